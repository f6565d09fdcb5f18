"""The steps that several benchmarks time: a member's training, a pair of a search's steps, and a step's profile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from timing import TrainingOptions, synchronise

if TYPE_CHECKING:
    import torch

    from dnas_ens.config import RetrainConfig
    from dnas_ens.data import ImageData
    from dnas_ens.nn.execution import Execution
    from dnas_ens.search.loop import SearchLoop
    from dnas_ens.training.trainer import MemberTraining, NetworkTraining


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(TrainingOptions):
    """Options of the benchmarks that train networks on images of a data set."""

    data: str = "digits"
    """A data set by name, which must be there already, or a folder."""
    channels: int = 16
    """C of the first cell."""
    num_cells: int = 3
    """Cells in the stack."""
    batch_size: int = 64
    """B."""

    def images(self) -> ImageData:
        """Load the data."""
        from dnas_ens.data import load_data

        return load_data(self.data, download=False)

    def recipe(self, execution: Execution) -> RetrainConfig:
        """Return how a member is trained."""
        from dnas_ens.config.fields import with_fields
        from dnas_ens.config.presets import retrain_preset

        return with_fields(
            retrain_preset(),
            channels=self.channels,
            num_cells=self.num_cells,
            batch_size=self.batch_size,
            **execution.settings(),
        )


def member_training(data: ImageData, recipe: RetrainConfig, device: torch.device, *, index: int = 0) -> MemberTraining:
    """Return the training of a random genotype, the same for the same index."""
    from dnas_ens.space.genotype import random_genotype
    from dnas_ens.space.spaces import DARTS_OPERATIONS
    from dnas_ens.training.trainer import MemberTraining

    genotype = random_genotype(np.random.default_rng(index), operations=DARTS_OPERATIONS)
    return MemberTraining(genotype, data, recipe, index=index, device=device)


def endless_steps(training: NetworkTraining[Any]) -> Iterator[None]:
    """Train without end; an epoch begins where the one before ends."""
    while True:
        yield from training.epoch_steps()


def some_steps(training: NetworkTraining[Any], count: int) -> Callable[[], object]:
    """Return what takes the training's next steps, so many at a call."""
    steps = endless_steps(training)
    return lambda: list(itertools.islice(steps, count))


def search_pair(loop: SearchLoop) -> Callable[[], None]:
    """Return a step of the architecture and one of the weights, on the first batch of the training images."""
    loop.supernet.train()
    loop.steps.begin_epoch(loop.schedules)
    half, size = loop.weight_images, loop.config.bilevel.batch_size
    batch = loop.augmentation.normalise(half.images[:size]), half.labels[:size]

    def pair() -> None:
        loop.steps.architecture_step(batch, batch)
        loop.steps.weight_step(batch)

    return pair


def joint_step(loop: SearchLoop) -> Callable[[], None]:
    """Return a step by hard paths, of weights and architecture, on the first batch of the training images."""
    loop.supernet.train()
    loop.steps.begin_epoch(loop.schedules)
    half, size = loop.weight_images, loop.config.bilevel.batch_size
    batch = loop.augmentation.normalise(half.images[:size]), half.labels[:size]
    return lambda: loop.steps.joint_step(batch)


def profile(step: Callable[[], object], device: torch.device, *, repeats: int = 1, **table: Any) -> str:
    """Return a step's operations by time, as PyTorch's profiler tables them, after as many steps to warm up."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(repeats):
        step()
    synchronise(device)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(repeats):
            step()
        synchronise(device)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=by, **table))
