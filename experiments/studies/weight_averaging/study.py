"""Options of the study, the rows of a training, and the data and models that they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from dnas_ens.compare.records import Record
from dnas_ens.compare.study import RESULTS, require_positive
from dnas_ens.config import DataConfig, RetrainConfig, require
from dnas_ens.config.fields import to_dict
from dnas_ens.space.genotype import Genotype, load_genotype, random_genotype
from dnas_ens.space.search_space import SearchSpace

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dnas_ens.training.prediction import Batches
    from dnas_ens.training.trainer import TrainingBatches

SCHEDULES = ("constant", "cosine")
#: Training, val and test points of the blobs.
BLOB_SIZES = (100, 200, 1000)
BLOBS, CELL, BLOBS_MODEL = "blobs", "cell", "mlp"
#: What differs from `RetrainConfig`: 100 points make 5 steps an epoch.
RECIPES: dict[str, dict[str, Any]] = {
    BLOBS: {"epochs": 100, "batch_size": 20, "weight_decay": 3e-4},
    "images": {"epochs": 24, "channels": 8, "weight_decay": 3e-4},
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
    def of(cls, record: Record) -> Task:
        """Return the training that a record is of."""
        return cls(*(record[name] for name in cls._fields))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    data: str = BLOBS
    """blobs, or images: digits, fashion-mnist, mnist, cifar10, cifar100, svhn, or a path to a folder of images."""
    data_root: Path | None = None
    """Where named data sets are kept; default: $DNAS_ENS_DATA or ~/.cache/dnas_ens/data."""
    limit_train: int | None = None
    """Use a stratified subset of this many training images; val and test stay whole."""
    model: tuple[str, ...] = ()
    """cell (a network of our cells) and reference models such as small-cnn; default: both, and mlp for blobs."""
    genotypes: Path | None = None
    """A run's genotypes.json, whose base is used as the cell; default: a random genotype."""
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
        require_positive(self, "seeds")
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
        return RetrainConfig(average_last=0.0, **fields | ({} if self.epochs is None else {"epochs": self.epochs}))

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
        generator = np.random.default_rng(0)
        return random_genotype(generator, operations=space.operations, num_nodes=space.num_nodes)

    def place(self, record: Record) -> Path:
        """Return the folder of a training."""
        return self.folder / str(Task.of(record))

    def settings(self, task: Task, fingerprint: str) -> Record:
        """Return what decides the outcome of a training, apart from its seed."""
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
            return cosine_learning_rate(self.recipe.learning_rate, epoch, self.recipe.epochs)
        begin = self.recipe.epochs - self.kept
        return cosine_to_constant(self.learning_rate, self.averaging_rate, epoch=epoch, begin=begin)

    def tasks(self) -> list[Task]:
        """Return the trainings, seed by seed, so that an interrupted study has all settings."""
        return [
            Task(model, schedule, seed) for seed in range(self.seeds) for model in self.models for schedule in SCHEDULES
        ]


# Data and models


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """Data as batches; inputs are (B, C, H, W), points as images of one pixel with two channels.

    Args:
        training_pass: Starts an epoch, given the generators of order and augmentation.
        training: The training inputs as they are, for BatchNorm.
        val: What everything is chosen on.
        test: What every finished row is evaluated on, once.
        in_channels: C.
        num_classes: K.
        image_size: H = W.
        fingerprint: Of data and splits.
        sizes: Training, val and test inputs.
    """

    training_pass: TrainingBatches
    training: Batches
    val: Batches
    test: Batches
    in_channels: int
    num_classes: int
    image_size: int
    fingerprint: str
    sizes: tuple[int, int, int]


def draw_blobs(study: Study) -> Problem:
    """Draw three Gaussian clouds of points around centres uniform in [-10, 10]^2, standardised by the training points.

    The few training points and the overlap leave a network of one training run uncertain, which is what averaging is
    for. scikit-learn's make_blobs shuffles, so that consecutive points make a random split.
    """
    import torch
    from sklearn.datasets import make_blobs

    points, labels = make_blobs(sum(BLOB_SIZES), centers=3, cluster_std=2.0, random_state=0)
    points, labels = points.astype(np.float32), labels.astype(np.int64)
    parts = np.cumsum(BLOB_SIZES)[:-1]
    mean, std = points[: parts[0]].mean(axis=0), points[: parts[0]].std(axis=0)
    digest = hashlib.sha256()
    tensors = []
    for some, classes in zip(np.split(points, parts), np.split(labels, parts), strict=True):
        digest.update(some.tobytes() + classes.tobytes())
        inputs = torch.from_numpy((some - mean) / std)[:, :, None, None]
        tensors.append((inputs, torch.from_numpy(classes)))
    train, val, test = tensors

    def training_pass(order: torch.Generator, _: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(BLOB_SIZES[0], generator=order).split(study.recipe.batch_size):
            yield train[0][chosen], train[1][chosen]

    return Problem(
        training_pass=training_pass,
        training=lambda: [train],
        val=lambda: [val],
        test=lambda: [test],
        in_channels=2,
        num_classes=3,
        image_size=1,
        fingerprint=digest.hexdigest(),
        sizes=BLOB_SIZES,
    )


def load_problem(study: Study) -> Problem:
    """Draw blobs, or load images as the commands of the package do."""
    if study.data == BLOBS:
        return draw_blobs(study)
    from dnas_ens.commands.options import load_configured_data
    from dnas_ens.data.batches import Augmentation, iterate_batches
    from dnas_ens.training.prediction import plain_passes, training_passes

    names = ("data", "data_root", "limit_train")
    data = load_configured_data(DataConfig(**{name: getattr(study, name) for name in names}))
    recipe = study.recipe
    augmentation = Augmentation.for_data(data, augment=recipe.augment, cutout=recipe.cutout)

    def training_pass(order: torch.Generator, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return iterate_batches(
            data.train,
            recipe.batch_size,
            generator=order,
            augmentation=augmentation,
            augmentation_generator=generator,
            drop_last=True,
        )

    return Problem(
        training_pass=training_pass,
        training=training_passes(data, data.train.drawn(), augment=recipe.augment),
        val=plain_passes(data, data.val),
        test=plain_passes(data, data.test),
        in_channels=data.num_channels,
        num_classes=data.num_classes,
        image_size=data.image_size,
        fingerprint=data.fingerprint,
        sizes=(len(data.train), len(data.val), len(data.test)),
    )


def build_model(study: Study, problem: Problem, name: str) -> nn.Module:
    """Build a model with fresh weights, drawn from torch's global generator."""
    import torch

    from dnas_ens.nn.network import Network
    from dnas_ens.nn.reference_models import reference_model
    from dnas_ens.nn.reference_models.small_networks import MLP
    from dnas_ens.space.stack import StackSpec, default_stem_stride

    model: nn.Module
    if study.data == BLOBS:
        model = MLP(in_features=problem.in_channels, num_classes=problem.num_classes)
    elif name == CELL:
        stack = StackSpec(
            num_cells=study.recipe.num_cells,
            channels=study.recipe.channels,
            in_channels=problem.in_channels,
            num_classes=problem.num_classes,
            stem_stride=default_stem_stride(problem.image_size, "darts"),
        )
        model = Network(study.genotype(), stack)
    else:
        model = reference_model(name, problem.in_channels, problem.num_classes, problem.image_size)
    return cast("nn.Module", model.to(memory_format=torch.channels_last))
