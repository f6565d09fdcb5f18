"""Figures of how members differ: the disagreement heat map and the plane of predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from dnas_ens.figures import style
from dnas_ens.report import canvas
from dnas_ens.report.labels import LabelPlacer, around

MAX_NUMBERED = 12
MAX_COLOURED_CLASSES = 12
MAX_NAMED_ERRORS = 12
#: More points than this would make a vector picture heavy.
MAX_VECTOR_POINTS = 600
MAX_NAME = 14
CLASS_TEXT, ERROR_TEXT = 11.0, 8.5


def draw_disagreement(matrix: ArrayLike) -> Figure:
    """Draw the share of images on which two members answer differently, a square a pair.

    Shades are one colour at different opacity, so that they read on any background.

    Args:
        matrix: Symmetric (M, M), in [0, 1].
    """
    values = np.asarray(matrix, dtype=np.float64)
    num_members = len(values)
    size = canvas.HEIGHT
    figure = style.new_figure(canvas.WIDTH, size + 18)
    side = size - 34.0
    axis = canvas.add_axis(figure, (68, 34, side, side))
    canvas.style_axis(axis)
    axis.grid(visible=False)
    axis.spines["bottom"].set_visible(False)
    off_diagonal = values[~np.eye(num_members, dtype=bool)]
    largest = max(float(off_diagonal.max()) if len(off_diagonal) else 0.0, 1e-9)
    for row in range(num_members):
        for column in range(num_members):
            if row == column:
                axis.plot(column, row, marker=".", markersize=3, color=style.LINE_COLOUR)
                continue
            share = float(values[row, column])
            axis.bar(
                column,
                0.94,
                0.94,
                row - 0.47,
                color=style.BLUE,
                alpha=0.04 + 0.5 * share / largest,
                linewidth=0,
            )
            if num_members <= MAX_NUMBERED:
                text = f"{100 * share:.1f}"
                canvas.write(
                    axis,
                    text,
                    (column, row),
                    ha="center",
                    va="center_baseline",
                    size=TEXT_OF.get(num_members, 10.5),
                )
    axis.set_xlim(-0.5, num_members - 0.5)
    axis.set_ylim(num_members - 0.5, -0.5)
    numbered = num_members <= MAX_NUMBERED
    ticks = range(0, num_members, 1 if numbered else -(-num_members // MAX_NUMBERED))
    axis.set_xticks(ticks, [str(index) for index in ticks])
    axis.set_yticks(ticks, [f"member {index}" if numbered else str(index) for index in ticks])
    axis.tick_params(length=0)
    axis.set_xlabel("member", fontproperties=style.font(10), color=style.TEXT_COLOUR)
    return figure


#: Size of the numbers where there are many members.
TEXT_OF = {8: 9.5, 9: 9.0, 10: 8.5, 11: 8.0, 12: 7.5}


def draw_embedding(
    positions: ArrayLike, labels: NDArray, predicted: NDArray, classes: Sequence[str]
) -> Figure:
    """Draw images by the t-SNE of their predictions, coloured by their class, those answered wrongly crossed.

    Args:
        positions: (n, 2).
        labels: True classes (n,).
        predicted: Answered classes (n,).
        classes: K names.
    """
    points = np.asarray(positions, dtype=np.float64)
    wrong = labels != predicted
    figure = style.new_figure(canvas.WIDTH, canvas.HEIGHT + 18)
    axis = canvas.add_axis(figure, (10, 8, canvas.WIDTH - 20, canvas.HEIGHT + 2))
    axis.set_axis_off()
    rasterized = len(points) > MAX_VECTOR_POINTS
    coloured = len(classes) <= MAX_COLOURED_CLASSES
    palette = style.CYCLE[:-1]
    for index in range(len(classes)) if coloured else [0]:
        chosen = ~wrong & (labels == index) if coloured else ~wrong
        colour = palette[index % len(palette)] if coloured else style.BLUE
        axis.scatter(
            points[chosen, 0],
            points[chosen, 1],
            s=13,
            color=colour,
            alpha=0.6,
            linewidth=0,
            rasterized=rasterized,
            gid=f"class-{index}",
        )
    axis.scatter(
        points[wrong, 0], points[wrong, 1], s=34, marker="x", color=style.TEXT_COLOUR, linewidth=1.5, zorder=4
    )
    axis.margins(0.07)
    placer = LabelPlacer(axis, points, radius=2.0)
    if coloured:
        for index, name in enumerate(classes):
            if (labels == index).any():
                middle = np.median(points[labels == index], axis=0)
                text = _shortened(name)
                placer.add(
                    text,
                    (float(middle[0]), float(middle[1])),
                    around(text, size=CLASS_TEXT, bold=True, reach=(4, 10, 16, 24, 32)),
                    colour=palette[index % len(palette)],
                    size=CLASS_TEXT,
                    bold=True,
                )
    if wrong.sum() <= MAX_NAMED_ERRORS and max(map(len, classes)) <= MAX_NAME:
        for place, label, answer in zip(points[wrong], labels[wrong], predicted[wrong], strict=True):
            text = f"{classes[label]} → {classes[answer]}"
            placer.add(
                text,
                (float(place[0]), float(place[1])),
                around(text, size=ERROR_TEXT, reach=(0, 6, 12)),
                size=ERROR_TEXT,
                colour=style.TEXT_COLOUR,
            )
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
