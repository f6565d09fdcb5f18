"""Which layout and precision is fastest here, and what do CUDA graphs bring?

    python experiments/benchmarks/execution.py --what search --data fashion-mnist
    python experiments/benchmarks/execution.py --what retraining --data fashion-mnist

The whole step of the default configuration on real images, optimisers included, from the same weights: a step of the
architecture and one of the weights, or an epoch's first steps of a random genotype (seed 0). Sides: channels_last and
contiguous in float32 and bfloat16 autocast (the fast supernet is always channels_last), on a GPU each also replayed as
a CUDA graph. *ours* is what an unmeasured run takes. A round of each in turn; two minutes on two CPU cores.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from timing import Side, TrainingOptions, measure, report, require_from, tell, tell_sides, timed

from dnas_ens.commands.parse import parse, run_main
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset, search_preset

if TYPE_CHECKING:
    import torch

    from dnas_ens.data import ImageData
    from dnas_ens.nn.execution import Execution

OURS, GRAPH = "ours", "CUDA graph"


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions(TrainingOptions):
    """Options of the benchmark."""

    what: Literal["search", "retraining"] = "search"
    """Which step."""
    data: str = "digits"
    """A data set by name, which must be there already, or a folder."""
    channels: int = 16
    """C of the first cell."""
    num_cells: int = 3
    """Cells in the stack."""
    batch_size: int = 64
    """B."""
    batches: int = 4
    """Steps of a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_from(1, self, "channels", "num_cells", "batch_size", "batches")


def sides_of(options: ExecutionOptions) -> list[str]:
    """Return the names of the sides, ours first."""
    from timing import in_fresh_process

    layouts = ("channels_last", "contiguous") if options.what == "retraining" else ("channels_last",)
    every = [
        f"{layout} {precision}" for precision, layout in itertools.product(("float32", "bfloat16"), layouts)
    ]
    graphs = [f"{name} {GRAPH}" for name in every]
    # The first of them is ours.
    others = every[1:]
    on_gpu = in_fresh_process(_device_type, options.device) == "cuda"
    return [OURS, *others, *(graphs if on_gpu else ())]


def _device_type(name: str) -> str:
    from dnas_ens.run.machine import resolve_device

    return resolve_device(name).type


def execution_of(side: str) -> Execution:
    """Return what a side's name stands for."""
    from dnas_ens.nn.execution import PLAIN

    if side == OURS:
        return PLAIN
    layout, precision, *_ = side.split()
    return replace(PLAIN, layout=layout, precision=precision, cuda_graph=side.endswith(GRAPH))


def build_round(side: str, options: ExecutionOptions, device: torch.device) -> Side:
    """Return the timed round of a side, with a network of its own."""
    from dnas_ens.data import load_data

    data = load_data(options.data, download=False)
    build = _search_round if options.what == "search" else _retraining_round
    return timed(build(execution_of(side), data, options, device), device)


def _search_round(
    execution: Execution, data: ImageData, options: ExecutionOptions, device: torch.device
) -> Callable[[], object]:
    from dnas_ens.search.loop import SearchLoop

    config = with_fields(
        search_preset(),
        channels=options.channels,
        num_cells=options.num_cells,
        batch_size=options.batch_size,
        warmup_epochs=0,
        precision=execution.precision,
        cuda_graph="on" if execution.cuda_graph else "off",
    )
    loop = SearchLoop(config, data, device=device)
    loop.steps.begin_epoch(loop.schedules)
    images = loop.augmentation.normalise(loop.weight_half.images[: options.batch_size])
    batch = images, loop.weight_half.labels[: options.batch_size]

    def steps() -> None:
        for _ in range(options.batches):
            loop.steps.architecture_step(batch, batch)
            loop.steps.weight_step(batch)

    return steps


def _retraining_round(
    execution: Execution, data: ImageData, options: ExecutionOptions, device: torch.device
) -> Callable[[], object]:
    from dnas_ens.space.genotype import random_genotype
    from dnas_ens.space.search_space import DARTS_OPERATIONS
    from dnas_ens.training.trainer import MemberTraining

    recipe = with_fields(
        retrain_preset(),
        channels=options.channels,
        num_cells=options.num_cells,
        batch_size=options.batch_size,
        **execution.settings(),
    )
    genotype = random_genotype(np.random.default_rng(0), operations=DARTS_OPERATIONS)
    training = MemberTraining(genotype, data, recipe, index=0, device=device)
    steps = training.epoch_steps()

    def round_of_steps() -> None:
        nonlocal steps
        for _ in range(options.batches):
            # An epoch's recording belongs to its steps; a new epoch begins when one is through.
            if next(steps, "through") == "through":
                steps = training.epoch_steps()

    return round_of_steps


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse(
        ExecutionOptions,
        argv,
        prog="python experiments/benchmarks/execution.py",
        description=__doc__ or "",
        default=ExecutionOptions(),
    )
    tell(f"{options.what} on {options.data}: C={options.channels}, batch {options.batch_size}")
    results = measure(build_round, options, sides_of(options), ours=OURS)
    tell_sides(results)
    report("execution", argv, options, results)


if __name__ == "__main__":
    sys.exit(run_main(main))
