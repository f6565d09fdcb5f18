"""Figures of how good the predictions are: reliability, ensemble size, risk against coverage."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from dnas_ens.figures import style
from dnas_ens.report import canvas
from dnas_ens.report.measures import NUM_BINS, Reliability

HISTOGRAM_HEIGHT, PANEL_GAP = 46.0, 12.0


def draw_reliability(bins: Reliability, *, colour: str = style.BLUE) -> Figure:
    """Draw accuracy against confidence, each bin with its Wilson interval, above a histogram of confidence.

    Args:
        bins: From `dnas_ens.report.measures.reliability`.
        colour: Of the points.
    """
    height = canvas.HEIGHT + 40
    above = canvas.BOTTOM + HISTOGRAM_HEIGHT + PANEL_GAP
    figure, axis = canvas.panel(x_label="", y_label="images right", height=height, bottom=above)
    across = canvas.WIDTH - canvas.LEFT - canvas.RIGHT
    below = canvas.add_axis(figure, (canvas.LEFT, canvas.BOTTOM, across, HISTOGRAM_HEIGHT))
    canvas.style_axis(below, x_label="stated probability of the answer", y_label="images")

    axis.plot([0, 1], [0, 1], color=style.LINE_COLOUR, linestyle="--", linewidth=1.2, gid="diagonal")
    axis.vlines(bins.confidence, bins.low, bins.high, color=colour, linewidth=1.2, alpha=0.4)
    areas = 14 + 90 * np.sqrt(bins.counts / bins.counts.max())
    axis.scatter(bins.confidence, bins.accuracy, s=areas, color=colour, edgecolor="white", zorder=3)
    canvas.write(axis, "claims too little", (0.03, 0.96), colour=style.MUTED_COLOUR, size=8.5)
    canvas.write(axis, "claims too much", (0.985, 0.05), colour=style.MUTED_COLOUR, size=8.5, ha="right")

    edges = np.linspace(0, 1, NUM_BINS + 1)
    below.bar(edges[:-1], bins.histogram, width=0.9 / NUM_BINS, align="edge", color=colour, alpha=0.45)
    tallest = int(bins.histogram.argmax())
    height_of_tallest = float(bins.histogram[tallest])
    above_it = (float(edges[tallest] + edges[tallest + 1]) / 2, height_of_tallest)
    share = f"{100 * height_of_tallest:.0f} %"
    canvas.write(below, share, above_it, offset=(0, 7), ha="center", size=8.5, colour=style.MUTED_COLOUR)
    below.set_ylim(0, 1.4 * height_of_tallest)
    below.set_yticks([])
    axis.set_ylim(-0.03, 1.03)
    axis.tick_params(labelbottom=False)
    for each in (axis, below):
        each.set_xlim(-0.01, 1.02)
        each.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        each.yaxis.set_label_coords(-38 / across, 0.5)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return figure


def draw_by_size(
    sizes: ArrayLike, mean: ArrayLike, low: ArrayLike, high: ArrayLike, *, y_label: str, percent: bool = False
) -> Figure:
    """Draw a figure of merit against the number of members, with a band around it.

    Args:
        sizes: S numbers of members.
        mean: S means over subsets.
        low: S lower ends of the band.
        high: S upper ends.
        y_label: What it is, with its unit.
        percent: Whether the values are shares to be shown in per cent.
    """
    factor = 100.0 if percent else 1.0
    counts = np.asarray(sizes)
    middle, bottom, top = (factor * np.asarray(values, dtype=np.float64) for values in (mean, low, high))
    figure, axis = canvas.panel(x_label="members", y_label=y_label, right=44)
    axis.fill_between(counts, bottom, top, color=style.BLUE, alpha=0.14, linewidth=0)
    axis.plot(counts, middle, color=style.BLUE, linewidth=1.8, marker="o", markersize=5)
    axis.lines[0].set(markeredgecolor="white", markeredgewidth=0.8, gid="mean")
    decimals = 1 if percent else 3
    for place in {0, len(counts) - 1}:
        value = f"{middle[place]:.{decimals}f}" + (" %" if percent else "")
        last = place == len(counts) - 1
        canvas.write(
            axis,
            value,
            (float(counts[place]), float(middle[place])),
            # The first stands on the side that the line leaves free.
            offset=(8, 0) if last else (7, 9 if middle[-1] < middle[0] else -9),
            colour=style.BLUE,
            bold=last,
        )
    margin = 0.12 * max(float(top.max() - bottom.min()), 1e-6)
    axis.set_ylim(float(bottom.min()) - margin, float(top.max()) + margin)
    axis.set_xlim(float(counts[0]) - 0.25, float(counts[-1]) + 0.1)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=canvas.STEPS))
    return figure


def draw_risk_coverage(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, faint: int = 0) -> Figure:
    """Draw the error among answered images against the share answered, a line a predictor.

    Args:
        curves: Coverage and risk, in [0, 1], by name; the last is the one to look at.
        faint: How many of the first are drawn as a background, with one name for all.
    """
    figure, axis = canvas.panel(x_label="images answered, surest first", y_label="wrong among them", right=70)
    ends, colours = {}, (style.VERMILION, style.BLUE)
    named = list(curves)[faint:]
    highest, start = 0.0, _first_error(curves)
    for index, (name, (coverage, risk)) in enumerate(curves.items()):
        x, y = np.asarray(coverage), np.asarray(risk)
        highest = max(highest, float(y[x >= start].max()))
        if index < faint:
            axis.plot(x, y, color=style.LINE_COLOUR, linewidth=0.9, alpha=0.7, gid=name)
            continue
        colour = colours[(named.index(name) + 2 - len(named)) % 2]
        axis.plot(x, y, color=colour, linewidth=1.8, gid=name)
        ends[name] = (float(y[-1]), colour)
    top = max(highest * 1.08, 1e-3)
    gap = 13 / (canvas.HEIGHT - canvas.TOP - canvas.BOTTOM) * top
    heights = canvas.spread([height for height, _ in ends.values()], gap)
    for (name, (_, colour)), height in zip(ends.items(), heights, strict=True):
        canvas.write(axis, name, (1.0, height), offset=(6, 0), colour=colour)
    axis.set_xlim(start - 0.01 * (1 - start), 1.0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=canvas.STEPS))
    axis.set_ylim(-0.02 * top, top)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    decimals = 0 if top > 0.04 else 1
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=" %"))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=canvas.STEPS))
    return figure


def _first_error(curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> float:
    """Return where to begin: a round coverage before the first error, from 0.1, where single images weigh less."""
    covered = [np.asarray(coverage)[np.asarray(risk) > 0] for coverage, risk in curves.values()]
    first = min((float(each[0]) for each in covered if len(each)), default=1.0)
    return float(np.clip(np.floor(10 * first - 0.5) / 10, 0.1, 0.8))
