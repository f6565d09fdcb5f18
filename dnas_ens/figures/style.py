"""What all figures have in common: colours, type, figure creation without pyplot's global state, SVG."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from scipy.optimize import isotonic_regression

from dnas_ens.run.files import write_atomic

FONT = "DejaVu Sans"  # ships with matplotlib, so that a figure looks the same everywhere
TEXT_COLOUR = "#1f2933"
MUTED_COLOUR = "#52606d"
LINE_COLOUR = "#9aa5b1"
GRID_COLOUR = "#e4e7eb"
PANEL_COLOUR = "#f0f2f5"

# Okabe and Ito's palette, distinguishable with every common colour vision deficiency.
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072b2", "#d55e00", "#009e73", "#b8579a", "#e69f00"
SKY, BLACK = "#56b4e9", "#000000"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

POINTS_PER_INCH = 72.0


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure of a size in points, drawn by Agg and unknown to pyplot."""
    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def font(size: float, *, bold: bool = False) -> FontProperties:
    """Return the house font at a size in points."""
    return FontProperties(family=FONT, size=size, weight="bold" if bold else "normal")


@functools.cache
def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width in points of a text, mathematical or not, set in the house font."""
    return float(TextPath((0, 0), text, prop=font(size, bold=bold)).get_extents().width)


def style_axis(axis: Axes, *, x_label: str = "", y_label: str = "") -> None:
    """Give a chart's axis the house look: two spines, a light grid, labels in muted grey."""
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE_COLOUR)
    axis.grid(visible=True, color=GRID_COLOUR, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED_COLOUR, length=3, labelsize=9, labelfontfamily=FONT)
    axis.set_xlabel(x_label, fontproperties=font(10), color=TEXT_COLOUR)
    axis.set_ylabel(y_label, fontproperties=font(10), color=TEXT_COLOUR)


def spread(wishes: Sequence[float], distances: Sequence[float]) -> list[float]:
    """Place P items of a row near to where they wish to be (least squares), in their order.

    Neighbours are at least the P - 1 distances apart.
    """
    offsets = np.cumsum([0.0, *distances])
    placed = isotonic_regression(np.asarray(wishes) - offsets).x + offsets
    return [float(place) for place in placed]


def to_svg(figure: Figure, *, title: str | None = None, outlines: bool = True) -> str:
    """Return a figure as SVG text that depends on the figure alone: no date, version or random identifiers.

    Args:
        title: The document's title, for readers who cannot see it.
        outlines: Glyphs are stored as outlines, each text also as a comment beside them, so no font is needed to
            view it; if false, as text for the reader's own font.
    """
    fonttype = "path" if outlines else "none"
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} | ({"Title": title} if title else {})
    with matplotlib.rc_context({"svg.hashsalt": "dnas_ens", "svg.fonttype": fonttype}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue().decode("utf-8")


def save_svg(figure: Figure, path: Path, *, title: str | None = None) -> None:
    """Write a figure as an SVG file, whose folder is made if need be; see `to_svg`."""
    write_atomic(path, to_svg(figure, title=title).encode())
