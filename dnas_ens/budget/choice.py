"""Who joins an ensemble, and what it is worth on val without having been chosen on the images it is scored on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles.selection import averaged_loss, greedy_selection
from dnas_ens.metrics.calibration import fit_temperature, tempered
from dnas_ens.metrics.scores import per_image_nll
from dnas_ens.types import FloatArray, IntArray


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
        temperature = fit_temperature.of(probs[chosen][:, fitted_on].mean(axis=0, dtype=np.float64), labels[fitted_on])
        averaged = probs[chosen][:, scored_on].mean(axis=0, dtype=np.float64)
        losses[scored_on] = per_image_nll.of(tempered(averaged, temperature), labels[scored_on])
    return losses


def cross_fitted_loss(
    probs: FloatArray, labels: IntArray, *, choose: Callable[[FloatArray, IntArray], list[int]] = best_set
) -> float:
    """Return the mean of `cross_fitted_losses`."""
    return float(cross_fitted_losses(probs, labels, choose=choose).mean())
