"""Members of an ensemble trained to the end, resumable, each in a folder of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnas_ens.config import RetrainConfig
from dnas_ens.data.dataset import ImageData
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.ensembles.storage import MANIFEST
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import fit_temperature
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.nn.execution import Execution
from dnas_ens.nn.network import Network
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import (
    as_json,
    first_difference,
    load_tensors,
    read_json,
    save_tensors,
    sha256,
    unreadable,
    write_json,
)
from dnas_ens.run.metrics_log import MetricsLog
from dnas_ens.run.progress import CostMeter, Progress
from dnas_ens.space.genotype import Genotype
from dnas_ens.training.interleaving import Steps, exhaust, in_turns, on_streams
from dnas_ens.training.step import tell_if_guessing
from dnas_ens.training.trainer import MemberTraining
from dnas_ens.training.workers import completed, worker_pool


def train_member(
    training: MemberTraining, *, folder: Path | None = None, num_members: int = 1
) -> tuple[Network, dict[str, Any]]:
    """Train one member to the end, continuing from its newest checkpoint if there is one.

    Args:
        folder: The ensemble's folder; the member goes to ``members/<i>/``, its states to ``checkpoints/``.

    Returns:
        The network in evaluation mode, and what member.json holds.
    """
    return exhaust(member_steps(training, folder=folder, num_members=num_members, alone=True))


def member_steps(
    training: MemberTraining, *, folder: Path | None = None, num_members: int = 1, alone: bool = False
) -> Steps[tuple[Network, dict[str, Any]]]:
    """Train one member as ``train_member`` does, pausing after every step.

    Args:
        alone: Whether nothing else has turns in between: epochs are then not paused, and operations that draw from
            the global stream find it seeded.
    """
    recipe, index = training.recipe, training.index
    store = None if folder is None else CheckpointStore(folder / "checkpoints", name=f"member-{index}")
    log = None if folder is None else MetricsLog(folder / "members" / str(index), tensorboard=folder / "tensorboard")
    phase = f"member-{index}"
    before: dict[str, float] = {}
    identity = training.identity()
    if store is not None and log is not None:
        if (newest := store.load_newest()) is not None:
            _require_identity(newest[1].get("identity"), identity, f"The saved state of member {index}")
            training.load_state_dict(newest[1]["training"])
            before = newest[1]["seconds"]
        # Also without a state: a process may have been killed after the first epoch's log line and before its state.
        log.truncate(phase, step=training.epoch * training.steps_per_epoch)
    cost = CostMeter(before, gpu=training.device.type == "cuda")
    measured: dict[str, float] = {}

    def on_val() -> dict[str, float]:
        # Validation time does not count as training cost: with much val and few epochs it would be most of it.
        cost.pause()
        probs, labels = training.val_probs(), training.val.labels.cpu().numpy()
        cost.resume()
        return {"val_accuracy": accuracy(probs, labels), "val_nll": nll(probs, labels)}

    with (
        nullcontext() if log is None else closing(log),
        Progress(
            recipe.epochs,
            description=f"member {index + 1} of {num_members}",
            steps_per_epoch=training.steps_per_epoch,
            initial_epoch=training.epoch,
        ) as progress,
    ):
        while training.epoch < recipe.epochs:
            if alone:
                scalars = training.run_epoch(progress)
            else:
                scalars = yield from _metered(training.epoch_steps(progress), cost)
            # Measured at the quarters only: the last state is the member, whatever its validation loss on the way.
            if 4 * training.epoch // recipe.epochs > 4 * (training.epoch - 1) // recipe.epochs:
                measured = on_val()
                scalars |= measured
            progress.epoch(training.epoch, **scalars)
            if store is not None and log is not None:
                step = training.epoch * training.steps_per_epoch
                log.log(scalars, step=step, epoch=training.epoch, phase=phase)
                state = {"training": training.state_dict(), "seconds": cost.seconds()}
                store.save(training.epoch, {**state, "identity": identity})
    # A resumed run that finds all epochs done has not measured anything yet.
    measured = measured or on_val()
    tell_if_guessing(measured["val_nll"], training.num_classes, f"member {index}")
    description = {
        "index": index,
        **identity,
        "execution": training.execution.to_dict(),
        "seeds": vars(training.seeds),
        "parameters": training.num_parameters,
        **measured,
        **cost.seconds(),
    }
    return training.network.eval(), description


def train_members(
    genotypes: Sequence[Genotype],
    data: ImageData,
    recipe: RetrainConfig,
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    workers: int = 1,
) -> Ensemble:
    """Train M members from scratch and return their ensemble, its temperature fitted on ``val``.

    With a folder, members that are finished there are loaded, unfinished ones continue where they stopped, and
    ``ensemble.json`` is written at the end; an ensemble that is finished there is returned as it is.

    Args:
        genotypes: M genotypes; the same one several times makes a deep ensemble.
        data: Images; ``test`` is not read.
        workers: Members trained side by side, which needs a folder. On a CPU in processes that share the
            threads, 0 for one per thread; members differ from those of a single worker as far as rounding depends
            on the number of threads. On a GPU step by step in turns, each on a stream of its own, 0 for one.
    """
    device, num_members = torch.device(device), len(genotypes)

    def training_of(index: int, execution: Execution | None = None) -> MemberTraining:
        genotype = genotypes[index]
        return MemberTraining(genotype, data, recipe, index=index, device=device, execution=execution)

    if folder is not None:
        stored = _stored(folder, num_members=num_members)
        if stored is not None:
            for index in range(num_members):
                _require_same(training_of(index), folder)
            return stored.to(device)
        # Before anything is overwritten: a damaged member must not get a new checksum.
        for index in filter(partial(_is_finished, folder), range(num_members)):
            _require_same(training_of(index), folder)
        # An older manifest would describe other members.
        (folder / MANIFEST).unlink(missing_ok=True)
    execution = _settled(training_of(0), folder)
    if folder is not None:
        unfinished = [index for index in range(num_members) if not _is_finished(folder, index)]
        # Sending a tensor moves its storage and leaves NumPy views dangling, so a copy is sent.
        sends = device.type == "cpu" and workers != 1 and len(unfinished) > 1
        sent = copy.deepcopy(data) if sends else data
        build = partial(MemberTraining, data=sent, recipe=recipe, device=device, execution=execution)
        _train_side_by_side(
            [partial(build, genotypes[index], index=index) for index in unfinished],
            device=device,
            folder=folder,
            workers=workers,
            num_members=num_members,
        )
    networks, val_probs = [], []
    for index in range(num_members):
        training = training_of(index, execution)
        networks.append(trained_network(training, folder=folder, num_members=num_members))
        val_probs.append(training.val_probs())
    averaged = np.mean(np.stack(val_probs).astype(np.float64), axis=0)
    ensemble = Ensemble(
        networks,
        temperature=fit_temperature(averaged, data.val.labels.cpu().numpy()),
        classes=data.classes,
        preprocessing=Preprocessing.of(data),
    ).eval()
    if folder is not None:
        ensemble.save(folder, overwrite=True)
    return ensemble.to(device)


def _stored(folder: Path, *, num_members: int) -> Ensemble | None:
    """Return the ensemble that is finished in a folder, if it has so many members."""
    if not (folder / MANIFEST).exists() or not all(_is_finished(folder, index) for index in range(num_members)):
        return None
    ensemble = Ensemble.load(folder).eval()
    return ensemble if len(ensemble.members) == num_members else None


def trained_network(training: MemberTraining, *, folder: Path | None = None, num_members: int = 1) -> Network:
    """Return a member's network in evaluation mode, trained only where the folder does not hold it finished.

    Args:
        training: The member; it holds the network's weights afterwards.
        folder: The ensemble's folder; a member that is finished there is loaded, another one kept there.

    Raises:
        UserError: The folder holds a finished member of another genotype or recipe.
    """
    if folder is not None and _is_finished(folder, training.index):
        _require_same(training, folder)
        file = folder / "members" / str(training.index) / "model.safetensors"
        training.network.load_state_dict(load_tensors(file, training.device))
        return training.network.eval()
    network, description = train_member(training, folder=folder, num_members=num_members)
    if folder is not None:
        _keep(network, description, folder)
    return network


def _is_finished(folder: Path, index: int) -> bool:
    return (folder / "members" / str(index) / "member.json").exists()


def _keep(network: Network, description: dict[str, Any], folder: Path) -> None:
    place = folder / "members" / str(description["index"])
    save_tensors(place / "model.safetensors", network.state_dict())
    # Last, because this file says that the member is finished.
    write_json(place / "member.json", {**description, "sha256": sha256(place / "model.safetensors")})


def _metered(steps: Steps[dict[str, float]], cost: CostMeter) -> Steps[dict[str, float]]:
    """Pass steps on, and stop the meter while others have their turn."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            scalars: dict[str, float] = end.value
            return scalars
        cost.pause()
        yield
        cost.resume()


def train_in_turns(
    trainings: Sequence[MemberTraining],
    *,
    folder: Path,
    num_members: int,
    context: Callable[[int], AbstractContextManager[object]] = lambda index: nullcontext(),
) -> None:
    """Train unfinished members step by step in turns, and keep them in the folder.

    Args:
        context: What the steps of the training of that number are done in.
    """
    works = [member_steps(training, folder=folder, num_members=num_members) for training in trainings]
    for network, description in in_turns(works, context=context):
        _keep(network, description, folder)


def _settled(training: MemberTraining, folder: Path | None) -> Execution:
    """Return how all members are computed: as the folder says, or as is measured now, once for all of them.

    If every member measured for itself, beside others, an ensemble would mix precisions by chance.
    """
    if training.execution_is_settled or folder is None:
        return training.settle_execution()
    file = folder / "execution.json"
    if not file.exists():
        write_json(file, training.settle_execution().to_dict())
    return Execution(**read_json(file))


def _train_side_by_side(
    builders: Sequence[Callable[[], MemberTraining]],
    *,
    device: torch.device,
    folder: Path,
    workers: int,
    num_members: int,
) -> None:
    """Train members side by side, where that is more than one at a time.

    Args:
        builders: Give the training of each unfinished member; importable, for other processes.
    """
    if device.type == "cuda":
        # A small network cannot fill a GPU: several, each on a stream of its own, share it.
        for first in range(0, len(builders) if workers > 1 else 0, max(1, workers)):
            trainings = [build() for build in builders[first : first + workers]]
            context = on_streams(device, len(trainings))
            train_in_turns(trainings, folder=folder, num_members=num_members, context=context)
        return
    workers = min(workers or torch.get_num_threads(), len(builders))
    if workers < 2:
        return
    tasks = [partial(_train_in_worker, build, folder, num_members) for build in builders]
    with worker_pool(workers) as pool:
        for _ in completed(pool, tasks):
            pass


def _train_in_worker(build: Callable[[], MemberTraining], folder: Path, num_members: int) -> None:
    # Returns nothing: the network is in the folder and need not be sent.
    trained_network(build(), folder=folder, num_members=num_members)


def _require_same(training: MemberTraining, folder: Path) -> None:
    """Refuse a finished member that is not the one the training would give, or that is damaged."""
    place = folder / "members" / str(training.index)
    stored = read_json(place / "member.json")
    if not isinstance(stored, dict):
        raise unreadable(place / "member.json", "it does not hold an object")
    _require_identity(stored, training.identity(), f"The member in {place}")
    file = place / "model.safetensors"
    if not file.is_file() or stored.get("sha256") != sha256(file):
        raise UserError(
            f"{file} is not the file that member.json was written for: its SHA-256 differs.",
            f"It is damaged or was replaced: restore it from a copy, or remove {place} to train the member again.",
        )


def _require_identity(stored: Any, asked: dict[str, Any], what: str) -> None:
    """Refuse what was trained with another genotype, recipe or other images, naming the first difference."""
    known = {name: stored.get(name) for name in asked} if isinstance(stored, dict) else {}
    difference = first_difference(known, as_json(asked), "member")
    if difference is not None:
        field, there, here = difference
        raise UserError(
            f"{what} is another one: {field.removeprefix('member.')} is {there} there and {here} here.",
            "Retrain with the settings it was begun with, or copy genotypes.json and config.json's search "
            "to a fresh folder.",
        )
