"""Accuracy, NLL, Brier score and calibration error of predicted class probabilities.

Legend: B batch, M members, N images, K classes. Everything is computed in float64.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from dnas_ens.types import FloatArray, IntArray

PROB_FLOOR = 1e-12
"""Smallest probability a logarithm is taken of; bounds the NLL of one image by 27.6 nats."""

SUM_TOLERANCE = 1e-3
"""Largest deviation of a row's sum from 1: the rounding of half-precision probabilities."""

ResultT = TypeVar("ResultT")


def check_probs(probs: npt.ArrayLike, *, num_dims: int = 2) -> FloatArray:
    """Validate class probabilities and return them in float64.

    Args:
        probs: Class probabilities, shape (N, K), or (M, N, K) with ``num_dims=3``; range [0, 1].
        num_dims: Number of axes that is asked for, 2 or 3.

    Raises:
        ValueError: Wrong number of axes, an empty axis, a value that is not finite or negative, or
            classes that do not sum to 1.
    """
    array = np.asarray(probs, dtype=np.float64)
    shape = "(N, K)" if num_dims == 2 else "(M, N, K)"
    if array.ndim != num_dims:
        raise ValueError(f"probabilities must have shape {shape}, got {array.shape}")
    if array.size == 0:
        raise ValueError(f"probabilities must not be empty, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"probabilities must be finite, {int((~np.isfinite(array)).sum())} values are not")
    if array.min() < 0.0:
        raise ValueError(f"probabilities must not be negative, the smallest is {array.min():g}")
    worst = float(np.abs(array.sum(axis=-1) - 1.0).max())
    if worst > SUM_TOLERANCE:
        raise ValueError(f"probabilities of one image must sum to 1, the worst sum is {worst:g} away from it")
    return array


def check_labels(labels: npt.ArrayLike, *, num_images: int, num_classes: int) -> IntArray:
    """Validate class indices, shape (N,), and return them in int64.

    Raises:
        ValueError: Wrong shape, not integers, or a label outside 0..K-1.
    """
    array = np.asarray(labels)
    if array.shape != (num_images,):
        raise ValueError(f"labels must have shape ({num_images},), got {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {array.min()}..{array.max()}")
    return array.astype(np.int64)


def check_predictions(probs: npt.ArrayLike, labels: npt.ArrayLike, *, num_dims: int = 2) -> tuple[FloatArray, IntArray]:
    """Validate probabilities of one model (N, K), or of members (M, N, K), together with their labels (N,).

    Raises:
        ValueError: See `check_probs` and `check_labels`.
    """
    checked = check_probs(probs, num_dims=num_dims)
    return checked, check_labels(labels, num_images=checked.shape[-2], num_classes=checked.shape[-1])


class Measure(Protocol[ResultT]):
    """A measure of class probabilities, shape (N, K), range [0, 1], and labels, shape (N,), integers in 0..K-1.

    Called, it checks both and raises ValueError for what does not fit (see `check_predictions`); ``of`` trusts
    probabilities in float64 and labels in int64 that were checked before.
    """

    of: Callable[[FloatArray, IntArray], ResultT]

    def __call__(self, probs: npt.ArrayLike, labels: npt.ArrayLike) -> ResultT:
        """Check the arguments and measure them."""


def measure(of: Callable[[FloatArray, IntArray], ResultT]) -> Measure[ResultT]:
    """Make a function of checked probabilities and labels a `Measure`."""

    @functools.wraps(of)
    def checked(probs: npt.ArrayLike, labels: npt.ArrayLike) -> ResultT:
        return of(*check_predictions(probs, labels))

    cast("Any", checked).of = of
    return cast("Measure[ResultT]", checked)


def labels_digest(labels: npt.ArrayLike) -> str:
    """SHA-256, in hexadecimal, of class indices in their order; equal for scores of the same images."""
    return hashlib.sha256(np.asarray(labels).astype("<i8").tobytes()).hexdigest()


@measure
def accuracy(probs: FloatArray, labels: IntArray) -> float:
    """Share of images whose most probable class is the label, in [0, 1]; a tie goes to the lowest class."""
    return float((probs.argmax(axis=1) == labels).mean())


@measure
def balanced_accuracy(probs: FloatArray, labels: IntArray) -> float:
    """Mean over the classes that occur of the share of their images that are right, in [0, 1], as scikit-learn's."""
    counts = np.bincount(labels)
    right = np.bincount(labels, weights=probs.argmax(axis=1) == labels)
    return float((right[counts > 0] / counts[counts > 0]).mean())


def label_losses(label_probs: FloatArray) -> FloatArray:
    """Return -ln max(p, 1e-12) of probabilities of the right class, in nats, in [0, 27.7]."""
    # A sum of rounded probabilities may exceed 1 in the last place: the upper clip keeps the losses >= 0.
    losses: FloatArray = -np.log(np.clip(label_probs, PROB_FLOOR, 1.0)) + 0.0
    return losses


@measure
def per_image_nll(probs: FloatArray, labels: IntArray) -> FloatArray:
    """Negative log-likelihood of every label, -ln max(p_n[y_n], 1e-12): nats in [0, 27.7], shape (N,)."""
    return label_losses(probs[np.arange(len(labels)), labels])


@measure
def nll(probs: FloatArray, labels: IntArray) -> float:
    """Negative log-likelihood of the labels, the mean of `per_image_nll`: nats in [0, 27.7]."""
    return float(per_image_nll.of(probs, labels).mean())


@measure
def brier(probs: FloatArray, labels: IntArray) -> float:
    """Brier score of several classes, 1/N sum_n sum_k (p_n[k] - 1[k = y_n])^2, in [0, 2].

    The original definition (Brier, Monthly Weather Review 78, 1950), a sum over classes: twice the
    usual score of a binary event.
    """
    residual = probs.copy()
    residual[np.arange(len(labels)), labels] -= 1.0
    return float((residual**2).sum(axis=1).mean())


@measure
def ece15(probs: FloatArray, labels: IntArray) -> float:
    """Expected calibration error with 15 equal-width bins of the top probability, in [0, 1].

    sum_b |B_b|/N * |acc(B_b) - conf(B_b)| with the bins ((b-1)/15, b/15], b = 1..15 (Guo et al., arXiv
    1706.04599). It is biased by the number of images and bins; compare it at equal N only (Ashukha et
    al., arXiv 2002.06470).
    """
    confidence = probs.max(axis=1)
    correct = probs.argmax(axis=1) == labels
    inner_bounds = np.linspace(0.0, 1.0, 16)[1:-1]
    bins = np.digitize(confidence, inner_bounds, right=True)
    # |B|/N * |acc - conf| is |sum of (correct - confidence)| / N, which needs no guard for an empty bin.
    gaps = np.bincount(bins, weights=correct - confidence, minlength=15)
    return float(np.abs(gaps).sum() / len(labels))


@measure
def evaluate_probs(probs: FloatArray, labels: IntArray) -> dict[str, float]:
    """All metrics of one predictive distribution: ``accuracy``, ``nll`` in nats, ``brier``, ``ece15``."""
    return {
        "accuracy": accuracy.of(probs, labels),
        "nll": nll.of(probs, labels),
        "brier": brier.of(probs, labels),
        "ece15": ece15.of(probs, labels),
    }
