"""The searched ensemble itself: as it is, its best member, its members weighted on val."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from frontier import of_ordered

from methods.comparison import Comparison
from methods.results import Result, some_members


def ours(comparison: Comparison) -> Iterator[Result]:
    """The searched ensemble, its best member, and its members weighted on val.

    Its options are its first k members in the order the search chose them in.
    """
    from dnas_ens.ensembles.weighting import caruana_weights, fit_weights
    from dnas_ens.evaluate.tables import best_single

    members = comparison.members
    trainings = [members, *comparison.at_other_epochs("ours", comparison.genotypes)]
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
    yield replace(part, name="its best member on val", predictions=some_members(whole.predictions, [best]))
    everyone = range(comparison.num_members)
    val = whole.predictions.val_probs.astype(np.float64), whole.predictions.val_labels
    for name, fitted in (
        ("its members weighted by log-loss (SLSQP)", fit_weights(*val, seed=comparison.recipe.seed)),
        ("its members weighted by Caruana selection", caruana_weights(*val)),
    ):
        weights = [float(weight) for weight in fitted.weights]
        yield replace(part, name=name, predictions=some_members(whole.predictions, everyone, weights))
