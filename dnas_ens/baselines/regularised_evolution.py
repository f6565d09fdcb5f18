"""NES-RE: regularised evolution of a population whose parents are chosen for the ensemble they would make.

Source: Zaidi et al., arXiv 2006.08573, Algorithm 1, upon regularised evolution (Real et al., arXiv 1802.01548).

Legend: P size of the population, m parent candidates, M members, N validation images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dnas_ens.baselines.evaluations import (
    VAL_PROBS,
    Evaluations,
    FoundEnsemble,
    TrainFunction,
    forward_select,
)
from dnas_ens.baselines.evolution_state import EvolutionConfig, Individual, read_state, write_state
from dnas_ens.baselines.mutation import mutate
from dnas_ens.baselines.random_search import random_pool
from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import PROB_FLOOR
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.types import FloatArray

STATE = "evolution.json"
EVALUATIONS = "evaluations"
#: Validation NLLs are rounded to single precision at most.
NLL_TOLERANCE = 1e-6


class RegularisedEvolution:
    """NES-RE, step by step; `nes_regularised_evolution` runs it to the end.

    The first population is random. Then, again and again: ForwardSelect takes m candidates from the population for
    the validation NLL of *their ensemble*; one of them, drawn uniformly, is the parent; a mutated child is trained
    and joins; the oldest dies, however good it is. Every one ever trained stays in the pool that the members are
    chosen from. Architectures may return, and are then trained with another index and hence other seeds.

    Each step draws from a generator of its own, seeded by the seed and the index, so a resumed course is the
    uninterrupted one.

    Args:
        train: Trains a genotype; called with it and its index, which should decide all seeds.
        val_labels: Class indices of the validation images, (N,).
        space: The space to search.
        config: Population, parents, seed.
        initial: The first population; None draws it with `random_pool` from the seed, so that it is the beginning of
            the pool of a random search with that seed.
        folder: Holds evolution.json, the state, and ``evaluations/``; None keeps all in memory. A folder that holds a
            state is resumed.

    Raises:
        UserError: The folder holds an evolution of other settings or on other labels, or ``initial`` has not P
            genotypes.
    """

    def __init__(
        self,
        train: TrainFunction,
        val_labels: npt.ArrayLike,
        *,
        space: SearchSpace,
        config: EvolutionConfig,
        initial: Sequence[Genotype] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.space, self.config = space, config
        self.folder = None if folder is None else Path(folder)
        self.evaluations = Evaluations(
            train, val_labels, folder=None if self.folder is None else self.folder / EVALUATIONS
        )
        drawn = initial
        if drawn is None:
            drawn = random_pool(
                space, config.population_size, seed=config.seed, edges_per_node=config.edges_per_node
            )
        if len(drawn) != config.population_size:
            raise UserError(
                f"The first population has {len(drawn)} genotypes, not {config.population_size}.",
                "Give as many genotypes as population_size says.",
            )
        self.initial = tuple(drawn)
        self.history: list[Individual] = []
        self._label_probs: list[FloatArray] = []
        self._resume()

    @property
    def population(self) -> list[int]:
        """Indices of those alive, oldest first: the P youngest, for nothing but age kills."""
        return list(range(len(self.history)))[-self.config.population_size :]

    def choose_parent(self, generator: np.random.Generator) -> int:
        """Draw the index of the next parent from the candidates; see the class."""
        alive = self.population
        if self.config.tournament_size is not None:
            alive = sorted(generator.choice(alive, size=self.config.tournament_size, replace=False).tolist())
        candidates = forward_select([self._label_probs[index] for index in alive], self.config.num_parents)
        return int(alive[candidates[int(generator.integers(len(candidates)))]])

    def step(self) -> Individual:
        """Train the next of the first population, or a child, and return it once the state is saved."""
        index = len(self.history)
        if index < self.config.population_size:
            parent, genotype = None, self.initial[index]
        else:
            generator = np.random.default_rng([self.config.seed, index])
            parent = self.choose_parent(generator)
            genotype = mutate(
                self.history[parent].genotype, operations=self.space.operations, generator=generator
            )
        individual = self._add(genotype, parent)
        if self.folder is not None:
            files = [
                f"{EVALUATIONS}/{self.evaluations.name_of(one.genotype, one.index)}/{VAL_PROBS}"
                for one in self.history
            ]
            write_state(self.folder / STATE, self._settings(), self.history, files)
        return individual

    def run(self, num_evaluations: int) -> None:
        """Go on until so many genotypes have been trained in all; a larger number later goes on further."""
        missing = range(len(self.history), num_evaluations)
        for _ in tqdm(missing, desc="evolution", unit="network", disable=None, leave=False):
            self.step()

    def select(self, num_members: int, *, num_evaluations: int | None = None) -> FoundEnsemble:
        """Choose M of everything ever trained, greedily on the ensemble's validation NLL.

        Args:
            num_members: M.
            num_evaluations: Choose from the first so many only: the result of a smaller budget. None for all.

        Raises:
            UserError: M is below 1 or more than were trained.
        """
        pool = self.history[:num_evaluations]
        if not pool:
            raise UserError("Nothing has been trained yet.", "Run the evolution before selecting from it.")
        picked = forward_select(self._label_probs[:num_evaluations], num_members)
        genotypes = [individual.genotype for individual in pool]
        return self.evaluations.found(genotypes, picked, [individual.parent for individual in pool])

    def _add(self, genotype: Genotype, parent: int | None) -> Individual:
        index = len(self.history)
        label_probs = self.evaluations.label_probs(genotype, index)
        val_nll = float(-np.log(np.clip(label_probs, PROB_FLOOR, 1.0)).mean())
        individual = Individual(index=index, genotype=genotype, parent=parent, val_nll=val_nll)
        self.history.append(individual)
        self._label_probs.append(label_probs)
        return individual

    def _settings(self) -> dict[str, Any]:
        """Return what another course would differ in."""
        return {
            **asdict(self.config),
            "space": asdict(self.space),
            "initial": [genotype.to_dict() for genotype in self.initial],
        }

    def _resume(self) -> None:
        if self.folder is None or not (self.folder / STATE).is_file():
            return
        for stored in read_state(self.folder / STATE, self._settings()):
            individual = self._add(stored.genotype, stored.parent)
            if abs(individual.val_nll - stored.val_nll) > NLL_TOLERANCE:
                raise UserError(
                    f"Genotype {individual.index} in {self.folder} had a validation NLL of {stored.val_nll:.6f}, now "
                    f"it has {individual.val_nll:.6f}.",
                    "Go on with the validation images and labels it was begun with.",
                )


def nes_regularised_evolution(
    train: TrainFunction,
    val_labels: npt.ArrayLike,
    *,
    space: SearchSpace,
    config: EvolutionConfig,
    num_evaluations: int,
    num_members: int,
    folder: Path | None = None,
) -> FoundEnsemble:
    """Run NES-RE (arXiv 2006.08573) and choose M of the pool greedily on the ensemble's validation NLL.

    Args:
        train: See `RegularisedEvolution`.
        val_labels: Class indices of the validation images, (N,).
        space: The space to search.
        config: Population, parents, seed.
        num_evaluations: Genotypes trained in all (the paper's budget K), at least M and at least P.
        num_members: M.
        folder: Where state and evaluations are kept; run again with it, the evolution goes on.

    Raises:
        UserError: Too few evaluations; see `RegularisedEvolution` for the rest.
    """
    if not 1 <= num_members <= num_evaluations or num_evaluations < config.population_size:
        raise UserError(
            f"{num_evaluations} evaluations are too few for a population of {config.population_size} and "
            f"{num_members} members.",
            "Choose num_evaluations at least as large as both, and 1 member or more.",
        )
    evolution = RegularisedEvolution(train, val_labels, space=space, config=config, folder=folder)
    evolution.run(num_evaluations)
    return evolution.select(num_members, num_evaluations=num_evaluations)
