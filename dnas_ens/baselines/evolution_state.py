"""What decides the course of an evolution, what became of it, and both as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnas_ens.errors import UserError
from dnas_ens.run.files import as_json, read_json, write_json
from dnas_ens.space.genotype import Genotype


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
        genotype: Its cells.
        parent: Index of its parent; None in the first population.
        val_nll: Its own validation NLL, nats.
    """

    index: int
    genotype: Genotype
    parent: int | None
    val_nll: float


def write_state(
    path: Path, settings: Mapping[str, Any], history: Sequence[Individual], val_probs: Sequence[str]
) -> None:
    """Write the state of an evolution.

    Args:
        path: The JSON file.
        settings: What decides the course; "seed" is one of them.
        history: Everyone ever trained.
        val_probs: For each of them the file with its probabilities, relative to the state's folder.
    """
    entries = [
        {
            "index": individual.index,
            "genotype": individual.genotype.to_dict(),
            "parent": individual.parent,
            "seed": [settings["seed"], individual.index],
            "val_nll": individual.val_nll,
            "val_probs": file,
        }
        for individual, file in zip(history, val_probs, strict=True)
    ]
    write_json(path, {"settings": settings, "history": entries})


def read_state(path: Path, settings: Mapping[str, Any]) -> list[Individual]:
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
            f"{path} is no state of an evolution: {error!r}.",
            "Restore it from a copy, or choose another folder.",
        ) from error
    if other:
        raise UserError(
            f"{path} belongs to an evolution with another {other[0]}.",
            "Go on with the settings it was begun with, or choose another folder.",
        )
    return history
