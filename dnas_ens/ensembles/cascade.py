"""Members asked in turn until the ensemble is sure enough: most images need few of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dnas_ens.errors import UserError
from dnas_ens.metrics.diversity import normalise_weights
from dnas_ens.metrics.scores import check_predictions
from dnas_ens.types import FloatArray, IntArray

#: Thresholds that are tried, at equal shares of the confidences on val.
_CANDIDATES = 500


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """When to stop asking: members m = 1, 2, ... are averaged until the largest probability reaches a threshold.

    Source: confidence-based ensemble cascades (Wang et al., arXiv 2012.01988).

    Args:
        threshold: On the average before the temperature, in [0, 1]; above 1 all members are always asked.
        mean_members: Members asked for an image, on average over the images it was fitted on.
    """

    threshold: float
    mean_members: float


def cascaded(member_probs: npt.ArrayLike, weights: FloatArray, threshold: float) -> tuple[FloatArray, IntArray]:
    """Average the members that are asked for each image.

    Args:
        member_probs: (M, N, K); what members that are not asked say is not read.

    Returns:
        Class probabilities (N, K), and how many members they are of (N,), in 1..M.
    """
    averages = _averages(np.asarray(member_probs), weights)
    sure = averages.max(axis=2) >= threshold
    sure[-1] = True
    last: IntArray = sure.argmax(axis=0).astype(np.int64)
    return averages[last, np.arange(len(last))], last + 1


def fit_cascade(
    member_probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    accuracy_loss: float = 0.0,
) -> Cascade:
    """Find the least threshold at which the cascade is as accurate as all members, on images none was trained on.

    Args:
        member_probs: (M, N, K), in the order in which members are asked.
        labels: (N,).
        weights: Combining weights (M,); None for equal ones. A first member of weight 0 is asked as well.
        accuracy_loss: How much of the accuracy, in [0, 1), may be lost.

    Raises:
        UserError: An accuracy loss outside [0, 1).
        ValueError: See `dnas_ens.metrics.scores.check_predictions`.
    """
    if not 0.0 <= accuracy_loss < 1.0:
        remedy = "Give a share from 0 on and below 1, such as 0.001."
        raise UserError(f"The accuracy to lose is {accuracy_loss}.", remedy)
    probs, checked = check_predictions(member_probs, labels, num_dims=3)
    averages = _averages(probs, normalise_weights(weights, len(probs)))
    confidences, right = averages.max(axis=2), averages.argmax(axis=2) == checked
    least = right[-1].mean() - accuracy_loss
    images = np.arange(len(checked))
    candidates = np.unique(np.quantile(confidences, np.linspace(0, 1, _CANDIDATES)))
    for threshold in candidates:
        sure = confidences >= threshold
        sure[-1] = True
        stops = sure.argmax(axis=0)
        # Shares of a count of images, so equal ones must not differ by rounding.
        if right[stops, images].mean() >= least - 1e-12:
            return Cascade(threshold=float(threshold), mean_members=float(stops.mean()) + 1.0)
    return Cascade(threshold=2.0, mean_members=float(len(probs)))


def _averages(member_probs: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the averages of the first 1, 2, ... M members, (M, N, K); 0 where they have no weight."""
    sums = np.cumsum(weights[:, None, None] * member_probs, axis=0, dtype=np.float64)
    averages: FloatArray = sums / np.maximum(np.cumsum(weights), 1e-12)[:, None, None]
    return averages
