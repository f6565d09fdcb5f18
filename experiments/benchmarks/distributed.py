"""How much faster are a search and a member's training when several processes share every batch?

    python experiments/benchmarks/distributed.py

Steps of a search and of a member's training, of one process and of several that torchrun starts, all with one thread
each and the same batch. Launches take turns, so that a busy moment of the machine falls on each; of a launch the median
step counts. Images are random ones of the preset's sizes. Writes OUTPUT.md and a line to OUTPUT.jsonl. Four minutes on
two CPU cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from search_cost import random_images
from timing import RESULTS, Options, parse_benchmark, ratio, report, tell

from dnas_ens.commands.parse import run_main
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.run.files import with_ending, write_atomic
from dnas_ens.run.ranks import end

Work = Literal["hard", "soft", "member"]
#: What is timed, in words.
WORKS: dict[Work, str] = {
    "hard": "search step, hard paths",
    "soft": "search step, soft paths (weights and architecture)",
    "member": "training step of a member",
}


@dataclass(frozen=True, kw_only=True)
class Distributed(Options):
    """Options of the benchmark."""

    rounds: int = 3
    """Launches of each number of processes."""
    warmup: int = 2
    """Steps of a launch that are not counted."""
    steps: int = 7
    """Steps of a launch that are."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes, the first of them 1."""
    works: tuple[Work, ...] = ("hard", "soft", "member")
    """What is timed."""
    batch_sizes: tuple[int, ...] = (64, 256)
    """B, images of a step of all processes together."""
    preset: Literal["smoke", "micro", "fast", "paper"] = "micro"
    """Sizes of images, search and members."""
    sync_batch_norm: bool = False
    """Take BatchNorm's statistics over all processes."""
    output: Path = RESULTS / "distributed"
    """Where OUTPUT.md and OUTPUT.jsonl go."""


class _EnoughError(Exception):
    """Enough steps were timed."""


def step_times(options: Distributed, work: Work, batch_size: int) -> dict[str, float]:
    """Return the median seconds of a step here, and of an all-reduce of all its gradients alone."""
    import torch

    from dnas_ens.run.ranks import current
    from dnas_ens.search.loop import SearchLoop
    from dnas_ens.space.genotype import random_genotype
    from dnas_ens.space.spaces import SPACES
    from dnas_ens.training.trainer import MemberTraining

    data, ends = random_images(options.preset), [time.perf_counter()]

    def on_step(*_: object) -> None:
        ends.append(time.perf_counter())
        if len(ends) > options.warmup + options.steps:
            raise _EnoughError

    if work == "member":
        recipe = with_fields(retrain_preset(options.preset), batch_size=batch_size)
        genotype = random_genotype(
            np.random.default_rng(0), space="efficient", operations=SPACES["efficient"].operations
        )
        training = MemberTraining(genotype, data, recipe, index=0)
        modules: list[torch.nn.Module] = [training.network]

        def epoch() -> object:
            return training.run_epoch(on_step=on_step)
    else:
        relaxation = "gumbel-hard" if work == "hard" else "softmax"
        fields = {"relaxation": relaxation, "batch_size": batch_size, "warmup_epochs": 0, "drawn_members": None}
        loop = SearchLoop(with_fields(search_preset(options.preset), **fields), data)
        modules = [loop.supernet, loop.family.hypernetwork]

        def epoch() -> object:
            return loop.run_epoch(on_step)

    try:
        while True:
            epoch()
    except _EnoughError:
        pass
    parameters = [parameter for module in modules for parameter in module.parameters()]
    taken = np.diff(ends)[options.warmup :]
    return {
        "seconds": float(np.median(taken)),
        "all_reduce_seconds": _median_seconds(lambda: current().means(parameters)),
        "parameters": sum(parameter.numel() for parameter in parameters),
    }


def _median_seconds(call: Any, *, times: int = 20) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def measure_here(options: Distributed) -> None:
    """Time every work in this process and those that share it, and print a line of JSON."""
    import torch

    from dnas_ens.run.ranks import joined

    torch.set_num_threads(1)
    with joined("cpu", sync_batch_norm=options.sync_batch_norm):
        found = [step_times(options, work, size) for work in options.works for size in options.batch_sizes]
        print(json.dumps(found), flush=True)


def launched_times(options: Distributed, processes: int, argv: list[str]) -> list[dict[str, float]]:
    """Time every work in so many new processes: the times of rank 0, in the order of works and batch sizes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, __file__, *argv]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(options: Distributed, argv: list[str]) -> list[dict[str, Any]]:
    """Launch in turns and return a row for every work, batch size and number of processes."""
    rounds = []
    for number in range(options.rounds):
        rounds.append({count: launched_times(options, count, argv) for count in options.processes})
        tell(f"round {number + 1} of {options.rounds}")
    rows = []
    for place, (work, size) in enumerate((work, size) for work in options.works for size in options.batch_sizes):
        alone = [found[options.processes[0]][place]["seconds"] for found in rounds]
        for count in options.processes:
            here = [found[count][place] for found in rounds]
            seconds = [one["seconds"] for one in here]
            rows.append(
                {
                    "work": work,
                    "batch_size": size,
                    "processes": count,
                    "parameters": int(here[0]["parameters"]),
                    "seconds": seconds,
                    "all_reduce_seconds": float(np.median([one["all_reduce_seconds"] for one in here])),
                    "speed_up": ratio(alone, seconds),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of all rows."""
    head = (
        "| step | images | parameters | processes | ms | times as fast (quartiles of rounds) | all-reduce, ms |\n"
        "|:--|--:|--:|--:|--:|--:|--:|\n"
    )
    lines = []
    for row in rows:
        quotient, times, reduced = row["speed_up"], "1.00", ""
        if row["processes"] > 1:
            times = f"{quotient['ratio']:.2f} ({quotient['lower_quartile']:.2f} to {quotient['upper_quartile']:.2f})"
            reduced = f"{1000 * row['all_reduce_seconds']:.2f}"
        lines.append(
            f"| {WORKS[row['work']]} | {row['batch_size']} | {row['parameters']:,} | {row['processes']} | "
            f"{1000 * float(np.median(row['seconds'])):,.1f} | {times} | {reduced} |\n"
        )
    return head + "".join(lines)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    from dnas_ens.compare.report import provenance
    from dnas_ens.run.ranks import launched

    options = parse_benchmark("distributed", __doc__, Distributed(), argv)
    if launched():
        measure_here(options)
        return
    rows = rows_of(options, argv)
    lines = replace(options, output=with_ending(options.output, ".jsonl"))
    env = report("distributed", argv, lines, {"rows": rows})
    statistics = "over all processes" if options.sync_batch_norm else "of each process's own images"
    text = (
        "# How much faster are several processes that share every batch?\n\n"
        f"{provenance(env, hardware='gloo on this machine, one thread a process')}\n\n"
        f"Random images of the sizes of the preset {options.preset}, space efficient, BatchNorm's statistics "
        f"{statistics}. Median step of a launch, and of {options.rounds} launches that take turns. The all-reduce is "
        "that of all gradients of a step, timed alone.\n\n" + table(rows)
    )
    write_atomic(with_ending(options.output, ".md"), text.encode())
    tell(f"wrote {options.output}.md and .jsonl")


if __name__ == "__main__":
    end(run_main(main, shared=True))
