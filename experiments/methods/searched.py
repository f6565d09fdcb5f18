"""The searched ensemble itself: as it is, its best member, its members weighted on val."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from frontier import of_ordered

from methods.comparison import Comparison
from methods.results import Result

if TYPE_CHECKING:
    from dnas_ens.evaluate.predictions import Predictions
    from dnas_ens.metrics.cross_fitting import WeightFit
    from dnas_ens.types import FloatArray, IntArray

#: Val images from which weights and temperature are fitted on different halves of val. Half of fewer may hold no
#: error of a good ensemble, which leaves the temperature without a minimum.
LEAST_CROSSED = 1_000


def ours(comparison: Comparison) -> Iterator[Result]:
    """The searched ensemble, its best member, and its members weighted on val.

    Its options are its first k members in the order of the search's ranking.
    """
    from dnas_ens.evaluate.tables import best_single

    members = comparison.members
    trainings = [comparison.grown, *comparison.at_other_epochs("ours", comparison.genotypes)]
    whole = Result(
        name="ours (searched ensemble)",
        label="ours",
        predictions=members.predictions,
        networks=comparison.num_members,
        cpu_seconds=comparison.total_seconds,
        search_seconds=comparison.search_seconds,
        options=[
            option
            for trained in trainings
            for option in of_ordered(
                trained.predictions,
                trained.seconds,
                epochs=trained.epochs,
                fixed_seconds=comparison.search_seconds,
            )
        ],
    )
    yield whole
    part = replace(whole, label="", options=())
    best = best_single(whole.predictions)
    yield replace(part, name="its best member on val", predictions=whole.predictions.of_members([best]))
    for name, fit in (
        ("log-loss (SLSQP)", _by_log_loss),
        ("differential evolution", _by_differential_evolution),
        ("Caruana selection", _by_caruana_selection),
    ):
        yield replace(part, name=f"its members weighted by {name}", **_weighted(whole.predictions, fit))


def _by_log_loss(val_probs: FloatArray, val_labels: IntArray) -> FloatArray:
    from dnas_ens.ensembles.weighting import fit_weights

    return fit_weights(val_probs, val_labels).weights


def _by_differential_evolution(val_probs: FloatArray, val_labels: IntArray) -> FloatArray:
    from dnas_ens.ensembles.weighting import evolve_weights

    return evolve_weights(val_probs, val_labels).weights


def _by_caruana_selection(val_probs: FloatArray, val_labels: IntArray) -> FloatArray:
    from dnas_ens.ensembles.weighting import caruana_weights

    return caruana_weights(val_probs, val_labels).weights


def _weighted(predictions: Predictions, fit: WeightFit) -> dict[str, Any]:
    """Return predictions with weights fitted on val, and where val is large enough the fit that is crossed."""
    from dnas_ens.metrics.cross_fitting import cross_fit

    val = predictions.val_probs.astype(np.float64), predictions.val_labels
    everyone = range(predictions.num_members)
    found: dict[str, Any] = {"predictions": predictions.of_members(everyone, np.asarray(fit(*val)).tolist())}
    if len(predictions.val_labels) >= LEAST_CROSSED:
        test = predictions.test_probs.astype(np.float64), predictions.test_labels
        found["cross_fit"] = cross_fit(*val, *test, fit=fit)
    return found
