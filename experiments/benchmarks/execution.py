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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from steps import NetworkOptions, member_training, search_pair, some_steps
from timing import Side, in_fresh_process, parse_benchmark, run_benchmark, timed

from dnas_ens.commands.parse import run_main

if TYPE_CHECKING:
    import torch

    from dnas_ens.nn.execution import Execution

OURS, GRAPH = "ours", "CUDA graph"


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions(NetworkOptions):
    """Options of the benchmark."""

    what: Literal["search", "retraining"] = "search"
    """Which step."""
    batches: int = 4
    """Steps of a round."""


def sides_of(options: ExecutionOptions) -> list[str]:
    """Return the names of the sides, ours first."""
    layouts = ("channels_last", "contiguous") if options.what == "retraining" else ("channels_last",)
    every = [f"{layout} {precision}" for precision, layout in itertools.product(("float32", "bfloat16"), layouts)]
    on_gpu = in_fresh_process(_device_type, options.device) == "cuda"
    # The first of them is ours.
    return [OURS, *every[1:], *(f"{name} {GRAPH}" for name in every if on_gpu)]


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
    from dnas_ens.config.fields import with_fields
    from dnas_ens.config.presets import search_preset
    from dnas_ens.search.loop import SearchLoop

    data, execution = options.images(), execution_of(side)
    if options.what == "retraining":
        training = member_training(data, options.recipe(execution), device)
        return timed(some_steps(training, options.batches), device)
    config = with_fields(
        search_preset(space="darts"),
        channels=options.channels,
        num_cells=options.num_cells,
        batch_size=options.batch_size,
        warmup_epochs=0,
        precision=execution.precision,
        cuda_graph="on" if execution.cuda_graph else "off",
    )
    pair = search_pair(SearchLoop(config, data, device=device))
    return timed(lambda: [pair() for _ in range(options.batches)], device)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("execution", __doc__, ExecutionOptions(), argv)
    heading = f"{options.what} on {options.data}: C={options.channels}, batch {options.batch_size}"
    run_benchmark("execution", argv, options, build_round, sides_of(options), ours=OURS, heading=heading)


if __name__ == "__main__":
    sys.exit(run_main(main))
