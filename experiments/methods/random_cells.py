"""Cells that nobody searched: random ones, the choice among them, and random deviations of a base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from frontier import Option, of_exchangeable, option, windows

from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace
from methods.comparison import Comparison
from methods.results import Result, Trained

if TYPE_CHECKING:
    from dnas_ens.evaluate.predictions import Predictions


def space_of(comparison: Comparison) -> SearchSpace:
    """Return the space the run searched."""
    base = comparison.base
    return SearchSpace(operations=comparison.operations, num_nodes=base.num_nodes, cell_types=base.cell_types)


def random_pool_of(comparison: Comparison, count: int) -> list[Genotype]:
    """Return the first random cells of the run's pool; a larger pool begins with the smaller one."""
    from dnas_ens.baselines import random_pool

    return random_pool(
        space_of(comparison),
        count,
        seed=comparison.recipe.seed,
        edges_per_node=comparison.search.candidates.edges_per_node,
    )


def random_cells(comparison: Comparison) -> Iterator[Result]:
    """Random-NES and, where the pool is larger than the ensemble, NES-RS."""
    size, count = comparison.budget.pool_size, comparison.num_members
    everyone = comparison.train_within(
        "random-cells",
        lambda wanted: random_pool_of(comparison, wanted),
        first=size,
        # Beyond the pool where ours grows too.
        seconds=comparison.largest_seconds if comparison.budget.members else 0.0,
    )
    pool = random_pool_of(comparison, size)
    yield random_nes(comparison, everyone, comparison.at_other_epochs("random-cells", pool))
    if size == count:
        return
    predictions, seconds = everyone.predictions.of_members(range(size)), everyone.seconds[:size]
    choice = greedy(predictions, range(size), count)
    yield Result(
        name=f"greedy choice of {size} random cells (NES-RS)",
        label="NES-RS",
        predictions=predictions.of_members(choice),
        networks=size,
        cpu_seconds=sum(seconds),
        options=[
            chosen_from(predictions, seconds, windows(size, tried), count=count, epochs=everyone.epochs)
            for tried in range(1, size + 1)
        ],
    )


def best_random_cell(comparison: Comparison) -> Iterator[Result]:
    """A deep ensemble of the best random cell of the pool, by its network on val."""
    from dnas_ens.evaluate.tables import best_single

    size, count = comparison.budget.pool_size, comparison.num_members
    pool = random_pool_of(comparison, size)
    trained = comparison.train("random-cells", pool)
    seconds = trained.seconds
    of_best = comparison.train("best-random-cell", [pool[best_single(trained.predictions)]] * count)
    yield Result(
        name=f"deep ensemble of the best of {size} random cells",
        label="deep ensemble, best random cell",
        predictions=of_best.predictions,
        networks=size + count,
        cpu_seconds=sum(seconds) + sum(of_best.seconds),
        options=of_exchangeable(
            of_best.predictions, of_best.seconds, epochs=of_best.epochs, fixed_seconds=sum(seconds)
        ),
    )


def random_nes(comparison: Comparison, trained: Trained, others: Sequence[Trained] = ()) -> Result:
    """Return M random cells as they come; more, fewer and other numbers of epochs are its options."""
    count = comparison.num_members
    return Result(
        name="random cells (Random-NES)",
        label="random cells",
        predictions=trained.predictions.of_members(range(count)),
        networks=count,
        cpu_seconds=sum(trained.seconds[:count]),
        options=[
            found
            for one in (trained, *others)
            for found in of_exchangeable(one.predictions, one.seconds, epochs=one.epochs)
        ],
    )


def greedy(predictions: Predictions, pool: Sequence[int], num_members: int) -> list[int]:
    """Choose members from a part of a pool on the NLL of their ensemble on val; all where there are no more."""
    from dnas_ens.ensembles.selection import greedy_selection

    tried = list(pool)
    picked = greedy_selection(
        predictions.val_probs[tried].astype(np.float64),
        predictions.val_labels,
        num_members=min(num_members, len(tried)),
    )
    return [tried[position] for position in picked]


def chosen_from(
    predictions: Predictions,
    seconds: Sequence[float],
    pools: Sequence[Sequence[int]],
    *,
    count: int,
    epochs: int,
) -> Option:
    """Return the option of choosing up to M greedily out of a part of a pool, the mean over such parts.

    Args:
        predictions: Of the whole pool.
        seconds: CPU seconds of each of it.
        pools: Parts of one size; all of a part is paid for.
        count: M.
        epochs: Epochs of each.
    """
    return option(
        predictions,
        [greedy(predictions, pool, count) for pool in pools],
        cpu_seconds=[sum(seconds[index] for index in pool) for pool in pools],
        epochs=epochs,
        spent=f"{min(count, len(pools[0]))} of {len(pools[0])} × {epochs}",
    )


def deviations(comparison: Comparison) -> Iterator[Result]:
    """RandomD-NES: random deviations of the base that share as many edges with it as our members do."""
    yield random_deviations(
        comparison,
        "deviations",
        base=comparison.base,
        like=comparison.genotypes,
        search_seconds=comparison.search_seconds,
        name="random deviations of the base at our distances (RandomD-NES)",
    )


def random_deviations(
    comparison: Comparison,
    folder: str,
    *,
    base: Genotype,
    like: Sequence[Genotype],
    search_seconds: float,
    name: str,
) -> Result:
    """Return random deviations of a base that share as many edges with it as given genotypes do.

    Args:
        comparison: Trains them.
        folder: Folder of the method.
        base: What is deviated from.
        like: Genotypes whose numbers of shared edges are matched; none is matched at all edges.
        search_seconds: What finding the base took.
        name: The row's name.
    """
    from dnas_ens.baselines import deviations_sharing

    shared = [min(genotype.shared_edges(base), base.num_edges - 1) for genotype in like]
    genotypes = deviations_sharing(
        base, shared, operations=comparison.operations, seed=comparison.recipe.seed
    )
    trained = comparison.train(folder, genotypes)
    return Result(
        name=name,
        label="random deviations",
        predictions=trained.predictions,
        networks=len(genotypes),
        cpu_seconds=search_seconds + sum(trained.seconds),
        search_seconds=search_seconds,
        options=of_exchangeable(
            trained.predictions, trained.seconds, epochs=trained.epochs, fixed_seconds=search_seconds
        ),
    )
