"""The section on changed images: corrupted test images, and images of other data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from dnas_ens.evaluate.shift import CIFAR10_C
from dnas_ens.figures import style
from dnas_ens.report import panels
from dnas_ens.report.parts import Picture, Section, count, percent, table
from dnas_ens.report.run_files import RunFiles

#: Colour of each row of the corruption curves, by the beginning of its name.
ROW_COLOURS = {"ensemble": style.BLUE, "best single": style.VERMILION, "average member": style.MUTED_COLOUR}
SMALL_WIDTH, SMALL_HEIGHT, COLUMNS = 118.0, 74.0, 4


def shift_section(files: RunFiles) -> Section | None:
    """Corrupted test images, and images of other data."""
    rows, others = files.corruptions, files.out_of_distribution
    if not rows and not others:
        return None
    pictures, text, below = [], "", ""
    if rows:
        kinds = len({row["corruption"] for row in rows})
        severities = ", ".join(str(severity) for severity in sorted({row["severity"] for row in rows}))
        text = (
            f"<p>The test images spoilt in {count(kinds, 'way')} at severity {severities}; temperatures stay as they "
            "were fitted on clean validation images.</p>"
        )
        public = [row for row in rows if str(row["corruption"]).startswith(CIFAR10_C)]
        pictures = _corruption_pictures(files, [row for row in rows if row not in public])
        pictures += _corruption_pictures(files, public, suffix="-public", source=" of the public CIFAR-10-C")
    if others:
        said = (
            "Images of other data, mixed with the test images: how well uncertainty tells them apart. AUROC is the "
            "chance that an image of the other data is the less sure one of a pair; 0.5 is guessing, 1 is perfect."
        )
        below = f"<h3>Images of other data</h3>\n<p>{said}</p>\n{_out_of_distribution_table(others)}"
    return Section(name="shift", title="What if the images change?", text=text, pictures=pictures, below=below)


def _corruption_pictures(
    files: RunFiles, rows: Sequence[Mapping[str, Any]], *, suffix: str = "", source: str = ""
) -> list[Picture]:
    """Curves of one family of corruptions; none where it has no rows."""
    if not rows:
        return []
    kinds = len({row["corruption"] for row in rows})
    clean = {
        metric: {
            name: float(row[metric])
            for name in dict.fromkeys(row["row"] for row in rows)
            for row in files.rows
            if str(row["name"]).startswith(name)
        }
        for metric in ("accuracy", "calibrated_nll")
    }
    name = next((row["row"] for row in rows if row["row"] == "ensemble"), rows[0]["row"])
    worst = mean_by_severity(rows, name, "accuracy")
    at = f"{percent(worst[max(worst)])} right at severity {max(worst)}"
    mean = f"Mean over {count(kinds, 'corruption')}{source}."
    pictures = [
        Picture(
            name=f"corruption-accuracy{suffix}",
            title="Accuracy",
            caption=f"{mean} The {escape(name)} gets {at}.",
            description=f"Accuracy against severity of corruption; {name}: {at}.",
            figure=_draw_mean(rows, "accuracy", y_label="accuracy, %", clean=clean["accuracy"]),
        ),
        Picture(
            name=f"corruption-nll{suffix}",
            title="Calibrated NLL",
            caption=f"{mean} Lower is better.",
            description="Calibrated NLL against severity of corruption, for the same predictors.",
            figure=_draw_mean(rows, "calibrated_nll", y_label="calibrated NLL, nats", clean=clean["calibrated_nll"]),
        ),
    ]
    if kinds > 1:
        pictures.append(
            Picture(
                name=f"corruption-each{suffix}",
                title=f"Accuracy under each corruption{source}",
                caption="Accuracy in % against severity; colours as above.",
                description=f"{kinds} small line charts of accuracy against severity, one a corruption.",
                figure=_draw_each(rows),
                shape="wide",
            )
        )
    return pictures


def _out_of_distribution_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of how well uncertainty tells images of other data from the run's own."""
    informed = any(row.get("auroc_mutual_information") is not None for row in rows)
    headings = ("", "images", "AUROC by entropy") + (("AUROC by mutual information",) if informed else ())
    body = []
    for row in rows:
        cells = [
            escape(f"{row['name']}, {row['row']}"),
            f"{row['num_images']:,}",
            f"{row['auroc_entropy']:.3f}",
        ]
        if informed:
            value = row.get("auroc_mutual_information")
            cells.append("–" if value is None else f"{value:.3f}")
        body.append(("ensemble" if row["row"] == "ensemble" else "", cells))
    return table(headings, body, label="Telling other images from the run's own")


def _draw_mean(rows: Sequence[Mapping[str, Any]], metric: str, *, y_label: str, clean: Mapping[str, float]) -> Figure:
    """Draw a metric against severity, the mean over corruptions, a line a predictor.

    Args:
        metric: "accuracy", shown in per cent, or one in nats.
        clean: The metric on untouched images by row, drawn as severity 0.
    """
    figure, axis = panels.panel(x_label="severity", y_label=y_label, right=92)
    factor = 100.0 if metric == "accuracy" else 1.0
    ends: dict[str, tuple[float, str]] = {}
    for name in _ordered(rows):
        curve = {
            **({0: clean[name]} if name in clean else {}),
            **mean_by_severity(rows, name, metric),
        }
        values = [factor * value for value in curve.values()]
        colour = _row_colour(name)
        axis.plot(list(curve), values, color=colour, marker="o", markersize=5, linewidth=1.8, gid=f"row-{name}")
        axis.lines[-1].set(markeredgecolor="white", markeredgewidth=0.8)
        ends[name] = (values[-1], colour)
    axis.margins(y=0.08)
    axis.set_xlim(-0.15 if clean else 0.85, 5.1)
    axis.xaxis.set_major_locator(FixedLocator(range(0 if clean else 1, 6)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "none" if value == 0 else f"{value:.0f}"))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=panels.STEPS))
    low, high = axis.get_ylim()
    panels.name_ends(axis, ends, x=5.0, offset=8, span=high - low)
    return figure


def _draw_each(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy against severity, a small panel a corruption, all on one scale; see `_draw_mean`."""
    names = list(dict.fromkeys(str(row["corruption"]) for row in rows))
    num_rows = math.ceil(len(names) / COLUMNS)
    left, bottom, head, gap = 36.0, 26.0, 20.0, 12.0
    width = left + COLUMNS * (SMALL_WIDTH + gap)
    height = num_rows * (SMALL_HEIGHT + head + gap) + bottom
    figure = style.new_figure(width, height)
    values = [100.0 * float(row["accuracy"]) for row in rows]
    margin = 0.06 * max(max(values) - min(values), 1e-6)
    for index, corruption in enumerate(names):
        line, column = divmod(index, COLUMNS)
        top = height - line * (SMALL_HEIGHT + head + gap) - head
        place = (left + column * (SMALL_WIDTH + gap), top - SMALL_HEIGHT, SMALL_WIDTH, SMALL_HEIGHT)
        axis = panels.add_axis(figure, place)
        panels.style_axis(axis)
        chosen = [row for row in rows if row["corruption"] == corruption]
        for name in _ordered(rows):
            curve = mean_by_severity(chosen, name, "accuracy")
            heights = [100.0 * value for value in curve.values()]
            axis.plot(list(curve), heights, color=_row_colour(name), linewidth=1.6)
        axis.set_ylim(min(values) - margin, max(values) + margin)
        axis.set_xlim(0.9, 5.1)
        axis.xaxis.set_major_locator(FixedLocator(range(1, 6)))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=panels.STEPS))
        lowest = index + COLUMNS >= len(names)
        axis.tick_params(labelleft=column == 0, labelbottom=lowest, labelsize=8.5)
        title = corruption.rpartition("/")[2].replace("_", " ")
        panels.write(axis, title, (0.9, max(values) + margin), offset=(0, 8))
    return figure


def mean_by_severity(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> dict[int, float]:
    """Mean of a metric over corruptions by rising severity, of one predictor."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["row"] == name:
            found.setdefault(int(row["severity"]), []).append(float(row[metric]))
    return {severity: float(np.mean(found[severity])) for severity in sorted(found)}


def _row_colour(name: str) -> str:
    """Colour of a predictor in all of these figures."""
    return next((colour for start, colour in ROW_COLOURS.items() if name.startswith(start)), style.PURPLE)


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The predictors, the ensemble last, on top of the others."""
    return sorted(dict.fromkeys(str(row["row"]) for row in rows), key=lambda name: name.startswith("ensemble"))
