"""One temperature for an ensemble's averaged probabilities, and the calibrated NLL.

The primary figure of a comparison is the NLL after one temperature, fitted on validation data and
applied **after** averaging (Ashukha et al., arXiv 2002.06470): without it the comparison measures how
well each method happened to be calibrated. Legend: N images, K classes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from dnas_ens.metrics.scores import PROB_FLOOR, check_predictions, check_probs, nll, per_image_nll
from dnas_ens.types import FloatArray

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0


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
        probs: Class probabilities, shape (N, K), range [0, 1].
        temperature: T, a finite number above 0.

    Returns:
        Class probabilities in float64, shape (N, K), range [0, 1].

    Raises:
        ValueError: A temperature that is not finite and positive; else see `check_probs`.
    """
    checked = check_probs(probs)
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    if temperature == 1.0:
        return checked.copy()
    scaled: FloatArray = np.exp(_scaled_log_probs(np.log(np.maximum(checked, PROB_FLOOR)), temperature))
    return scaled


def fit_temperature(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Find the temperature with the least NLL, for probabilities that are averaged already.

    NLL(T) = -1/N sum_n [ln p_n[y_n] / T - ln sum_k p_n[k]^(1/T)] is convex in 1/T, hence unimodal in
    ln T, which a bounded Brent search goes over. Fit on validation data only.

    Args:
        probs: Class probabilities, shape (N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        T in [0.05, 20]; 1 where no temperature has a smaller NLL on this data.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_predictions`.
    """
    checked, classes = check_predictions(probs, labels)
    log_probs = np.log(np.maximum(checked, PROB_FLOOR))
    images = np.arange(len(classes))

    def nll_at(log_temperature: float) -> float:
        return float(-_scaled_log_probs(log_probs, math.exp(log_temperature))[images, classes].mean())

    found = minimize_scalar(
        nll_at,
        bounds=(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-7},
    )
    temperature = float(np.clip(math.exp(found.x), MIN_TEMPERATURE, MAX_TEMPERATURE))
    # The search ends within a tolerance of the minimum, which may lie at T = 1 itself.
    better = nll(apply_temperature(checked, temperature), classes) < nll(checked, classes)
    return temperature if better else 1.0


def calibrated_nll(test_probs: npt.ArrayLike, test_labels: npt.ArrayLike, temperature: float) -> float:
    """NLL of the test labels after a temperature that was fitted on other data (arXiv 2002.06470).

    Args:
        test_probs: Averaged class probabilities, shape (N, K), range [0, 1].
        test_labels: Class indices, shape (N,), integers in 0..K-1.
        temperature: T > 0, from `fit_temperature` on validation data.

    Returns:
        Mean over images in nats, in [0, 27.7].

    Raises:
        ValueError: See `apply_temperature` and `dnas_ens.metrics.scores.check_predictions`.
    """
    checked, classes = check_predictions(test_probs, test_labels)
    return nll(apply_temperature(checked, temperature), classes)


def per_image_calibrated_nll(
    val_probs: npt.ArrayLike, val_labels: npt.ArrayLike, test_probs: npt.ArrayLike, test_labels: npt.ArrayLike
) -> FloatArray:
    """NLL of every test label after one temperature that is fitted on validation data.

    What paired tests over images compare; its mean is `calibrated_nll`.

    Args:
        val_probs: Averaged class probabilities, shape (N_val, K), range [0, 1].
        val_labels: Class indices, shape (N_val,), integers in 0..K-1.
        test_probs: Averaged class probabilities, shape (N, K), range [0, 1].
        test_labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        Nats, shape (N,), in [0, 27.7].

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_predictions`.
    """
    return per_image_nll(apply_temperature(test_probs, fit_temperature(val_probs, val_labels)), test_labels)
