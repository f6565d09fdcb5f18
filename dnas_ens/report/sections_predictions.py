"""Sections made from the predictions: calibration, ensemble size, differences of members, risk and coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dnas_ens.evaluate.classes import ClassFigures
from dnas_ens.evaluate.tables import best_single
from dnas_ens.figures import style
from dnas_ens.metrics.diversity import pairwise_disagreement
from dnas_ens.metrics.scores import ece15
from dnas_ens.metrics.selective import risk_coverage
from dnas_ens.report.figures_members import (
    MAX_COLOURED_CLASSES,
    MAX_NAMED_ERRORS,
    draw_disagreement,
    draw_embedding,
)
from dnas_ens.report.figures_predictions import draw_by_size, draw_reliability, draw_risk_coverage
from dnas_ens.report.measures import embed, reliability
from dnas_ens.report.parts import Picture, Section
from dnas_ens.report.run_files import RunFiles
from dnas_ens.report.tables import classes_table, confusion_table
from dnas_ens.report.wording import NARROW, count, percent
from dnas_ens.types import FloatArray


def classes_section(files: RunFiles) -> Section | None:
    """Recall and precision of every class, a constant answer beside them, and the confusion matrix."""
    if files.predictions is None:
        return None
    figures = ClassFigures.of(files.predictions)
    of = (
        ""
        if len(figures.rows) == len(figures.shown)
        else (f"<p>The {len(figures.shown)} of lowest recall of {len(figures.rows)} classes.</p>\n")
    )
    said = " ".join(map(escape, figures.sentences()))
    matrix = ""
    if len(figures.rows) == len(figures.shown):
        matrix = (
            "<h3>Confusion matrix</h3>\n<p>A row a true class, a column an answer; numbers of test images.</p>\n"
            + confusion_table(figures)
        )
    return Section(
        name="classes",
        title="How does each class fare?",
        text=f"<p>{said}</p>\n{of}{classes_table(figures)}{matrix}",
    )


def calibration_section(files: RunFiles) -> Section | None:
    """Reliability of the ensemble, and of its members pooled."""
    predictions = files.predictions
    if predictions is None:
        return None
    labels = predictions.test_labels
    whole = "ensemble" if files.num_members > 1 else "network"
    mean = predictions.averaged()[1]
    bins = reliability(mean, labels)
    pictures = [
        Picture(
            name=f"reliability-{whole}",
            title=f"The {whole}",
            caption=f"Images sorted by the stated probability of the answer into 15 bins of equal width, "
            f"{int(bins.counts.max()):,} of {len(labels):,} in the fullest; larger dots hold more, lines are "
            f"95{NARROW}% intervals (Wilson), the bars below are the share of images. Expected calibration error "
            f"{100 * ece15(mean, labels):.1f} points, before the temperature.",
            description=f"Reliability diagram of the {whole}: share of images right against stated probability, in "
            f"{len(bins.counts)} bins, with the diagonal of honest probabilities and a histogram below.",
            figure=draw_reliability(bins),
        )
    ]
    if files.num_members > 1:
        pooled = predictions.test_probs.reshape(-1, predictions.test_probs.shape[-1]).astype(np.float64)
        members = reliability(pooled, np.tile(labels, files.num_members))
        pictures.append(
            Picture(
                name="reliability-members",
                title="Its members, each by itself",
                caption=f"The same for all {len(pooled):,} answers of the {count(files.num_members, 'member')} pooled. "
                "Their intervals are too narrow, for the members see the same images.",
                description="Reliability diagram of the members' own answers, pooled, of the same form.",
                figure=draw_reliability(members, colour=style.VERMILION),
            )
        )
    text = (
        "<p>Of the images answered with a stated probability of 80"
        + NARROW
        + "%, 80"
        + NARROW
        + "% should be "
        "right: honest probabilities lie on the dashed diagonal. Bins that hold few images scatter.</p>"
    )
    return Section(name="calibration", title="Are the probabilities honest?", text=text, pictures=pictures)


def size_section(files: RunFiles) -> Section | None:
    """NLL and accuracy against the number of members."""
    predictions = files.predictions
    if predictions is None or files.num_members < 2:
        return None
    rows = files.ensemble_sizes
    sizes = [row["size"] for row in rows]
    pictures = [
        Picture(
            name="nll-by-size",
            title="Calibrated NLL",
            caption="Dots are means over subsets of that many members, averaged with equal weights, each with a "
            "temperature of its own; the band is one standard deviation over the subsets. It tells how much the choice "
            "among these members matters, not how other trainings would turn out. Lower is better.",
            description=f"Calibrated NLL against number of members: {rows[0]['calibrated_nll']:.4f} nats for one, "
            f"{rows[-1]['calibrated_nll']:.4f} for {sizes[-1]}.",
            figure=draw_by_size(sizes, *_band(rows, "calibrated_nll"), y_label="calibrated NLL, nats"),
        ),
        Picture(
            name="accuracy-by-size",
            title="Accuracy",
            caption="The same subsets; higher is better.",
            description=f"Accuracy against number of members: {percent(rows[0]['accuracy'])} for one, "
            f"{percent(rows[-1]['accuracy'])} for {sizes[-1]}.",
            figure=draw_by_size(sizes, *_band(rows, "accuracy"), y_label="accuracy, %", percent=True),
        ),
    ]
    return Section(name="size", title="How many members does it take?", pictures=pictures)


def _band(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean, and one standard deviation below and above it; a single subset has none."""
    mean = np.array([row[metric] for row in rows])
    deviation = np.array([row[f"{metric}_deviation"] or 0.0 for row in rows])
    return mean, mean - deviation, mean + deviation


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


def _plane(files: RunFiles) -> list[Picture]:
    predictions = files.predictions
    assert predictions is not None
    mean = predictions.averaged()[1]
    embedded = embed(mean)
    if embedded is None:
        return []
    positions, chosen = embedded
    labels, predicted = predictions.test_labels[chosen], mean[chosen].argmax(axis=1)
    wrong = int((labels != predicted).sum())
    drawn = "Every test image" if len(chosen) == len(mean) else f"{len(chosen):,} test images drawn at random"
    coloured = len(predictions.classes) <= MAX_COLOURED_CLASSES
    colours = "coloured by its true class and " if coloured else ""
    named = " (true class → answer)" if coloured and 0 < wrong <= MAX_NAMED_ERRORS else ""
    crosses = (
        f"Crosses are the {count(wrong, 'error')}{named}"
        if wrong > 1
        else (f"The cross is the one error{named}" if wrong else "None of them is answered wrongly")
    )
    whole = "ensemble" if files.num_members > 1 else "network"
    return [
        Picture(
            name="predictions-tsne",
            title="What is confused with what",
            caption=f"{drawn}, {colours}placed by t-SNE of the {whole}’s probabilities: images predicted alike lie "
            f"together, those between two islands are torn between two classes. {crosses}. Distances between islands "
            "mean nothing.",
            description=f"Scatter plot of {len(chosen)} images by the t-SNE of their predicted distributions, in "
            f"islands of {len(predictions.classes)} classes; {wrong} errors are marked.",
            figure=draw_embedding(positions, labels, predicted, predictions.classes),
        )
    ]


def selective_section(files: RunFiles) -> Section | None:
    """Risk against coverage of the ensemble, its best member and the others."""
    predictions = files.predictions
    if predictions is None or len(predictions.test_labels) < 10:
        return None
    labels, members = predictions.test_labels, files.num_members
    mean = predictions.averaged()[1]
    best = best_single(predictions)
    whole = "ensemble" if members > 1 else "network"
    found = {}
    if members > 1:
        others = [index for index in range(members) if index != best]
        found = {f"member {index}": risk_coverage(predictions.test_probs[index], labels) for index in others}
        found["best member"] = risk_coverage(predictions.test_probs[best], labels)
    found[whole] = risk_coverage(mean, labels)
    curves = {name: (curve.coverage, curve.risk) for name, curve in found.items()}
    beside = f", {100 * found['best member'].aurc:.2f}{NARROW}% of the best member" if members > 1 else ""
    picture = Picture(
        name="risk-coverage",
        title="Risk against coverage",
        caption=f"Error among the images answered when only the surest are. The area under the curve (AURC) is "
        f"{100 * found[whole].aurc:.2f}{NARROW}% of the {whole}{beside}; lower is better."
        + (" Thin lines are the other members." if members > 2 else ""),
        description=f"Share of wrong answers against share of images answered, of {', '.join(list(curves)[-2:])}; all "
        f"images answered, the {whole} errs on {percent(float(found[whole].risk[-1]))}.",
        figure=draw_risk_coverage(curves, faint=members - 1),
    )
    text = (
        "<p>A predictor that may hand unsure images to a person errs less on the rest, if it is unsure of the right "
        "ones.</p>"
    )
    return Section(name="selective", title="What if it may decline to answer?", text=text, pictures=[picture])
