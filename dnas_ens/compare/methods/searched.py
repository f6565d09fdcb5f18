"""Searched cells: ours as they are and weighted on val; independent DARTS searches; the published hypernetwork.

Further searches have the run's data, supernet and number of epochs, and each a seed of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from dnas_ens.compare.frontier import of_ordered, option, windows
from dnas_ens.compare.methods.comparison import Comparison, Result, Searched
from dnas_ens.compare.methods.random_cells import random_deviations
from dnas_ens.ensembles import weighting
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import best_single
from dnas_ens.metrics.calibration import WeightFit, cross_fit

#: Val images from which weights and temperature are fitted on different halves of val. Half of fewer may hold no
#: error of a good ensemble, which leaves the temperature without a minimum.
LEAST_CROSSED = 1_000
DARTS, HYPERNET = "darts-ens", "hypernet"


def ours(comparison: Comparison) -> Iterator[Result]:
    """The searched ensemble, its best member, and its members weighted on val.

    Its options are its first k members in the order of the search's ranking.
    """
    search = comparison.search_seconds
    trainings = [comparison.grown, *comparison.at_other_epochs("ours", comparison.genotypes)]
    whole = Result.of_all(
        comparison.members,
        searching=search,
        name="ours (searched ensemble)",
        label="ours",
        options=[found for trained in trainings for found in of_ordered(trained, fixed_seconds=search)],
    )
    yield whole
    part = replace(whole, label="", options=())
    best = best_single(whole.predictions)
    yield replace(part, name="its best member on val", predictions=whole.predictions.of_members([best]))

    fits: dict[str, WeightFit] = {
        "log-loss (SLSQP)": lambda probs, labels: weighting.fit_weights(probs, labels).weights,
        "differential evolution": lambda probs, labels: weighting.evolve_weights(probs, labels).weights,
        "Caruana selection": lambda probs, labels: weighting.caruana_weights(probs, labels).weights,
    }
    for name, fit in fits.items():
        yield replace(part, name=f"its members weighted by {name}", **weighted(whole.predictions, fit))


def weighted(predictions: Predictions, fit: WeightFit) -> dict[str, Any]:
    """Return predictions with weights fitted on val, and where val is large enough the fit that is crossed."""
    val = predictions.val_probs.astype(np.float64), predictions.val_labels
    everyone = range(predictions.num_members)
    found: dict[str, Any] = {"predictions": predictions.of_members(everyone, np.asarray(fit(*val)).tolist())}
    if len(predictions.val_labels) >= LEAST_CROSSED:
        test = predictions.test_probs.astype(np.float64), predictions.test_labels
        found["cross_fit"] = cross_fit(*val, *test, fit=fit)
    return found


def darts_search(comparison: Comparison, index: int) -> Searched:
    """Return a plain DARTS search: lambda is 0 and nothing is penalised (regime "optimal")."""
    return comparison.search_again(
        f"{DARTS}/search-{index}", "optimal", seed=search_seed(comparison, f"{DARTS}-{index}")
    )


def search_seed(comparison: Comparison, name: str) -> int:
    """Return the seed of a further search, different from all others of the run."""
    return comparison.search.seed + zlib.crc32(name.encode())


def darts_ens(comparison: Comparison) -> Iterator[Result]:
    """DartsEns: the cells of M independent DARTS searches, each trained once; all searches are paid for."""
    yield list(darts(comparison))[1]


def darts(comparison: Comparison) -> Iterator[Result]:
    """DARTS, the cell of one search trained once, and DartsEns, those of M searches."""
    count = comparison.num_members
    searches = [darts_search(comparison, index) for index in range(count)]
    trained = comparison.train(DARTS, [search.base for search in searches])
    searching = [search.seconds for search in searches]
    costs = [sum(pair) for pair in zip(searching, trained.seconds, strict=True)]
    yield Result(
        name="one DARTS search, its cell trained once (DARTS)",
        predictions=trained.predictions.of_members([0]),
        networks=1,
        cpu_seconds=costs[0],
        search_seconds=searching[0],
    )
    yield Result(
        name="cells of independent DARTS searches (DartsEns)",
        label="DartsEns",
        predictions=trained.predictions,
        networks=count,
        cpu_seconds=sum(costs),
        search_seconds=sum(searching),
        options=[
            option(
                trained.predictions,
                windows(count, size),
                cpu_seconds=[sum(costs[index] for index in subset) for subset in windows(count, size)],
                epochs=trained.epochs,
            )
            for size in range(1, count + 1)
        ],
    )


def hypernet(comparison: Comparison) -> Iterator[Result]:
    """EdgeNES: one path of architectures (regime "hypernet") that starts from the cell of the first DARTS search."""
    base, found = darts_search(comparison, 0), hypernet_search(comparison)
    trained = comparison.train(HYPERNET, found.genotypes)
    yield Result.of_all(
        trained,
        searching=base.seconds + found.seconds,
        ordered=True,
        name="hypernetwork upon a DARTS cell (EdgeNES)",
        label="EdgeNES",
    )


def hypernet_search(comparison: Comparison) -> Searched:
    """Return the search of the hypernetwork on the cell of the first DARTS search."""
    return comparison.search_again(
        f"{HYPERNET}/search",
        "hypernet",
        seed=search_seed(comparison, HYPERNET),
        members=comparison.num_members,
        base=darts_search(comparison, 0).file,
    )


def darts_deviations(comparison: Comparison) -> Result:
    """Return random deviations of the first DARTS cell, as far from it as the hypernetwork's members."""
    base = darts_search(comparison, 0)
    return random_deviations(
        comparison,
        "darts-deviations",
        base=base.base,
        like=hypernet_search(comparison).genotypes,
        search_seconds=base.seconds,
        name="random deviations of the DARTS cell (RandomD-NES)",
    )
