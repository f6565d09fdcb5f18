"""What are averages of the weights of one training's last models worth, and over how many models?

    OMP_NUM_THREADS=1 python experiments/weight_averaging.py --data blobs --seeds 10
    OMP_NUM_THREADS=1 python experiments/weight_averaging.py --data digits --seeds 5

One training keeps the models after each of its last epochs. The study draws the whole curve over i: model i from the
end alone, the equal, linearly and exponentially decaying averages of the last i models, and the average of their
predictions. Beside them Polyak's average, SWA (arXiv 1803.05407), an EMA, and uniform and greedy soups (arXiv
2203.05482) of branches: the training is taken up once more from where the kept models begin, with another order and
augmentation. Everything is run under a learning rate that is constant over the kept epochs, as averaging wants it, and
under the usual cosine to 0, for an average may also merely undo that a constant rate never settles. On blobs the MLP,
on images a network of our cells and small-cnn (``--model`` chooses).

n, the best single model, greedy soups and temperatures are chosen on val; each row is then evaluated on test once.
There is no published table of this study. The literature expects: SWA generalises better than the end of a
conventional training, at a constant or cyclic rate (1803.05407); soups of models that were fine-tuned from one
pre-trained network are better than their best ingredient at the cost of one (2203.05482).

Cost on one core: blobs with ten seeds half a minute, digits with five seeds six to seven minutes. Trainings, their kept
models and their predictions lie in the run folder and are not made again, so that an interrupted study goes on, from
the training that was interrupted, and more seeds add to it. Results: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from dnas_ens.cli import parse, run_main
from dnas_ens.config import DataConfig, RetrainConfig, require, to_dict
from dnas_ens.errors import UserError
from dnas_ens.genotype import Genotype, load_genotype, random_genotype
from dnas_ens.search_space import SearchSpace

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor, nn

    from dnas_ens.ensembles.averaging import State

    Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]

PROG = "python experiments/weight_averaging.py"
RESULTS = Path(__file__).parent / "results"
BLOBS, CELL, BLOBS_MODEL = "blobs", "cell", "mlp"
SCHEDULES = ("constant", "cosine")
#: What differs from `RetrainConfig`: 100 points make 5 steps an epoch.
RECIPES: dict[str, dict[str, Any]] = {
    BLOBS: {"epochs": 100, "batch_size": 20},
    "images": {"epochs": 24, "channels": 8},
}
KINDS = {"equal": "equal", "linear": "linearly decaying", "exponential": "exponentially decaying"}
CONFIDENCE = 0.95
RESAMPLES = 2000
#: To which a calibrated NLL is given.
DECIMALS = 4

LAST = "last model"
AS_SAVED = "last model, running BatchNorm statistics"
BEST = "best single kept model"
EQUAL, LINEAR, EXPONENTIAL = (f"{name} average of the last n" for name in KINDS.values())
SWA = "SWA: equal average of all kept"
EMA = "EMA"
POLYAK = "Polyak, every step of the training"
POLYAK_LATE = "Polyak, every step of the kept epochs"
GREEDY_KEPT = "greedy soup of the kept models"
UNIFORM = "uniform soup of the branches"
GREEDY = "greedy soup of the branches"
ENSEMBLE = "ensemble of the last n (n of equal)"
ENSEMBLE_KEPT = "ensemble of all kept"
ENSEMBLE_BRANCHES = "ensemble of the branches"
#: Which pairs of one schedule are told in a sentence each.
PAIRS = (
    (BEST, LAST),
    (EQUAL, LAST),
    (EQUAL, BEST),
    (LINEAR, EQUAL),
    (EXPONENTIAL, EQUAL),
    (EQUAL, ENSEMBLE),
    (SWA, LAST),
    (SWA, ENSEMBLE_KEPT),
    (EMA, LAST),
    (POLYAK, LAST),
    (POLYAK_LATE, LAST),
    (GREEDY_KEPT, LAST),
    (GREEDY_KEPT, BEST),
    (UNIFORM, LAST),
    (GREEDY, LAST),
    (UNIFORM, ENSEMBLE_BRANCHES),
    (ENSEMBLE, LAST),
)
#: Methods under the constant rate that are held against the last model of the cosine.
ACROSS = (LAST, EQUAL, SWA, EMA, ENSEMBLE)


class Task(NamedTuple):
    """One training: which model, schedule and seed."""

    model: str
    schedule: str
    seed: int

    def __str__(self) -> str:
        """Name it as its folder is named."""
        return f"{self.model}-{self.schedule}-{self.seed}"


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
    """Where the results go: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl; default: experiments/results/weight-averaging-DATA."""

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
        from dnas_ens.training import cosine_learning_rate

        if schedule == "cosine":
            return cosine_learning_rate(self.recipe, epoch)
        begin = self.recipe.epochs - self.kept
        share = 0.5 * (1 + math.cos(math.pi * min(epoch, begin) / begin))
        return self.averaging_rate + share * (self.learning_rate - self.averaging_rate)


# Data


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

    training_pass: Callable[[torch.Generator, torch.Generator], Iterator[tuple[Tensor, Tensor]]]
    training: Batches
    val: Batches
    test: Batches
    in_channels: int
    num_classes: int
    image_size: int
    fingerprint: str
    sizes: tuple[int, int, int]


def load_problem(study: Study) -> Problem:
    """Load images, or draw blobs."""
    return draw_problem(study) if study.data == BLOBS else load_images(study)


def draw_problem(study: Study) -> Problem:
    """Draw the blobs; points are standardised by the training points."""
    import torch

    from dnas_ens.data.blobs import draw_blobs

    blobs = draw_blobs(study.split_seed)
    splits = (blobs.train, blobs.val, blobs.test)
    mean, std = blobs.train[0].mean(axis=0), blobs.train[0].std(axis=0)
    digest = hashlib.sha256()
    tensors = []
    for points, labels in splits:
        digest.update(points.tobytes() + labels.tobytes())
        tensors.append((torch.from_numpy((points - mean) / std)[:, :, None, None], torch.from_numpy(labels)))
    (inputs, classes), val, test = tensors
    size = study.recipe.batch_size

    def training_pass(order: torch.Generator, _: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        shuffled = torch.randperm(len(inputs), generator=order)
        yield from ((inputs[chosen], classes[chosen]) for chosen in shuffled.split(size))

    return Problem(
        training_pass=training_pass,
        training=lambda: [(inputs, classes)],
        val=lambda: [val],
        test=lambda: [test],
        in_channels=2,
        num_classes=int(classes.max()) + 1,
        image_size=1,
        fingerprint=digest.hexdigest(),
        sizes=(len(inputs), len(val[0]), len(test[0])),
    )


def load_images(study: Study) -> Problem:
    """Load images as the commands of the package do."""
    import torch

    from dnas_ens.commands import load_configured_data
    from dnas_ens.data.batches import Augmentation, iterate_batches
    from dnas_ens.data.dataset import Split
    from dnas_ens.inference import EVALUATION_BATCH

    data = load_configured_data(
        DataConfig(
            data=study.data,
            data_root=study.data_root,
            limit_train=study.limit_train,
            split_seed=study.split_seed,
        )
    )
    augmentation = Augmentation.for_data(data, augment=study.recipe.augment, cutout=study.recipe.cutout)

    def plain(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in iterate_batches(split, EVALUATION_BATCH, augmentation=augmentation):
            yield images.contiguous(memory_format=torch.channels_last), labels

    return Problem(
        training_pass=lambda order, augmentation_generator: iterate_batches(
            data.train,
            study.recipe.batch_size,
            generator=order,
            augmentation=augmentation,
            augmentation_generator=augmentation_generator,
            drop_last=True,
        ),
        training=lambda: plain(data.train),
        val=lambda: plain(data.val),
        test=lambda: plain(data.test),
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
    from dnas_ens.nn.stack import SMALL_IMAGE

    model: nn.Module
    if study.data == BLOBS:
        model = MLP(in_features=problem.in_channels, num_classes=problem.num_classes)
    elif name == CELL:
        model = Network(
            study.genotype(),
            num_cells=study.recipe.num_cells,
            channels=study.recipe.channels,
            in_channels=problem.in_channels,
            num_classes=problem.num_classes,
            large_images=problem.image_size > SMALL_IMAGE,
        )
    else:
        model = reference_model(name, problem.in_channels, problem.num_classes, problem.image_size)
    return cast("nn.Module", model.to(memory_format=torch.channels_last))


# Training


class Training:
    """A model that is trained under a schedule, from fresh weights or on from a state.

    Args:
        study: Recipe and rates.
        problem: The data.
        task: Model, schedule and seed.
        branch: Decides order and augmentation; branch 0 also initialises.
    """

    def __init__(self, study: Study, problem: Problem, task: Task, *, branch: int = 0) -> None:
        import torch

        from dnas_ens.training import MemberSeeds

        self.study, self.problem, self.task = study, problem, task
        seeds = MemberSeeds.derive(task.seed, branch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.initialisation)
            self.model = build_model(study, problem, task.model)
        recipe = study.recipe
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.order = torch.Generator().manual_seed(seeds.order)
        self.augmentation = torch.Generator().manual_seed(seeds.augmentation)
        self.dropout_seed = seeds.augmentation + 1

    def run_epoch(self, epoch: int, on_step: Callable[[int], None] | None = None) -> None:
        """Train one epoch (from 0)."""
        import torch

        from dnas_ens.training import require_finite, train_epoch

        for group in self.optimizer.param_groups:
            group["lr"] = self.study.learning_rate_at(self.task.schedule, epoch)
        batches = self.problem.training_pass(self.order, self.augmentation)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.dropout_seed + epoch)
            scalars = train_epoch(self.model, batches, self.optimizer, self.study.recipe, on_step=on_step)
        require_finite(scalars, where=f"epoch {epoch + 1} of {self.task}")

    def state(self) -> dict[str, Any]:
        """Return a copy of what decides how the training goes on, but for the generators."""
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        # The optimiser takes over the tensors of a state, which another branch begins from too.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


def train(study: Study, problem: Problem, task: Task, place: Path) -> None:
    """Train a model with its branches and running averages and save everything; training.json comes last."""
    from dnas_ens.cost import CostMeter
    from dnas_ens.ensembles.running_averages import (
        ExponentialMovingAverage,
        PolyakAverage,
        StochasticWeightAverage,
    )
    from dnas_ens.files import save_tensors, write_json

    epochs, begin = study.recipe.epochs, study.recipe.epochs - study.kept
    # What an interrupted training left could be of other settings.
    shutil.rmtree(place, ignore_errors=True)
    cost = CostMeter()
    training = Training(study, problem, task)
    late = PolyakAverage(training.model)
    averages = {
        POLYAK: PolyakAverage(training.model),
        EMA: ExponentialMovingAverage(training.model, decay=study.ema_decay),
        SWA: StochasticWeightAverage(training.model, start_epoch=begin + 1),
    }
    at_begin: dict[str, Any] = {}
    for epoch in range(epochs):
        if epoch == begin:
            averages[POLYAK_LATE] = late
            at_begin = training.state()

        def on_step(_: int) -> None:
            for average in averages.values():
                average.after_step(training.model)

        training.run_epoch(epoch, on_step)
        for average in averages.values():
            average.after_epoch(training.model, epoch + 1)
        if epoch >= begin:
            save_tensors(place / "kept" / f"{epoch - begin:04d}.safetensors", training.model.state_dict())
    for name, average in averages.items():
        finished = average.finished(problem.training)
        save_tensors(place / "averages" / f"{slug(name)}.safetensors", finished.state_dict())
    own = cost.seconds()["cpu_seconds"]
    for branch in range(1, study.branches):
        other = Training(study, problem, task, branch=branch)
        other.load(at_begin)
        for epoch in range(begin, epochs):
            other.run_epoch(epoch)
        save_tensors(place / "branches" / f"{branch:04d}.safetensors", other.model.state_dict())
    write_json(
        place / "training.json",
        {
            "settings": study.settings(task, problem.fingerprint),
            "seed": task.seed,
            "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
            "training_cpu_seconds": own,
            "branches_cpu_seconds": cost.seconds()["cpu_seconds"] - own,
        },
    )


def slug(name: str) -> str:
    """Return a method's name as a file's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


# Choosing on val, then evaluating once on test


@dataclass(kw_only=True)
class Row:
    """A method of one training: its models, and what is noted of it.

    Args:
        models: One, or as many as have their predictions averaged.
        num_averaged: Models that went into it, where that is a number of saved models.
        choosing_cpu_seconds: What making it cost after the training, the choice on val included.
        branched: Whether it also needs the branches.
        notes: What else is noted.
    """

    models: Sequence[nn.Module]
    num_averaged: int | None = None
    choosing_cpu_seconds: float = 0.0
    branched: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


def predict(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities (N, K) and labels (N,)."""
    import torch

    from dnas_ens.inference import evaluation_mode

    with evaluation_mode(model), torch.inference_mode():
        parts = [(model(inputs).double().softmax(dim=1), labels) for inputs, labels in batches]
    return torch.cat([probs for probs, _ in parts]).numpy(), torch.cat(
        [labels for _, labels in parts]
    ).numpy()


def choose(study: Study, problem: Problem, task: Task, place: Path) -> tuple[dict[str, Row], dict[str, Any]]:
    """Make every method's models, choosing on val alone; return them with the curves over n."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from dnas_ens.analysis.metrics import accuracy, nll
    from dnas_ens.cost import CostMeter
    from dnas_ens.ensembles.averaging import CoefficientKind, averaged_model, coefficients
    from dnas_ens.ensembles.loss_barrier import BarrierCheck, loss_barrier
    from dnas_ens.ensembles.soups import averaging_curve, greedy_soup, uniform_soup
    from dnas_ens.files import load_tensors

    with torch.random.fork_rng(devices=[]):
        shell = build_model(study, problem, task.model)
    kept, others = (
        [load_tensors(file) for file in sorted((place / name).iterdir())] for name in ("kept", "branches")
    )
    ends = [kept[-1], *others]

    def fitted(state: State) -> nn.Module:
        return averaged_model(shell, [state], None, problem.training)

    def loaded(state: State) -> nn.Module:
        model = copy.deepcopy(shell).eval()
        model.load_state_dict(state)
        return model

    meter = CostMeter()

    def seconds() -> float:
        nonlocal meter
        spent = meter.seconds()["cpu_seconds"]
        meter = CostMeter()
        return spent

    rows: dict[str, Row] = {}
    singles = [fitted(state) for state in kept]
    cost_of_singles = seconds()
    rows[LAST] = Row(models=singles[-1:], num_averaged=1, choosing_cpu_seconds=cost_of_singles / len(singles))
    if any(isinstance(module, _BatchNorm) for module in shell.modules()):
        rows[AS_SAVED] = Row(models=[loaded(kept[-1])], num_averaged=1)

    # The newest first, as the curves are drawn.
    predictions = [predict(model, problem.val()) for model in reversed(singles)]
    labels = predictions[0][1]
    probs = np.stack([each for each, _ in predictions])
    curves: dict[str, Any] = {
        "single_nll": [nll(each, labels) for each in probs],
        "single_accuracy": [accuracy(each, labels) for each in probs],
    }
    together = np.cumsum(probs, axis=0) / np.arange(1, len(probs) + 1)[:, None, None]
    curves["ensemble_nll"] = [nll(each, labels) for each in together]
    curves["ensemble_accuracy"] = [accuracy(each, labels) for each in together]
    best = int(np.argmin(curves["single_nll"]))
    rows[BEST] = Row(
        models=[singles[-1 - best]],
        num_averaged=1,
        choosing_cpu_seconds=cost_of_singles + seconds(),
        notes={"from_the_end": best + 1},
    )
    for name, kind in zip((EQUAL, LINEAR, EXPONENTIAL), KINDS, strict=True):
        rule = cast("CoefficientKind", kind)
        curve = averaging_curve(shell, kept, rule, problem.training, problem.val, decay=study.decay)
        curves[f"{kind}_nll"] = [point.average_nll for point in curve]
        curves[f"{kind}_accuracy"] = [point.average_accuracy for point in curve]
        count = int(np.argmin(curves[f"{kind}_nll"])) + 1
        shares = coefficients(rule, count, decay=study.decay)
        model = averaged_model(shell, kept[-count:], shares, problem.training)
        rows[name] = Row(models=[model], num_averaged=count, choosing_cpu_seconds=seconds())
    for name in (SWA, EMA, POLYAK_LATE, POLYAK):
        rows[name] = Row(models=[loaded(load_tensors(place / "averages" / f"{slug(name)}.safetensors"))])
    rows[SWA].num_averaged = len(kept)
    seconds()
    for name, states in ((GREEDY_KEPT, kept), (GREEDY, ends)):
        soup = greedy_soup(shell, states, problem.training, problem.val)
        rows[name] = Row(
            models=[soup.model],
            num_averaged=len(soup.ingredients),
            choosing_cpu_seconds=seconds(),
            branched=name == GREEDY,
            notes={"ingredients": list(soup.ingredients)},
        )
    uniform = uniform_soup(shell, ends, problem.training, problem.val)
    rows[UNIFORM] = Row(
        models=[uniform.model], num_averaged=len(ends), choosing_cpu_seconds=seconds(), branched=True
    )
    count = rows[EQUAL].num_averaged or 1
    share = cost_of_singles / len(singles)
    rows[ENSEMBLE] = Row(
        models=singles[-count:],
        num_averaged=count,
        choosing_cpu_seconds=rows[EQUAL].choosing_cpu_seconds + count * share,
    )
    rows[ENSEMBLE_KEPT] = Row(models=singles, num_averaged=len(singles), choosing_cpu_seconds=cost_of_singles)
    rows[ENSEMBLE_BRANCHES] = Row(
        models=[singles[-1], *map(fitted, others)],
        num_averaged=len(ends),
        choosing_cpu_seconds=len(ends) * share,
        branched=True,
    )
    with warnings.catch_warnings():
        # The barriers are in the table, also where they are high.
        warnings.simplefilter("ignore", UserWarning)
        for name, first in (("oldest_kept", kept[0]), ("branch", others[0])):
            check = BarrierCheck(num_points=5)
            line = loss_barrier(shell, first, kept[-1], problem.training, problem.val, check=check)
            curves[f"barrier_to_{name}"] = line.barrier
    return rows, curves


def evaluate(study: Study, problem: Problem, task: Task, place: Path) -> None:
    """Choose on val, then predict test once; write predictions.npz and, last, record.json."""
    from dnas_ens.files import read_json, write_json

    rows, curves = choose(study, problem, task, place)
    trained = read_json(place / "training.json")
    arrays: dict[str, Any] = {}
    for split, batches in (("val", problem.val), ("test", problem.test)):
        known: dict[int, np.ndarray] = {}
        for row in rows.values():
            for model in row.models:
                # A model of several rows predicts once.
                if id(model) not in known:
                    known[id(model)], arrays[f"{split}_labels"] = predict(model, batches())
        arrays[f"{split}_probs"] = np.stack(
            [np.mean([known[id(model)] for model in row.models], axis=0) for row in rows.values()]
        ).astype(np.float32)
    np.savez_compressed(place / "predictions.npz", methods=np.array(list(rows)), **arrays)
    found = {}
    for index, (name, row) in enumerate(rows.items()):
        of_branches = trained["branches_cpu_seconds"] if row.branched else 0.0
        found[name] = {
            "num_averaged": row.num_averaged,
            "passes": len(row.models),
            "training_cpu_seconds": trained["training_cpu_seconds"] + of_branches,
            "choosing_cpu_seconds": row.choosing_cpu_seconds,
            **row.notes,
            **metrics(arrays, index),
        }
    record = {**task._asdict(), **trained, "sizes": problem.sizes, "rows": found, "curves": curves}
    write_json(place / "record.json", record)


def metrics(arrays: Mapping[str, np.ndarray], index: int) -> dict[str, float]:
    """Return a row's figures from its predictions; the temperature is fitted on val."""
    from dnas_ens.analysis.calibration import calibrated_nll, fit_temperature
    from dnas_ens.analysis.metrics import accuracy, nll

    val, test = arrays["val_probs"][index], arrays["test_probs"][index]
    temperature = fit_temperature(val, arrays["val_labels"])
    return {
        "val_nll": nll(val, arrays["val_labels"]),
        "val_accuracy": accuracy(val, arrays["val_labels"]),
        "temperature": temperature,
        "accuracy": accuracy(test, arrays["test_labels"]),
        "nll": nll(test, arrays["test_labels"]),
        "calibrated_nll": calibrated_nll(test, arrays["test_labels"], temperature),
    }


# What is kept


def finished_records(study: Study, fingerprint: str) -> dict[Task, dict[str, Any]]:
    """Return the records of the run folder, by training.

    Raises:
        UserError: Run folder or OUTPUT.jsonl holds other settings, or the latter more than the former.
    """
    from dnas_ens.files import as_json, read_json

    def refuse_others(task: Task, settings: Mapping[str, Any], place: Path, option: str) -> None:
        if settings != as_json(study.settings(task, fingerprint)):
            raise UserError(
                f"{place} holds {task} with other settings.",
                f"Give another --{option}, or remove it to start afresh.",
            )

    records: dict[Task, dict[str, Any]] = {}
    for file in sorted(study.folder.glob("*/training.json")):
        task = task_of(file.parent.name)
        refuse_others(task, read_json(file)["settings"], study.folder, "run-dir")
        if (done := file.with_name("record.json")).exists():
            records[task] = read_json(done)
    results = study.results.with_suffix(".jsonl")
    for line in results.read_text().splitlines() if results.exists() else ():
        stored = json.loads(line)
        task = Task(*(stored[name] for name in Task._fields))
        refuse_others(task, stored["settings"], results, "output")
        if task not in records and task not in tasks(study):
            raise UserError(
                f"{results} holds {task}, which is not in {study.folder}.",
                "Give the --run-dir it was trained in, or another --output.",
            )
    return records


def tasks(study: Study) -> list[Task]:
    """Return the trainings of a study, seed by seed, so that an interrupted one has all settings."""
    return [
        Task(model, schedule, seed)
        for seed in range(study.seeds)
        for model in study.models
        for schedule in SCHEDULES
    ]


def task_of(name: str) -> Task:
    """Return the training that a folder is named after."""
    model, schedule, seed = name.rsplit("-", 2)
    return Task(model, schedule, int(seed))


class Group:
    """The finished seeds of one model under both schedules.

    Args:
        records: All records.
        model: The model.
        folder: The run folder, for the predictions.
    """

    def __init__(self, records: Mapping[Task, dict[str, Any]], model: str, folder: Path) -> None:
        self.model = model
        self.seeds = [
            task.seed
            for task in sorted(records)
            if task.model == model
            and task.schedule == SCHEDULES[0]
            and all(task._replace(schedule=schedule) in records for schedule in SCHEDULES)
        ]
        self.records = {
            schedule: [records[Task(model, schedule, seed)] for seed in self.seeds] for schedule in SCHEDULES
        }
        self.methods = list(self.records[SCHEDULES[0]][0]["rows"]) if self.seeds else []
        self._losses = {
            schedule: np.stack([self._read(folder / str(Task(model, schedule, seed))) for seed in self.seeds])
            for schedule in (SCHEDULES if self.seeds else ())
        }
        self._differences: dict[tuple[tuple[str, str], tuple[str, str]], Difference] = {}

    def _read(self, place: Path) -> np.ndarray:
        """Return each method's calibrated NLL of each test input, (methods, N)."""
        from dnas_ens.analysis.calibration import apply_temperature
        from dnas_ens.analysis.metrics import PROB_FLOOR

        task = task_of(place.name)
        record = self.records[task.schedule][self.seeds.index(task.seed)]
        with np.load(place / "predictions.npz") as stored:
            labels, probs = stored["test_labels"], stored["test_probs"]
        losses = []
        for row, predicted in zip(record["rows"].values(), probs, strict=True):
            calibrated = apply_temperature(predicted, row["temperature"])
            losses.append(-np.log(np.clip(calibrated[np.arange(len(labels)), labels], PROB_FLOOR, 1.0)))
        return np.stack(losses)

    def rows(self, schedule: str, method: str) -> list[dict[str, Any]]:
        """Return a method's rows, a seed each."""
        return [record["rows"][method] for record in self.records[schedule]]

    def difference(self, first: tuple[str, str], second: tuple[str, str]) -> Difference:
        """Compare two methods, each (schedule, method), by their calibrated NLL."""
        if (first, second) not in self._differences:
            self._differences[first, second] = Difference.of(
                *(
                    self._losses[schedule][:, self.methods.index(method)]
                    for schedule, method in (first, second)
                )
            )
        return self._differences[first, second]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First minus second, calibrated NLL in nats, with two 95 % intervals.

    Args:
        mean: Over seeds and test inputs.
        seeds: Paired t interval over seeds; NaN for a single one.
        points: Paired bootstrap over test inputs, of the mean over seeds.
        same: Whether both predict the same.
    """

    mean: float
    seeds: tuple[float, float]
    points: tuple[float, float]
    same: bool

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray) -> Difference:
        """Compare losses (S, N) of two methods on the same seeds and test inputs."""
        from scipy.stats import bootstrap, ttest_1samp

        difference = first - second
        # Beyond what single precision of stored probabilities tells apart.
        if np.abs(difference).max() < 1e-4:
            return cls(mean=0.0, seeds=(0.0, 0.0), points=(0.0, 0.0), same=True)
        over_seeds = (math.nan, math.nan)
        if len(difference) > 1:
            interval = ttest_1samp(difference.mean(axis=1), 0.0).confidence_interval(CONFIDENCE)
            over_seeds = (float(interval.low), float(interval.high))
        drawn = bootstrap(
            (difference.mean(axis=0),),
            np.mean,
            n_resamples=RESAMPLES,
            batch=500,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        return cls(
            mean=float(difference.mean()),
            seeds=over_seeds,
            points=(float(drawn.low), float(drawn.high)),
            same=False,
        )

    def verdict(self) -> str:
        """Say in a word or two what the intervals allow to say."""
        if self.same:
            return "the same"
        if math.isnan(self.seeds[0]):
            return "one seed tells nothing beyond its training"
        if min(self.seeds[0], self.points[0]) <= 0 <= max(self.seeds[1], self.points[1]):
            return "not distinguishable at this size"
        if abs(self.mean) < 0.5 * 10**-DECIMALS:
            return f"equal to {DECIMALS} decimals"
        return "better" if self.mean < 0 else "worse"

    def sentence(self, first: str, second: str) -> str:
        """Say it as a sentence."""
        verdict = self.verdict()
        if self.same:
            return f"{first} predicts the same as {second}."
        if verdict in ("better", "worse"):
            return f"{first} is {verdict} than {second} ({self})."
        return f"{first} and {second}: {verdict} ({self})."

    def __str__(self) -> str:
        """Give the mean with both intervals."""
        if self.same:
            return "0"
        ends = " to ".join(f"{end:+.{DECIMALS}f}" for end in self.points)
        over_seeds = " to ".join(f"{end:+.{DECIMALS}f}" for end in self.seeds)
        seeds = "" if math.isnan(self.seeds[0]) else f"seeds {over_seeds}; "
        return f"{self.mean:+.{DECIMALS}f}; {seeds}test points {ends}"


# What comes out


def mean_and_deviation(values: Sequence[float], *, digits: int) -> str:
    """Return mean ± standard deviation as text; the mean alone of a single value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(group: Group, schedule: str) -> str:
    """Return every method of a schedule as Markdown."""
    header = (
        "method",
        "models, a seed",
        "accuracy %",
        "NLL",
        "calibrated NLL",
        "val NLL",
        "passes",
        "CPU s training",
        "CPU s after it",
        "calibrated NLL minus last model's",
        "verdict",
    )
    lines = ["| " + " | ".join(header) + " |", "|:--" + "|--:" * (len(header) - 3) + "|:--" * 2 + "|"]
    for method in group.methods:
        rows = group.rows(schedule, method)
        counts = [row["num_averaged"] for row in rows]
        difference = group.difference((schedule, method), (schedule, LAST))
        cells = [
            method,
            "" if None in counts else ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1])),
            mean_and_deviation([100 * row["accuracy"] for row in rows], digits=2),
            *(
                mean_and_deviation([row[name] for row in rows], digits=DECIMALS)
                for name in ("nll", "calibrated_nll", "val_nll")
            ),
            f"{statistics.fmean(row['passes'] for row in rows):.3g}",
            *(
                f"{statistics.fmean(row[f'{name}_cpu_seconds'] for row in rows):.1f}"
                for name in ("training", "choosing")
            ),
            "" if method == LAST else str(difference),
            "" if method == LAST else difference.verdict(),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def comparisons(group: Group) -> tuple[str, int]:
    """Return one sentence for each comparison of a model as a Markdown list, and how many there are."""
    sentences = [
        f"{schedule}: "
        + group.difference((schedule, first), (schedule, second)).sentence(f"*{first}*", f"*{second}*")
        for schedule in SCHEDULES
        for first, second in PAIRS
    ]
    constant, cosine = SCHEDULES
    sentences += [
        "across schedules: "
        + group.difference((constant, method), (cosine, LAST)).sentence(
            f"*{method}*, {constant},", f"*{LAST}*, {cosine}"
        )
        for method in ACROSS
    ]
    return "".join(f"- {sentence}\n" for sentence in sentences), len(sentences)


def summary(group: Group, schedule: str) -> str:
    """Say in one sentence how all methods stand to the last model."""
    by_verdict: dict[str, list[str]] = {}
    for method in group.methods:
        if method != LAST:
            verdict = group.difference((schedule, method), (schedule, LAST)).verdict()
            by_verdict.setdefault(verdict, []).append(f"*{method}*")
    told = "; ".join(f"**{verdict}**: {', '.join(methods)}" for verdict, methods in by_verdict.items())
    return f"Against the last model of the schedule {schedule}: {told}."


def bounded(group: Group, schedule: str) -> str:
    """Say in how many trainings the best n is the largest there is, so that a larger one may be better still."""
    told = []
    for name, method in zip(KINDS, (EQUAL, LINEAR, EXPONENTIAL), strict=True):
        pairs = zip(group.records[schedule], group.rows(schedule, method), strict=True)
        at_bound = [row["num_averaged"] == len(record["curves"]["single_nll"]) for record, row in pairs]
        told.append(f"{sum(at_bound)} ({name})")
    return f"Of {len(group.seeds)} trainings, n is the largest there is in {', '.join(told)}."


def section(group: Group) -> str:
    """Return everything on one model as Markdown."""
    parts = [f"## {group.model}, {group.records[SCHEDULES[0]][0]['parameters']:,} parameters\n"]
    for schedule in SCHEDULES:
        oldest, branch = (
            mean_and_deviation(
                [record["curves"][name] for record in group.records[schedule]], digits=DECIMALS
            )
            for name in ("barrier_to_oldest_kept", "barrier_to_branch")
        )
        parts += [
            f"### Schedule {schedule}\n",
            table(group, schedule),
            f"{summary(group, schedule)}\n",
            f"Loss barrier on val, five points on the line: from the last model to the oldest kept {oldest}, to "
            f"another branch's end {branch} nats. {bounded(group, schedule)}\n",
        ]
    sentences, count = comparisons(group)
    parts += [
        f"### Comparisons\n\nCalibrated NLL, first minus second, over seeds {', '.join(map(str, group.seeds))}. "
        "*Better* and *worse* need both 95 % intervals to leave out 0: the paired t interval over seeds and the paired "
        f"bootstrap over test points of the mean over seeds. Each stands alone: of {count} comparisons some will err "
        "by chance.\n",
        sentences,
    ]
    return "\n".join(parts)


def plot(groups: Sequence[Group], path: Path) -> None:
    """Draw a row a model: val NLL over i under both schedules, and every method's difference on test."""
    from dnas_ens.analysis.style import font, new_figure

    height = 70 + 290 * len(groups)
    figure = new_figure(960, height)
    # Unlike tight_layout it lets columns differ in the room their labels take.
    figure.set_layout_engine(
        "constrained", rect=(0, 50 / height, 1, 1 - 56 / height), wspace=0.04, hspace=0.06
    )
    axes = figure.subplots(len(groups), 3, squeeze=False, width_ratios=(1, 1, 1.1))
    for row, group in zip(axes, groups, strict=True):
        row[1].sharey(row[0])
        row[1].tick_params(labelleft=False)
        for axis, schedule in zip(row, SCHEDULES, strict=False):
            _plot_curves(axis, group, schedule)
        _plot_differences(row[2], group)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=3, frameon=False, prop=font(9))
    handles, labels = axes[0, 2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", ncols=1, frameon=False, prop=font(9))
    figure.savefig(path, dpi=110)


def _plot_curves(axis: Axes, group: Group, schedule: str) -> None:
    """Draw val NLL over i minus that of the same training's last model: mean and standard deviation over seeds."""
    from matplotlib.ticker import MaxNLocator

    from dnas_ens.analysis.style import BLUE, GREEN, MUTED_COLOUR, PURPLE, VERMILION, font, style_axis

    lines = {
        "single": ("model i from the end, alone", MUTED_COLOUR, "-"),
        "equal": ("equal average of the last i", BLUE, "-"),
        "linear": ("linearly decaying average", VERMILION, (0, (6, 2))),
        "exponential": ("exponentially decaying average", GREEN, (0, (2, 1.5))),
        "ensemble": ("ensemble of the last i (predictions averaged)", PURPLE, (0, (8, 2, 2, 2))),
    }
    records = group.records[schedule]
    for name, (label, colour, style) in lines.items():
        values = np.array([record["curves"][f"{name}_nll"] for record in records])
        # A seed's own level would hide what averaging does to it.
        values -= np.array([record["curves"]["single_nll"][:1] for record in records])
        models, mean, spread = np.arange(1, values.shape[1] + 1), values.mean(axis=0), values.std(axis=0)
        axis.fill_between(models, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axis.plot(models, mean, color=colour, linestyle=style, linewidth=1.8, label=label)
    level = statistics.fmean(record["curves"]["single_nll"][0] for record in records)
    style_axis(
        axis,
        x_label="i, models from the end of the training",
        y_label="val NLL minus the last model's, nats" if schedule == SCHEDULES[0] else "",
    )
    axis.set_xlim(1, None)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, prune="lower"))
    rate = "constant rate" if schedule == SCHEDULES[0] else "cosine to 0"
    axis.set_title(
        f"{group.model}, {rate}\nlast model {level:.3f} nats", fontproperties=font(10, bold=True), loc="left"
    )


def _plot_differences(axis: Axes, group: Group) -> None:
    """Draw each method's calibrated NLL on test minus the last model's, with both intervals."""
    from dnas_ens.analysis.style import BLUE, MUTED_COLOUR, TEXT_COLOUR, VERMILION, font, style_axis

    methods = [method for method in group.methods if method != LAST]
    ends = []
    for schedule, colour, offset in zip(SCHEDULES, (BLUE, VERMILION), (-0.17, 0.17), strict=True):
        for position, method in enumerate(methods):
            found = group.difference((schedule, method), (schedule, LAST))
            label = schedule if position == 0 else None
            axis.plot(found.mean, position + offset, "o", color=colour, markersize=4.5, label=label)
            axis.plot(found.points, [position + offset] * 2, color=colour, linewidth=3, alpha=0.55)
            axis.plot(found.seeds, [position + offset] * 2, color=colour, linewidth=0.9)
            ends += [*found.points, found.mean]
    axis.axvline(0, color=MUTED_COLOUR, linewidth=1, linestyle="--")
    style_axis(axis, x_label="test: calibrated NLL minus last model's")
    # An interval over few seeds may be far wider than anything else in the panel.
    margin = 0.35 * (max(ends) - min(ends)) + 1e-6
    axis.set_xlim(min(ends) - margin, max(ends) + margin)
    axis.locator_params(axis="x", nbins=5)
    axis.set_yticks(range(len(methods)), methods, fontproperties=font(8), color=TEXT_COLOUR)
    axis.invert_yaxis()
    axis.set_title(
        f"{group.model}, 95 % intervals\nthick: test points, thin: seeds",
        fontproperties=font(10, bold=True),
        loc="left",
    )


def report(
    study: Study, problem: Problem, records: Mapping[Task, dict[str, Any]], command: Sequence[str]
) -> str:
    """Write OUTPUT.md, .png and .jsonl and return the tables."""
    from dnas_ens.environment import environment

    models = dict.fromkeys([*study.models, *(task.model for task in sorted(records))])
    groups = [group for model in models if (group := Group(records, model, study.folder)).seeds]
    env = environment(command)
    versions = ", ".join(f"{name} {env['packages'][name]}" for name in ("torch", "numpy", "scipy"))
    recipe, (train_size, val_size, test_size) = study.recipe, problem.sizes
    seeds = "; ".join(f"{group.model} {', '.join(map(str, group.seeds))}" for group in groups)
    cells = "a given genotype" if study.genotypes else f"a random genotype (seed {study.genotype_seed})"
    header = (
        f"# Averages of the weights of the last models of a training: {Path(study.data).name}\n\n"
        f"Command: `{' '.join(env['command'])}`\n\n"
        f"Hardware: {env['cpu']}, {env['num_cpus']} cores, no GPU, one thread. Versions: {versions}. "
        f"Revision: {env['git_revision']}. Date: {env['time']}. Seeds of initialisation, order and augmentation, "
        f"each from its own stream: {seeds}; split seed {study.split_seed}, the same for all, so "
        "that intervals over seeds cover the luck of training and not that of the draw of the data.\n\n"
        "**No published table exists for this study.** What the literature expects: SWA generalises better than the "
        "end of a conventional training, when the learning rate stays constant or cycles (arXiv 1803.05407); soups of "
        "models fine-tuned from one pre-trained network beat their best ingredient at the cost of one (arXiv "
        "2203.05482). Both were shown on far larger networks and data than these.\n\n"
        f"Scale: {train_size} training, {val_size} val and {test_size} test inputs; {recipe.epochs} epochs in batches "
        f"of {recipe.batch_size}, SGD with momentum {recipe.momentum:g} and weight decay {recipe.weight_decay:g}; "
        f"the models after the last {study.kept} epochs are kept. Learning rate from {study.learning_rate:g}: "
        f"*constant* falls by half a cosine to {study.averaging_rate:g}, where it stays over the kept epochs; "
        "*cosine* falls to 0 over the whole training. Both are run because a model at the end of a constant rate has "
        "not settled: an average that only makes up for that gains nothing against the cosine's last model, which is "
        "what the comparisons *across schedules* ask. Where models get worse towards the end, an average also gains by "
        "reaching back before that; a single earlier model does so too, hence the comparisons with the *best single "
        "kept model*. "
        + (f"Cells: {cells}, {recipe.num_cells} cells, C={recipe.channels}. " if CELL in models else "")
        + "\n\nBatchNorm statistics are recomputed on training data for every row but the one that says otherwise, "
        f"and for single models too. n, by val NLL, is chosen separately for each rule; the exponential decay is "
        f"{study.decay:g} a model, the EMA's {study.ema_decay:g} a step. SWA takes every kept epoch, so it is the "
        "equal average without a choice of n, and would be a uniform soup of the kept models too. Branches: "
        f"{study.branches} trainings of the kept epochs from one start, which differ in order and augmentation alone "
        "(the paper's soups also vary hyper-parameters). Everything is chosen on val; temperatures are fitted on val; "
        "test was predicted once, after that. Mean ± standard deviation over seeds; NLL in nats. *Passes*: forward "
        "passes a prediction. CPU seconds: training includes the running averages with their pass for BatchNorm and, "
        "for soups and ensembles of branches, the other branches; *after it* is BatchNorm statistics and "
        "choosing on val.\n\n"
    )
    text = "\n".join(section(group) for group in groups)
    study.results.parent.mkdir(parents=True, exist_ok=True)
    study.results.with_suffix(".md").write_text(header + text)
    lines = (json.dumps(records[task]) + "\n" for task in sorted(records))
    study.results.with_suffix(".jsonl").write_text("".join(lines))
    plot(groups, study.results.with_suffix(".png"))
    return text


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    import torch

    from dnas_ens.environment import environment
    from dnas_ens.files import read_json, write_json

    torch.set_num_threads(1)
    problem = load_problem(study)
    for model in study.models:
        # A model that is not possible is refused before another one is trained.
        build_model(study, problem, model)
    finished_records(study, problem.fingerprint)
    command = [*PROG.split(), *argv]
    environments = study.folder / "env.json"
    sittings = read_json(environments) if environments.exists() else []
    write_json(environments, [*sittings, environment(command)])
    for task in tasks(study):
        place = study.folder / str(task)
        if not (place / "training.json").exists():
            train(study, problem, task, place)
            trained = read_json(place / "training.json")
            seconds = trained["training_cpu_seconds"] + trained["branches_cpu_seconds"]
            print(f"{task}: trained, {seconds:.1f} CPU s", flush=True)
        if not (place / "record.json").exists():
            evaluate(study, problem, task, place)
            rows = read_json(place / "record.json")["rows"]
            print(
                f"{task}: evaluated, calibrated NLL of the last model {rows[LAST]['calibrated_nll']:.4f}, of the "
                f"equal average of {rows[EQUAL]['num_averaged']} {rows[EQUAL]['calibrated_nll']:.4f}",
                flush=True,
            )
    print(report(study, problem, finished_records(study, problem.fingerprint), command))
    print(f"wrote {study.results}.md, .png and .jsonl")


if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))
