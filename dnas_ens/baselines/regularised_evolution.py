"""NES-RE: regularised evolution of a population whose parents are chosen for the ensemble they would make.

Source: Zaidi et al., arXiv 2006.08573, Algorithm 1, on regularised evolution (Real et al., arXiv 1802.01548).

Legend: P size of the population, m parent candidates, M members, N validation images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from dnas_ens.baselines.random_search import random_pool
from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import label_losses
from dnas_ens.run.files import as_json, read_json, write_json
from dnas_ens.space.genotype import Genotype, Node
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.types import FloatArray

T = TypeVar("T")
Kind = Literal["operation", "source", "number"]
STATE = "evolution.json"
EVALUATIONS = "evaluations"
#: Validation NLLs are rounded to single precision at most.
NLL_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """What decides the course of an evolution, apart from its length.

    Args:
        population_size: P, at least 1.
        num_parents: m, parent candidates that ForwardSelect takes from the population, 1 .. P. With 1 the fittest is
            always the parent, as in plain regularised evolution.
        tournament_size: Members of the population, drawn at random, that the candidates are taken from, m .. P (Real
            et al.'s sample); None takes them from the whole population, as arXiv 2006.08573 does.
        edges_per_node: Edges each node of the first population keeps.
        seed: Decides the first population, parents and mutations.

    Raises:
        UserError: A number is out of range.
    """

    population_size: int = 50
    num_parents: int = 10
    tournament_size: int | None = None
    edges_per_node: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        sampled = self.population_size if self.tournament_size is None else self.tournament_size
        if not 1 <= self.num_parents <= sampled <= self.population_size:
            raise UserError(
                f"{self.num_parents} parent candidates of a tournament of {sampled} in a population of "
                f"{self.population_size} are not possible.",
                "Choose 1 <= num_parents <= tournament_size <= population_size.",
            )


@dataclass(frozen=True, kw_only=True)
class Individual:
    """One trained genotype of an evolution.

    Args:
        index: Position in the history, which is its birthday.
        parent: Index of its parent; None in the first population.
        val_nll: Its own validation NLL, nats.
    """

    index: int
    genotype: Genotype
    parent: int | None
    val_nll: float


def mutate(
    genotype: Genotype, *, operations: Sequence[str], generator: np.random.Generator, edges_per_node: int = 2
) -> Genotype:
    """Change one edge of one cell, as regularised evolution does (Real et al., arXiv 1802.01548).

    Drawn uniformly, one after the other: whether an operation or a source (there: hidden state) changes, the cell,
    the edge, and what it changes to. What is not possible is passed over: a source can only become one that its
    node does not take yet. A change that gives the parent back under another numbering of its nodes does not count
    and is passed over. The identity, which the paper allows at a low rate, is not among the mutations. Where nodes may
    keep fewer edges than they are allowed, a third kind of change takes the edge away or gives its node another one.

    Args:
        edges_per_node: Most edges a node may be given.

    Returns:
        A valid genotype that differs from the parent in exactly one edge, and there in the operation or in the
        source but not in both, or in that the edge is only in one of them; and that is not isomorphic to it.

    Raises:
        UserError: No edge can change: there is only one operation, and every node takes all its sources.
    """
    parent, rules = genotype.canonical(), genotype.rules
    names = [name for name in dict.fromkeys(operations) if name != "none"]
    kinds: tuple[Kind, ...] = ("operation", "source")
    if rules.keeps_fewer_edges:
        kinds = (*kinds, "number")
    for kind in _shuffled(kinds, generator):
        for cell_type in _shuffled(genotype.cell_types, generator):
            cell = genotype.cell(cell_type)
            slots = [(node, position) for node, edges in enumerate(cell) for position in range(len(edges))]
            for node, position in _shuffled(slots, generator):
                num_sources = rules.num_inputs + node
                most = max(rules.edge_counts(edges_per_node, num_sources))
                # The edge from the node before it stays one.
                stays = rules.reads_previous and cell[node][position][1] == num_sources - 1
                others = _other_nodes(cell[node], position, num_sources, kind, names, most, stays=stays)
                for other in _shuffled(others, generator):
                    changed: dict[str, Any] = {cell_type: (*cell[:node], other, *cell[node + 1 :])}
                    child = replace(genotype, **changed)
                    if child.canonical() != parent:
                        return child
    raise UserError(
        f"No edge of the genotype can change: there are {len(names)} operations to draw from.",
        "Give at least 2 different operations.",
    )


def _shuffled(items: Sequence[T], generator: np.random.Generator) -> Iterator[T]:
    return (items[index] for index in generator.permutation(len(items)))


def _other_nodes(
    node: Node, position: int, num_sources: int, kind: Kind, names: Sequence[str], most: int, *, stays: bool
) -> list[Node]:
    """List what a node can become by a change of a kind to one of its edges; it has ``most`` edges at most.

    An edge that stays neither goes nor leaves its source.
    """
    operation, source = node[position]
    before, after = node[:position], node[position + 1 :]
    taken = {other for _, other in node}
    free = [other for other in range(num_sources) if other not in taken]
    if kind == "operation":
        return [(*before, (name, source), *after) for name in names if name != operation]
    if kind == "source":
        return [] if stays else [(*before, (operation, other), *after) for other in free]
    fewer = [(*before, *after)] if len(node) > 1 and not stays else []
    return fewer + [(*node, (name, other)) for other in free for name in names if len(node) < most]


class RegularisedEvolution:
    """NES-RE, step by step; `nes_regularised_evolution` runs it to the end.

    The first population is random. Then, again and again: ForwardSelect takes m candidates from the population for
    the validation NLL of *their ensemble*; one of them, drawn uniformly, is the parent; a mutated child is trained
    and joins; the oldest dies, however good it is. Everything trained stays in the pool that the members are
    chosen from. An architecture may return; it is then trained with another index and so with other seeds.

    Each step draws from a generator of its own, seeded by the seed and the index, so a resumed course is the
    uninterrupted one.

    Args:
        train: Trains a genotype; called with it and its index, which should decide all seeds.
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
            drawn = random_pool(space, config.population_size, seed=config.seed, edges_per_node=config.edges_per_node)
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
        """Indices of those alive, oldest first: the P youngest, because only age decides."""
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
                self.history[parent].genotype,
                operations=self.space.operations,
                generator=generator,
                edges_per_node=self.config.edges_per_node,
            )
        individual = self._add(genotype, parent)
        if self.folder is not None:
            self._save(self.folder / STATE)
        return individual

    def run(self, num_evaluations: int) -> None:
        """Train until there are so many genotypes in all; a later call with a larger number continues."""
        missing = range(len(self.history), num_evaluations)
        for _ in tqdm(missing, desc="evolution", unit="network", disable=None, leave=False):
            self.step()

    def select(self, num_members: int, *, num_evaluations: int | None = None) -> FoundEnsemble:
        """Choose M of everything ever trained, greedily on the ensemble's validation NLL.

        Args:
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
        val_nll = float(label_losses(label_probs).mean())
        individual = Individual(index=index, genotype=genotype, parent=parent, val_nll=val_nll)
        self.history.append(individual)
        self._label_probs.append(label_probs)
        return individual

    def _settings(self) -> dict[str, Any]:
        """Return the settings that decide the course."""
        return {
            **asdict(self.config),
            "space": asdict(self.space),
            "initial": [genotype.to_dict() for genotype in self.initial],
        }

    def _save(self, path: Path) -> None:
        """Write the settings and everyone ever trained, each with the seed and the file of its probabilities."""
        entries = [
            {
                "index": one.index,
                "genotype": one.genotype.to_dict(),
                "parent": one.parent,
                "seed": [self.config.seed, one.index],
                "val_nll": one.val_nll,
                "val_probs": f"{EVALUATIONS}/{self.evaluations.name_of(one.genotype, one.index)}/{VAL_PROBS}",
            }
            for one in self.history
        ]
        write_json(path, {"settings": self._settings(), "history": entries})

    def _resume(self) -> None:
        if self.folder is None or not (self.folder / STATE).is_file():
            return
        for stored in _read_state(self.folder / STATE, self._settings()):
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
        num_evaluations: Genotypes trained in all (the paper's budget K), at least M and at least P.
        folder: Where state and evaluations are kept; run again with it, the evolution continues.

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


def _read_state(path: Path, settings: Mapping[str, Any]) -> list[Individual]:
    """Read the history of an evolution that was begun with the same settings.

    Raises:
        UserError: The file is damaged, or its settings are others; the first that differs is named.
    """
    state = read_json(path)
    try:
        stored = state["settings"]
        history = [
            Individual(
                index=int(entry["index"]),
                genotype=Genotype.from_dict(entry["genotype"]),
                parent=entry["parent"],
                val_nll=float(entry["val_nll"]),
            )
            for entry in state["history"]
        ]
        other = [name for name, value in as_json(settings).items() if stored.get(name) != value]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not the state of an evolution: {error!r}.",
            "Restore it from a copy, or choose another folder.",
        ) from error
    if other:
        raise UserError(
            f"{path} belongs to an evolution with another {other[0]}.",
            "Go on with the settings it was begun with, or choose another folder.",
        )
    return history
