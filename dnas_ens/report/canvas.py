"""Panels of one size for every figure of a report, so that text is as large in all of them."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dnas_ens.figures import style

#: Points. Two panels stand side by side on a wide page; one fills a phone, its text still large enough to read.
WIDTH, HEIGHT = 330.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 16.0, 12.0, 40.0
TEXT = 9.5
#: Steps between ticks that a reader adds up easily.
STEPS = (1, 2, 2.5, 5, 10)


def panel(
    *,
    x_label: str,
    y_label: str,
    width: float = WIDTH,
    height: float = HEIGHT,
    left: float = LEFT,
    right: float = RIGHT,
    top: float = TOP,
    bottom: float = BOTTOM,
) -> tuple[Figure, Axes]:
    """Return a figure with one styled axis; all lengths in points."""
    figure = style.new_figure(width, height)
    axis = add_axis(figure, (left, bottom, width - left - right, height - top - bottom))
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
    """Return a name that others chose, such as a class's, as text that is neither mathematics nor unprintable."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text).replace("$", r"\$")


def spread(values: list[float], gap: float) -> list[float]:
    """Move labels' heights apart until no two are nearer than a gap, keeping their order and their mean.

    Args:
        values: Wanted heights.
        gap: Least distance of two.

    Returns:
        The heights to write them at, in the given order.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []
    centre: list[float] = []
    for index in order:
        groups.append([index])
        centre.append(values[index])
        # Two neighbouring groups whose labels touch become one around their common mean.
        while len(groups) > 1 and centre[-1] - centre[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            joined = groups[-2] + groups[-1]
            groups[-2:] = [joined]
            centre[-2:] = [sum(values[each] for each in joined) / len(joined)]
    placed = [0.0] * len(values)
    for group, middle in zip(groups, centre, strict=True):
        for rank, index in enumerate(group):
            placed[index] = middle + gap * (rank - (len(group) - 1) / 2)
    return placed
