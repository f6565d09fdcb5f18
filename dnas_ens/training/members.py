"""Members of an ensemble trained to the end, resumable, each in a folder of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnas_ens.config import RetrainConfig, require
from dnas_ens.config.settings import Engine
from dnas_ens.data.dataset import ImageData
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.ensembles.selection import averaged_loss
from dnas_ens.ensembles.storage import MANIFEST
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import fit_temperature
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.nn.execution import Execution
from dnas_ens.nn.network import Network
from dnas_ens.nn.synchronised import separate, synchronise
from dnas_ens.run.checkpoint import CheckpointStore, RegularStates
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
from dnas_ens.run.ranks import current
from dnas_ens.space.genotype import Genotype
from dnas_ens.training.interleaving import Steps, exhaust, in_turns, on_streams
from dnas_ens.training.step import tell_if_guessing
from dnas_ens.training.trainer import MemberTraining, Parent
from dnas_ens.training.workers import completed, worker_pool
from dnas_ens.types import FloatArray, IntArray


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
    recipe, index, ranks = training.recipe, training.index, training.ranks
    store = None if folder is None else CheckpointStore(folder / "checkpoints", name=f"member-{index}")
    log = None if folder is None else MetricsLog(folder / "members" / str(index), tensorboard=folder / "tensorboard")
    phase = f"member-{index}"
    before: dict[str, float] = {}
    identity = training.identity()
    newest = None if store is None else store.load_newest()
    if newest is not None:
        _require_identity(newest[1].get("identity"), identity, f"The saved state of member {index}")
    state = ranks.shared_state(None if newest is None else newest[1])
    if state is None:
        training.begin()
    else:
        training.load_state_dict(state["training"])
        before = state["seconds"]
    if log is not None:
        # Also without a state: a process may have been killed after the first epoch's log line and before its state.
        log.truncate(phase, step=training.epoch * training.steps_per_epoch)
    if ranks.sync_batch_norm:
        synchronise(training.network)
    ranks.require_agreement(training.network, f"Member {index}")
    cost = CostMeter(before, gpu=training.device.type == "cuda", processes=ranks.size)
    measured: dict[str, float] = {}
    # Those of the last epoch are part of a state: the member may be finished but for its files.
    scalars: dict[str, float] = {} if state is None else state["scalars"]

    def on_val() -> dict[str, float]:
        # Validation time does not count as training cost: with much val and few epochs it would be most of it.
        cost.pause()
        probs, labels = training.val_probs(), training.val.labels.cpu().numpy()
        cost.resume()
        return {"val_accuracy": accuracy(probs, labels), "val_nll": nll(probs, labels)}

    def steps_taken() -> int:
        return training.epoch * training.steps_per_epoch + training.steps_done

    def save() -> None:
        if store is not None:
            state = {"training": training.state_dict(), "scalars": scalars, "seconds": cost.seconds()}
            store.save(steps_taken(), {**state, "identity": identity})

    states = RegularStates(save)

    def on_step() -> None:
        states.after_step(done=training.steps_done, of=training.steps_per_epoch)

    with (
        nullcontext() if log is None else closing(log),
        Progress(
            recipe.epochs,
            description=f"member {index + 1} of {num_members}",
            steps_per_epoch=training.steps_per_epoch,
            initial_epoch=training.epoch,
        ) as progress,
    ):
        while training.epoch < training.total_epochs:
            if alone:
                scalars = training.run_epoch(progress, on_step=on_step)
            else:
                scalars = yield from _metered(training.epoch_steps(progress, on_step=on_step), cost)
            ranks.require_agreement(training.network, f"Member {index}")
            if training.on_epoch is not None:
                cost.pause()
                training.on_epoch(scalars)
                cost.resume()
            if training.epoch == training.total_epochs:
                separate(training.network)
                training.end()
            # Not at every epoch: the last state is the member, whatever its validation loss on the way.
            times, total = training.val_measurements, training.total_epochs
            if times * training.epoch // total > times * (training.epoch - 1) // total:
                measured = on_val()
                scalars |= measured
            progress.epoch(training.epoch, **scalars)
            if log is not None:
                log.log(scalars, step=steps_taken(), epoch=training.epoch, phase=phase)
            states.after_epoch()
    separate(training.network)
    # A resumed run that finds all epochs done has not measured anything yet.
    measured = measured or on_val()
    tell_if_guessing(measured["val_nll"], training.num_classes, f"member {index}")
    description = {
        "index": index,
        **identity,
        "execution": training.execution.to_dict(),
        "seeds": vars(training.seeds),
        "parameters": training.num_parameters,
        "epochs": training.epoch,
        "train_loss": scalars.get("train_loss"),
        **measured,
        **cost.seconds(),
    }
    return training.network.eval(), description


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One network to train.

    Args:
        recipe: What it is trained with, without cycles of its own.
        parent: Number of the network it goes on from; None for fresh weights.
    """

    genotype: Genotype
    recipe: RetrainConfig
    parent: int | None = None


def plan_members(genotypes: Sequence[Genotype], recipe: RetrainConfig) -> list[list[Plan]]:
    """Plan the networks of M members: for each the base and its H cycles, numbered member by member."""
    chains = []
    for base in range(0, len(genotypes) * (recipe.cycles + 1), recipe.cycles + 1):
        genotype = genotypes[base // (recipe.cycles + 1)]
        chain = [Plan(genotype=genotype, recipe=recipe.of_base())]
        for cycle in range(recipe.cycles):
            parent = base if recipe.branches else base + cycle
            chain.append(Plan(genotype=genotype, recipe=recipe.of_cycle(), parent=parent))
        chains.append(chain)
    return chains


def joining(val_probs: Sequence[FloatArray], val_labels: IntArray, *, networks_each: int) -> list[int]:
    """Choose how many of the last networks of every member join, by the least calibrated NLL on val.

    Args:
        val_probs: Of each network (N, K), member by member.
        networks_each: Networks of a member, its base and its cycles.

    Returns:
        Numbers of the networks, ascending; those of a member are its last ones, equally many of each.
    """

    def last(count: int) -> list[int]:
        return [number for number in range(len(val_probs)) if number % networks_each >= networks_each - count]

    def loss(count: int) -> float:
        averaged = np.stack([val_probs[number] for number in last(count)]).mean(axis=0, dtype=np.float64)
        return averaged_loss(np.asarray(averaged), val_labels, "calibrated_nll")

    return last(min(range(1, networks_each + 1), key=loss)) if networks_each > 1 else list(range(len(val_probs)))


def train_members(
    genotypes: Sequence[Genotype],
    data: ImageData,
    recipe: RetrainConfig,
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    workers: int = 1,
    engine: Engine = "local",
) -> Ensemble:
    """Train M members from scratch and return their ensemble, its temperature fitted on ``val``.

    With a folder, members that are finished there are loaded, unfinished ones continue where they stopped, and
    ``ensemble.json`` is written at the end; an ensemble that is finished there is returned as it is.

    Args:
        genotypes: M genotypes; the same one several times makes a deep ensemble.
        data: Images; ``test`` is not read.
        recipe: With cycles, each member is several networks, of which the last ones join; see `joining`.
        workers: Members trained side by side, which needs a folder. On a CPU in processes that share the
            threads, 0 for one per thread; members differ from those of a single worker as far as rounding depends
            on the number of threads. On a GPU step by step in turns, each on a stream of its own, 0 for one. Several
            ranks train one member after the other, together.
        engine: ``ray`` trains them as tasks of a Ray cluster instead, ``workers`` to a machine's threads or to a GPU.
    """
    device, ranks = torch.device(device), current()
    require(
        ranks.size == 1 or workers < 2,
        f"--workers {workers} asks for members side by side, but {ranks.size} processes train each together.",
        "Leave --workers out.",
    )
    require(
        ranks.size == 1 or engine == "local",
        f"--engine {engine} gives members to other processes, but {ranks.size} of torchrun train each together.",
        "Leave --engine out, or start the command with python instead of torchrun.",
    )
    chains = plan_members(genotypes, recipe)
    plans = [plan for chain in chains for plan in chain]
    each = recipe.cycles + 1
    networks: list[Network] = []

    def training_of(number: int, execution: Execution | None = None) -> MemberTraining:
        parent = plans[number].parent
        # Where there is no folder, the parent is at hand: networks are trained in the order of their numbers.
        weights = None if folder is not None or parent is None else partial(_state_of, networks, parent)
        return build_training(
            plans[number], data, number=number, device=device, execution=execution, folder=folder, weights=weights
        )

    if folder is not None:
        # Several ranks load every member, so that each has the ensemble.
        loads_whole = recipe.cycles == 0 and ranks.size == 1
        stored = _stored(folder, num_members=len(plans)) if loads_whole else None
        if stored is not None:
            for number in range(len(plans)):
                _require_same(training_of(number), folder)
            return stored.to(device)
        # Before anything is overwritten: a damaged member must not get a new checksum.
        for number in filter(partial(_is_finished, folder), range(len(plans))):
            _require_same(training_of(number), folder)
        # An older manifest would describe other members.
        (folder / MANIFEST).unlink(missing_ok=True)
    settled: dict[str, Any] = ranks.shared(settled_execution(training_of(0), folder).to_dict() if ranks.first else {})
    execution = Execution(**settled)
    if folder is not None and ranks.size == 1:
        # Sending a tensor moves its storage and leaves NumPy views dangling, so a copy is sent.
        sends = device.type == "cpu" and engine == "local" and workers != 1 and len(chains) > 1
        sent = copy.deepcopy(data) if sends else data
        # A task of Ray sees the GPUs that it was given alone.
        where = torch.device(device.type) if engine == "ray" else device
        build = partial(build_training, data=sent, device=where, execution=execution, folder=folder)
        unfinished = {
            f"member {index}": [
                partial(build, plans[number], number=number)
                for number in range(index * each, (index + 1) * each)
                if not _is_finished(folder, number)
            ]
            for index in range(len(chains))
        }
        _train_side_by_side(
            {name: chain for name, chain in unfinished.items() if chain},
            device=device,
            folder=folder,
            workers=workers,
            engine=engine,
            num_chains=len(chains),
            num_members=len(plans),
        )
    val_probs = []
    for number in range(len(plans)):
        training = training_of(number, execution)
        networks.append(trained_network(training, folder=folder, num_members=len(plans)))
        val_probs.append(training.val_probs())
    labels = data.val.labels.cpu().numpy()
    chosen = joining(val_probs, labels, networks_each=each)
    averaged = np.mean(np.stack([val_probs[number] for number in chosen]).astype(np.float64), axis=0)
    temperature = fit_temperature(averaged, labels)
    ensemble = ensemble_of([networks[number] for number in chosen], temperature=temperature, data=data)
    if folder is not None:
        num_trained = len(plans) if recipe.cycles else None
        ensemble.save(folder, overwrite=True, numbers=chosen, num_trained=num_trained)
    return ensemble.to(device)


def build_training(
    plan: Plan,
    data: ImageData,
    *,
    number: int,
    device: torch.device | str,
    execution: Execution | None = None,
    folder: Path | None = None,
    weights: Callable[[], Mapping[str, Tensor]] | None = None,
) -> MemberTraining:
    """Return the training of a planned network.

    Args:
        number: Its position, which decides its seeds.
        folder: Holds the parent finished, if there is one.
        weights: Gives the parent's state, where there is no folder.
    """
    parent = None
    if plan.parent is not None:
        if weights is None:
            assert folder is not None
            weights = partial(load_tensors, folder / "members" / str(plan.parent) / "model.safetensors")
        parent = Parent(plan.parent, weights)
    return MemberTraining(
        plan.genotype, data, plan.recipe, index=number, device=device, execution=execution, parent=parent
    )


def ensemble_of(networks: Sequence[Network], *, temperature: float, data: ImageData) -> Ensemble:
    """Return the equally weighted ensemble of networks that classify the images of a data set."""
    return Ensemble(
        list(networks), temperature=temperature, classes=data.classes, preprocessing=Preprocessing.of(data)
    ).eval()


def _state_of(networks: Sequence[Network], number: int) -> Mapping[str, Tensor]:
    return networks[number].state_dict()


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
    ranks = training.ranks
    if ranks.shared(folder is not None and _is_finished(folder, training.index)):
        if folder is not None:
            _require_same(training, folder)
            file = folder / "members" / str(training.index) / "model.safetensors"
            training.network.load_state_dict(load_tensors(file, training.device))
        ranks.take_over([*training.network.parameters(), *training.network.buffers()])
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
    chains: Sequence[Sequence[Callable[[], MemberTraining]]],
    *,
    folder: Path,
    num_members: int,
    context: Callable[[int], AbstractContextManager[object]] = lambda index: nullcontext(),
) -> None:
    """Train chains of unfinished networks step by step in turns, and keep them in the folder.

    Args:
        chains: Each gives the trainings of networks that go on from one another, in their order.
        context: What the steps of the chain of that number are done in.
    """

    def steps_of(chain: Sequence[Callable[[], MemberTraining]]) -> Steps[None]:
        for build in chain:
            network, description = yield from member_steps(build(), folder=folder, num_members=num_members)
            _keep(network, description, folder)

    in_turns([steps_of(chain) for chain in chains], context=context)


def settled_execution(training: MemberTraining, folder: Path | None) -> Execution:
    """Return how all members are computed: as the folder says, or as is measured now, once for all of them.

    If every member measured for itself, beside others, an ensemble would mix precisions by chance.
    """
    if training.execution_is_settled or folder is None:
        return training.settle_execution()
    file = folder / "execution.json"
    if not file.exists():
        write_json(file, training.settle_execution().to_dict())
    return Execution(**read_json(file)).on(training.device)


def _train_side_by_side(
    chains: Mapping[str, Sequence[Callable[[], MemberTraining]]],
    *,
    device: torch.device,
    folder: Path,
    workers: int,
    engine: Engine,
    num_chains: int,
    num_members: int,
) -> None:
    """Train chains of networks side by side, where that is more than one at a time.

    Args:
        chains: Give the trainings of unfinished networks, by name; importable, for other processes.
        num_chains: How many there were at first. They decide how many threads each has, so that the last one of an
            interrupted training ends as it would have.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and engine == "local":
        # A small network cannot fill a GPU: several, each on a stream of its own, share it.
        every = list(chains.values())
        for first in range(0, len(every) if workers > 1 else 0, max(1, workers)):
            beside = every[first : first + workers]
            train_in_turns(beside, folder=folder, num_members=num_members, context=on_streams(device, len(beside)))
        return
    workers = max(1, workers) if on_gpu else min(workers or torch.get_num_threads(), num_chains)
    if num_chains < 2 or not chains or (workers < 2 and engine == "local"):
        return
    tasks: dict[Hashable, Callable[[], None]] = {
        name: partial(_train_in_worker, chain, folder, num_members) for name, chain in chains.items()
    }
    with worker_pool(workers, engine=engine, gpu=on_gpu) as pool:
        for _ in completed(pool, tasks):
            pass


def _train_in_worker(chain: Sequence[Callable[[], MemberTraining]], folder: Path, num_members: int) -> None:
    # Returns nothing: the networks are in the folder and need not be sent.
    for build in chain:
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
