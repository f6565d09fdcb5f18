"""What trainings will take, before they begin: a short trial of each network where it will be trained, and arithmetic.

    one training = u + E e + 4 N f,    M of them on W places = start + the longest of W queues

with u seconds before the first step and after the last, E epochs of e seconds with their logs and states, N validation
images of f seconds each. The trial trains for `TRIAL_SECONDS` as a member is trained and measures u, e and f, beside as
many other trials as there will be trainings side by side.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dnas_ens.config import RetrainConfig
from dnas_ens.config.settings import Engine
from dnas_ens.data.dataset import ImageData
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.machine import peak_resident_bytes
from dnas_ens.run.progress import duration
from dnas_ens.space.genotype import Genotype
from dnas_ens.training.cluster import RayPool
from dnas_ens.training.members import member_steps, plan_members
from dnas_ens.training.prediction import predict_log_probs
from dnas_ens.training.trainer import MemberTraining
from dnas_ens.training.workers import completed, worker_pool
from dnas_ens.types import FloatArray

#: Seconds of steps that are timed, after a few that are not (on a GPU the fourth is recorded), and steps at least.
TRIAL_SECONDS, WARM_UP, FEWEST = 1.5, 5, 3
#: Epochs of a training that never comes near its end.
ENDLESS = 1_000_000
#: Validation images that a forward pass is timed on, at most.
TRIAL_IMAGES = 500


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a network trains, as a trial measured it.

    Args:
        setup: Wall-clock seconds until the first step, and after the last.
        epoch: Those of an epoch, saving its state included.
        epoch_cpu: CPU seconds of it.
        image: Wall-clock seconds of a forward pass, for an image.
        memory_mib: The most memory that the process held, or on a GPU PyTorch's tensors.
        began: When the trial began, in seconds of `time.time`.
    """

    setup: float
    epoch: float
    epoch_cpu: float
    image: float
    memory_mib: float
    began: float

    def seconds(self, epochs: int, num_val: int) -> float:
        """Return the wall-clock seconds of a training, with its measurements on so many validation images."""
        return self.setup + epochs * self.epoch + MemberTraining.val_measurements * num_val * self.image


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a piece of work will take.

    Args:
        wall: Seconds until it is done.
        cpu: CPU seconds of all processes; on a GPU the seconds that GPUs are held.
        memory_mib: What is in use at once; of a GPU its own.
        gpu: Whether a GPU does it.
    """

    wall: float = 0.0
    cpu: float = 0.0
    memory_mib: float = 0.0
    gpu: bool = False

    def __add__(self, other: Estimate) -> Estimate:
        """Return the estimate of one after the other."""
        memory = max(self.memory_mib, other.memory_mib)
        return Estimate(
            wall=self.wall + other.wall, cpu=self.cpu + other.cpu, memory_mib=memory, gpu=self.gpu or other.gpu
        )

    def facts(self, price: float | None = None) -> dict[str, str]:
        """Return the lines that a dry run prints; the price is of an hour of the machines."""
        hours = "GPU-hours" if self.gpu else "CPU-hours"
        found = {"time": duration(self.wall), hours: f"{self.cpu / 3600:.3g}"}
        if self.memory_mib:
            found["memory of trainings, MiB"] = f"{self.memory_mib:,.0f}"
        if price is not None:
            found["price"] = f"{self.wall / 3600 * price:.2f}"
        return found


def trial(genotype: Genotype, data: ImageData, recipe: RetrainConfig, *, device: torch.device) -> Pace:
    """Train a network for a moment as a member is trained, and measure; nothing is kept."""
    opened, began = time.time(), _clocks(device)[0]
    training = MemberTraining(genotype, data, replace(recipe, epochs=ENDLESS), index=0, device=device)
    n, stamps = training.steps_per_epoch, [_clocks(device)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        steps = member_steps(training, folder=Path(folder))
        for _ in steps:
            stamps.append(_clocks(device))
            counted = len(stamps) - 1 - WARM_UP
            if counted >= FEWEST and stamps[-1][0] - stamps[WARM_UP][0] >= TRIAL_SECONDS:
                break
        closing = seconds_of(steps.close, device)[0]
        store = CheckpointStore(Path(folder), name="trial")
        save = seconds_of(lambda: store.save(0, training.state_dict()), device)
    # After the last step of an epoch, past those that warm up; from one to another its end is counted too.
    first, last = -(-WARM_UP // n) * n, (len(stamps) - 1) // n * n
    if last > first:
        epoch, epoch_cpu = n / (last - first) * np.subtract(stamps[last], stamps[first])
    else:
        epoch, epoch_cpu = n / counted * np.subtract(stamps[-1], stamps[WARM_UP]) + save
    images = data.val.drawn(TRIAL_IMAGES).to(device)
    passing = [
        seconds_of(lambda: predict_log_probs(training.network, images, augmentation=training.augmentation), device)[0]
        for _ in range(2)
    ]
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
    return Pace(
        setup=max(0.0, stamps[1][0] - began - epoch / n) + closing,
        epoch=float(epoch),
        epoch_cpu=float(epoch_cpu),
        image=passing[-1] / len(images),
        memory_mib=memory / 2**20,
        began=opened,
    )


@dataclass(frozen=True, kw_only=True)
class Fanout:
    """How trainings are spread.

    Args:
        workers: As the command takes them; 0 for one a thread, on a GPU for one.
    """

    workers: int
    engine: Engine
    device: torch.device

    def places(self, count: int) -> int:
        """Return how many of so many trainings share this machine's threads, or a GPU."""
        on_gpu = self.device.type == "cuda"
        return max(1, min(self.workers or (1 if on_gpu else torch.get_num_threads()), count))

    @property
    def in_processes(self) -> bool:
        """Whether others than this process do them where there are several."""
        return self.engine == "ray" or (self.device.type == "cpu" and self.places(2) > 1)


@dataclass(frozen=True, kw_only=True)
class Paces:
    """The paces of several networks, and what it takes until the first of them begins.

    Args:
        start: Wall-clock seconds from opening the pool to the first training, and of closing it.
        slots: How many go on side by side.
    """

    of: Mapping[Hashable, Pace]
    start: float
    slots: int

    def mean(self) -> Pace:
        """Return the mean over networks, and the most memory of any."""
        every = list(self.of.values())
        return Pace(
            setup=statistics.fmean(pace.setup for pace in every),
            epoch=statistics.fmean(pace.epoch for pace in every),
            epoch_cpu=statistics.fmean(pace.epoch_cpu for pace in every),
            image=statistics.fmean(pace.image for pace in every),
            memory_mib=max(pace.memory_mib for pace in every),
            began=min(pace.began for pace in every),
        )


def measured(
    networks: Mapping[Hashable, Genotype], data: ImageData, recipe: RetrainConfig, fanout: Fanout, *, count: int
) -> Paces:
    """Measure the pace of networks side by side, where and beside as many as ``count`` of them will be trained."""
    device, places = fanout.device, fanout.places(count)
    if count < 2 or not fanout.in_processes:
        found = {name: trial(genotype, data, recipe, device=device) for name, genotype in networks.items()}
        return Paces(of=found, start=0.0, slots=1)
    # Sending a tensor moves its storage and leaves NumPy views dangling, so a copy is sent.
    sent = copy.deepcopy(data)
    where = torch.device(device.type) if fanout.engine == "ray" else device
    named = list(networks.items())
    # As many at a time as there are places, so that each has its neighbours.
    waves = [named[number % len(named)] for number in range(-(-len(named) // places) * places)]

    def tasks(of: Iterable[tuple[Hashable, Genotype]]) -> dict[Hashable, Callable[[], tuple[Hashable, Pace]]]:
        return {
            number: partial(_named_trial, name, genotype, sent, recipe, where)
            for number, (name, genotype) in enumerate(of)
        }

    opened = time.time()
    with worker_pool(places, engine=fanout.engine, gpu=device.type == "cuda") as pool:
        slots = pool.slots if isinstance(pool, RayPool) else places
        # The first ones import, and are not alike.
        first = [pace for _, pace in completed(pool, tasks(waves[:places]))]
        paces = dict(completed(pool, tasks(waves)))
        ending = time.time()
    start = statistics.fmean(pace.began + pace.setup for pace in first) - opened + time.time() - ending
    return Paces(of=paces, start=start, slots=slots)


def estimate_members(
    genotypes: Sequence[Genotype], data: ImageData, recipe: RetrainConfig, fanout: Fanout, *, measure: int = 3
) -> Estimate:
    """Return what training genotypes as members will take, from a trial of some of them."""
    chains = plan_members(genotypes, recipe)
    paces = measured(dict(enumerate(genotypes[:measure])), data, recipe.of_base(), fanout, count=len(chains))
    return fanned_out(paces, [recipe.epochs_in_all] * len(chains), len(data.val), gpu=fanout.device.type == "cuda")


def fanned_out(paces: Paces, epochs: Sequence[int], num_val: int, *, gpu: bool) -> Estimate:
    """Return what trainings of so many epochs will take, side by side on the slots of their paces."""
    pace = paces.mean()
    seconds = [pace.seconds(length, num_val) for length in epochs]
    return Estimate(
        # The networks are then loaded, and val is predicted once more, one after another.
        wall=paces.start + longest_queue(seconds, paces.slots) + len(epochs) * num_val * pace.image,
        cpu=sum(seconds) if gpu else sum(epochs) * pace.epoch_cpu,
        memory_mib=min(paces.slots, len(epochs)) * pace.memory_mib,
        gpu=gpu,
    )


def longest_queue(seconds: Sequence[float], slots: int) -> float:
    """Return when the last of several tasks ends that begin in their order, each where a slot is free first."""
    ends = [0.0] * slots
    for taken in seconds:
        heapq.heapreplace(ends, ends[0] + taken)
    return max(ends)


def _named_trial(
    name: Hashable, genotype: Genotype, data: ImageData, recipe: RetrainConfig, device: torch.device
) -> tuple[Hashable, Pace]:
    return name, trial(genotype, data, recipe, device=device)


def _clocks(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def seconds_of(work: Callable[[], object], device: torch.device) -> FloatArray:
    """Return wall-clock and CPU seconds of a piece of work, (2,)."""
    before = _clocks(device)
    work()
    return np.subtract(_clocks(device), before)
