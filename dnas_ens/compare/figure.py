"""The frontier as a figure: calibrated NLL against total training cost, one line a method, each with its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from dnas_ens.compare.frontier import frontier
from dnas_ens.compare.methods.comparison import Result
from dnas_ens.figures import style
from dnas_ens.figures.style import spread as spread_in_order

#: Points, of the labels beside the lines.
LABEL_SIZE, LABEL_GAP = 8.5, 12.5
WIDTH, HEIGHT = 760, 470
LEFT, BOTTOM, TOP = 0.09, 0.12, 0.93
#: Of the lines after the first, as often as the colours are used up.
STYLES = ("-", (0, (4, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
#: Between the axis and its labels, and between them and the edge.
LEADER, MARGIN = 16, 10


def plot_frontiers(
    results: Sequence[Sequence[Result]], *, budgets: Mapping[str, float], title: str, path: Path
) -> None:
    """Draw the frontiers of methods and write them as PNG.

    Args:
        results: The results of every seed, the same rows in the same order, ours first.
        budgets: Total costs that are compared, means over seeds, by the words their marks have.
    """
    lines = {
        result.label: frontier([of_seed[index].options for of_seed in results])
        for index, result in enumerate(results[0])
        if result.options
    }
    lines = {label: line for label, line in lines.items() if line[0]}
    # The colour of ours is no other's.
    first, *others = style.CYCLE
    colours = [first, *(others[index % len(others)] for index in range(len(lines) - 1))]
    figure = style.new_figure(WIDTH, HEIGHT)
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_yscale("log")
    right = 1.15 * max(*budgets.values(), *(costs[-1] for costs, _ in lines.values()))
    for index, ((costs, heights), colour) in enumerate(zip(lines.values(), colours, strict=True)):
        axis.step(
            costs,
            heights,
            where="post",
            color=colour,
            linewidth=1.5 if index else 2.6,
            linestyle=STYLES[(index - 1) // len(others) % len(STYLES)] if index else STYLES[0],
            zorder=3 - index / 50,
        )
        axis.plot(costs[0], heights[0], "o", color=colour, markersize=4.5, zorder=3)
        # Nothing more was trained, so a larger budget changes nothing.
        axis.plot([costs[-1], right], [heights[-1]] * 2, color=colour, linewidth=0.8, linestyle=":", zorder=2)
        axis.plot(costs[-1], heights[-1], "|", color=colour, markersize=7, zorder=3)
    for row, (words, budget) in enumerate(budgets.items()):
        axis.axvline(budget, color=style.MUTED_COLOUR, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        # One below the other, because costs may be close.
        axis.annotate(
            words,
            (budget, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2 - LABEL_GAP * row),
            textcoords="offset points",
            va="top",
            color=style.MUTED_COLOUR,
            fontproperties=style.font(LABEL_SIZE),
        )
    axis.set_xlim(right=right)
    style.style_axis(axis, x_label="total CPU seconds, searches included", y_label="calibrated NLL on test, nats")
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        direction.set_major_formatter("{x:g}")
        direction.set_minor_locator(NullLocator())
    # A folder's name may hold what would be read as a formula.
    axis.set_title(
        title.replace("$", r"\$"), fontproperties=style.font(10, bold=True), loc="left", color=style.TEXT_COLOUR
    )
    widest = max(style.text_width(label, LABEL_SIZE, bold=True) for label in lines)
    edge = WIDTH - MARGIN - LEADER - widest
    figure.subplots_adjust(left=LEFT, right=edge / WIDTH, bottom=BOTTOM, top=TOP)
    figure.canvas.draw()
    # In points from the lower edge of the figure.
    ends = [
        float(axis.transData.transform((right, heights[-1]))[1]) / (figure.dpi / 72) for _, heights in lines.values()
    ]
    places = spread(ends, LABEL_GAP, low=BOTTOM * HEIGHT, high=TOP * HEIGHT)
    for index, (label, height, place) in enumerate(zip(lines, ends, places, strict=True)):
        axis.annotate(
            label,
            (edge, height),
            xycoords="figure points",
            xytext=(edge + LEADER, place),
            textcoords="figure points",
            va="center",
            color=colours[index],
            fontproperties=style.font(LABEL_SIZE, bold=index == 0),
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),
                "color": colours[index],
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
    figure.savefig(path, dpi=110)


def spread(heights: Sequence[float], gap: float, *, low: float, high: float) -> list[float]:
    """Move labels apart until none is nearer than a gap to the next, keeping their order and staying near.

    They stay above ``low``, and below ``high`` unless there are too many of them.
    """
    order = np.argsort(heights, kind="stable")
    offsets = gap * np.arange(len(order))
    placed = np.array(spread_in_order([heights[index] for index in order], [gap] * (len(order) - 1)))
    bounded = np.clip(placed - offsets, low, max(low, high - offsets[-1])) + offsets
    return [float(place) for place in bounded[np.argsort(order)]]
