"""What the report shows beside the stored tables, computed from the predictions alone.

Legend: M members, N test images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import best_single
from dnas_ens.metrics.calibration import apply_temperature
from dnas_ens.metrics.scores import per_image_nll
from dnas_ens.metrics.significance import CONFIDENCE
from dnas_ens.types import FloatArray

NUM_BINS = 15
#: Resamples for the intervals of a table's rows; a tenth of those of a test, for a page is written in seconds.
NUM_RESAMPLES = 2_000
MAX_EMBEDDED = 1_000
MIN_EMBEDDED = 30
LEAST_EMBEDDED = 1e-4

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the results with its intervals over test images; NaN where resampling says nothing.

    Args:
        values: The stored figures.
        role: "member", "best", "average" or "ensemble".
        losses: Calibrated NLL of each test image in nats, (N,).
        accuracy_interval: Of the accuracy, in [0, 1].
        calibrated_nll_interval: Of the calibrated NLL, in nats.
    """

    values: Mapping[str, Any]
    role: str
    losses: FloatArray
    accuracy_interval: Interval
    calibrated_nll_interval: Interval


def rows_with_intervals(predictions: Predictions, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Give every row of the results a percentile bootstrap over test images.

    All rows are resampled together, with the same images; the temperature stays as it was fitted.

    Args:
        predictions: Of M members.
        rows: As ``result_rows`` returns them: M members, best single, average member, ensemble.
    """
    labels, members = predictions.test_labels, len(predictions.test_probs)
    probs = [np.asarray(each, dtype=np.float64) for each in predictions.test_probs]
    probs.append(predictions.averaged()[1])
    temperatures = [rows[index]["temperature"] for index in (*range(members), -1)]
    losses = np.stack(
        [
            per_image_nll(apply_temperature(each, temperature), labels)
            for each, temperature in zip(probs, temperatures, strict=True)
        ]
    )
    correct = np.stack([(each.argmax(axis=1) == labels).astype(np.float64) for each in probs])
    best = best_single(predictions)

    def arranged(values: FloatArray) -> FloatArray:
        """Bring values of members and ensemble, (M+1, N), into the order of the rows."""
        return np.concatenate(
            [values[:-1], values[best][None], values[:-1].mean(axis=0)[None], values[-1][None]]
        )

    losses, correct = arranged(losses), arranged(correct)
    loss_intervals, correct_intervals = _intervals(losses), _intervals(correct)
    roles = ["member"] * members + ["best", "average", "ensemble"]
    return [
        Row(
            values=row,
            role=role,
            losses=losses[index],
            accuracy_interval=correct_intervals[index],
            calibrated_nll_interval=loss_intervals[index],
        )
        for index, (row, role) in enumerate(zip(rows, roles, strict=True))
    ]


def _intervals(values: FloatArray) -> list[Interval]:
    """Return the interval of the mean of each row of (R, N); NaN for a row that does not vary."""
    if values.shape[1] < 2:
        return [(math.nan, math.nan)] * len(values)
    found = bootstrap(
        (values,),
        np.mean,
        axis=1,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, 10_000_000 // values.size),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [
        (float(low), float(high)) if low < high else (math.nan, math.nan)
        for low, high in np.column_stack([found.low, found.high])
    ]


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
    counts: NDArray[np.int64]
    histogram: FloatArray


def reliability(probs: NDArray, labels: NDArray) -> Reliability:
    """Sort images by their top probability into the 15 bins of `dnas_ens.metrics.scores.ece15`.

    Args:
        probs: Class probabilities (N, K).
        labels: (N,).
    """
    top, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    bins = np.digitize(top, np.linspace(0.0, 1.0, NUM_BINS + 1)[1:-1], right=True)
    counts = np.bincount(bins, minlength=NUM_BINS)
    right = np.bincount(bins, weights=correct, minlength=NUM_BINS).astype(np.int64)
    held = np.flatnonzero(counts)
    wilson = [
        binomtest(int(right[bin_]), int(counts[bin_])).proportion_ci(CONFIDENCE, method="wilson")
        for bin_ in held
    ]
    return Reliability(
        confidence=(np.bincount(bins, weights=top, minlength=NUM_BINS)[held] / counts[held]),
        accuracy=right[held] / counts[held],
        low=np.array([interval.low for interval in wilson]),
        high=np.array([interval.high for interval in wilson]),
        counts=counts[held],
        histogram=counts / len(labels),
    )


def embed(probs: NDArray) -> tuple[FloatArray, NDArray[np.int64]] | None:
    """Place images in a plane by t-SNE of their predicted distributions (van der Maaten and Hinton, JMLR 9, 2008).

    Distances are Euclidean between logarithms of probabilities, those below 0.0001 counted as 0.0001, so that sure
    images still lie apart by what they resemble next.

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
