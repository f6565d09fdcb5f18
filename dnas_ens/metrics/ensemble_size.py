"""How much each further member brings: metrics of the average of k of M members, against k.

From predictions alone, so that a curve costs no training beyond the M members. Legend: M members, N images, K classes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dnas_ens.metrics.calibration import calibrated_nll, fit_temperature
from dnas_ens.metrics.scores import accuracy, check_labels, check_probs, nll
from dnas_ens.types import FloatArray, IntArray

#: What is measured at every size.
CURVE_METRICS = ("accuracy", "nll", "calibrated_nll")


@dataclass(frozen=True, kw_only=True)
class EnsembleSizeCurve:
    """Metrics against ensemble size.

    The deviation is that over subsets of the same M members. Subsets overlap, the more the larger they are, so it
    tells how much the choice among these members matters, not how another M trainings would turn out.

    Args:
        sizes: 1..M, shape (M,).
        subsets: How many subsets of each size were measured, shape (M,).
        mean: For each of `CURVE_METRICS` the mean over subsets, shape (M,).
        deviation: For each of them the standard deviation over subsets, shape (M,); NaN where there is one subset.
    """

    sizes: IntArray
    subsets: IntArray
    mean: dict[str, FloatArray]
    deviation: dict[str, FloatArray]

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a dictionary a size, ready for JSON: ``size``, ``subsets``, each metric and its ``_deviation``."""
        rows = []
        for position, size in enumerate(self.sizes):
            row: dict[str, Any] = {"size": int(size), "subsets": int(self.subsets[position])}
            for name in CURVE_METRICS:
                deviation = float(self.deviation[name][position])
                row[name] = float(self.mean[name][position])
                row[f"{name}_deviation"] = None if math.isnan(deviation) else deviation
            rows.append(row)
        return rows


def ensemble_size_curve(
    val_probs: npt.ArrayLike,
    val_labels: npt.ArrayLike,
    test_probs: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    *,
    max_subsets: int = 30,
    seed: int = 0,
) -> EnsembleSizeCurve:
    """Measure the equally weighted average of k members on test, for k = 1..M.

    Every subset has a temperature of its own, fitted on val after averaging (Ashukha et al., arXiv 2002.06470).

    Args:
        val_probs: Members' class probabilities on validation data, shape (M, N_val, K), range [0, 1].
        val_labels: Class indices, shape (N_val,), integers in 0..K-1.
        test_probs: Members' class probabilities on test data, shape (M, N, K), range [0, 1].
        test_labels: Class indices, shape (N,), integers in 0..K-1.
        max_subsets: Largest number of subsets of one size, 1 or more; all of them where there are no more, else
            a sample without repetition.
        seed: Of the sample.

    Returns:
        The curve.

    Raises:
        ValueError: Another number of members on val than on test, no subsets; else see
            `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    val, test = check_probs(val_probs, num_dims=3), check_probs(test_probs, num_dims=3)
    num_members, _, num_classes = test.shape
    if val.shape[::2] != test.shape[::2]:
        raise ValueError(
            f"val and test must have the same members and classes, got {val.shape}, {test.shape}"
        )
    if max_subsets < 1:
        raise ValueError(f"max_subsets must be at least 1, got {max_subsets}")
    of_val = check_labels(val_labels, num_images=val.shape[1], num_classes=num_classes)
    of_test = check_labels(test_labels, num_images=test.shape[1], num_classes=num_classes)
    generator = np.random.default_rng(seed)
    sizes = range(1, num_members + 1)
    chosen = [draw_subsets(num_members, size, max_subsets, generator=generator) for size in sizes]

    def measure(subset: tuple[int, ...]) -> tuple[float, ...]:
        members = list(subset)
        averaged = test[members].mean(axis=0)
        temperature = fit_temperature(val[members].mean(axis=0), of_val)
        return (
            accuracy(averaged, of_test),
            nll(averaged, of_test),
            calibrated_nll(averaged, of_test, temperature),
        )

    measured = [np.array([measure(subset) for subset in subsets]) for subsets in chosen]
    means = np.stack([values.mean(axis=0) for values in measured])
    deviations = np.stack(
        [
            values.std(axis=0, ddof=1) if len(values) > 1 else np.full(len(CURVE_METRICS), np.nan)
            for values in measured
        ]
    )
    return EnsembleSizeCurve(
        sizes=np.array(sizes),
        subsets=np.array([len(subsets) for subsets in chosen]),
        mean=dict(zip(CURVE_METRICS, means.T, strict=True)),
        deviation=dict(zip(CURVE_METRICS, deviations.T, strict=True)),
    )


def draw_subsets(
    num_members: int, size: int, max_subsets: int, *, generator: np.random.Generator
) -> list[tuple[int, ...]]:
    """Return all subsets of a size, or as many different ones at random as are allowed.

    Args:
        num_members: M.
        size: Members of a subset, 1..M.
        max_subsets: At least 1.
        generator: Of the sample.

    Returns:
        Sorted tuples of members, in lexicographic order.
    """
    if math.comb(num_members, size) <= max_subsets:
        return list(itertools.combinations(range(num_members), size))
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < max_subsets:
        drawn.add(tuple(sorted(generator.permutation(num_members)[:size].tolist())))
    return sorted(drawn)
