"""Does the expected time of a step, summed from operations measured alone, rank networks as their steps do?

    python experiments/benchmarks/step_time.py --setting digits
    python experiments/benchmarks/step_time.py --setting 28x28 --space darts

The operations are measured as before a search with --step-time-weight. Then a step (forward, loss, backward) of each
of some random networks is timed, all in turn in the same process, and Spearman's correlation between expected and
measured times is taken. Adds a line to --output. Half a minute on one CPU core.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from search_step import NUM_CLASSES, SETTINGS, Setting
from timing import Options, parse_benchmark, report, tell

from dnas_ens.commands.parse import peek, run_main

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class StepTime(Setting, Options):
    """Options of the benchmark."""

    image_size: int
    """Side of the images in pixels."""
    space: Literal["efficient", "darts"] = "efficient"
    """The space that networks are drawn from."""
    channels: int = 16
    """C of the first cell."""
    num_cells: int = 3
    """Cells in the stack."""
    batch_size: int = 64
    """B."""
    networks: int = 12
    """Random networks."""
    threads: int = 1
    """Threads of PyTorch."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


def measure(options: StepTime, device: torch.device) -> dict[str, Any]:
    """Return expected and measured times of the networks, in milliseconds, and how they agree."""
    import numpy as np
    import torch
    from scipy.stats import spearmanr

    from dnas_ens.nn.execution import PLAIN, step_seconds
    from dnas_ens.search.step_time import measured_step_times, whole_step
    from dnas_ens.space.genotype import random_genotype
    from dnas_ens.space.search_space import SearchSpace
    from dnas_ens.space.stack import StackSpec, default_stem_stride

    torch.set_num_threads(options.threads)
    space = SearchSpace.for_stack(options.num_cells, name=options.space)
    stack = StackSpec(
        num_cells=options.num_cells,
        channels=options.channels,
        in_channels=1,
        num_classes=NUM_CLASSES,
        stem_stride=default_stem_stride(options.image_size, options.space),
    )
    times = measured_step_times(
        space,
        stack,
        image_size=options.image_size,
        batch_size=options.batch_size,
        edges_per_node=2,
        execution=PLAIN,
        device=device,
    )
    genotypes = [
        random_genotype(
            np.random.default_rng(seed), space=space.name, operations=space.operations, num_nodes=space.num_nodes
        )
        for seed in range(options.networks)
    ]
    shape = (options.batch_size, stack.in_channels, options.image_size, options.image_size)
    seconds = step_seconds(
        range(options.networks),
        lambda index: whole_step(genotypes[index], stack, shape, PLAIN, device),
        device=device,
        rounds=options.rounds,
        warm_up=options.warmup,
    )
    expected = [times.of(genotype) for genotype in genotypes]
    measured = [1000 * seconds[index] for index in range(options.networks)]
    return {
        "expected_ms": expected,
        "measured_ms": measured,
        "rest_ms": times.rest,
        "spearman": float(spearmanr(expected, measured)[0]),
    }


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    import torch

    setting = peek(Setting, argv, prog="python experiments/benchmarks/step_time.py").setting
    default = StepTime(setting=setting, image_size=SETTINGS[setting]["image_size"])
    options = parse_benchmark("step_time", __doc__, default, argv)
    results = measure(options, torch.device(options.device))
    measured = results["measured_ms"]
    tell(
        f"{options.networks} networks of {min(measured):.1f} to {max(measured):.1f} ms: Spearman's correlation of "
        f"expected and measured times {results['spearman']:.2f}"
    )
    report("step_time", argv, options, results)


if __name__ == "__main__":
    sys.exit(run_main(main))
