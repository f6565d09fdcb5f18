"""What becomes of one training's models: every method's, chosen on val alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from studies.weight_averaging.methods import (
    AS_SAVED,
    BEST,
    EMA,
    ENSEMBLE,
    ENSEMBLE_BRANCHES,
    ENSEMBLE_KEPT,
    EQUAL,
    EXPONENTIAL,
    GREEDY,
    GREEDY_KEPT,
    KINDS,
    LAST,
    LINEAR,
    POLYAK,
    POLYAK_LATE,
    SWA,
    UNIFORM,
)
from studies.weight_averaging.options import Study, Task
from studies.weight_averaging.problem import Problem, build_model
from studies.weight_averaging.trainings import slug

if TYPE_CHECKING:
    from torch import nn

    from dnas_ens.ensembles.averaging import State


@dataclass(kw_only=True)
class Choice:
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


def choose(
    study: Study, problem: Problem, task: Task, place: Path
) -> tuple[dict[str, Choice], dict[str, Any]]:
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

    rows: dict[str, Choice] = {}
    singles = [fitted(state) for state in kept]
    cost_of_singles = seconds()
    rows[LAST] = Choice(
        models=singles[-1:], num_averaged=1, choosing_cpu_seconds=cost_of_singles / len(singles)
    )
    if any(isinstance(module, _BatchNorm) for module in shell.modules()):
        rows[AS_SAVED] = Choice(models=[loaded(kept[-1])], num_averaged=1)

    # The newest first, as the curves are drawn.
    probs, labels = predict_members(reversed(singles), problem.val)
    curves: dict[str, Any] = {
        "single_nll": [nll(each, labels) for each in probs],
        "single_accuracy": [accuracy(each, labels) for each in probs],
    }
    together = np.cumsum(probs, axis=0) / np.arange(1, len(probs) + 1)[:, None, None]
    curves["ensemble_nll"] = [nll(each, labels) for each in together]
    curves["ensemble_accuracy"] = [accuracy(each, labels) for each in together]
    best = int(np.argmin(curves["single_nll"]))
    rows[BEST] = Choice(
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
        rows[name] = Choice(models=[model], num_averaged=count, choosing_cpu_seconds=seconds())
    for name in (SWA, EMA, POLYAK_LATE, POLYAK):
        rows[name] = Choice(models=[loaded(load_tensors(place / "averages" / f"{slug(name)}.safetensors"))])
    rows[SWA].num_averaged = len(kept)
    seconds()
    for name, states in ((GREEDY_KEPT, kept), (GREEDY, ends)):
        soup = greedy_soup(shell, states, problem.training, problem.val)
        rows[name] = Choice(
            models=[soup.model],
            num_averaged=len(soup.ingredients),
            choosing_cpu_seconds=seconds(),
            branched=name == GREEDY,
            notes={"ingredients": list(soup.ingredients)},
        )
    uniform = uniform_soup(shell, ends, problem.training, problem.val)
    rows[UNIFORM] = Choice(
        models=[uniform.model], num_averaged=len(ends), choosing_cpu_seconds=seconds(), branched=True
    )
    count = rows[EQUAL].num_averaged or 1
    share = cost_of_singles / len(singles)
    rows[ENSEMBLE] = Choice(
        models=singles[-count:],
        num_averaged=count,
        choosing_cpu_seconds=rows[EQUAL].choosing_cpu_seconds + count * share,
    )
    rows[ENSEMBLE_KEPT] = Choice(
        models=singles, num_averaged=len(singles), choosing_cpu_seconds=cost_of_singles
    )
    rows[ENSEMBLE_BRANCHES] = Choice(
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
