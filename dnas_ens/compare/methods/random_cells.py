"""Cells that no gradient found: random ones, the choice among them, an evolution, random deviations of a base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dnas_ens.baselines import EvolutionConfig, RegularisedEvolution, deviations_sharing, random_pool
from dnas_ens.compare.frontier import Option, Trained, of_exchangeable, option, windows
from dnas_ens.compare.methods.comparison import Comparison, Result
from dnas_ens.ensembles.selection import greedy_selection
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import best_single
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.training.members import trained_network
from dnas_ens.training.trainer import MemberTraining


def space_of(comparison: Comparison) -> SearchSpace:
    """Return the space the run searched."""
    base = comparison.base
    return SearchSpace(
        name=base.space, operations=comparison.operations, num_nodes=base.num_nodes, cell_types=base.cell_types
    )


def random_pool_of(comparison: Comparison, count: int) -> list[Genotype]:
    """Return the first random cells of the run's pool; a larger pool starts with the smaller one."""
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
        seconds=comparison.largest_seconds if comparison.budget.members_grid else 0.0,
    )
    pool = random_pool_of(comparison, size)
    yield random_nes(comparison, everyone, comparison.at_other_epochs("random-cells", pool))
    if size == count:
        return
    tried = everyone.first(size)
    yield Result(
        name=f"greedy choice of {size} random cells (NES-RS)",
        label="NES-RS",
        predictions=tried.predictions.of_members(greedy(tried.predictions, range(size), count)),
        networks=size,
        cpu_seconds=sum(tried.seconds),
        options=[chosen_from(tried, windows(size, part), count=count) for part in range(1, size + 1)],
    )


def random_nes(comparison: Comparison, trained: Trained, others: Sequence[Trained] = ()) -> Result:
    """Return the first M random cells; more, fewer and other numbers of epochs are its options."""
    return Result.of_all(
        trained.first(comparison.num_members),
        name="random cells (Random-NES)",
        label="random cells",
        options=[found for one in (trained, *others) for found in of_exchangeable(one)],
    )


def best_random_cell(comparison: Comparison) -> Iterator[Result]:
    """A deep ensemble of the best random cell of the pool, by its network on val."""
    size, count = comparison.budget.pool_size, comparison.num_members
    pool = random_pool_of(comparison, size)
    trained = comparison.train("random-cells", pool)
    of_best = comparison.train("best-random-cell", [pool[best_single(trained.predictions)]] * count)
    finding = sum(trained.seconds)
    yield Result.of_all(
        of_best,
        fixed=finding,
        name=f"deep ensemble of the best of {size} random cells",
        label="deep ensemble, best random cell",
        networks=size + count,
    )


def greedy(predictions: Predictions, pool: Sequence[int], num_members: int) -> list[int]:
    """Choose members from a part of a pool on the NLL of their ensemble on val; all where there are no more."""
    tried = list(pool)
    picked = greedy_selection(
        predictions.val_probs[tried].astype(np.float64),
        predictions.val_labels,
        num_members=min(num_members, len(tried)),
    )
    return [tried[position] for position in picked]


def chosen_from(trained: Trained, pools: Sequence[Sequence[int]], *, count: int) -> Option:
    """Return the option of choosing up to ``count`` greedily out of a part of a pool, the mean over parts of one size.

    All of a part is paid for.
    """
    return option(
        trained.predictions,
        [greedy(trained.predictions, pool, count) for pool in pools],
        cpu_seconds=[sum(trained.seconds[index] for index in pool) for pool in pools],
        epochs=trained.epochs,
        spent=f"{min(count, len(pools[0]))} of {len(pools[0])} × {trained.epochs}",
    )


def nes_re(comparison: Comparison) -> Iterator[Result]:
    """NES-RE (arXiv 2006.08573): evolve cells, then choose M of all that were trained, as many as for NES-RS.

    Its options are the choices after 1, 2, ... networks. The state is kept after each of them.
    """
    name, budget, count = "nes-re", comparison.budget, comparison.num_members
    folder, recipe, size = comparison.baseline(name), comparison.recipe_of(name), budget.pool_size

    def train(genotype: Genotype, index: int) -> np.ndarray:
        training = MemberTraining(genotype, comparison.data, recipe, index=index, device=comparison.device)
        with comparison.threads_of_a_member():
            trained_network(training, folder=folder, num_members=size)
        return training.val_probs()

    evolution = RegularisedEvolution(
        train,
        comparison.data.val.labels.cpu().numpy(),
        space=space_of(comparison),
        config=EvolutionConfig(
            population_size=budget.population,
            num_parents=budget.parents,
            edges_per_node=comparison.search.candidates.edges_per_node,
            seed=comparison.recipe.seed,
        ),
        folder=folder,
    )
    evolution.run(size)
    # All are finished: what is left is to predict test.
    trained = comparison.train(name, [individual.genotype for individual in evolution.history[:size]])
    choices = [evolution.select(min(count, tried), num_evaluations=tried).picked for tried in range(1, size + 1)]
    yield Result(
        name=f"evolution of {size} cells (NES-RE)",
        label="NES-RE",
        predictions=trained.predictions.of_members(choices[-1]),
        networks=size,
        cpu_seconds=sum(trained.seconds),
        options=[
            option(
                trained.predictions,
                [picked],
                cpu_seconds=[sum(trained.seconds[:tried])],
                epochs=trained.epochs,
                spent=f"{len(picked)} of {tried} × {trained.epochs}",
            )
            for tried, picked in enumerate(choices, start=1)
        ],
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
        like: Genotypes whose numbers of shared edges are matched; none is matched at all edges.
        search_seconds: What finding the base took.
    """
    shared = [min(genotype.shared_edges(base), base.num_edges - 1) for genotype in like]
    genotypes = deviations_sharing(base, shared, operations=comparison.operations, seed=comparison.recipe.seed)
    trained = comparison.train(folder, genotypes)
    return Result.of_all(trained, searching=search_seconds, name=name, label="random deviations")
