"""Ensembles of equal GPU seconds on all of Fashion-MNIST: a budget, cells, found and random, plain networks.

Networks of three cells of the efficient space, their stem of stride 2, and of stride 1 in a second budget; the search
on images is that of the preset ``fast``.

Each method has the same seconds, a search included, but for the copies of the best random cell, which took the random
cells' seconds to be found. How they are spent is decided by a rule before anything is trained, and written down: three
members side by side; of a kind's sizes the widest whose step takes at most ``WIDER`` times the smallest's; as many
epochs as fit, the learning rate falling by one cosine. A budget decides all that itself. What a method predicts on val
and test is kept and not looked at; `table` reads it.
"""

from __future__ import annotations

import io
import itertools
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from steps import endless_steps, joint_step
from timing import timed

from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.run.files import write_atomic
from studies.gpu.sections import Session

if TYPE_CHECKING:
    from torch import nn

    from dnas_ens.config import RetrainConfig
    from dnas_ens.data import ImageData
    from dnas_ens.data.batches import Augmentation
    from dnas_ens.space.genotype import Genotype
    from dnas_ens.training.trainer import NetworkTraining

MEMBERS = 3
#: A larger size is taken while its step takes at most so many times the smallest's.
WIDER = 1.25
#: Share of a searched ensemble's seconds that its search may take.
SEARCH_SHARE = 0.3
#: Seconds kept back for predictions and what cannot be foreseen, of each method.
RESERVE = 4.0
BUDGET, STAR, SEARCHED = "ours by budget", "cells by the star alone", "searched cells"
#: A ResNet-20 begins at the images' full size, and was far ahead; nine cells were not (docs/log.md).
FINE = "ours by budget, stem of stride 1"
RANDOM, COPIES = "random cells", "copies of the best random cell"
#: Holds what every method predicts.
LOG_PROBS = "log-probs.npz"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Networks of one kind in several sizes, smallest first.

    Args:
        name: What they are.
        sizes: Width of each.
        build: Size and member -> network.
    """

    name: str
    sizes: Sequence[int]
    build: Callable[[int, int], nn.Module]


def compare(session: Session) -> None:
    """Train and predict with every method that fits, each in the same seconds."""
    from dnas_ens.space.genotype import random_genotype
    from dnas_ens.space.spaces import SPACES

    data = session.data()
    way = session.executions("bfloat16")[-1]
    recipe = with_fields(retrain_preset(), batch_size=session.scaled(256, 64), learning_rate=0.1, **way.settings())
    rules = SPACES["efficient"]
    cells = [
        random_genotype(
            np.random.default_rng(1000 + index),
            operations=rules.operations,
            num_nodes=rules.num_nodes,
            space="efficient",
        )
        for index in range(MEMBERS)
    ]
    plain = {"cnn6": (2,)} if session.rehearse else {"cnn6": (32, 64, 128), "resnet20": (1,)}
    kinds = [_cells_kind(session, data, cells), *(_plain_kind(data, *kind) for kind in plain.items())]
    budgets = {BUDGET: recipe, FINE: with_fields(recipe, stem_stride=1)}
    methods = [*budgets, *plain, STAR, RANDOM, COPIES, SEARCHED]
    finished = [name.removeprefix("comparison, ") for name in session.earlier if name.startswith("comparison, ")]
    if finished:
        # What was decided before anything was trained.
        seconds, plan = (session.earlier["comparison plan"][name] for name in ("seconds", "kinds"))
    else:
        plan = {kind.name: _plan(session, data, recipe, kind) for kind in kinds}
        # What the search cannot use is left; nothing is trained for longer than the others.
        left = (session.seconds_left - 10.0) / len(methods) - RESERVE
        seconds = 0.5 if session.rehearse else left
        session.keep("comparison plan", {"data": data.name, "seconds": seconds, "members": MEMBERS, "kinds": plan})
    failed = []
    for method in methods:
        if method in finished:
            continue
        session.say(method)
        if session.seconds_left < seconds + RESERVE and not session.rehearse:
            session.keep(f"left out, {method}", {"seconds_left": session.seconds_left})
            failed.append(method)
            continue
        try:
            if method in budgets:
                _spend(session, data, budgets[method], method, seconds)
            else:
                _run(session, data, recipe, method, seconds, plan, kinds, cells)
        except Exception:  # what fails on a GPU costs its own seconds alone
            session.keep(f"failed, {method}", {"error": traceback.format_exc()})
            failed.append(method)
        session.free()
    if failed:
        # So that --resume tries them again.
        raise RuntimeError(f"failed or left out: {', '.join(failed)}")


def _cells_kind(session: Session, data: ImageData, genotypes: Sequence[Genotype]) -> Kind:
    from dnas_ens.nn.network import Network
    from dnas_ens.space.stack import StackSpec

    def build(size: int, index: int) -> nn.Module:
        stack = StackSpec.for_data(data, space=genotypes[index].space, num_cells=session.scaled(3, 2), channels=size)
        return Network(genotypes[index], stack)

    return Kind(name="cells", sizes=(2, 4) if session.rehearse else (32, 64, 128), build=build)


def _plain_kind(data: ImageData, name: str, sizes: Sequence[int]) -> Kind:
    from dnas_ens.nn.reference_models import reference_model

    def build(size: int, index: int) -> nn.Module:
        full = name if name == "resnet20" else f"{name}-{size}"
        return reference_model(full, data.num_channels, data.num_classes, data.image_size)

    return Kind(name=name, sizes=sizes, build=build)


def _trainings(
    session: Session, data: ImageData, recipe: RetrainConfig, kind: Kind, size: int
) -> list[NetworkTraining[nn.Module]]:
    from dnas_ens.training.trainer import NetworkTraining

    return [
        NetworkTraining(partial(kind.build, size, index), data, recipe, index=index, device=session.device)
        for index in range(MEMBERS)
    ]


def _train_side_by_side(session: Session, steps: Sequence[Iterator[None]], count: int) -> float:
    """Take so many steps of each training in turns; return the seconds they took."""
    from dnas_ens.training.interleaving import Steps, in_turns, on_streams

    def some(own: Iterator[None]) -> Steps[None]:
        yield from itertools.islice(own, count)

    context = on_streams(session.device, len(steps))
    return timed(lambda: in_turns([some(own) for own in steps], context=context), session.device)()


def _plan(session: Session, data: ImageData, recipe: RetrainConfig, kind: Kind) -> dict[str, Any]:
    """Time a step of the members side by side in every size; return what was found and the size to take."""
    count = session.scaled(20, 1)
    found: dict[int, dict[str, float]] = {}
    for size in kind.sizes:
        session.say(f"plan of {kind.name}-{size}")
        steps = [endless_steps(training) for training in _trainings(session, data, recipe, kind, size)]
        found[size] = {
            "first": _train_side_by_side(session, steps, 5),
            "step": _train_side_by_side(session, steps, count) / count,
        }
        del steps
        session.free()
    smallest = found[kind.sizes[0]]["step"]
    size = max(size for size in kind.sizes if found[size]["step"] <= WIDER * smallest)
    return {"sizes": {str(key): value for key, value in found.items()}, "size": size, **found[size]}


def _run(
    session: Session,
    data: ImageData,
    recipe: RetrainConfig,
    method: str,
    seconds: float,
    plan: dict[str, dict[str, Any]],
    kinds: Sequence[Kind],
    cells: Sequence[Genotype],
) -> None:
    """Find cells if the method does, train its members and keep what they predict."""
    record: dict[str, Any] = {"budget_seconds": seconds}
    start = time.perf_counter()
    kind = next((kind for kind in kinds if kind.name == method), kinds[0])
    if method == SEARCHED:
        genotypes, record["search"] = _search(session, data, SEARCH_SHARE * seconds)
        kind = _cells_kind(session, data, genotypes)
    elif method == STAR:
        genotypes, record["search"] = _star(data)
        kind = _cells_kind(session, data, genotypes)
    elif method == COPIES:
        nlls = session.earlier[f"comparison, {RANDOM}"]["val_nlls"]
        record["chosen"] = best = int(np.argmin(nlls))
        kind = _cells_kind(session, data, [cells[best]] * MEMBERS)
    own = plan[kind.name]
    size, steps = own["size"], len(data.train) // recipe.batch_size
    left = seconds - (time.perf_counter() - start) - own["first"]
    epochs = max(1, int(left / (steps * own["step"])))
    recipe = with_fields(recipe, epochs=epochs, seed=1 + len(session.earlier))
    trainings = _trainings(session, data, recipe, kind, size)

    def whole(training: NetworkTraining[nn.Module]) -> Iterator[None]:
        for _ in range(epochs):
            yield from training.epoch_steps()
        training.end()

    _train_side_by_side(session, [whole(training) for training in trainings], sys.maxsize)
    record |= {"size": size, "epochs": epochs, "seconds": time.perf_counter() - start}
    parameters = sum(weight.numel() for weight in trainings[0].network.parameters())
    record |= {"members": MEMBERS, "parameters": parameters, "execution": recipe.precision}
    networks = [training.network for training in trainings]
    _keep_predictions(session, data, networks, trainings[0].augmentation, method, record)


def _spend(session: Session, data: ImageData, recipe: RetrainConfig, method: str, seconds: float) -> None:
    """Spend the seconds as ``--budget`` does, and keep what the members predict."""
    from dnas_ens.budget.amount import Amount
    from dnas_ens.budget.cells import StarCells
    from dnas_ens.budget.run import Spending
    from dnas_ens.data.batches import Augmentation

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        spending = Spending(
            data,
            recipe,
            amount=Amount(total=4.0 if session.rehearse else seconds),
            # Its steps are small, and a GPU waits for the host in each.
            cells=StarCells(search_preset("fast"), data),
            folder=Path(folder),
            device=session.device,
        )
        ensemble = spending.run()
    members = list(ensemble.members)
    units = [
        {"kind": done.unit.kind, "cell": done.unit.cell, "epochs": done.epochs, "seconds": done.cost, "loss": done.loss}
        for done in spending.history
    ]
    record = {
        "budget_seconds": seconds,
        "seconds": time.perf_counter() - start,
        "size": spending.recipe.channels,
        "epochs": sum(done.epochs for done in spending.history),
        "members": len(members),
        "units": units,
        "execution": recipe.precision,
    }
    _keep_predictions(session, data, members, Augmentation.for_data(data), method, record)


def _star(data: ImageData) -> tuple[list[Genotype], dict[str, Any]]:
    """Return cells by the star alone, as many as there are members."""
    from dnas_ens.budget.cells import StarCells

    start = time.perf_counter()
    cells = StarCells(search_preset("fast"), data)
    found = list(cells.find()[len(cells.known) :])
    chosen = list(itertools.islice(itertools.cycle(found), MEMBERS))
    return chosen, {"seconds": time.perf_counter() - start, "genotypes": [cell.to_dict() for cell in chosen]}


def _search(session: Session, data: ImageData, seconds: float) -> tuple[list[Genotype], dict[str, Any]]:
    """Search for so many seconds, timing an epoch first; return genotypes along the paths."""
    from dnas_ens.run.progress import CostMeter
    from dnas_ens.search.loop import SearchLoop
    from dnas_ens.search.run import conclude

    start = time.perf_counter()
    fields: dict[str, Any] = {
        "batch_size": session.scaled(256, 64),
        "learning_rate": 0.1,
        "members": MEMBERS,
        "pool_size": session.scaled(20, 9),
    }
    if session.rehearse:
        fields |= {"num_cells": 1, "channels": 2, "directions": 3}
    preset = search_preset("smoke" if session.rehearse else "fast")
    # Some steps of the same search that are thrown away say how long an epoch takes.
    trial = SearchLoop(with_fields(preset, epochs=2, warmup_epochs=0, **fields), data, device=session.device)
    step = timed(joint_step(trial), session.device)
    step()
    epoch_seconds = trial.steps_per_epoch * statistics.median(step() for _ in range(session.scaled(10, 1)))
    del trial
    session.free()
    left = seconds - (time.perf_counter() - start) - 2.0
    epochs = max(2, int(left / epoch_seconds))
    config = with_fields(preset, epochs=epochs, warmup_epochs=max(1, epochs // 5), **fields)
    loop = SearchLoop(config, data, device=session.device)
    losses = [loop.run_epoch() for _ in range(epochs)]
    result = conclude(loop, recipe=retrain_preset(), cost=CostMeter())
    return result.genotypes, {
        "epochs": epochs,
        "epoch_seconds": epoch_seconds,
        "seconds": time.perf_counter() - start,
        "last_epoch": losses[-1],
        "genotypes": [genotype.to_dict() for genotype in result.genotypes],
    }


def _keep_predictions(
    session: Session,
    data: ImageData,
    networks: Sequence[nn.Module],
    augmentation: Augmentation,
    method: str,
    record: dict[str, Any],
) -> None:
    """Write log-probabilities in half precision, and the record with each member's NLL on val."""
    from dnas_ens.training.prediction import predict_log_probs

    splits = {"val": data.val.to(session.device), "test": data.test.to(session.device)}
    predicted = {
        name: [predict_log_probs(network.to(session.device), split, augmentation=augmentation) for network in networks]
        for name, split in splits.items()
    }
    log_probs: dict[str, Any] = {
        name: np.stack([part.half().cpu().numpy() for part in parts]) for name, parts in predicted.items()
    }
    labels = data.val.labels.numpy()
    picked = np.take_along_axis(log_probs["val"].astype(np.float64), labels[None, :, None], axis=2)
    file = session.out / LOG_PROBS
    kept: dict[str, Any] = {}
    if file.exists():
        with np.load(file, allow_pickle=False) as stored:
            kept = dict(stored)
    kept |= {f"{method}, {name}": value for name, value in log_probs.items()}
    whole = io.BytesIO()
    np.savez_compressed(whole, **kept)
    write_atomic(file, whole.getvalue())
    record["val_nlls"] = (-picked[..., 0].mean(axis=1)).tolist()
    session.keep(f"comparison, {method}", record)
