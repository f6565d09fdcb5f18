"""Sentences, tables and the picture of what was found between the weights of networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.parameter_evolution.evolving import KINDS, Study
from studies.report import markdown_table

PUBLISHED = {
    "network 1": "63.23",
    "network 2": "63.42",
    "evolved, two networks": "63.35",
    "mean of predictions, two": "64.92",
}


def published_table(records: Sequence[dict[str, Any]]) -> str:
    """Return the published accuracies beside ours as Markdown."""
    means = {
        row["name"]: 100 * float(np.mean([record["rows"][index]["accuracy"] for record in records]))
        for index, row in enumerate(records[0]["rows"])
    }
    rows = [
        [name, PUBLISHED.get(name, ""), *(f"{means[f'{kind}: {name}']:.2f}" for kind in KINDS)]
        for name in (name.split(": ")[1] for name in means if name.startswith(KINDS[0]))
    ]
    return markdown_table(["accuracy %", "published", *(f"ours, {kind}" for kind in KINDS)], rows)


def found_sentences(study: Study, records: Sequence[dict[str, Any]]) -> str:
    """Say what the evolutions found: e, the coefficients' spread, the barrier."""
    from dnas_ens.metrics.significance import mean_and_deviation

    lines = []
    for kind in KINDS:
        rows = {
            name: [
                next(row for row in record["rows"] if row["name"] == f"{kind}: {name}") for record in records
            ]
            for name in ("evolved, two networks", f"evolved, simplex of {study.networks}")
        }
        line, simplex = rows.values()
        barrier = mean_and_deviation([record["kinds"][kind]["barrier"] for record in records], digits=4)
        shares = ", ".join(f"{row['coefficients'][0]:.2f}" for row in line)
        largest = ", ".join(f"{max(row['coefficients']):.2f}" for row in simplex)
        line_count, simplex_count = (
            ", ".join(str(row["evaluations"]) for row in of_kind) for of_kind in (line, simplex)
        )
        lines.append(
            f"- {kind}: the barrier of NLL on the line is {barrier} nats; e was found at {shares} in {line_count} "
            f"evaluations; the largest coefficient on the simplex is {largest} in {simplex_count} evaluations.\n"
        )
    return "".join(lines)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy and NLL on val over e, a column a kind of networks, a colour a seed."""
    from matplotlib.lines import Line2D

    from dnas_ens.figures.style import CYCLE, MUTED_COLOUR, font, new_figure, style_axis

    figure = new_figure(720, 470)
    axes = figure.subplots(2, len(KINDS), sharex=True, squeeze=False)
    for column, kind in enumerate(KINDS):
        for position, record in enumerate(records):
            found, colour = record["kinds"][kind], CYCLE[position % len(CYCLE)]
            share, nll, accuracy = found["evolved"]
            for axis, values, point, mean in (
                (axes[0, column], 100 * np.array(found["accuracy"]), 100 * accuracy, 1),
                (axes[1, column], np.array(found["nll"]), nll, 0),
            ):
                level = found["mean_of_predictions"][mean] * (100 if mean else 1)
                axis.plot(found["e"], values, color=colour, linewidth=1.5)
                axis.axhline(level, color=colour, linestyle=":", linewidth=1.2)
                axis.plot(share, point, "*", color=colour, markersize=11, markeredgecolor="white", zorder=3)
        every = [value for record in records for value in record["kinds"][kind]["nll"]]
        # NLLs of a barrier differ by factors.
        if max(every) > 10 * min(every):
            axes[1, column].set_yscale("log")
            axes[1, column].yaxis.set_major_formatter("{x:g}")
        style_axis(axes[0, column], y_label="val accuracy, %" if column == 0 else "")
        style_axis(
            axes[1, column],
            x_label="e, share of the first network",
            y_label="val NLL, nats" if column == 0 else "",
        )
        barrier = np.mean([record["kinds"][kind]["barrier"] for record in records])
        axes[0, column].set_title(
            f"{'independent networks' if column == 0 else 'two snapshots of one training'}\n"
            f"barrier {barrier:.3f} nats",
            fontproperties=font(10, bold=True),
            loc="left",
        )
    handles = [
        Line2D([], [], color=MUTED_COLOUR, linewidth=1.5, label="one network, weights averaged"),
        Line2D([], [], color=MUTED_COLOUR, linestyle="", marker="*", markersize=10, label="evolved e"),
        Line2D([], [], color=MUTED_COLOUR, linestyle=":", label="mean of the two networks' predictions"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, prop=font(9))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
