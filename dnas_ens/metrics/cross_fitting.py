"""Honest use of one validation set for two fits: combining weights, and the temperature of what they combine.

Weights fitted on val make the ensemble look better calibrated there than it is, and a temperature fitted on the same
images inherits the mistake. Cross-fitting fits each on a half of its own (the sample splitting of Chernozhukov et
al., arXiv 1608.00060). Legend: M members, N images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dnas_ens.data.splits import alternating_halves
from dnas_ens.metrics.calibration import apply_temperature, fit_temperature
from dnas_ens.metrics.diversity import normalise_weights
from dnas_ens.metrics.scores import check_labels, check_probs, per_image_nll
from dnas_ens.types import FloatArray, IntArray

#: Members' probabilities (M, N, K) and labels (N,) -> combining weights (M,).
WeightFit = Callable[[FloatArray, IntArray], npt.ArrayLike]


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """Two fits, each with weights from one half of val and a temperature from the other.

    Args:
        weights: Combining weights, shape (2, M), rows sum to 1.
        temperatures: T of both, in [0.05, 20].
        per_image_calibrated_nll: Mean of the two fits' losses on every test image, nats, shape (N,); what paired tests
            over images compare.
    """

    weights: FloatArray
    temperatures: tuple[float, float]
    per_image_calibrated_nll: FloatArray

    @property
    def calibrated_nll(self) -> float:
        """Mean over test images, in nats."""
        return float(self.per_image_calibrated_nll.mean())


def cross_fit(
    val_probs: npt.ArrayLike,
    val_labels: npt.ArrayLike,
    test_probs: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    *,
    fit: WeightFit,
) -> CrossFit:
    """Fit weights on one stratified half of val and the temperature on the other, both ways round.

    The losses of the two calibrated predictions are averaged, not the predictions: their average would be an ensemble
    of another kind.

    Args:
        val_probs: Members' class probabilities on validation data, shape (M, N_val, K), range [0, 1].
        val_labels: Class indices, shape (N_val,), integers in 0..K-1.
        test_probs: Members' class probabilities on test data, shape (M, N, K), range [0, 1].
        test_labels: Class indices, shape (N,), integers in 0..K-1.
        fit: How weights are fitted, such as ``lambda probs, labels: fit_weights(probs, labels).weights``.

    Returns:
        Both fits and their mean loss.

    Raises:
        ValueError: Fewer than two validation images, or weights that are none; else see
            `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    val, test = check_probs(val_probs, num_dims=3), check_probs(test_probs, num_dims=3)
    of_val = check_labels(val_labels, num_images=val.shape[1], num_classes=val.shape[2])
    of_test = check_labels(test_labels, num_images=test.shape[1], num_classes=test.shape[2])
    first, second = alternating_halves(of_val)
    if not (len(first) and len(second)):
        raise ValueError(f"{len(of_val)} validation images cannot be halved")
    weights, temperatures, losses = [], [], []
    for fitted_on, calibrated_on in ((first, second), (second, first)):
        shares = normalise_weights(fit(val[:, fitted_on], of_val[fitted_on]), len(val))
        averaged = np.tensordot(shares, val[:, calibrated_on], axes=1)
        temperature = fit_temperature(averaged, of_val[calibrated_on])
        predicted = apply_temperature(np.tensordot(shares, test, axes=1), temperature)
        weights.append(shares)
        temperatures.append(temperature)
        losses.append(per_image_nll(predicted, of_test))
    return CrossFit(
        weights=np.stack(weights),
        temperatures=(temperatures[0], temperatures[1]),
        per_image_calibrated_nll=np.mean(losses, axis=0),
    )
