"""The picture of the study: nine panels in three rows, of weights and predictions, of the plane, of ensembles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from dnas_ens.figures.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GRID_COLOUR,
    LINE_COLOUR,
    MARKERS,
    MUTED_COLOUR,
    TEXT_COLOUR,
    VERMILION,
    font,
    new_figure,
    style_axis,
)
from dnas_ens.metrics.diversity import pairwise_disagreement
from studies.loss_landscape.landscape import (
    disagreement_bounds,
    independent_disagreement,
    pair_values,
    perturbed_disagreement,
)
from studies.loss_landscape.measures import KINDS, PAIR_MEASURES, SEEDS, Found


def draw(found: Found, path: Path) -> None:
    """Draw everything and write it as PNG."""
    figure = new_figure(1130, 1010)
    panels = figure.subplots(3, 3)
    # The plane's legend is below it, so it is in the last row.
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
    _plane(plane, found)
    _lines(line, found)
    _matrix(
        figure,
        solutions,
        100 * pairwise_disagreement(found.predictions.test_probs),
        [architecture.name for architecture in found.bench.architectures],
        title="Disagreement % of all solutions, test",
    )
    _sizes(accuracy, found, "accuracy", "accuracy % on test")
    _sizes(calibrated, found, "calibrated_nll", "calibrated NLL on test, nats")
    _pairs(pairs, found)
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
    axis.set_xticks(centres, names, rotation=35 if len(names) > 3 else 0, ha="right" if len(names) > 3 else "center")
    axis.set_yticks(centres, names)
    axis.tick_params(length=0, labelsize=8, colors=MUTED_COLOUR)
    for edge in np.arange(1, len(names)) * block - 0.5:
        axis.axhline(edge, color="white", linewidth=1.5)
        axis.axvline(edge, color="white", linewidth=1.5)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03, extend="neither" if highest is None else "max")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=MUTED_COLOUR, length=0)
    _title(axis, title)


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
    _title(axis, "t-SNE of val predictions along trajectories")
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
    _title(axis, f"Loss along lines between weights, {found.bench.architectures[0].name}")


def _title(axis: Axes, text: str) -> None:
    """Head a panel."""
    axis.set_title(text, fontproperties=font(10, bold=True), loc="left", color=TEXT_COLOUR)


def _plane(axis: Axes, found: Found) -> None:
    """Draw the diversity-accuracy plane with its limits; the base is the first solution."""
    plane, num_classes = found.landscape.plane, found.predictions.val_probs.shape[2]
    count = len(found.solutions[0].states)
    accuracy, diversity = (values.reshape(len(found.solutions), count) for values in (plane.accuracy, plane.diversity))
    groups = np.array(found.groups)
    ends = accuracy[:, -1]
    # Early checkpoints would squeeze all that is of interest.
    own = accuracy[0, :-1] > ends.min() - 0.5 * (1.0 - plane.base_accuracy) - 0.02
    shown = np.concatenate([ends, accuracy[0, :-1][own]])
    margin = 0.08 * max(float(np.ptp(shown)), 0.01)
    low, high = float(shown.min()) - margin, min(float(shown.max()) + margin, 1.0 - 1e-4)
    grid = np.linspace(low, high, 300)
    errors = 1.0 - grid
    least, largest = disagreement_bounds(grid, plane.base_accuracy)
    independent, perturbed = (
        curve(grid, plane.base_accuracy, num_classes) for curve in (independent_disagreement, perturbed_disagreement)
    )
    curves: list[tuple[np.ndarray, str | None, dict[str, Any]]] = [
        (largest, "bounds", {"color": LINE_COLOUR, "linewidth": 1, "linestyle": ":"}),
        (least, None, {"color": LINE_COLOUR, "linewidth": 1, "linestyle": ":"}),
        (independent, "independent errors", {"color": MUTED_COLOUR, "linewidth": 1.5}),
        (
            perturbed,
            "base, perturbed at random",
            {"color": MUTED_COLOUR, "linewidth": 1.5, "linestyle": "--"},
        ),
    ]
    for values, label, look in curves:
        axis.plot(100 * grid, values / errors, label=label, **look)
    axis.plot(
        100 * accuracy[0, :-1][own],
        diversity[0, :-1][own],
        "o-",
        color=GREEN,
        markersize=4,
        linewidth=1,
        label="the base's own trajectory",
    )
    axis.plot([100 * plane.base_accuracy], [0.0], "*", color=BLACK, markersize=11, label="base, seed 0")
    same, other = groups == 0, groups != 0
    same[0] = False
    axis.plot(100 * ends[same], diversity[same, -1], "s", color=BLUE, markersize=6, label="its other seeds")
    if other.any():
        axis.plot(
            100 * ends[other],
            diversity[other, -1],
            "^",
            color=VERMILION,
            markersize=5,
            alpha=0.8,
            label="other architectures",
        )
    axis.set_xlim(100 * low, 100 * high)
    highest = np.nanmax(np.concatenate([diversity[:, -1], diversity[0, :-1][own]]))
    # The upper curve grows without bound towards accuracy 1; its left end is shown in any case.
    top = 1.15 * max(highest, float(independent_disagreement(low, plane.base_accuracy, num_classes)) / (1.0 - low))
    axis.set_ylim(-0.05 * top, top)
    style_axis(axis, x_label="accuracy % on val", y_label="disagreement with base / error rate")
    axis.legend(
        frameon=False,
        prop=font(8),
        ncols=2,
        columnspacing=1.0,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        borderaxespad=0.0,
    )
    _title(axis, f"Diversity and accuracy, base: {found.bench.architectures[0].name}")


def _sizes(axis: Axes, found: Found, column: str, label: str) -> None:
    """Draw a metric of ensembles against their size."""
    factor = 100.0 if column == "accuracy" else 1.0
    for index, (name, rows) in enumerate(found.sizes.items()):
        colour = BLUE if name.endswith(SEEDS) else VERMILION if name.endswith(KINDS) else GREEN
        axis.plot(
            [row["size"] for row in rows],
            [factor * row[column] for row in rows],
            marker=MARKERS[index],
            color=colour,
            linestyle="--" if name.startswith("reference") else "-",
            markersize=5,
            label=name,
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    style_axis(axis, x_label="networks in the ensemble", y_label=label)
    axis.legend(frameon=False, prop=font(8))
    _title(axis, "Accuracy against ensemble size" if column == "accuracy" else "Calibrated NLL against size")


def _pairs(axis: Axes, found: Found) -> None:
    """Draw the first measure of pairs, a point a pair, of seeds and of architectures."""
    primary, measure = next(iter(PAIR_MEASURES.items()))
    matrix = measure(found.predictions.test_probs.astype(np.float64), found.predictions.test_labels)
    rows: list[tuple[str, np.ndarray, str]] = []
    for kind in found.comparisons:
        members = found.members(kind)
        of_members = [found.groups[index] for index in members]
        within, between = pair_values(matrix[np.ix_(members, members)], of_members)
        rows += [(f"seeds of\none {kind[:-1]}", within, BLUE), (f"different\n{kind}", between, VERMILION)]
    if not rows:
        within, _ = pair_values(matrix, found.groups)
        rows = [("seeds of one\narchitecture", within, BLUE)]
    generator = np.random.default_rng(0)
    for height, (_, values, colour) in enumerate(rows):
        jitter = generator.uniform(-0.22, 0.22, len(values))
        axis.plot(values, height + jitter, "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        axis.plot([values.mean()] * 2, [height - 0.33, height + 0.33], color=BLACK, linewidth=2.5)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    style_axis(axis, x_label=f"{primary} on test")
    _title(axis, "Pairs of solutions; bar: mean")
