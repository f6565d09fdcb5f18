"""HTML tables of the report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dnas_ens.evaluate.classes import ClassFigures
from dnas_ens.report.measures import Interval, Row
from dnas_ens.report.wording import interval

GLYPH_WIDTH, GLYPH_HEIGHT, GLYPH_MARGIN = 128.0, 14.0, 5.0


def table(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, label: str) -> str:
    """Return a table in a box of its own that scrolls where the page is narrow.

    Args:
        headings: HTML of the column heads.
        rows: Class of the row, and HTML of its cells; the first is the row's head.
        label: What the table holds, for readers who cannot see it.
    """
    head = "".join(f'<th scope="col">{heading}</th>' if heading else "<td></td>" for heading in headings)
    body = "".join(
        f'<tr class="{kind or "plain"}"><th scope="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>\n"
        for kind, cells in rows
    )
    return (
        f'<div class="table" role="region" aria-label="{escape(label)}" tabindex="0">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def results_table(rows: Sequence[Row]) -> str:
    """Return the table of members, best single, average and ensemble, with intervals."""
    ends = [end for row in rows for end in row.calibrated_nll_interval if not math.isnan(end)]
    values = [float(row.values["calibrated_nll"]) for row in rows]
    scale = (min([*ends, *values]), max([*ends, *values]))
    headings = (
        "",
        "accuracy, %",
        "calibrated NLL, nats",
        f'<span class="scale"><span>{scale[0]:.3f}</span><span>{scale[1]:.3f}</span></span>',
        "NLL",
        "Brier",
        "ECE",
        "T",
        "parameters",
    )
    body = []
    for row in rows:
        found = row.values
        parameters, temperature = found.get("parameters"), found.get("temperature")
        cells = [
            escape(_row_name(row)),
            _with_interval(
                100 * found["accuracy"], row.accuracy_interval, digits=2, factor=100.0, interval_digits=1
            ),
            _with_interval(found["calibrated_nll"], row.calibrated_nll_interval, digits=4, interval_digits=3),
            _glyph(found["calibrated_nll"], row.calibrated_nll_interval, scale),
            f"{found['nll']:.4f}",
            f"{found['brier']:.4f}",
            f"{found['ece15']:.4f}",
            "" if temperature is None else f"{temperature:.2f}",
            "" if parameters is None else f"{parameters:,}",
        ]
        body.append((row.role, cells))
    return table(headings, body, label="Results on the test images")


def classes_table(figures: ClassFigures) -> str:
    """Return the table of classes with their recall and precision."""

    def shown(share: float) -> str:
        return "–" if math.isnan(share) else f"{100 * share:.1f}"

    body = [
        ("", [escape(row.name), f"{row.num_images:,}", shown(row.recall), shown(row.precision)])
        for row in figures.shown
    ]
    headings = ("", "test images", "recall, %", "precision, %")
    return table(headings, body, label="Recall and precision of each class")


def confusion_table(figures: ClassFigures) -> str:
    """Return the confusion matrix, a row a true class."""
    names = [escape(row.name) for row in figures.rows]
    body = [
        ("", [name, *(f"{count:,}" if count else "" for count in counts)])
        for name, counts in zip(names, figures.confusion.tolist(), strict=True)
    ]
    return table(("", *names), body, label="Confusion matrix: true classes in rows, answers in columns")


def _row_name(row: Row) -> str:
    name = str(row.values["name"])
    member = re.search(r"member \d+", name)
    return f"best single: {member[0]}" if row.role == "best" and member else name


def _with_interval(
    value: float, ends: Interval, *, digits: int, interval_digits: int, factor: float = 1.0
) -> str:
    below = interval(ends, digits=interval_digits, factor=factor)
    return f"{value:.{digits}f}" + (f"<small>{below}</small>" if below else "")


def _glyph(value: float, ends: Interval, scale: tuple[float, float]) -> str:
    """Return a dot with its interval on a scale that all rows share."""
    span = max(scale[1] - scale[0], 1e-12)

    def place(of: float) -> float:
        return GLYPH_MARGIN + (of - scale[0]) / span * (GLYPH_WIDTH - 2 * GLYPH_MARGIN)

    middle = GLYPH_HEIGHT / 2
    said = f"{value:.4f}"
    line = ""
    if not math.isnan(ends[0]):
        said += f", interval {interval(ends, digits=4)}"
        line = f'<line x1="{place(ends[0]):.1f}" x2="{place(ends[1]):.1f}" y1="{middle}" y2="{middle}"/>'
    return (
        f'<svg class="glyph" role="img" aria-label="{said}" width="{GLYPH_WIDTH:.0f}" height="{GLYPH_HEIGHT:.0f}" '
        f'viewBox="0 0 {GLYPH_WIDTH:.0f} {GLYPH_HEIGHT:.0f}">{line}'
        f'<circle cx="{place(value):.1f}" cy="{middle}" r="3.6"/></svg>'
    )


def comparison_table(rows: Sequence[Mapping[str, Any]], ours: int | None) -> str:
    """Return the table of compared methods, numbered as in the figure of cost."""
    optional = [
        name for name in ("disagreement", "parameters", "networks", "cpu_seconds") if _any(rows, name)
    ]
    titles = {
        "disagreement": "disagreement, %",
        "parameters": "parameters",
        "networks": "networks trained",
        "cpu_seconds": "CPU seconds",
    }
    headings = ("", "accuracy, %", "calibrated NLL, nats", *(titles[name] for name in optional))
    lowest = min(float(row["calibrated_nll"]) for row in rows)
    body = []
    for index, row in enumerate(rows):
        loss = f"{row['calibrated_nll']:.4f}"
        if float(row["calibrated_nll"]) == lowest:
            loss = f"<b>{loss}</b>"
        if row.get("interval"):
            loss += f"<small>{interval(tuple(row['interval']), digits=3)}</small>"
        name = f'<span class="numbered"><span>{index + 1}</span>{escape(str(row["name"]))}</span>'
        cells = [
            name,
            f"{100 * row['accuracy']:.2f}",
            loss,
            *(_optional_cell(name, row) for name in optional),
        ]
        body.append(("ensemble" if index == ours else "", cells))
    return table(headings, body, label="Methods compared on the same test images")


def _any(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def _optional_cell(name: str, row: Mapping[str, Any]) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name == "disagreement":
        return f"{100 * value:.2f}" if value else "–"  # one network has none
    return f"{value:,.0f}"


def out_of_distribution_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of how well uncertainty tells images of other data from the run's own."""
    informed = _any(rows, "auroc_mutual_information")
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
