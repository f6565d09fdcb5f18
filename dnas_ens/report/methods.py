"""The section that sets the run beside other methods: their table, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from dnas_ens.figures import style
from dnas_ens.report import panels
from dnas_ens.report.parts import NARROW, Picture, Section, interval, table
from dnas_ens.report.run_files import RunFiles

#: Letters of a method's name beside its point.
MAX_LABEL = 46
#: Columns that are shown where any row has them.
OPTIONAL = {
    "disagreement": "disagreement, %",
    "parameters": "parameters",
    "networks": "networks trained",
    "cpu_seconds": "CPU seconds",
}


def our_row(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Position of this run's own ensemble among compared methods; None where it is not there."""
    return next((index for index, row in enumerate(rows) if str(row["name"]).startswith("ours")), None)


def comparison_section(files: RunFiles) -> Section | None:
    """Other methods on the same test images, and what they cost."""
    rows = files.comparison
    if not rows:
        return None
    ours, pictures = our_row(rows), []
    timed = [index for index, row in enumerate(rows) if row.get("cpu_seconds")]
    if len(timed) > 1:
        costs = np.array([float(rows[index]["cpu_seconds"]) for index in timed])
        losses = np.array([float(rows[index]["calibrated_nll"]) for index in timed])
        unbeaten = {timed[place] for place in frontier_of(costs, losses)}
        figure = draw_cost(
            costs,
            losses,
            labels=[_label(rows[index], index, ours=ours, named=index in unbeaten) for index in timed],
            ours=[index == ours for index in timed],
            intervals=[tuple(rows[index]["interval"]) if rows[index].get("interval") else None for index in timed],
        )
        pictures.append(
            Picture(
                name="nll-by-cost",
                title="Calibrated NLL against cost",
                caption="Numbers are as in the table. Down is better, left is cheaper; the line joins the methods "
                "that no cheaper one beats. A cost holds all the training a row needs: the search where its cells "
                "come from it, and networks that were trained and not chosen.",
                description=f"Scatter plot of calibrated NLL against CPU seconds of training for {len(timed)} methods.",
                figure=figure,
                shape="wide",
            )
        )
    notes = "All on the same test images. Bold is the lowest calibrated NLL." + (
        f" Below a figure is its 95{NARROW}% interval over test images."
        if any(r.get("interval") for r in rows)
        else " One training each: differences well within the intervals above may be luck."
    )
    return Section(
        name="comparison",
        title="Beside other methods",
        text=_comparison_table(rows, ours) + f'<p class="note">{notes}</p>\n',
        pictures=pictures,
    )


def _label(row: Mapping[str, Any], index: int, *, ours: int | None, named: bool) -> str:
    """A point's number in the table, with its name where it is one to look at."""
    if index == ours:
        return f"{index + 1} ours"
    if not named:
        return str(index + 1)
    name = str(row["name"]).split(" (")[0]
    return f"{index + 1} {name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + '…'}"


def _comparison_table(rows: Sequence[Mapping[str, Any]], ours: int | None) -> str:
    """Return the table of compared methods, numbered as in the figure of cost."""
    optional = [name for name in OPTIONAL if any(row.get(name) is not None for row in rows)]
    headings = ("", "accuracy, %", "calibrated NLL, nats", *(OPTIONAL[name] for name in optional))
    lowest = min(float(row["calibrated_nll"]) for row in rows)
    body = []
    for index, row in enumerate(rows):
        loss = f"{row['calibrated_nll']:.4f}"
        if float(row["calibrated_nll"]) == lowest:
            loss = f"<b>{loss}</b>"
        if row.get("interval"):
            loss += f"<small>{interval(tuple(row['interval']), digits=3)}</small>"
        numbered = f'<span class="numbered"><span>{index + 1}</span>{escape(str(row["name"]))}</span>'
        extra = (_optional_cell(name, row.get(name)) for name in optional)
        cells = [numbered, f"{100 * row['accuracy']:.2f}", loss, *extra]
        body.append(("ensemble" if index == ours else "", cells))
    return table(headings, body, label="Methods compared on the same test images")


def _optional_cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "disagreement":
        return f"{100 * value:.2f}" if value else "–"  # one network has none
    return f"{value:,.0f}"


def draw_cost(
    seconds: ArrayLike,
    losses: ArrayLike,
    *,
    labels: Sequence[str],
    ours: Sequence[bool],
    intervals: Sequence[tuple[float, float] | None] = (),
    x_label: str = "CPU seconds of training, search included",
    y_label: str = "calibrated NLL, nats",
) -> Figure:
    """Draw a loss against a cost, a labelled point a method, with the frontier of the best.

    Args:
        seconds: P costs, above 0.
        losses: P losses.
        labels: Label of each point; empty for none.
        ours: Which points are this run's own.
        intervals: An interval of the loss or None for each point; empty for none at all.
    """
    cost, loss = np.asarray(seconds, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    width = 2 * panels.WIDTH - 40
    figure, axis = panels.panel(x_label=x_label, y_label=y_label, width=width, height=290)
    axis.grid(visible=True, axis="x", color=style.GRID_COLOUR, linewidth=0.8)
    frontier = frontier_of(cost, loss)
    axis.step(cost[frontier], loss[frontier], where="post", color=style.LINE_COLOUR, linewidth=1.2, gid="frontier")
    for index, ends in enumerate(intervals):
        if ends is not None:
            axis.vlines(cost[index], *ends, color=style.BLUE if ours[index] else style.LINE_COLOUR, linewidth=1)
    for mine, colour in ((False, style.MUTED_COLOUR), (True, style.BLUE)):
        chosen = np.asarray(ours, dtype=bool) == mine
        axis.scatter(cost[chosen], loss[chosen], s=46 if mine else 34, color=colour, edgecolor="white", zorder=3 + mine)
    low, high = float(cost.min()), float(cost.max())
    if high > 1.6 * low:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(_round_ticks(low * 0.9, high * 1.15)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(low * 0.9, high * 1.15)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=panels.STEPS))
    axis.margins(y=0.1)
    placer = panels.LabelPlacer(axis, np.column_stack([cost, loss]))
    for index in sorted(
        filter(labels.__getitem__, range(len(labels))), key=lambda each: (not ours[each], each not in frontier)
    ):
        half = panels.half_width(labels[index], bold=ours[index])
        beside = [(half + 7, 0.0), (-half - 7, 0.0), (0.0, 11.0), (0.0, -11.0)]
        above = [(half - 4, 11.0), (4 - half, 11.0), (half - 4, -12.0), (4 - half, -12.0)]
        placer.add(
            labels[index],
            (float(cost[index]), float(loss[index])),
            above if index in frontier else beside + above,  # off the frontier's line
            colour=style.BLUE if ours[index] else style.TEXT_COLOUR,
            bold=ours[index],
        )
    return figure


def frontier_of(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Positions of the points that no cheaper point beats, by rising cost."""
    best, kept = math.inf, []
    for index in np.lexsort((loss, cost)):
        if loss[index] < best:
            best = float(loss[index])
            kept.append(int(index))
    return kept


def _round_ticks(low: float, high: float) -> list[float]:
    """Return round values from low to high: 1, 2, 5 and their tens; 1, 1.5, 2, 3, 5, 7 over a short stretch."""
    steps = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 5, 7)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
