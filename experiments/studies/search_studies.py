"""Studies that search and train from scratch: their common options, their units, and what is run for a seed.

A unit is a search, named by its setting, or a training of one genotype, named by its cells; both belong to a seed.
"""

from __future__ import annotations

import functools
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from scipy.stats import spearmanr

from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.study import RESULTS, require_positive, run_missing
from dnas_ens.config import DataConfig, RetrainConfig, SearchConfig
from dnas_ens.config.fields import to_dict
from dnas_ens.config.presets import retrain_preset
from dnas_ens.config.settings import Engine
from dnas_ens.data.dataset import Split
from dnas_ens.run.files import with_ending
from dnas_ens.search.family import diversity_curve
from dnas_ens.search.loop import SearchLoop
from dnas_ens.space.genotype import Genotype

if TYPE_CHECKING:
    from dnas_ens.compare.study import Task
    from dnas_ens.data.dataset import ImageData
    from dnas_ens.training.trainer import MemberTraining
    from dnas_ens.training.workers import Pool

#: |D - lambda| is judged up to here.
JUDGED_LAMBDA = 0.7
#: Preset of searches and trainings from scratch on each data set.
PRESETS = {"digits": "smoke", "fashion-mnist": "micro"}


@dataclass(frozen=True, kw_only=True)
class SearchStudy(ABC):
    """Options of such a study; a subclass says what a setting changes."""

    #: Name of results and run folder.
    name: ClassVar[str]
    #: Gives trainings their data.
    first_setting: ClassVar[str]

    data: Literal["digits", "fashion-mnist"] = "digits"
    """digits with preset smoke, or fashion-mnist with preset micro."""
    seeds: int = 3
    """Seeds, each with one search a setting."""
    epochs: int | None = None
    """Epochs a search; default: the preset's."""
    limit_train: int | None = None
    """Training images of searches and trainings; default: the preset's."""
    candidate_recipe_epochs: int | None = None
    """Epochs of every training from scratch; default: the preset's."""
    workers: int = 1
    """Searches and trainings side by side, each on one CPU core."""
    engine: Engine = "local"
    """local, or ray: tasks of the Ray cluster that RAY_ADDRESS names, else of a Ray of this machine."""
    output: Path | None = None
    """Where results go: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl; default: runs/results/STUDY-DATA."""

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "workers")

    @property
    def path(self) -> Path:
        """Output without suffix."""
        return RESULTS / f"{self.name}-{self.data}" if self.output is None else self.output

    def given(self) -> dict[str, Any]:
        """Return the fields of a search that were given."""
        fields = {"epochs": self.epochs, "limit_train": self.limit_train}
        return {name: value for name, value in fields.items() if value is not None}

    @abstractmethod
    def configuration(self, setting: str, seed: int) -> SearchConfig:
        """Return the search of a setting and a seed."""

    @abstractmethod
    def measured(self) -> Record:
        """Return what decides the figures of a search beside its configuration."""

    def recipe(self, seed: int) -> RetrainConfig:
        """Return the recipe of a seed's trainings from scratch."""
        recipe = retrain_preset(PRESETS[self.data], "darts")
        return replace(recipe, seed=seed, epochs=self.candidate_recipe_epochs or recipe.epochs)

    def settings_of(self, record: Record) -> Record:
        """Return the settings that a record must have."""
        seed = record["seed"]
        config = to_dict(self.configuration(record.get("setting", self.first_setting), seed))
        if record["kind"] == "search":
            return {"config": config, **self.measured()}
        return {"recipe": to_dict(self.recipe(seed)), "data": config["data"]}

    def records(self, **more: Any) -> Records:
        """Open the store: a line a unit in OUTPUT.jsonl."""
        file = with_ending(self.path, ".jsonl")
        return Records(file, key=key_of, settings=self.settings_of, **more)

    def search_record(self, setting: str, seed: int) -> Record:
        """Return what the record of a search begins with."""
        config = to_dict(self.configuration(setting, seed))
        return {"kind": "search", "setting": setting, "seed": seed, "config": config, **self.measured()}

    def train(self, genotype: Genotype, seed: int) -> tuple[MemberTraining, Record]:
        """Train one genotype from scratch; the result depends on its isomorphism class and the seed alone.

        Returns:
            The finished training, and what its record begins with.
        """
        import torch

        from dnas_ens.run.progress import CostMeter
        from dnas_ens.training.trainer import MemberTraining

        torch.set_num_threads(1)
        recipe, config = self.recipe(seed), self.configuration(self.first_setting, seed).data
        data, cost, cells = load(config), CostMeter(), genotype.canonical_hash()
        # Seeds from the cells' name instead of a position, so that neither setting nor order of the runs matters.
        training = MemberTraining(genotype.canonical(), data, recipe, index=int(cells, 16))
        while training.epoch < recipe.epochs:
            training.run_epoch()
        training.end()
        return training, {
            "kind": "training",
            "cells": cells,
            "seed": seed,
            "genotype": genotype.to_dict(),
            "recipe": to_dict(recipe),
            "data": to_dict(config),
            **cost.seconds(),
        }


def key_of(record: Record) -> tuple[str, str, int]:
    """Return what names a unit: kind, setting or cells, seed."""
    return record["kind"], record["setting" if record["kind"] == "search" else "cells"], record["seed"]


def training_tasks(run_training: Any, genotypes: Iterable[Genotype], seed: int) -> dict[Any, Task]:
    """Return the trainings of a seed by key, each isomorphism class once.

    Args:
        run_training: Trains a genotype with a seed.
        genotypes: What is to be trained.
        seed: The study's seed.
    """
    by_cells = {genotype.canonical_hash(): genotype for genotype in genotypes}
    return {
        ("training", cells, seed): functools.partial(run_training, genotype, seed)
        for cells, genotype in by_cells.items()
    }


def run_units(records: Records, tasks: dict[Any, Task], *, pool: Pool) -> None:
    """Run the units that are missing, and say what each took."""

    def said(record: Record) -> str:
        name = f"search, {record['setting']}" if record["kind"] == "search" else "training"
        return f"seed {record['seed']}, {name}: {record['cpu_seconds']:.1f} s"

    run_missing(records, tasks, pool=pool, said=said)


@functools.cache
def load(config: DataConfig) -> ImageData:
    """Load the data once a process."""
    from dnas_ens.commands.options import load_configured_data

    return load_configured_data(config)


def inherited(loop: SearchLoop, genotypes: Iterable[Genotype], splits: Sequence[Split]) -> list[np.ndarray]:
    """Return the probabilities (P, N, K) of networks with inherited weights on each split."""
    from dnas_ens.search.candidates import inherited_networks
    from dnas_ens.training.prediction import predict_log_probs

    networks = inherited_networks(loop.supernet, genotypes, loop.weight_images, augmentation=loop.augmentation)
    by_network = [
        [predict_log_probs(network, split, augmentation=loop.augmentation).exp().numpy() for split in splits]
        for network in networks
    ]
    return [np.stack(of_split) for of_split in zip(*by_network, strict=True)]


def steering(loop: SearchLoop) -> dict[str, Any]:
    """Return how lambda steers distance and shared edges along the paths of a search, and the curves.

    Returns:
        Measures; ``lam`` (L,), ``distance`` and ``shared`` (R, L), and ``between``, the mean D between members of
        equal lambda, (L,), empty for R = 1.
    """
    curve = diversity_curve(loop.family)
    lam, distance, shared = (
        np.array(values, dtype=float).reshape(loop.config.hypernetwork.directions, -1)
        for values in (curve.lam, curve.distance_to_base, curve.shared_edges)
    )
    return {
        "spearman_distance": rank_correlation(lam[0], distance),
        "spearman_shared": rank_correlation(lam[0], shared),
        "tracking_error": float(np.abs(distance - lam)[lam <= JUDGED_LAMBDA].mean()),
        "lam": lam[0].tolist(),
        "distance": distance.tolist(),
        "shared": shared.tolist(),
        "between": curve.distance_between,
    }


def rank_correlation(lam: np.ndarray, values: np.ndarray) -> float:
    """Return Spearman's correlation of lambda with a quantity along each path, the mean over paths.

    Args:
        lam: (L,), the same on every direction.
        values: (R, L).

    Returns:
        In [-1, 1].
    """
    # A constant has no rank order: lambda steers nothing, which counts as 0.
    return statistics.fmean(0.0 if np.ptp(row) == 0 else float(spearmanr(lam, row)[0]) for row in values)
