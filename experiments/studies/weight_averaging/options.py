"""Options of the study of averaged weights, and what a training of it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnas_ens.config import RetrainConfig, require
from dnas_ens.config.fields import to_dict
from dnas_ens.space.genotype import Genotype, load_genotype, random_genotype
from dnas_ens.space.search_space import SearchSpace
from studies.options import RESULTS
from studies.weight_averaging.methods import SCHEDULES

BLOBS, CELL, BLOBS_MODEL = "blobs", "cell", "mlp"
#: What differs from `RetrainConfig`: 100 points make 5 steps an epoch.
RECIPES: dict[str, dict[str, Any]] = {
    BLOBS: {"epochs": 100, "batch_size": 20},
    "images": {"epochs": 24, "channels": 8},
}


class Task(NamedTuple):
    """One training: which model, schedule and seed."""

    model: str
    schedule: str
    seed: int

    def __str__(self) -> str:
        """Name it as its folder is named."""
        return f"{self.model}-{self.schedule}-{self.seed}"

    @classmethod
    def of(cls, name: str) -> Task:
        """Return the training that a folder is named after."""
        model, schedule, seed = name.rsplit("-", 2)
        return cls(model, schedule, int(seed))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    data: str = BLOBS
    """blobs, or images: digits, fashion-mnist, mnist, cifar10, cifar100, svhn, or a path to a folder of images."""
    data_root: Path | None = None
    """Where data sets lie or are downloaded to; default $DNAS_ENS_DATA or ~/.cache/dnas_ens/data."""
    limit_train: int | None = None
    """Use a stratified subset of this many training images; val and test stay whole."""
    split_seed: int = 0
    """Seed of the splits, and of the draw of the blobs; the same for all seeds."""
    model: tuple[str, ...] = ()
    """cell (a network of our cells) and reference models such as small-cnn; default: both, and mlp for blobs."""
    genotypes: Path | None = None
    """A run's genotypes.json, whose base is used as the cell; default: a random genotype."""
    genotype_seed: int = 0
    """Seed of the random genotype; the same for all seeds."""
    seeds: int = 3
    """Seeds: of initialisation, order and augmentation, each from its own stream."""
    epochs: int | None = None
    """Epochs of a training; default: 100 for blobs, 24 for images."""
    keep: int | None = None
    """Models that are kept, one after each of the last epochs; default: half the epochs."""
    branches: int = 3
    """Trainings of the kept epochs from the same start, for the soups; the first is the one everything else is of."""
    learning_rate: float = 0.05
    """SGD learning rate at the beginning."""
    averaging_rate: float = 0.02
    """Constant learning rate of the kept epochs; half a cosine leads there. The other schedule's leads to 0."""
    decay: float = 0.9
    """Ratio between neighbouring weights of the exponentially decaying average."""
    ema_decay: float = 0.99
    """Decay of the EMA, a step."""
    run_dir: Path | None = None
    """Where trainings are kept; default: runs/weight-averaging-DATA."""
    output: Path | None = None
    """Where the results go: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl; default: runs/results/weight-averaging-DATA."""

    def __post_init__(self) -> None:
        require(self.seeds > 0, f"--seeds is {self.seeds}.", "Give --seeds 1 or more.")
        require(self.branches > 1, f"--branches is {self.branches}.", "Give --branches 2 or more.")
        require(
            1 <= self.kept < self.recipe.epochs,
            f"{self.kept} models cannot be kept of {self.recipe.epochs} epochs.",
            "Give --keep a number from 1 to below --epochs.",
        )
        require(
            0 < self.averaging_rate <= self.learning_rate,
            f"--averaging-rate is {self.averaging_rate} with --learning-rate {self.learning_rate}.",
            "Give an averaging rate above 0 and not above the learning rate.",
        )
        require(
            self.data != BLOBS or set(self.models) == {BLOBS_MODEL},
            f"--data blobs has two numbers a point, which {', '.join(self.models)} cannot take.",
            "Leave out --model, or give --data images.",
        )

    @property
    def recipe(self) -> RetrainConfig:
        """How every model is trained."""
        fields = {**RECIPES[BLOBS if self.data == BLOBS else "images"], "learning_rate": self.learning_rate}
        return RetrainConfig(**fields | ({} if self.epochs is None else {"epochs": self.epochs}))

    @property
    def kept(self) -> int:
        """How many models are kept."""
        return self.recipe.epochs // 2 if self.keep is None else self.keep

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are trained."""
        return self.model or ((BLOBS_MODEL,) if self.data == BLOBS else (CELL, "small-cnn"))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run_dir or Path("runs") / f"weight-averaging-{Path(self.data).name}"

    @property
    def results(self) -> Path:
        """Output without suffix."""
        return self.output or RESULTS / f"weight-averaging-{Path(self.data).name}"

    def genotype(self) -> Genotype:
        """Return the cells."""
        if self.genotypes is not None:
            return load_genotype(self.genotypes)
        space = SearchSpace()
        generator = np.random.default_rng(self.genotype_seed)
        return random_genotype(generator, operations=space.operations, num_nodes=space.num_nodes)

    def settings(self, task: Task, fingerprint: str) -> dict[str, Any]:
        """Return what decides the outcome of a training, but for its seed."""
        return {
            "data": Path(self.data).name,
            "fingerprint": fingerprint,
            "cells": self.genotype().to_dict() if task.model == CELL else None,
            "recipe": to_dict(self.recipe),
            **{name: getattr(self, name) for name in ("averaging_rate", "branches", "decay", "ema_decay")},
            "keep": self.kept,
        }

    def learning_rate_at(self, schedule: str, epoch: int) -> float:
        """Return the learning rate of an epoch (from 0)."""
        from dnas_ens.training.step import cosine_learning_rate, cosine_to_constant

        if schedule == "cosine":
            return cosine_learning_rate(self.recipe, epoch)
        begin = self.recipe.epochs - self.kept
        return cosine_to_constant(self.learning_rate, self.averaging_rate, epoch=epoch, begin=begin)

    def tasks(self) -> list[Task]:
        """Return the trainings, seed by seed, so that an interrupted study has all settings."""
        return [
            Task(model, schedule, seed)
            for seed in range(self.seeds)
            for model in self.models
            for schedule in SCHEDULES
        ]
