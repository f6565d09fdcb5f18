"""What a search will take, without running it: parameters, memory, and its cost in trainings of a member."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dnas_ens.baselines import random_pool
from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.data.batches import Augmentation, count_batches
from dnas_ens.data.dataset import ImageData
from dnas_ens.nn.execution import candidates
from dnas_ens.nn.network import Network
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.relaxation import discretise
from dnas_ens.search.star import FamilyLoop, StarLoop
from dnas_ens.search.steps import Batch
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import stack_cell_types
from dnas_ens.space.stack import StackSpec
from dnas_ens.training.batch_norm import CALIBRATION_IMAGES
from dnas_ens.training.cost import Estimate, seconds_of
from dnas_ens.training.step import TrainingStep, build_sgd

#: Activations kept for the backward pass, per edge, operation, channel and pixel, of each space and form of the
#: supernet with a margin: measured were 2.3 to 2.4 and 3.7 to 4.1 (darts), 1.5 to 1.7 (efficient).
VALUES_KEPT = {"darts": {"fast": 3, "reference": 5}, "efficient": {"fast": 2, "reference": 2}}
#: A step that may take more seconds than this is not tried whole, and one that takes more than that is tried once.
LONGEST_STEP, LONG_STEP = 4.0, 0.5
#: Random cells whose steps are timed for a member's.
MEMBERS = 3
#: Steps of each kind that are timed.
ROUNDS = 3


def estimate(config: SearchConfig, data: ImageData) -> dict[str, float]:
    """Return what a search will take: parameters, steps and an estimate of memory.

    Memory counts weights with gradient, momentum and a copy, and ``VALUES_KEPT`` activations for each edge,
    operation, channel and pixel of a step's images; the interpreter and its libraries come on top.
    """
    if not config.reads_images:
        steps = StarLoop(config).steps
        return {"hypernetwork_parameters": _count(steps.architecture), "steps": config.bilevel.star_steps}
    loop = SearchLoop(config, data)
    space, stack, num_parameters = loop.family.space, loop.supernet.stack, _count(loop.steps.weights)
    pairs = space.num_edges * len(space.operations)
    if config.objective.hard:
        # The drawn operations, and about as much for the preprocessing of each input as for one more.
        drawn = config.candidates.edges_per_node
        pairs = sum(min(drawn, node.stop - node.start) for node in space.node_slices)
        pairs += 0 if space.rules.sums_loose_ends else space.rules.num_inputs
    side = -(-data.image_size // stack.stem_stride)
    values = 0
    for plan in stack.plan(space.name, space.num_nodes):
        if plan.cell_type == "reduction":
            side = -(-side // 2)
        values += pairs * plan.channels * side * side
    values //= config.supernet.partial_channels
    form = "reference" if config.objective.hard else config.supernet.form
    kept = VALUES_KEPT[space.name][form] * config.bilevel.batch_size * values
    return {
        "supernet_parameters": num_parameters,
        "hypernetwork_parameters": _count(loop.steps.architecture),
        "steps": loop.steps_per_epoch * config.bilevel.epochs,
        "memory_mib": 4 * (4 * num_parameters + kept) / 2**20,
    }


def search_facts(
    config: SearchConfig, recipe: RetrainConfig, data: ImageData, *, device: torch.device
) -> tuple[dict[str, float | str], Estimate]:
    """Return what a dry run says about a search, and what it will take; random deviations take nothing."""
    gpu = torch.device(device).type == "cuda"
    if config.regime == "random":
        return {}, Estimate(gpu=gpu)
    facts, cost = estimate(config, data), search_cost(config, recipe, data, device=device)
    wall = cost.search_seconds + _around_seconds(config, data, device=device)
    return {**facts, "search": str(cost)}, Estimate(wall=wall, cpu=wall if gpu else wall * cost.busy, gpu=gpu)


def _around_seconds(config: SearchConfig, data: ImageData, *, device: torch.device) -> float:
    """Measure what is no training: val and a state after every epoch, and drawing the members' cells at the end."""
    from dnas_ens.figures.cells import save_cells

    (cell,) = random_members(config, 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), TemporaryDirectory() as folder:

        def draw() -> None:
            save_cells(cell, Path(folder) / "cells.svg", title="Member").canvas.draw()

        draw()
        drawing = (config.candidates.members + 1) * _seconds_of(draw, device)
        if not config.reads_images:
            return drawing
        loop, store = SearchLoop(config, data, device=device), CheckpointStore(Path(folder))

        def end_epoch() -> None:
            loop.measure()
            store.save(0, loop.state_dict())

        end_epoch()
        return drawing + config.bilevel.epochs * _seconds_of(end_epoch, device)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """The cost of a search beside that of training one member, in seconds of steps.

    Args:
        counts: How often each kind of work is done: "weights", "architecture", "joint" and "penalties" are steps,
            "scoring" passes over a candidate's images.
        seconds: What one of each takes, and "member", a step of a member.
        member_steps: Steps of a member's training.
        busy: CPU seconds of a second, as many as threads that have something to do.
    """

    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    member_steps: int
    busy: float = 1.0

    @property
    def search_seconds(self) -> float:
        """What the search takes."""
        return sum(count * self.seconds[kind] for kind, count in self.counts.items())

    @property
    def trainings(self) -> float:
        """What the search takes, in trainings of a member."""
        return self.search_seconds / (self.member_steps * self.seconds["member"])

    def __str__(self) -> str:
        shown = f"{self.trainings:.1f}" if self.trainings >= 1 else f"{self.trainings:.1g}"
        return f"{shown} trainings of a member, as a few measured steps predict"


def member_stack(config: SearchConfig, recipe: RetrainConfig, data: ImageData) -> StackSpec:
    """Return the stack of the members; of as many cells as the search's where that finds no cells for the recipe's."""
    space, num_cells = config.supernet.search_space, recipe.num_cells
    if not set(stack_cell_types(num_cells)) <= set(space.cell_types):
        num_cells = config.supernet.num_cells
    return StackSpec.for_data(
        data, space=space.name, num_cells=num_cells, channels=recipe.channels, stem_stride=recipe.stem_stride
    )


def random_members(config: SearchConfig, count: int) -> list[Genotype]:
    """Return random cells of the space of a search, as stand-ins for members that it has not found yet."""
    space = config.supernet.search_space
    operations = tuple(name for name in space.operations if name != "none")
    return random_pool(
        replace(space, operations=operations), count, seed=0, edges_per_node=config.candidates.edges_per_node
    )


def search_cost(
    config: SearchConfig, recipe: RetrainConfig, data: ImageData, *, device: torch.device | str = "cpu"
) -> SearchCost:
    """Predict the cost of a search from a few measured steps of each kind, in seconds where steps do not take seconds.

    The optional brief training of candidates counts as that many more passes, forward and backward; what is left open
    to a trial is taken unmeasured, and nothing is recorded as a CUDA graph.

    Args:
        recipe: How members will be trained.
    """
    config, recipe = with_fields(config, cuda_graph="off"), with_fields(recipe, cuda_graph="off")
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        loop: FamilyLoop = (
            SearchLoop(config, data, device=device) if config.reads_images else StarLoop(config, device=device)
        )
        counts = work(loop)
        began, cpu = time.perf_counter(), time.process_time()
        seconds = {"member": _member_seconds(loop, recipe, data)}
        for kind in counts:
            seconds[kind] = _seconds(loop, kind)
        busy = (time.process_time() - cpu) / (time.perf_counter() - began)
        member_steps = recipe.epochs * count_batches(data.train, recipe.batch_size, drop_last=True)
        return SearchCost(counts=counts, seconds=seconds, member_steps=member_steps, busy=busy)


def work(loop: FamilyLoop) -> dict[str, int]:
    """Return how often a search does each kind of work; see ``SearchCost``."""
    config = loop.config
    if not isinstance(loop, SearchLoop):
        return {"penalties": config.bilevel.star_steps}
    images = min(loop.weight_images, loop.architecture_images, key=len)
    batches = count_batches(images, config.bilevel.batch_size, drop_last=True)
    searched = batches * (config.bilevel.epochs - config.bilevel.warmup_epochs)
    warm_up = batches * config.bilevel.warmup_epochs
    if config.objective.hard:
        counts = {"weights": warm_up, "joint": searched}
    else:
        counts = {"weights": warm_up + searched, "architecture": searched}
    if config.scores_candidates:
        counts["scoring"] = config.candidates.pool_size + 1
    return counts


def _seconds(loop: FamilyLoop, kind: str) -> float:
    """Measure one piece of work of a loop that is thrown away afterwards."""
    if isinstance(loop, StarLoop):
        loop.steps.take_over(loop.schedules)
        loop.steps.penalty_step()
        return statistics.median(_seconds_of(loop.steps.penalty_step, loop.device) for _ in range(ROUNDS))
    assert isinstance(loop, SearchLoop)
    loop.supernet.train()
    loop.steps.begin_epoch(loop.schedules)
    size = loop.config.bilevel.batch_size
    batch = loop.augmentation.normalise(loop.weight_images.images[:size]), loop.weight_images.labels[:size]
    least = 2 * loop.config.objective.num_drawn
    if kind == "scoring":
        return _scoring_seconds(loop, batch)
    step = {
        "weights": loop.steps.weight_step,
        "architecture": lambda batch: loop.steps.architecture_step(batch, batch),
        "joint": loop.steps.joint_step,
    }[kind]
    return _step_seconds(lambda part: step(loop._whole_slices(*part)), batch, loop.device, least=least)


def _scoring_seconds(loop: SearchLoop, batch: Batch) -> float:
    """Measure a candidate's passes: for BatchNorm's statistics, over the scored images, and its brief training."""
    network = _random_network(loop, loop.supernet.stack).to(loop.device).train()
    scored = min(CALIBRATION_IMAGES, len(loop.weight_images)) + len(loop.scoring_images())
    # A backward pass takes about twice as long as the forward pass.
    scored += 3 * loop.config.candidates.candidate_epochs * len(loop.weight_images)

    def forward(part: Batch) -> None:
        with torch.no_grad():
            network(loop.steps.execution.place(part[0]))

    return scored / len(batch[1]) * _step_seconds(forward, batch, loop.device)


def _member_seconds(loop: FamilyLoop, recipe: RetrainConfig, data: ImageData) -> float:
    """Measure a member's step, the mean over some random cells, of long steps over one."""
    device = loop.device
    execution = candidates(layout=recipe.layout, precision=recipe.precision, device=device)[0]
    augmentation = Augmentation.for_data(data, augment=False)
    images = augmentation.normalise(data.train.images[: recipe.batch_size].to(device))
    batch = images, data.train.labels[: recipe.batch_size].to(device)
    taken = []
    for _ in range(MEMBERS):
        network = _random_network(loop, member_stack(loop.config, recipe, data))
        network = execution.place_module(network, device).train()
        optimizer = build_sgd(network.parameters(), recipe.for_images(len(data.train)))
        step = TrainingStep(network, optimizer, recipe, execution=execution)
        taken.append(_step_seconds(lambda part, step=step: step(*part), batch, device))  # type: ignore[misc]
        if taken[-1] > LONG_STEP:
            break
    return statistics.fmean(taken)


def _random_network(loop: FamilyLoop, stack: StackSpec) -> Network:
    space = loop.family.space
    edges_per_node = loop.config.candidates.edges_per_node
    return Network(discretise(torch.rand(space.shape), space, edges_per_node=edges_per_node), stack)


def _step_seconds(step: Callable[[Batch], object], batch: Batch, device: torch.device, *, least: int = 2) -> float:
    """Return the seconds of a step on a batch; where that may take long, parts of the batch predict it."""

    def seconds(count: int) -> float:
        return _seconds_of(lambda: step((batch[0][:count], batch[1][:count])), device)

    size = len(batch[1])
    few = min(size, max(least, size // 8))
    seconds(few)
    part = seconds(few)
    if part * size / few > LONGEST_STEP:
        # Every step also takes a time that does not grow with its images.
        return part + max(0.0, seconds(2 * few) - part) * (size - few) / few
    whole = seconds(size)
    return whole if whole > LONG_STEP else statistics.median(seconds(size) for _ in range(ROUNDS))


def _seconds_of(step: Callable[[], object], device: torch.device) -> float:
    return float(seconds_of(step, device)[0])
