"""Sections on how good the predictions are: classes, calibration, ensemble size, risk and coverage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import binomtest

from dnas_ens.evaluate.classes import ClassFigures
from dnas_ens.figures import style
from dnas_ens.metrics.scores import ece15
from dnas_ens.metrics.selective import RiskCoverage
from dnas_ens.metrics.significance import CONFIDENCE
from dnas_ens.report import panels
from dnas_ens.report.parts import NARROW, Picture, Section, count, percent, table
from dnas_ens.report.run_files import RunFiles
from dnas_ens.types import FloatArray, IntArray

NUM_BINS = 15
HISTOGRAM_HEIGHT, PANEL_GAP = 46.0, 12.0


def classes_section(files: RunFiles) -> Section | None:
    """Recall and precision of every class, a constant answer beside them, and the confusion matrix."""
    if files.predictions is None:
        return None
    figures = files.classes
    said = " ".join(map(escape, figures.sentences()))
    of = matrix = ""
    if len(figures.shown) < len(figures.rows):
        of = f"<p>The {len(figures.shown)} of lowest recall of {len(figures.rows)} classes.</p>\n"
    else:
        matrix = (
            "<h3>Confusion matrix</h3>\n<p>A row a true class, a column an answer; numbers of test images.</p>\n"
            + _confusion_table(figures)
        )
    return Section(
        name="classes",
        title="How does each class fare?",
        text=f"<p>{said}</p>\n{of}{_classes_table(figures)}{matrix}",
    )


def _classes_table(figures: ClassFigures) -> str:

    def shown(share: float) -> str:
        return "–" if math.isnan(share) else f"{100 * share:.1f}"

    body = [
        ("", [escape(row.name), f"{row.num_images:,}", shown(row.recall), shown(row.precision)])
        for row in figures.shown
    ]
    headings = ("", "test images", "recall, %", "precision, %")
    return table(headings, body, label="Recall and precision of each class")


def _confusion_table(figures: ClassFigures) -> str:
    names = [escape(row.name) for row in figures.rows]
    body = [
        ("", [name, *(f"{count:,}" if count else "" for count in counts)])
        for name, counts in zip(names, figures.confusion.tolist(), strict=True)
    ]
    return table(("", *names), body, label="Confusion matrix: true classes in rows, answers in columns")


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Bins of confidence that hold images.

    Args:
        confidence: Mean top probability of each bin, in [0, 1].
        accuracy: Share of images right, in [0, 1].
        low: Lower end of its Wilson interval.
        high: Upper end.
        counts: Images in each.
        histogram: Share of all images in each of 15 equal bins of [0, 1], empty ones included.
    """

    confidence: FloatArray
    accuracy: FloatArray
    low: FloatArray
    high: FloatArray
    counts: IntArray
    histogram: FloatArray


def reliability(probs: FloatArray, labels: IntArray) -> Reliability:
    """Sort images by their top probability, of (N, K), into the 15 bins of `dnas_ens.metrics.scores.ece15`."""
    top, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    bins = np.digitize(top, np.linspace(0.0, 1.0, NUM_BINS + 1)[1:-1], right=True)
    counts = np.bincount(bins, minlength=NUM_BINS)
    right = np.bincount(bins, weights=correct, minlength=NUM_BINS).astype(np.int64)
    held = np.flatnonzero(counts)
    tests = [binomtest(int(right[bin_]), int(counts[bin_])) for bin_ in held]
    wilson = [test.proportion_ci(CONFIDENCE, method="wilson") for test in tests]
    return Reliability(
        confidence=(np.bincount(bins, weights=top, minlength=NUM_BINS)[held] / counts[held]),
        accuracy=right[held] / counts[held],
        low=np.array([interval.low for interval in wilson]),
        high=np.array([interval.high for interval in wilson]),
        counts=counts[held],
        histogram=counts / len(labels),
    )


def calibration_section(files: RunFiles) -> Section | None:
    """Reliability of the ensemble, and of its members pooled."""
    predictions = files.predictions
    if predictions is None:
        return None
    labels = predictions.test_labels
    whole, stated = files.whole, files.stated
    bins = reliability(stated, labels)
    pictures = [
        Picture(
            name=f"reliability-{whole}",
            title=f"The {whole}",
            caption=f"Images sorted by the stated probability of the answer into 15 bins of equal width, "
            f"{int(bins.counts.max()):,} of {len(labels):,} in the fullest; larger dots hold more, lines are "
            f"95{NARROW}% intervals (Wilson), the bars below are the share of images. Expected calibration error "
            f"{100 * ece15.of(stated, labels):.1f} points; before the temperature, as in the tables, "
            f"{100 * ece15.of(files.averaged, labels):.1f}.",
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
                caption=f"The same for all {len(pooled):,} answers of the {count(files.num_members, 'member')} pooled, "
                "without a temperature. "
                "Their intervals are too narrow, for the members see the same images.",
                description="Reliability diagram of the members' own answers, pooled, of the same form.",
                figure=draw_reliability(members, colour=style.VERMILION),
            )
        )
    text = (
        f"<p>Of the images answered with a stated probability of 80{NARROW}%, 80{NARROW}% should be "
        "right: honest probabilities lie on the dashed diagonal. Bins that hold few images scatter.</p>"
    )
    return Section(name="calibration", title="Are the probabilities honest?", text=text, pictures=pictures)


def draw_reliability(bins: Reliability, *, colour: str = style.BLUE) -> Figure:
    """Draw accuracy against confidence, each bin with its Wilson interval, above a histogram of confidence."""
    height = panels.HEIGHT + 40
    above = panels.BOTTOM + HISTOGRAM_HEIGHT + PANEL_GAP
    figure, axis = panels.panel(x_label="", y_label="images right", height=height, bottom=above)
    across = panels.WIDTH - panels.LEFT - panels.RIGHT
    below = panels.add_axis(figure, (panels.LEFT, panels.BOTTOM, across, HISTOGRAM_HEIGHT))
    panels.style_axis(below, x_label="stated probability of the answer", y_label="images")

    axis.plot([0, 1], [0, 1], color=style.LINE_COLOUR, linestyle="--", linewidth=1.2, gid="diagonal")
    axis.vlines(bins.confidence, bins.low, bins.high, color=colour, linewidth=1.2, alpha=0.4)
    areas = 14 + 90 * np.sqrt(bins.counts / bins.counts.max())
    axis.scatter(bins.confidence, bins.accuracy, s=areas, color=colour, edgecolor="white", zorder=3)
    panels.write(axis, "claims too little", (0.03, 0.96), colour=style.MUTED_COLOUR, size=8.5)
    panels.write(axis, "claims too much", (0.985, 0.05), colour=style.MUTED_COLOUR, size=8.5, ha="right")

    edges = np.linspace(0, 1, NUM_BINS + 1)
    below.bar(edges[:-1], bins.histogram, width=0.9 / NUM_BINS, align="edge", color=colour, alpha=0.45)
    tallest = int(bins.histogram.argmax())
    height_of_tallest = float(bins.histogram[tallest])
    above_it = (float(edges[tallest] + edges[tallest + 1]) / 2, height_of_tallest)
    share = f"{100 * height_of_tallest:.0f} %"
    panels.write(below, share, above_it, offset=(0, 7), ha="center", size=8.5, colour=style.MUTED_COLOUR)
    below.set_ylim(0, 1.4 * height_of_tallest)
    below.set_yticks([])
    axis.set_ylim(-0.03, 1.03)
    axis.tick_params(labelbottom=False)
    for each in (axis, below):
        each.set_xlim(-0.01, 1.02)
        each.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        each.yaxis.set_label_coords(-38 / across, 0.5)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return figure


def size_section(files: RunFiles) -> Section | None:
    """NLL and accuracy against the number of members."""
    predictions = files.predictions
    if predictions is None or files.num_members < 2:
        return None
    rows = files.ensemble_sizes
    pictures = [
        Picture(
            name="nll-by-size",
            title="Calibrated NLL",
            caption="Dots are means over subsets of that many members, averaged with equal weights, each with a "
            "temperature of its own; the band is one standard deviation over the subsets. It tells how much the choice "
            "among these members matters, not how other trainings would turn out. Lower is better.",
            description=f"Calibrated NLL against number of members: {rows[0]['calibrated_nll']:.4f} nats for one, "
            f"{rows[-1]['calibrated_nll']:.4f} for {rows[-1]['size']}.",
            figure=draw_by_size(rows, "calibrated_nll", y_label="calibrated NLL, nats"),
        ),
        Picture(
            name="accuracy-by-size",
            title="Accuracy",
            caption="The same subsets; higher is better.",
            description=f"Accuracy against number of members: {percent(rows[0]['accuracy'])} for one, "
            f"{percent(rows[-1]['accuracy'])} for {rows[-1]['size']}.",
            figure=draw_by_size(rows, "accuracy", y_label="accuracy, %"),
        ),
    ]
    return Section(name="size", title="How many members does it take?", pictures=pictures)


def draw_by_size(rows: Sequence[Mapping[str, Any]], metric: str, *, y_label: str) -> Figure:
    """Draw a metric against the number of members, with a band of one standard deviation over subsets around it.

    Args:
        rows: See `dnas_ens.metrics.ensemble_size.ensemble_size_curve`.
        metric: "accuracy", shown in per cent, or one in nats.
        y_label: What it is, with its unit.
    """
    factor, decimals, unit = (100.0, 1, " %") if metric == "accuracy" else (1.0, 3, "")
    counts = np.array([row["size"] for row in rows])
    mean = np.array([row[metric] for row in rows])
    deviation = np.array([row[f"{metric}_deviation"] or 0.0 for row in rows])  # a single subset has none
    middle, bottom, top = (factor * values for values in (mean, mean - deviation, mean + deviation))
    figure, axis = panels.panel(x_label="members", y_label=y_label, right=44)
    axis.fill_between(counts, bottom, top, color=style.BLUE, alpha=0.14, linewidth=0)
    axis.plot(counts, middle, color=style.BLUE, linewidth=1.8, marker="o", markersize=5)
    axis.lines[0].set(markeredgecolor="white", markeredgewidth=0.8, gid="mean")
    for place in {0, len(counts) - 1}:
        value = f"{middle[place]:.{decimals}f}{unit}"
        last = place == len(counts) - 1
        panels.write(
            axis,
            value,
            (float(counts[place]), float(middle[place])),
            # The first is on the side that the line leaves free.
            offset=(8, 0) if last else (7, 9 if middle[-1] < middle[0] else -9),
            colour=style.BLUE,
            bold=last,
        )
    margin = 0.12 * max(float(top.max() - bottom.min()), 1e-6)
    axis.set_ylim(float(bottom.min()) - margin, float(top.max()) + margin)
    axis.set_xlim(float(counts[0]) - 0.25, float(counts[-1]) + 0.1)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=panels.STEPS))
    return figure


def selective_section(files: RunFiles) -> Section | None:
    """Risk against coverage of the ensemble, its best member and the others."""
    predictions = files.predictions
    if predictions is None or len(predictions.test_labels) < 10:
        return None
    labels, members = predictions.test_labels, files.num_members
    whole, best = files.whole, files.best
    shown = {}
    if members > 1:
        shown = {f"member {index}": predictions.test_probs[index] for index in range(members) if index != best}
        shown["best member"] = predictions.test_probs[best]
    shown[whole] = files.averaged
    found = {
        name: RiskCoverage.of(probs.max(axis=1).astype(np.float64), probs.argmax(axis=1) != labels)
        for name, probs in shown.items()
    }
    beside = f", {100 * found['best member'].aurc:.2f}{NARROW}% of the best member" if members > 1 else ""
    picture = Picture(
        name="risk-coverage",
        title="Risk against coverage",
        caption=f"Error among the images answered when only the surest are. The area under the curve (AURC) is "
        f"{100 * found[whole].aurc:.2f}{NARROW}% of the {whole}{beside}; lower is better."
        + (" Thin lines are the other members." if members > 2 else ""),
        description=f"Share of wrong answers against share of images answered, of {', '.join(list(found)[-2:])}; all "
        f"images answered, the {whole} errs on {percent(float(found[whole].risk[-1]))}.",
        figure=draw_risk_coverage(found, faint=members - 1),
    )
    text = (
        "<p>A predictor that may hand unsure images to a person errs less on the rest, if it is unsure of the right "
        "ones.</p>"
    )
    return Section(name="selective", title="What if it may decline to answer?", text=text, pictures=[picture])


def draw_risk_coverage(curves: Mapping[str, RiskCoverage], *, faint: int = 0) -> Figure:
    """Draw the error among answered images against the share answered, a line a predictor.

    Args:
        curves: By name; the last is the one to look at.
        faint: How many of the first are drawn as a background, with one name for all.
    """
    figure, axis = panels.panel(x_label="images answered, surest first", y_label="wrong among them", right=70)
    # Where to begin: a round coverage before the first error, from 0.1, where single images weigh less.
    first = min((curve.coverage[curve.risk > 0].min(initial=1.0) for curve in curves.values()), default=1.0)
    start = float(np.clip(np.floor(10 * first - 0.5) / 10, 0.1, 0.8))
    ends: dict[str, tuple[float, str]] = {}
    for index, (name, curve) in enumerate(curves.items()):
        if index < faint:
            axis.plot(curve.coverage, curve.risk, color=style.LINE_COLOUR, linewidth=0.9, alpha=0.7, gid=name)
            continue
        colour = style.BLUE if index == len(curves) - 1 else style.VERMILION
        axis.plot(curve.coverage, curve.risk, color=colour, linewidth=1.8, gid=name)
        ends[name] = (float(curve.risk[-1]), colour)
    highest = max(float(curve.risk[curve.coverage >= start].max()) for curve in curves.values())
    top = max(highest * 1.08, 1e-3)
    panels.name_ends(axis, ends, x=1.0, offset=6, span=top)
    axis.set_xlim(start - 0.01 * (1 - start), 1.0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=panels.STEPS))
    axis.set_ylim(-0.02 * top, top)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.04 else 1, symbol=" %"))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=panels.STEPS))
    return figure
