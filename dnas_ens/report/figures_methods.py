"""Figures that set methods beside each other: cost, corrupted images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from dnas_ens.figures import style
from dnas_ens.report import canvas
from dnas_ens.report.labels import LabelPlacer

#: Colour of each row of the corruption curves, by the beginning of its name.
ROW_COLOURS = {"ensemble": style.BLUE, "best single": style.VERMILION, "average member": style.MUTED_COLOUR}
SMALL_WIDTH, SMALL_HEIGHT, COLUMNS = 118.0, 74.0, 4


def draw_cost(
    seconds: ArrayLike,
    losses: ArrayLike,
    *,
    labels: Sequence[str],
    ours: Sequence[bool],
    intervals: Sequence[tuple[float, float] | None] = (),
) -> Figure:
    """Draw calibrated NLL against training cost, a numbered point a method, with the frontier of the best.

    Args:
        seconds: P costs, above 0.
        losses: P calibrated NLLs.
        labels: What stands beside each point.
        ours: Which points are this run's own.
        intervals: An interval of the loss or None for each point; empty for none at all.
    """
    cost, loss = np.asarray(seconds, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    width = 2 * canvas.WIDTH - 40
    figure, axis = canvas.panel(
        x_label="CPU seconds of training, search included",
        y_label="calibrated NLL, nats",
        width=width,
        height=290,
    )
    axis.grid(visible=True, axis="x", color=style.GRID_COLOUR, linewidth=0.8)
    frontier = frontier_of(cost, loss)
    axis.step(
        cost[frontier], loss[frontier], where="post", color=style.LINE_COLOUR, linewidth=1.2, gid="frontier"
    )
    for index, interval in enumerate(intervals):
        if interval is not None:
            axis.vlines(
                cost[index], *interval, color=style.BLUE if ours[index] else style.LINE_COLOUR, linewidth=1
            )
    for mine, colour in ((False, style.MUTED_COLOUR), (True, style.BLUE)):
        chosen = np.asarray(ours, dtype=bool) == mine
        axis.scatter(
            cost[chosen], loss[chosen], s=46 if mine else 34, color=colour, edgecolor="white", zorder=3 + mine
        )
    low, high = float(cost.min()), float(cost.max())
    if high > 1.6 * low:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(_round_ticks(low * 0.9, high * 1.15)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(low * 0.9, high * 1.15)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=canvas.STEPS))
    axis.margins(y=0.1)
    placer = LabelPlacer(axis, np.column_stack([cost, loss]))
    for index in sorted(range(len(labels)), key=lambda each: (not ours[each], each not in frontier)):
        half = style.text_width(labels[index] or " ", canvas.TEXT, bold=ours[index]) / 2
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


def draw_corruptions(
    rows: Sequence[Mapping[str, Any]], metric: str, *, y_label: str, clean: Mapping[str, float] | None = None
) -> Figure:
    """Draw a metric against severity, the mean over corruptions, a line a predictor.

    Args:
        rows: With corruption, severity, row and the metric.
        metric: "accuracy", shown in per cent, or one in nats.
        y_label: What it is.
        clean: The metric on untouched images by row, drawn as severity 0.
    """
    figure, axis = canvas.panel(x_label="severity", y_label=y_label, right=92)
    factor = 100.0 if metric == "accuracy" else 1.0
    ends: dict[str, float] = {}
    for name in _ordered(rows):
        curve = {
            **({0: clean[name]} if clean and name in clean else {}),
            **mean_by_severity(rows, name, metric),
        }
        values = [factor * value for value in curve.values()]
        colour = row_colour(name)
        axis.plot(
            list(curve), values, color=colour, marker="o", markersize=5, linewidth=1.8, gid=f"row-{name}"
        )
        axis.lines[-1].set(markeredgecolor="white", markeredgewidth=0.8)
        ends[name] = values[-1]
    axis.margins(y=0.08)
    axis.set_xlim(-0.15 if clean else 0.85, 5.1)
    axis.xaxis.set_major_locator(FixedLocator(range(0 if clean else 1, 6)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "none" if value == 0 else f"{value:.0f}"))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=canvas.STEPS))
    low, high = axis.get_ylim()
    gap = 13 / (canvas.HEIGHT - canvas.TOP - canvas.BOTTOM) * (high - low)
    for name, height in zip(ends, canvas.spread(list(ends.values()), gap), strict=True):
        canvas.write(axis, name, (5.0, height), offset=(8, 0), colour=row_colour(name))
    return figure


def draw_each_corruption(rows: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> Figure:
    """Draw a metric against severity, a small panel a corruption, all on one scale; see `draw_corruptions`."""
    names = list(dict.fromkeys(str(row["corruption"]) for row in rows))
    num_rows = math.ceil(len(names) / COLUMNS)
    left, bottom, head, gap = 36.0, 26.0, 20.0, 12.0
    width = left + COLUMNS * (SMALL_WIDTH + gap)
    height = num_rows * (SMALL_HEIGHT + head + gap) + bottom
    figure = style.new_figure(width, height)
    factor = 100.0 if metric == "accuracy" else 1.0
    values = [factor * float(row[metric]) for row in rows]
    margin = 0.06 * max(max(values) - min(values), 1e-6)
    for index, corruption in enumerate(names):
        line, column = divmod(index, COLUMNS)
        top = height - line * (SMALL_HEIGHT + head + gap) - head
        place = (left + column * (SMALL_WIDTH + gap), top - SMALL_HEIGHT, SMALL_WIDTH, SMALL_HEIGHT)
        axis = canvas.add_axis(figure, place)
        canvas.style_axis(axis)
        chosen = [row for row in rows if row["corruption"] == corruption]
        for name in _ordered(rows):
            curve = mean_by_severity(chosen, name, metric)
            axis.plot(
                list(curve),
                [factor * value for value in curve.values()],
                color=row_colour(name),
                linewidth=1.6,
            )
        axis.set_ylim(min(values) - margin, max(values) + margin)
        axis.set_xlim(0.9, 5.1)
        axis.xaxis.set_major_locator(FixedLocator(range(1, 6)))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=canvas.STEPS))
        lowest = index + COLUMNS >= len(names)
        axis.tick_params(labelleft=column == 0, labelbottom=lowest, labelsize=8.5)
        canvas.write(
            axis,
            corruption.rpartition("/")[2].replace("_", " "),
            (0.9, max(values) + margin),
            offset=(0, 8),
            size=canvas.TEXT,
        )
    return figure


def mean_by_severity(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> dict[int, float]:
    """Mean of a metric over corruptions by rising severity, of one predictor."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["row"] == name:
            found.setdefault(int(row["severity"]), []).append(float(row[metric]))
    return {severity: float(np.mean(found[severity])) for severity in sorted(found)}


def row_colour(name: str) -> str:
    """Colour of a predictor in all of these figures."""
    return next((colour for start, colour in ROW_COLOURS.items() if name.startswith(start)), style.PURPLE)


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The predictors, the ensemble last, on top of the others."""
    return sorted(
        dict.fromkeys(str(row["row"]) for row in rows), key=lambda name: name.startswith("ensemble")
    )
