"""One temperature for an ensemble's averaged probabilities, and the calibrated NLL.

The primary figure of a comparison is the NLL after one temperature, fitted on validation data and
applied **after** averaging (Ashukha et al., arXiv 2002.06470): without it the comparison measures how
well each method happened to be calibrated.

Legend: M members, N images, K classes. Averaged class probabilities have shape (N, K), members' (M, N, K), both in
[0, 1]; labels are class indices, shape (N,), integers in 0..K-1. Those of val and test may differ in N alone. All are
checked, and a ValueError says what does not fit (see `dnas_ens.metrics.scores.check_predictions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from dnas_ens.data.splits import alternating_halves
from dnas_ens.metrics.diversity import normalise_weights
from dnas_ens.metrics.scores import PROB_FLOOR, check_predictions, check_probs, measure, nll, per_image_nll
from dnas_ens.types import FloatArray, IntArray

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
#: s, how far the logarithm of a temperature is expected to be from 0.
LOG_TEMPERATURE_SPREAD = 0.5


def _scaled_log_probs(log_probs: FloatArray, temperature: float) -> FloatArray:
    """Return log softmax(log_probs / temperature), shape (N, K)."""
    scaled = log_probs / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    normalised: FloatArray = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return normalised


def apply_temperature(probs: npt.ArrayLike, temperature: float) -> FloatArray:
    """Sharpen (T < 1) or flatten (T > 1) probabilities, p^(1/T) / sum_k p_k^(1/T).

    For one network this is temperature scaling of its logits (Guo et al., arXiv 1706.04599). A
    probability below 1e-12 counts as 1e-12; a temperature of exactly 1 changes nothing.

    Args:
        temperature: T, a finite number above 0.

    Returns:
        Class probabilities in float64, shape (N, K), range [0, 1].

    Raises:
        ValueError: A temperature that is not finite and positive.
    """
    checked = check_probs(probs)
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    return tempered(checked, temperature)


def tempered(probs: FloatArray, temperature: float) -> FloatArray:
    """Return what `apply_temperature` does, of arguments that were checked."""
    if temperature == 1.0:
        return probs.copy()
    scaled: FloatArray = np.exp(_scaled_log_probs(np.log(np.maximum(probs, PROB_FLOOR)), temperature))
    return scaled


@measure
def fit_temperature(probs: FloatArray, labels: IntArray) -> float:
    """Find the temperature with the least N NLL(T) + (ln T)^2 / (2 s^2), for probabilities that are averaged already.

    NLL(T) = -1/N sum_n [ln p_n[y_n] / T - ln sum_k p_n[k]^(1/T)]. The second term is a normal prior on ln T of
    deviation s = 0.5: a small val may hold no error, and the NLL alone would then be least at T = 0, where every answer
    is sure. With a thousand images it no longer matters. A bounded Brent search goes over ln T.

    Fit on validation data only.

    Returns:
        T in [0.05, 20]; 1 where no temperature is better on this data.
    """
    log_probs = np.log(np.maximum(probs, PROB_FLOOR))
    images = np.arange(len(labels))

    def cost(log_temperature: float) -> float:
        fitted = _scaled_log_probs(log_probs, math.exp(log_temperature))[images, labels]
        return float(-fitted.mean() + log_temperature**2 / (2 * LOG_TEMPERATURE_SPREAD**2 * len(labels)))

    bounds = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    # Close enough that an end of the range is met, too.
    found = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    # The search ends within a tolerance of the minimum, which may lie at T = 1 itself.
    return math.exp(found.x) if found.fun < cost(0.0) else 1.0


def calibrated_nll(test_probs: npt.ArrayLike, test_labels: npt.ArrayLike, temperature: float) -> float:
    """NLL of the test labels after T > 0 that was fitted on other data (arXiv 2002.06470): nats, in [0, 27.7]."""
    return nll(apply_temperature(test_probs, temperature), test_labels)


def per_image_calibrated_nll(
    val_probs: npt.ArrayLike, val_labels: npt.ArrayLike, test_probs: npt.ArrayLike, test_labels: npt.ArrayLike
) -> FloatArray:
    """NLL of every test label after one temperature that is fitted on validation data.

    What paired tests over images compare; its mean is `calibrated_nll`. Nats, shape (N,), in [0, 27.7].
    """
    return per_image_nll(apply_temperature(test_probs, fit_temperature(val_probs, val_labels)), test_labels)


#: Members' probabilities (M, N, K) and labels (N,) -> combining weights (M,).
WeightFit = Callable[[FloatArray, IntArray], npt.ArrayLike]


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """Two fits, each with weights from one half of val and a temperature from the other.

    Args:
        weights: Combining weights, shape (2, M), rows sum to 1.
        temperatures: T of each fit, in [0.05, 20].
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

    Weights fitted on val make the ensemble look better calibrated there than it is, and a temperature fitted on the
    same images inherits the mistake; so each is fitted on a half of its own (the sample splitting of Chernozhukov et
    al., arXiv 1608.00060). The losses of the two calibrated predictions are averaged, not the predictions: their
    average would be an ensemble of another kind.

    Args:
        fit: How weights are fitted, such as ``lambda probs, labels: fit_weights(probs, labels).weights``.

    Raises:
        ValueError: Fewer than two validation images, or invalid weights.
    """
    val, of_val = check_predictions(val_probs, val_labels, num_dims=3)
    test, of_test = check_predictions(test_probs, test_labels, num_dims=3)
    first, second = alternating_halves(of_val)
    if not (len(first) and len(second)):
        raise ValueError(f"{len(of_val)} validation images cannot be halved")
    weights, temperatures, losses = [], [], []
    for fitted_on, calibrated_on in ((first, second), (second, first)):
        shares = normalise_weights(fit(val[:, fitted_on], of_val[fitted_on]), len(val))
        averaged = np.tensordot(shares, val[:, calibrated_on], axes=1)
        temperature = fit_temperature.of(averaged, of_val[calibrated_on])
        predicted = tempered(np.tensordot(shares, test, axes=1), temperature)
        weights.append(shares)
        temperatures.append(temperature)
        losses.append(per_image_nll.of(predicted, of_test))
    return CrossFit(
        weights=np.stack(weights),
        temperatures=(temperatures[0], temperatures[1]),
        per_image_calibrated_nll=np.mean(losses, axis=0),
    )
