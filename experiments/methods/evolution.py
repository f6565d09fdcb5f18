"""NES-RE: regularised evolution in the run's space (arXiv 2006.08573)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from frontier import option

from dnas_ens.space.genotype import Genotype
from methods.comparison import Comparison
from methods.random_cells import space_of
from methods.results import Result

FOLDER = "nes-re"


def nes_re(comparison: Comparison) -> Iterator[Result]:
    """Evolve cells, then choose M of everything ever trained; as many networks are trained as for NES-RS.

    Its options are the choices after 1, 2, ... networks. The state is kept after each of them.
    """
    from dnas_ens.baselines import EvolutionConfig, RegularisedEvolution
    from dnas_ens.training.members import trained_network
    from dnas_ens.training.trainer import MemberTraining

    budget, folder = comparison.budget, comparison.baseline(FOLDER)
    recipe = comparison.recipe_of(FOLDER)

    def train(genotype: Genotype, index: int) -> np.ndarray:
        training = MemberTraining(genotype, comparison.data, recipe, index=index, device=comparison.device)
        trained_network(training, folder=folder, num_members=budget.pool_size)
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
    size, count = budget.pool_size, comparison.num_members
    evolution.run(size)
    # All are finished: what is left is to predict test.
    trained = comparison.train(FOLDER, [individual.genotype for individual in evolution.history[:size]])
    choices = [
        evolution.select(min(count, tried), num_evaluations=tried).picked for tried in range(1, size + 1)
    ]
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
