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

import numpy as np
from timing import ExecutedOptions, Side, measure, report, require_from, tell, tell_sides, timed

from dnas_ens.commands.parse import parse, run_main
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset

if TYPE_CHECKING:
    import torch

    from dnas_ens.training.interleaving import Steps
    from dnas_ens.training.trainer import MemberTraining

ONE = "one member"


@dataclass(frozen=True, kw_only=True)
class SideBySide(ExecutedOptions):
    """Options of the benchmark."""

    data: str = "digits"
    """A data set by name, which must be there already, or a folder."""
    members: int = 5
    """M."""
    channels: int = 16
    """C of the first cell."""
    num_cells: int = 3
    """Cells in the stack."""
    batch_size: int = 64
    """B."""
    batches: int = 8
    """Steps of each member in a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_from(1, self, "members", "channels", "num_cells", "batch_size", "batches")


def build_round(side: str, options: SideBySide, device: torch.device) -> Side:
    """Return the timed round of a side, with networks of its own."""
    from dnas_ens.data import load_data
    from dnas_ens.space.genotype import random_genotype
    from dnas_ens.space.search_space import DARTS_OPERATIONS
    from dnas_ens.training.interleaving import in_turns, on_streams
    from dnas_ens.training.trainer import MemberTraining

    data = load_data(options.data, download=False)
    recipe = with_fields(
        retrain_preset(),
        channels=options.channels,
        num_cells=options.num_cells,
        batch_size=options.batch_size,
        **options.execution.settings(),
    )
    trainings = [
        MemberTraining(
            random_genotype(np.random.default_rng(index), operations=DARTS_OPERATIONS),
            data,
            recipe,
            index=index,
            device=device,
        )
        for index in range(1 if side == ONE else options.members)
    ]
    context = on_streams(device, len(trainings))

    def endless_steps(training: MemberTraining) -> Iterator[None]:
        while True:
            yield from training.epoch_steps()

    def some(steps: Iterator[None]) -> Steps[None]:
        yield from itertools.islice(steps, options.batches)

    members = [endless_steps(training) for training in trainings]
    return timed(lambda: in_turns([some(steps) for steps in members], context=context), device)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse(
        SideBySide,
        argv,
        prog="python experiments/benchmarks/side_by_side.py",
        description=__doc__ or "",
        default=SideBySide(),
    )
    together = f"{options.members} members"
    tell(f"{together} side by side on {options.data}: C={options.channels}, batch {options.batch_size}")
    results = measure(build_round, options, (together, ONE), ours=ONE)
    tell_sides(results)
    report("side_by_side", argv, options, results)


if __name__ == "__main__":
    sys.exit(run_main(main))
