"""Panels of one size for every figure of a report, so that text is as large in all of them, and their labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from dnas_ens.figures import style

Offset = tuple[float, float]
#: Points. Two panels fit side by side on a wide page; one fills a phone, its text still large enough to read.
WIDTH, HEIGHT = 330.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 16.0, 12.0, 40.0
TEXT = 9.5
HALF_HEIGHT = 5.5  # of a label
#: Steps between ticks that a reader adds up easily.
STEPS = (1, 2, 2.5, 5, 10)


def panel(
    *,
    x_label: str,
    y_label: str,
    width: float = WIDTH,
    height: float = HEIGHT,
    right: float = RIGHT,
    bottom: float = BOTTOM,
) -> tuple[Figure, Axes]:
    """Return a figure with one styled axis; all lengths in points."""
    figure = style.new_figure(width, height)
    axis = add_axis(figure, (LEFT, bottom, width - LEFT - right, height - TOP - bottom))
    style_axis(axis, x_label=x_label, y_label=y_label)
    return figure, axis


def add_axis(figure: Figure, bounds: tuple[float, float, float, float]) -> Axes:
    """Add an axis at (left, bottom, width, height) in points."""
    width, height = (inches * style.POINTS_PER_INCH for inches in figure.get_size_inches())
    left, bottom, across, up = bounds
    return figure.add_axes((left / width, bottom / height, across / width, up / height), label=str(bounds))


def style_axis(axis: Axes, *, x_label: str = "", y_label: str = "") -> None:
    """Give an axis the house look, with horizontal grid lines alone."""
    style.style_axis(axis, x_label=x_label, y_label=y_label)
    axis.grid(visible=False, axis="x")
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)


def write(
    axis: Axes,
    text: str,
    position: tuple[float, float],
    *,
    colour: str = style.TEXT_COLOUR,
    offset: tuple[float, float] = (0.0, 0.0),
    ha: str = "left",
    va: str = "center",
    size: float = TEXT,
    bold: bool = False,
) -> None:
    """Write a text at a point of the data, moved by an offset in points."""
    axis.annotate(
        plain(text),
        position,
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        color=colour,
        fontproperties=style.font(size, bold=bold),
        annotation_clip=False,
        zorder=5,
    )


def plain(text: str) -> str:
    """Return a user's name, such as a class name, as printable text that is not read as mathematics."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text).replace("$", r"\$")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move labels' heights apart until no two are nearer than a gap, keeping their order and their mean."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = style.spread([values[index] for index in order], [gap] * (len(values) - 1))
    return [height for _, height in sorted(zip(order, placed, strict=True))]


def name_ends(axis: Axes, ends: Mapping[str, tuple[float, str]], *, x: float, offset: float, span: float) -> None:
    """Write the names of lines on their right, moved apart.

    Args:
        axis: Of a `panel` of usual height.
        ends: Last value and colour of each line, by name.
        span: What the height of the axis stands for.
    """
    gap = 13 / (HEIGHT - TOP - BOTTOM) * span
    heights = spread([height for height, _ in ends.values()], gap)
    for (name, (_, colour)), height in zip(ends.items(), heights, strict=True):
        write(axis, name, (x, height), offset=(offset, 0), colour=colour)


class LabelPlacer:
    """Labels of one axis that keep clear of its points, of each other and of the axis's ends.

    Args:
        axis: With its limits set.
        points: (P, 2) in data coordinates, not to be covered.
        radius: Of the points, in points of paper.
    """

    def __init__(self, axis: Axes, points: ArrayLike, *, radius: float = 4.0) -> None:
        figure = axis.get_figure(root=True)
        assert figure is not None
        figure.canvas.draw()
        self._axis = axis
        self._scale = style.POINTS_PER_INCH / figure.dpi
        self._points = self._on_paper(points)
        self._radius = radius
        self._labels = np.empty((0, 4))
        window = axis.get_window_extent()
        self._ends = window.x0 * self._scale - 4, window.x1 * self._scale + 10

    def add(
        self,
        text: str,
        position: tuple[float, float],
        offsets: Sequence[Offset],
        *,
        size: float = TEXT,
        colour: str = style.TEXT_COLOUR,
        bold: bool = False,
    ) -> None:
        """Write a label, centred at the first of the offsets where it hides the least.

        Args:
            position: The point it belongs to, in data coordinates.
            offsets: Places of its middle relative to the point, in points of paper, the best one first.
        """
        half = half_width(text, size=size, bold=bold)
        anchor = self._on_paper([position])[0]
        chosen = min(offsets, key=lambda offset: self._hidden(anchor + offset, half))
        place = (*(anchor + chosen), half, HALF_HEIGHT)
        self._labels = np.vstack([self._labels, place])
        write(
            self._axis,
            text,
            position,
            offset=chosen,
            ha="center",
            va="center_baseline",
            size=size,
            colour=colour,
            bold=bold,
        )

    def _on_paper(self, points: ArrayLike) -> np.ndarray:
        return np.asarray(self._axis.transData.transform(np.asarray(points, dtype=np.float64))) * self._scale

    def _hidden(self, place: np.ndarray, half: float) -> float:
        """How much a label of a half width hides there: points, and labels, which weigh more."""
        apart = np.abs(self._points - place)
        points = ((apart[:, 0] < half + self._radius) & (apart[:, 1] < HALF_HEIGHT + self._radius)).sum()
        apart = np.abs(self._labels[:, :2] - place)
        labels = ((apart[:, 0] < half + self._labels[:, 2] + 2) & (apart[:, 1] < 2 * HALF_HEIGHT)).sum()
        outside = place[0] - half < self._ends[0] or place[0] + half > self._ends[1]
        return float(points + 20 * labels + 60 * outside)


def half_width(text: str, *, size: float = TEXT, bold: bool = False) -> float:
    """Return half of a label's width in points; 0 of one that is empty."""
    return style.text_width(plain(text), size, bold=bold) / 2 if text.strip() else 0.0


def around(text: str, *, size: float, bold: bool = False, reach: Sequence[float] = (0.0,)) -> list[Offset]:
    """Return offsets of a label in eight directions around a point, at distances from it in points of paper."""
    half = half_width(text, size=size, bold=bold)
    found = []
    for far in reach:
        for turn in range(8):
            angle = math.pi / 4 * turn
            across, up = math.cos(angle), math.sin(angle)
            found.append((across * (half + 6 + far), up * (11 + far)))
    return found
