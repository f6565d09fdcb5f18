"""Placing labels beside points where they hide the least."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from dnas_ens.figures import style
from dnas_ens.report import canvas

Offset = tuple[float, float]
HALF_HEIGHT = 5.5


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
        size: float = canvas.TEXT,
        colour: str = style.TEXT_COLOUR,
        bold: bool = False,
    ) -> None:
        """Write a label, centred at the first of the offsets where it hides the least.

        Args:
            text: The label.
            position: The point it belongs to, in data coordinates.
            offsets: Places of its middle relative to the point, in points of paper, the best one first.
            size: Of the type.
            colour: Of the type.
            bold: Of the type.
        """
        half = style.text_width(canvas.plain(text), size, bold=bold) / 2 if text.strip() else 0.0
        anchor = self._on_paper([position])[0]
        chosen = min(offsets, key=lambda offset: self._hidden(anchor + offset, half))
        place = (*(anchor + chosen), half, HALF_HEIGHT)
        self._labels = np.vstack([self._labels, place])
        canvas.write(
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


def around(text: str, *, size: float, bold: bool = False, reach: Sequence[float] = (0.0,)) -> list[Offset]:
    """Return offsets of a label in eight directions around a point.

    Args:
        text: The label.
        size: Of its type.
        bold: Of its type.
        reach: Distances from the point, in points of paper, the best first.
    """
    half = style.text_width(canvas.plain(text), size, bold=bold) / 2 if text.strip() else 0.0
    found = []
    for far in reach:
        for turn in range(8):
            angle = math.pi / 4 * turn
            across, up = math.cos(angle), math.sin(angle)
            found.append((across * (half + 6 + far), up * (11 + far)))
    return found
