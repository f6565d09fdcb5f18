"""What the pictures of studies share: a panel with its title and labels, and entries of legends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dnas_ens.figures.style import MUTED_COLOUR, font, style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


def panel(axis: Axes, title: str, *, x_label: str = "", y_label: str = "", size: float = 10) -> None:
    """Give a panel the house look and a bold title on the left."""
    style_axis(axis, x_label=x_label, y_label=y_label)
    axis.set_title(title, fontproperties=font(size, bold=True), loc="left")


def handle(label: str, **look: Any) -> Line2D:
    """Return an entry of a legend, muted unless a colour is given."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **{"color": MUTED_COLOUR} | look)
