"""The picture of the study: nine panels in three rows, of weights and predictions, of the plane, of ensembles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from dnas_ens.figures.style import (
    BLUE,
    CYCLE,
    GREEN,
    GRID_COLOUR,
    MARKERS,
    MUTED_COLOUR,
    font,
    new_figure,
    style_axis,
)
from dnas_ens.metrics.diversity import pairwise_disagreement
from studies.loss_landscape.found import Found
from studies.loss_landscape.panels import draw_pairs, draw_plane, draw_sizes, draw_title


def draw(found: Found, path: Path) -> None:
    """Draw everything and write it as PNG."""
    figure = new_figure(1130, 1010)
    panels = figure.subplots(3, 3)
    # The plane's legend lies below it, so it stands in the last row.
    (cosine, apart, trajectories), (accuracy, calibrated, pairs), (plane, line, solutions) = panels
    first, seeds = found.bench.architectures[0].name, found.bench.seeds
    landscape = found.landscape
    names = [f"seed {index}" for index in range(seeds)]
    _matrix(figure, cosine, landscape.cosines, names, title=f"Cosine of weights, {first}")
    # Early checkpoints are far from everything; the colours are for the second halves.
    late = np.arange(len(landscape.disagreement)) % len(found.solutions[0].states)
    late = np.flatnonzero(late >= len(found.solutions[0].states) // 2)
    disagreement = 100 * landscape.disagreement
    highest = float(disagreement[np.ix_(late, late)].max())
    _matrix(figure, apart, disagreement, names, title=f"Disagreement % on val, {first}", highest=highest)
    _trajectories(trajectories, found)
    draw_plane(plane, found)
    _lines(line, found)
    _matrix(
        figure,
        solutions,
        100 * pairwise_disagreement(found.predictions.test_probs),
        [architecture.name for architecture in found.bench.architectures],
        title="Disagreement % of all solutions, test",
    )
    draw_sizes(accuracy, found, "accuracy", "accuracy % on test")
    draw_sizes(calibrated, found, "calibrated_nll", "calibrated NLL on test, nats")
    draw_pairs(pairs, found)
    figure.tight_layout(h_pad=2.2, w_pad=2.0)
    figure.savefig(path, dpi=110)


def _matrix(
    figure: Figure,
    axis: Axes,
    matrix: np.ndarray,
    names: Sequence[str],
    *,
    title: str,
    highest: float | None = None,
) -> None:
    """Draw a matrix whose rows come in blocks of the same length, with a line between blocks.

    Args:
        figure: For the colour bar.
        axis: Where to draw.
        matrix: Square.
        names: A name for each block.
        title: The panel's.
        highest: Value of the darkest colour, which larger ones share; None for the largest.
    """
    block = len(matrix) // len(names)
    shown = matrix.astype(float).copy()
    if matrix[0, 0] == 0:
        # The distance of a solution to itself says nothing.
        np.fill_diagonal(shown, np.nan)
    image = axis.imshow(
        shown, cmap=colormaps["Blues"].with_extremes(bad=GRID_COLOUR), interpolation="nearest", vmax=highest
    )
    centres = np.arange(len(names)) * block + (block - 1) / 2
    axis.set_xticks(
        centres, names, rotation=35 if len(names) > 3 else 0, ha="right" if len(names) > 3 else "center"
    )
    axis.set_yticks(centres, names)
    axis.tick_params(length=0, labelsize=8, colors=MUTED_COLOUR)
    for edge in np.arange(1, len(names)) * block - 0.5:
        axis.axhline(edge, color="white", linewidth=1.5)
        axis.axvline(edge, color="white", linewidth=1.5)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(
        image, ax=axis, fraction=0.046, pad=0.03, extend="neither" if highest is None else "max"
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=MUTED_COLOUR, length=0)
    draw_title(axis, title)


def _trajectories(axis: Axes, found: Found) -> None:
    for index, points in zip(found.landscape.embedded, found.landscape.points, strict=True):
        one = found.solutions[index]
        colour = CYCLE[one.architecture % len(CYCLE)]
        label = found.bench.architectures[one.architecture].name
        axis.plot(points[:, 0], points[:, 1], color=colour, linewidth=1, alpha=0.5)
        axis.scatter(points[1:-1, 0], points[1:-1, 1], s=8, color=colour, alpha=0.6)
        axis.scatter(points[0, 0], points[0, 1], s=18, facecolors="white", edgecolors=colour, zorder=3)
        new = one.index % found.bench.seeds == 0
        axis.scatter(
            points[-1, 0],
            points[-1, 1],
            s=60,
            color=colour,
            marker=MARKERS[one.architecture % len(MARKERS)],
            edgecolors="white",
            zorder=4,
            label=label if new else None,
        )
    style_axis(axis)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(frameon=False, prop=font(8), handletextpad=0.2)
    draw_title(axis, "t-SNE of val predictions along trajectories")
    axis.set_xlabel(
        f"hollow: epoch {found.solutions[0].epochs[1]}; large: the solution",
        fontproperties=font(9),
        color=MUTED_COLOUR,
    )


def _lines(axis: Axes, found: Found) -> None:
    for (name, line), colour in zip(found.landscape.lines.items(), (GREEN, BLUE), strict=False):
        axis.plot(line.positions, line.nll, "o-", color=colour, markersize=4, label=name)
    # Barriers are factors above the ends.
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    # Room for the legend.
    axis.set_ylim(top=3 * max(line.nll.max() for line in found.landscape.lines.values()))
    style_axis(axis, x_label="position on the line", y_label="NLL on val, nats")
    axis.legend(frameon=False, prop=font(8), loc="upper left")
    draw_title(axis, f"Loss along lines between weights, {found.bench.architectures[0].name}")
