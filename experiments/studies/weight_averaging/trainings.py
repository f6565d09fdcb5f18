"""One training with its kept models, running averages and branches, and every method's models, chosen on val."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dnas_ens.compare.records import Record
from dnas_ens.compare.report import Row, measured_rows
from dnas_ens.compare.study import Unit
from studies.weight_averaging.study import Problem, Study, Task, build_model

if TYPE_CHECKING:
    from torch import nn

    from dnas_ens.ensembles.averaging import State
    from dnas_ens.training.trainer import Training


KINDS = {"equal": "equal", "linear": "linearly decaying", "exponential": "exponentially decaying"}

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
#: Pairs of one schedule that get a sentence each.
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
#: Methods under the constant rate that are compared with the last model of the cosine.
ACROSS = (LAST, EQUAL, SWA, EMA, ENSEMBLE)


def start(study: Study, problem: Problem, task: Task, *, branch: int = 0) -> Training[nn.Module]:
    """Return a training from fresh weights; the branch decides order and augmentation, branch 0 also initialises."""
    from dnas_ens.nn.execution import PLAIN
    from dnas_ens.training.step import MemberSeeds
    from dnas_ens.training.trainer import Training

    return Training(
        lambda: build_model(study, problem, task.model),
        problem.training_pass,
        study.recipe,
        MemberSeeds.derive(task.seed, branch),
        name=str(task),
        execution=PLAIN,
    )


def train(study: Study, problem: Problem, task: Task) -> Record:
    """Train a model with its branches and running averages, save the states, and return what the training was."""
    from dnas_ens.ensembles.averaging import (
        ExponentialMovingAverage,
        PolyakAverage,
        StochasticWeightAverage,
    )
    from dnas_ens.run.files import save_tensors
    from dnas_ens.run.progress import CostMeter

    place = study.folder / str(task)
    epochs, begin = study.recipe.epochs, study.recipe.epochs - study.kept
    # What an interrupted training left could be of other settings.
    shutil.rmtree(place, ignore_errors=True)
    cost = CostMeter()
    training = start(study, problem, task)
    late = PolyakAverage(training.network)
    averages = {
        POLYAK: PolyakAverage(training.network),
        EMA: ExponentialMovingAverage(training.network, decay=study.ema_decay),
        SWA: StochasticWeightAverage(training.network, start_epoch=begin + 1),
    }
    at_begin: dict[str, Any] = {}
    for epoch in range(epochs):
        if epoch == begin:
            averages[POLYAK_LATE] = late
            at_begin = copy.deepcopy(training.state_dict())

        def on_step() -> None:
            for average in averages.values():
                average.after_step(training.network)

        training.run_epoch(learning_rate=study.learning_rate_at(task.schedule, training.epoch), on_step=on_step)
        for average in averages.values():
            average.after_epoch(training.network, epoch + 1)
        if epoch >= begin:
            save_tensors(place / "kept" / f"{epoch - begin:04d}.safetensors", training.network.state_dict())
    for name, average in averages.items():
        finished = average.finished(problem.training)
        save_tensors(place / "averages" / f"{slug(name)}.safetensors", finished.state_dict())
    own = cost.seconds()["cpu_seconds"]
    for branch in range(1, study.branches):
        other = start(study, problem, task, branch=branch)
        other.branch_off(at_begin)
        while other.epoch < epochs:
            other.run_epoch(learning_rate=study.learning_rate_at(task.schedule, other.epoch))
        save_tensors(place / "branches" / f"{branch:04d}.safetensors", other.network.state_dict())
    return {
        **task._asdict(),
        "settings": study.settings(task, problem.fingerprint),
        "parameters": training.num_parameters,
        "training_cpu_seconds": own,
        "branches_cpu_seconds": cost.seconds()["cpu_seconds"] - own,
    }


def slug(name: str) -> str:
    """Return a method's name as a file's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


@dataclass(frozen=True)
class Choice:
    """A method of one training.

    Args:
        models: One, or as many as have their predictions averaged.
        num_averaged: Models that went into it, where that is a number of saved models.
        seconds: What making it cost after the training, the choice on val included, in CPU seconds.
        branched: Whether it also needs the branches.
        notes: What else is noted.
    """

    models: Sequence[nn.Module]
    num_averaged: int | None
    seconds: float
    branched: bool
    notes: dict[str, Any]


def choose(study: Study, problem: Problem, task: Task) -> tuple[dict[str, Choice], dict[str, Any]]:
    """Make every method's models, choosing on val alone; return them with the curves over n."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from dnas_ens.ensembles.averaging import CoefficientKind, averaged_model, coefficients
    from dnas_ens.ensembles.soups import (
        BarrierCheck,
        averaging_curve,
        greedy_soup,
        loss_barrier,
        uniform_soup,
    )
    from dnas_ens.metrics.scores import accuracy, nll
    from dnas_ens.run.files import load_tensors
    from dnas_ens.run.progress import CostMeter
    from dnas_ens.training.prediction import predict_members

    place = study.folder / str(task)
    with torch.random.fork_rng(devices=[]):
        shell = build_model(study, problem, task.model)
    kept, others = ([load_tensors(file) for file in sorted((place / name).iterdir())] for name in ("kept", "branches"))
    ends, batches = [kept[-1], *others], (problem.training, problem.val)

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

    rows: dict[str, Choice] = {}

    def add(
        name: str,
        models: Sequence[nn.Module],
        num_averaged: int | None = None,
        *,
        seconds: float = 0.0,
        branched: bool = False,
        **notes: Any,
    ) -> None:
        rows[name] = Choice(models, num_averaged, seconds, branched, notes)

    singles = [fitted(state) for state in kept]
    cost_of_singles = seconds()
    share = cost_of_singles / len(singles)
    add(LAST, singles[-1:], 1, seconds=share)
    if any(isinstance(module, _BatchNorm) for module in shell.modules()):
        add(AS_SAVED, [loaded(kept[-1])], 1)

    # The newest first, as the curves are drawn.
    probs, labels = predict_members(reversed(singles), problem.val)
    curves: dict[str, Any] = {}
    together = np.cumsum(probs, axis=0) / np.arange(1, len(probs) + 1)[:, None, None]
    for name, of_name in (("single", probs), ("ensemble", together)):
        curves[f"{name}_nll"] = [nll(each, labels) for each in of_name]
        curves[f"{name}_accuracy"] = [accuracy(each, labels) for each in of_name]
    best = int(np.argmin(curves["single_nll"]))
    add(BEST, [singles[-1 - best]], 1, seconds=cost_of_singles + seconds(), from_the_end=best + 1)
    for name, kind in zip((EQUAL, LINEAR, EXPONENTIAL), KINDS, strict=True):
        rule = cast("CoefficientKind", kind)
        curve = averaging_curve(shell, kept, rule, *batches, decay=study.decay)
        curves[f"{kind}_nll"] = [point.average_nll for point in curve]
        curves[f"{kind}_accuracy"] = [point.average_accuracy for point in curve]
        count = int(np.argmin(curves[f"{kind}_nll"])) + 1
        shares = coefficients(rule, count, decay=study.decay)
        add(name, [averaged_model(shell, kept[-count:], shares, problem.training)], count, seconds=seconds())
    for name in (SWA, EMA, POLYAK_LATE, POLYAK):
        state = load_tensors(place / "averages" / f"{slug(name)}.safetensors")
        add(name, [loaded(state)], len(kept) if name == SWA else None)
    seconds()
    for name, states in ((GREEDY_KEPT, kept), (GREEDY, ends)):
        soup = greedy_soup(shell, states, *batches)
        chosen = list(soup.ingredients)
        add(
            name,
            [soup.model],
            len(chosen),
            seconds=seconds(),
            branched=name == GREEDY,
            ingredients=chosen,
        )
    uniform = uniform_soup(shell, ends, *batches)
    add(UNIFORM, [uniform.model], len(ends), seconds=seconds(), branched=True)
    count = rows[EQUAL].num_averaged or 1
    add(ENSEMBLE, singles[-count:], count, seconds=rows[EQUAL].seconds + count * share)
    add(ENSEMBLE_KEPT, singles, len(singles), seconds=cost_of_singles)
    models = [singles[-1], *map(fitted, others)]
    add(ENSEMBLE_BRANCHES, models, len(ends), seconds=len(ends) * share, branched=True)
    with warnings.catch_warnings():
        # The barriers are in the table, also where they are high.
        warnings.simplefilter("ignore", UserWarning)
        for name, first in (("oldest_kept", kept[0]), ("branch", others[0])):
            check = BarrierCheck(num_points=5)
            curves[f"barrier_to_{name}"] = loss_barrier(shell, first, kept[-1], *batches, check=check).barrier
    return rows, curves


def evaluate(study: Study, problem: Problem, task: Task, trained: Record) -> Unit:
    """Choose on val, then predict test once; returns the training's record with rows and curves."""
    from dnas_ens.metrics.scores import accuracy, nll
    from dnas_ens.training.prediction import predict_batches

    chosen, curves = choose(study, problem, task)
    # A model of several rows predicts once.
    models = {id(model): model for choice in chosen.values() for model in choice.models}
    known, labels = {}, {}
    for split, batches in (("val", problem.val), ("test", problem.test)):
        for key, model in models.items():
            known[split, key], labels[split] = predict_batches(model, batches)

    def mean(split: str, choice: Choice) -> np.ndarray:
        averaged: np.ndarray = np.mean([known[split, id(model)] for model in choice.models], axis=0)
        return averaged

    rows = []
    for name, choice in chosen.items():
        val_probs = mean("val", choice).astype(np.float32)
        details = {
            "num_averaged": choice.num_averaged,
            "passes": len(choice.models),
            "training_cpu_seconds": trained["training_cpu_seconds"]
            + (trained["branches_cpu_seconds"] if choice.branched else 0.0),
            "choosing_cpu_seconds": choice.seconds,
            **choice.notes,
            "val_nll": nll(val_probs, labels["val"]),
            "val_accuracy": accuracy(val_probs, labels["val"]),
        }
        rows.append(Row(name=name, val_probs=val_probs, test_probs=mean("test", choice), details=details))
    measured, arrays = measured_rows(rows, val_labels=labels["val"], test_labels=labels["test"])
    by_name = {row.pop("name"): row for row in measured}
    return {**trained, "sizes": problem.sizes, "rows": by_name, "curves": curves}, arrays
