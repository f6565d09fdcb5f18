"""The section on how members differ: the disagreement heat map and the plane of predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from dnas_ens.figures import style
from dnas_ens.metrics.diversity import pairwise_disagreement
from dnas_ens.report import panels
from dnas_ens.report.parts import Picture, Section, count, percent
from dnas_ens.report.run_files import RunFiles
from dnas_ens.types import FloatArray

MAX_EMBEDDED = 1_000
MIN_EMBEDDED = 30
LEAST_EMBEDDED = 1e-4
MAX_NUMBERED = 12
MAX_COLOURED_CLASSES = 12
MAX_NAMED_ERRORS = 12
#: More points than this would make a vector picture heavy.
MAX_VECTOR_POINTS = 600
MAX_NAME = 14
CLASS_TEXT, ERROR_TEXT = 11.0, 8.5
#: Size of the numbers where there are many members.
TEXT_OF = {8: 9.5, 9: 9.0, 10: 8.5, 11: 8.0, 12: 7.5}


def difference_section(files: RunFiles) -> Section | None:
    """Disagreement between members, and the plane of predictions."""
    predictions = files.predictions
    if predictions is None:
        return None
    pictures = []
    if files.num_members > 1:
        matrix = pairwise_disagreement(predictions.test_probs)
        pairs = matrix[np.triu_indices(files.num_members, k=1)]
        pictures.append(
            Picture(
                name="disagreement",
                title="Who answers differently",
                caption="Share of test images, in %, on which two members give different answers. A stronger "
                "blue is more.",
                description=f"Heat map of disagreement of {files.num_members} members, from {percent(pairs.min())} to "
                f"{percent(pairs.max())} of images.",
                figure=draw_disagreement(matrix),
            )
        )
    pictures += _plane(files)
    title = "How do the members differ?" if files.num_members > 1 else "What is it unsure of?"
    return Section(name="difference", title=title, pictures=pictures) if pictures else None


def draw_disagreement(matrix: ArrayLike) -> Figure:
    """Draw the share of images on which two members answer differently, a square a pair.

    Shades are one colour at different opacity, so that they read on any background.

    Args:
        matrix: Symmetric (M, M), in [0, 1].
    """
    values = np.asarray(matrix, dtype=np.float64)
    num_members = len(values)
    numbered = num_members <= MAX_NUMBERED
    figure = style.new_figure(panels.WIDTH, panels.HEIGHT + 18)
    side = panels.HEIGHT - 34.0
    axis = panels.add_axis(figure, (68, 34, side, side))
    panels.style_axis(axis)
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
            shade = 0.04 + 0.5 * share / largest
            axis.bar(column, 0.94, 0.94, row - 0.47, color=style.BLUE, alpha=shade, linewidth=0)
            if numbered:
                size = TEXT_OF.get(num_members, 10.5)
                text = f"{100 * share:.1f}"
                panels.write(axis, text, (column, row), ha="center", va="center_baseline", size=size)
    axis.set_xlim(-0.5, num_members - 0.5)
    axis.set_ylim(num_members - 0.5, -0.5)
    ticks = range(0, num_members, 1 if numbered else -(-num_members // MAX_NUMBERED))
    axis.set_xticks(ticks, [str(index) for index in ticks])
    axis.set_yticks(ticks, [f"member {index}" if numbered else str(index) for index in ticks])
    axis.tick_params(length=0)
    axis.set_xlabel("member", fontproperties=style.font(10), color=style.TEXT_COLOUR)
    return figure


def _plane(files: RunFiles) -> list[Picture]:
    """The plane of predictions, where it shows anything."""
    predictions = files.predictions
    assert predictions is not None
    mean = files.averaged
    embedded = embed(mean)
    if embedded is None:
        return []
    positions, chosen = embedded
    labels, predicted = predictions.test_labels[chosen], mean[chosen].argmax(axis=1)
    wrong = int((labels != predicted).sum())
    drawn = "Every test image" if len(chosen) == len(mean) else f"{len(chosen):,} test images drawn at random"
    colours = "coloured by its true class and " if len(predictions.classes) <= MAX_COLOURED_CLASSES else ""
    named = " (true class → answer)" if _are_named(wrong, predictions.classes) else ""
    crosses = (
        f"Crosses are the {count(wrong, 'error')}{named}"
        if wrong > 1
        else (f"The cross is the one error{named}" if wrong else "None of them is answered wrongly")
    )
    return [
        Picture(
            name="predictions-tsne",
            title="What is confused with what",
            caption=f"{drawn}, {colours}placed by t-SNE of the {files.whole}’s probabilities: images predicted alike "
            f"lie together, those between two islands are torn between two classes. {crosses}. Distances between "
            "islands mean nothing.",
            description=f"Scatter plot of {len(chosen)} images by the t-SNE of their predicted distributions, in "
            f"islands of {len(predictions.classes)} classes; {wrong} errors are marked.",
            figure=draw_embedding(positions, labels, predicted, predictions.classes),
        )
    ]


def _are_named(num_errors: int, classes: Sequence[str]) -> bool:
    """Whether each error says its true class and the answer: where they are few, and all classes have short names."""
    return num_errors <= MAX_NAMED_ERRORS and max(map(len, classes)) <= MAX_NAME


def embed(probs: NDArray) -> tuple[FloatArray, NDArray[np.int64]] | None:
    """Place images in a plane by t-SNE of their predicted distributions (van der Maaten and Hinton, JMLR 9, 2008).

    Distances are Euclidean between logarithms of probabilities, those below 0.0001 counted as 0.0001, so that sure
    images are still separated by what they resemble next.

    Args:
        probs: The ensemble's class probabilities (N, K).

    Returns:
        Positions (n, 2) and the indices of the n images, at most 1,000 drawn at random; None for fewer than 30
        images or three classes, where the plane shows nothing.
    """
    if len(probs) < MIN_EMBEDDED or probs.shape[1] < 3:
        return None
    from sklearn.manifold import TSNE

    chosen = np.arange(len(probs))
    if len(probs) > MAX_EMBEDDED:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, MAX_EMBEDDED, replace=False))
    points = np.log(np.maximum(probs[chosen], LEAST_EMBEDDED)).astype(np.float32)
    if float(np.ptp(points, axis=0).max()) == 0.0:  # all predicted alike
        return None
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(points), chosen


def draw_embedding(positions: ArrayLike, labels: NDArray, predicted: NDArray, classes: Sequence[str]) -> Figure:
    """Draw images by the t-SNE of their predictions, coloured by their class, those answered wrongly crossed.

    Args:
        positions: (n, 2).
        labels: True classes, (n,).
        predicted: Answered classes, (n,).
        classes: K names.
    """
    points = np.asarray(positions, dtype=np.float64)
    wrong = labels != predicted
    figure = style.new_figure(panels.WIDTH, panels.HEIGHT + 18)
    axis = panels.add_axis(figure, (10, 8, panels.WIDTH - 20, panels.HEIGHT + 2))
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
    axis.scatter(points[wrong, 0], points[wrong, 1], s=34, marker="x", color=style.TEXT_COLOUR, linewidth=1.5, zorder=4)
    axis.margins(0.07)
    placer = panels.LabelPlacer(axis, points, radius=2.0)
    if coloured:
        for index, name in enumerate(classes):
            if (labels == index).any():
                middle = np.median(points[labels == index], axis=0)
                text = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
                placer.add(
                    text,
                    (float(middle[0]), float(middle[1])),
                    panels.around(text, size=CLASS_TEXT, bold=True, reach=(4, 10, 16, 24, 32)),
                    colour=palette[index % len(palette)],
                    size=CLASS_TEXT,
                    bold=True,
                )
    if _are_named(int(wrong.sum()), classes):
        for place, label, answer in zip(points[wrong], labels[wrong], predicted[wrong], strict=True):
            text = f"{classes[label]} → {classes[answer]}"
            placer.add(
                text,
                (float(place[0]), float(place[1])),
                panels.around(text, size=ERROR_TEXT, reach=(0, 6, 12)),
                size=ERROR_TEXT,
                colour=style.TEXT_COLOUR,
            )
    return figure
