"""Panels of functions and ensembles: the diversity-accuracy plane, ensemble sizes, pairs of solutions."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dnas_ens.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    LINE_COLOUR,
    MARKERS,
    MUTED_COLOUR,
    TEXT_COLOUR,
    VERMILION,
    font,
    style_axis,
)
from studies.loss_landscape.diversity_accuracy import (
    disagreement_bounds,
    independent_disagreement,
    perturbed_disagreement,
)
from studies.loss_landscape.found import KINDS, SEEDS, Found
from studies.loss_landscape.measures import PAIR_MEASURES
from studies.loss_landscape.member_groups import pair_values


def draw_title(axis: Axes, text: str) -> None:
    """Head a panel."""
    axis.set_title(text, fontproperties=font(10, bold=True), loc="left", color=TEXT_COLOUR)


def draw_plane(axis: Axes, found: Found) -> None:
    """Draw the diversity-accuracy plane with its limits; the base is the first solution."""
    plane, num_classes = found.landscape.plane, found.predictions.val_probs.shape[2]
    count = len(found.solutions[0].states)
    accuracy, diversity = (
        values.reshape(len(found.solutions), count) for values in (plane.accuracy, plane.diversity)
    )
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
    axis.plot(100 * grid, largest / errors, color=LINE_COLOUR, linewidth=1, linestyle=":", label="bounds")
    axis.plot(100 * grid, least / errors, color=LINE_COLOUR, linewidth=1, linestyle=":")
    axis.plot(
        100 * grid,
        independent_disagreement(grid, plane.base_accuracy, num_classes) / errors,
        color=MUTED_COLOUR,
        linewidth=1.5,
        label="independent errors",
    )
    axis.plot(
        100 * grid,
        perturbed_disagreement(grid, plane.base_accuracy, num_classes) / errors,
        color=MUTED_COLOUR,
        linewidth=1.5,
        linestyle="--",
        label="base, perturbed at random",
    )
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
    top = 1.15 * max(
        highest, float(independent_disagreement(low, plane.base_accuracy, num_classes)) / (1.0 - low)
    )
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
    draw_title(axis, f"Diversity and accuracy, base: {found.bench.architectures[0].name}")


def draw_sizes(axis: Axes, found: Found, column: str, label: str) -> None:
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
    draw_title(
        axis, "Accuracy against ensemble size" if column == "accuracy" else "Calibrated NLL against size"
    )


def draw_pairs(axis: Axes, found: Found) -> None:
    """Draw the first measure of pairs, a point a pair, of seeds and of architectures."""
    primary, measure = next(iter(PAIR_MEASURES.items()))
    matrix = measure(found.predictions.test_probs.astype(np.float64), found.predictions.test_labels)
    rows: list[tuple[str, np.ndarray, str]] = []
    for kind in found.comparisons:
        cells = kind == "genotypes"
        members = [
            one.index
            for one in found.solutions
            if (found.bench.architectures[one.architecture].genotype is not None) == cells
        ]
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
    draw_title(axis, "Pairs of solutions; bar: mean")
