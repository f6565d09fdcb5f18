"""Other searches than the run's own: independent DARTS searches, and the published hypernetwork upon one of them.

They search with the run's data, supernet and number of epochs, each with a seed of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from frontier import of_ordered, option, windows

from methods.comparison import Comparison
from methods.random_cells import random_deviations
from methods.results import Result, Searched

DARTS, HYPERNET, DEVIATIONS = "darts-ens", "hypernet", "darts-deviations"


def darts_search(comparison: Comparison, index: int) -> Searched:
    """Return a plain DARTS search: lambda is 0 and nothing is penalised (regime "optimal")."""
    return comparison.search_again(
        f"{DARTS}/search-{index}", "optimal", seed=search_seed(comparison, f"{DARTS}-{index}")
    )


def search_seed(comparison: Comparison, name: str) -> int:
    """Return the seed of a further search, which is that of no other one of the run."""
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
    searching = base.seconds + found.seconds
    yield Result(
        name="hypernetwork upon a DARTS cell (EdgeNES)",
        label="EdgeNES",
        predictions=trained.predictions,
        networks=len(found.genotypes),
        cpu_seconds=searching + sum(trained.seconds),
        search_seconds=searching,
        options=of_ordered(
            trained.predictions, trained.seconds, epochs=trained.epochs, fixed_seconds=searching
        ),
    )


def hypernet_search(comparison: Comparison) -> Searched:
    """Return the search of the hypernetwork upon the cell of the first DARTS search."""
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
        DEVIATIONS,
        base=base.base,
        like=hypernet_search(comparison).genotypes,
        search_seconds=base.seconds,
        name="random deviations of the DARTS cell (RandomD-NES)",
    )
