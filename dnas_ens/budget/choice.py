"""Who joins an ensemble, and what it is worth on val without having been chosen on the images it is scored on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles.selection import averaged_loss, greedy_selection
from dnas_ens.metrics.calibration import tempered
from dnas_ens.metrics.scores import PROB_FLOOR, per_image_nll
from dnas_ens.types import FloatArray, IntArray

#: s, how far the logarithm of an ensemble's temperature is expected to be from 0.
LOG_TEMPERATURE_SPREAD = 0.5


def best_set(probs: FloatArray, labels: IntArray) -> list[int]:
    """Choose who joins: of the greedy order by NLL (arXiv 2006.08573) the beginning with the least calibrated NLL.

    Args:
        probs: Probabilities of the networks (P, N, K).
        labels: (N,).
    """
    order = greedy_selection(probs, labels, num_members=len(probs))
    sums = np.cumsum(probs[order], axis=0, dtype=np.float64)
    losses = [averaged_loss(total / count, labels, "calibrated_nll") for count, total in enumerate(sums, start=1)]
    return order[: int(np.argmin(losses)) + 1]


def likely_temperature(averaged: FloatArray, labels: IntArray) -> float:
    """Return the temperature with the least N NLL(T) + (ln T)^2 / (2 s^2), a fit that takes few images for few.

    Half of a small val may hold no error, and without the second term the best temperature would be 0.
    """
    log_probs = np.log(np.maximum(averaged, PROB_FLOOR))
    images = np.arange(len(labels))

    def cost(log_temperature: float) -> float:
        scaled = log_probs / math.exp(log_temperature)
        fitted = scaled[images, labels] - logsumexp(scaled, axis=1)
        return float(-fitted.sum() + log_temperature**2 / (2 * LOG_TEMPERATURE_SPREAD**2))

    return math.exp(minimize_scalar(cost, bounds=(-3.0, 3.0), method="bounded").x)


def cross_fitted_losses(
    probs: FloatArray, labels: IntArray, *, choose: Callable[[FloatArray, IntArray], list[int]] = best_set
) -> FloatArray:
    """Return the calibrated NLL of every val image by the networks that ``choose`` takes on the other half of val.

    Choosing and fitting on the images that are scored would make every further network look like a gain
    (cross-fitting, arXiv 1608.00060).
    """
    halves = alternating_halves(labels)
    losses = np.empty(len(labels))
    for fitted_on, scored_on in (halves, halves[::-1]):
        chosen = choose(probs[:, fitted_on], labels[fitted_on])
        temperature = likely_temperature(probs[chosen][:, fitted_on].mean(axis=0, dtype=np.float64), labels[fitted_on])
        averaged = probs[chosen][:, scored_on].mean(axis=0, dtype=np.float64)
        losses[scored_on] = per_image_nll.of(tempered(averaged, temperature), labels[scored_on])
    return losses


def cross_fitted_loss(
    probs: FloatArray, labels: IntArray, *, choose: Callable[[FloatArray, IntArray], list[int]] = best_set
) -> float:
    """Return the mean of `cross_fitted_losses`."""
    return float(cross_fitted_losses(probs, labels, choose=choose).mean())
