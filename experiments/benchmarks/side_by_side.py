"""What do several members cost, trained side by side, beside one?

    python experiments/benchmarks/side_by_side.py --data fashion-mnist

An epoch's first steps of one member, and the same of M members in turns of a step, in one process; on a GPU each on a
stream of its own, with --cuda-graph replayed. On a GPU that one small network cannot fill, M members take less than
M times as long; on a CPU in one process they cannot (there, members are trained in processes).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steps import NetworkOptions, endless_steps, member_training
from timing import ExecutedOptions, Side, parse_benchmark, run_benchmark, timed

from dnas_ens.commands.parse import run_main

if TYPE_CHECKING:
    import torch

    from dnas_ens.training.interleaving import Steps

ONE = "one member"


@dataclass(frozen=True, kw_only=True)
class SideBySide(NetworkOptions, ExecutedOptions):
    """Options of the benchmark."""

    members: int = 5
    """M."""
    batches: int = 8
    """Steps of each member in a round."""


def build_round(side: str, options: SideBySide, device: torch.device) -> Side:
    """Return the timed round of a side, with networks of its own."""
    from dnas_ens.training.interleaving import in_turns, on_streams

    data, recipe = options.images(), options.recipe(options.execution)
    members = [
        endless_steps(member_training(data, recipe, device, index=index))
        for index in range(1 if side == ONE else options.members)
    ]
    context = on_streams(device, len(members))

    def some(steps: Iterator[None]) -> Steps[None]:
        yield from itertools.islice(steps, options.batches)

    return timed(lambda: in_turns([some(steps) for steps in members], context=context), device)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("side_by_side", __doc__, SideBySide(), argv)
    together = f"{options.members} members"
    heading = f"{together} side by side on {options.data}: C={options.channels}, batch {options.batch_size}"
    run_benchmark("side_by_side", argv, options, build_round, (together, ONE), ours=ONE, heading=heading)


if __name__ == "__main__":
    sys.exit(run_main(main))
