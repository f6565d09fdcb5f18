"""One training with its kept models, its running averages and its branches."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from studies.training import Training
from studies.weight_averaging.methods import EMA, POLYAK, POLYAK_LATE, SWA
from studies.weight_averaging.options import Study, Task
from studies.weight_averaging.problem import Problem, build_model


def start(study: Study, problem: Problem, task: Task, *, branch: int = 0) -> Training:
    """Return a training from fresh weights; the branch decides order and augmentation, branch 0 also initialises."""
    from dnas_ens.training.step import MemberSeeds

    return Training(
        lambda: build_model(study, problem, task.model),
        problem.training_pass,
        study.recipe,
        MemberSeeds.derive(task.seed, branch),
        name=str(task),
    )


def train(study: Study, problem: Problem, task: Task, place: Path) -> None:
    """Train a model with its branches and running averages and save everything; training.json comes last."""
    from dnas_ens.ensembles.averaging import (
        ExponentialMovingAverage,
        PolyakAverage,
        StochasticWeightAverage,
    )
    from dnas_ens.run.files import save_tensors, write_json
    from dnas_ens.run.progress import CostMeter

    epochs, begin = study.recipe.epochs, study.recipe.epochs - study.kept
    # What an interrupted training left could be of other settings.
    shutil.rmtree(place, ignore_errors=True)
    cost = CostMeter()
    training = start(study, problem, task)
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
            at_begin = copy.deepcopy(training.state_dict())

        def on_step(_: int) -> None:
            for average in averages.values():
                average.after_step(training.model)

        training.run_epoch(
            learning_rate=study.learning_rate_at(task.schedule, training.epoch), on_step=on_step
        )
        for average in averages.values():
            average.after_epoch(training.model, epoch + 1)
        if epoch >= begin:
            save_tensors(place / "kept" / f"{epoch - begin:04d}.safetensors", training.model.state_dict())
    for name, average in averages.items():
        finished = average.finished(problem.training)
        save_tensors(place / "averages" / f"{slug(name)}.safetensors", finished.state_dict())
    own = cost.seconds()["cpu_seconds"]
    for branch in range(1, study.branches):
        other = start(study, problem, task, branch=branch)
        other.branch_off(at_begin)
        while other.epoch < epochs:
            other.run_epoch(learning_rate=study.learning_rate_at(task.schedule, other.epoch))
        save_tensors(place / "branches" / f"{branch:04d}.safetensors", other.model.state_dict())
    write_json(
        place / "training.json",
        {
            "settings": study.settings(task, problem.fingerprint),
            "seed": task.seed,
            "parameters": training.num_parameters,
            "training_cpu_seconds": own,
            "branches_cpu_seconds": cost.seconds()["cpu_seconds"] - own,
        },
    )


def slug(name: str) -> str:
    """Return a method's name as a file's."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
