"""Charts of a search: how far the architectures move from the base as lambda grows."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from dnas_ens.errors import UserError
from dnas_ens.figures import style

# Lengths in points.
WIDTH, LEGEND_WIDTH, DISTANCE_HEIGHT, SHARED_HEIGHT = 360.0, 110.0, 230.0, 130.0
LEFT, BOTTOM, TOP, PANEL_GAP = 56.0, 46.0, 16.0, 20.0


def plot_diversity_curve(
    lam: ArrayLike,
    distance_to_base: ArrayLike,
    shared_edges: ArrayLike | None = None,
    *,
    directions: ArrayLike | None = None,
    is_distance: bool = True,
) -> Figure:
    """Draw the distance D to the base against lambda, one line a direction, beside the diagonal D = lambda.

    Args:
        lam: P values of lambda, at least 0, in any order.
        distance_to_base: P distances D in [0, 1].
        shared_edges: P numbers of edges shared with the base, for a second panel below.
        directions: P direction numbers; one line for all points by default.
        is_distance: Whether lambda asks for a distance; there is no diagonal otherwise.

    Returns:
        The figure, its first axis the distances and its second, if any, the shared edges.

    Raises:
        UserError: The arguments have different lengths, no points, or values that are not finite.
    """
    columns = {"lam": _column("lam", lam), "distance_to_base": _column("distance_to_base", distance_to_base)}
    if shared_edges is not None:
        columns["shared_edges"] = _column("shared_edges", shared_edges)
    columns["directions"] = np.zeros_like(columns["lam"]) if directions is None else _column("directions", directions)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1 or not len(columns["lam"]):
        raise UserError(f"A curve cannot have {lengths} points.", "Give as many values of each, at least one.")

    heights = [DISTANCE_HEIGHT] if shared_edges is None else [DISTANCE_HEIGHT, SHARED_HEIGHT]
    figure, axes = _panels(heights)
    span = float(max(columns["lam"].max(), 1e-3))
    if is_distance:
        axes[0].plot([0, min(span, 1)], [0, min(span, 1)], color=style.MUTED_COLOUR, linestyle="--", linewidth=1.2)
        axes[0].lines[0].set(label="D = λ", gid="diagonal")
    _lines(axes[0], columns, "distance_to_base", labelled=directions is not None)
    axes[0].set_ylim(-0.03, 1.03)
    style.style_axis(axes[0], y_label="distance D to the base")
    if shared_edges is not None:
        axes[0].tick_params(labelbottom=False)
        _lines(axes[1], columns, "shared_edges", labelled=False)
        axes[1].set_ylim(bottom=0, top=max(1.0, columns["shared_edges"].max()) * 1.08)
        axes[1].yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        style.style_axis(axes[1], y_label="shared edges")
    for axis in axes:
        axis.set_xlim(-0.03 * span, 1.03 * span)
        axis.yaxis.set_label_coords(-38 / WIDTH, 0.5)
    axes[-1].set_xlabel("λ", fontproperties=style.font(10), color=style.TEXT_COLOUR)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, prop=style.font(9), borderaxespad=0)
    return figure


def _column(name: str, values: ArrayLike) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not np.isfinite(column).all():
        raise UserError(
            f"{name} of shape {column.shape} is not a row of finite numbers.",
            "Give one number for each point.",
        )
    return column


def _panels(heights: list[float]) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of these heights one below the other, room for a legend on their right."""
    width = LEFT + WIDTH + LEGEND_WIDTH
    height = TOP + sum(heights) + PANEL_GAP * (len(heights) - 1) + BOTTOM
    figure = style.new_figure(width, height)
    axes, top = [], height - TOP
    for panel in heights:
        axes.append(
            figure.add_axes((LEFT / width, (top - panel) / height, WIDTH / width, panel / height), label=str(top))
        )
        top -= panel + PANEL_GAP
    return figure, axes


def _lines(axis: Axes, columns: dict[str, NDArray[np.float64]], name: str, *, labelled: bool) -> None:
    """Draw a line for each direction, its points in the order of lambda."""
    for index, direction in enumerate(np.unique(columns["directions"])):
        chosen = np.flatnonzero(columns["directions"] == direction)
        chosen = chosen[np.argsort(columns["lam"][chosen], kind="stable")]
        axis.plot(
            columns["lam"][chosen],
            columns[name][chosen],
            color=style.CYCLE[index % len(style.CYCLE)],
            marker=style.MARKERS[index % len(style.MARKERS)],
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=1.6,
            label=f"direction {direction:g}" if labelled else "_searched",
            gid=f"{name}-direction-{direction:g}",
        )
