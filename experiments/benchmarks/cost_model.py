"""Does the cost model predict what work takes, what does a task cost with both engines, and what would GPUs do?

    python experiments/benchmarks/cost_model.py

For the search, the training of members (one after another, two side by side with each engine) and a comparison on
digits: the prediction of a short trial, then the work itself, each in a fresh process. Then the time of tasks that do
nothing, and a projection of a study to more GPUs. Writes OUTPUT.md and a line to OUTPUT.jsonl. About five minutes on
one CPU core; the engine ray needs ``pip install 'dnas_ens[cluster]'``.
"""

from __future__ import annotations

import functools
import heapq
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from timing import RESULTS, in_fresh_process, parse_benchmark, tell

from dnas_ens.commands.parse import run_main
from dnas_ens.compare.records import append_line
from dnas_ens.run.files import with_ending, write_atomic
from dnas_ens.run.machine import environment, peak_resident_bytes

if TYPE_CHECKING:
    from dnas_ens.training.cost import Estimate

#: Digits, not so small that starting is all there is.
SEARCH = {"epochs": 48, "members": 4, "pool_size": 8}
METHODS = ("random-cells", "deviations", "snapshots", "wider")
BUDGET: dict[str, Any] = {"pool_size": 5}
#: Trainings of a member of the preset fast: 50 epochs of 781 steps of 8.9 ms (experiments/results/gpu.md, one H200,
#: batch 64, channels_last bfloat16 CUDA graph), and its search, 25 epochs of 390 pairs of 47.7 ms.
TRAINING_SECONDS, SEARCH_SECONDS = 50 * 781 * 8.9e-3, 25 * 390 * 47.7e-3
#: Stages of a comparison of all methods with five members: networks side by side, each so many trainings long. Further
#: searches, the evolution of cells and the long trainings are one after another.
STAGES: dict[str, tuple[Literal["beside", "chain"], int, float]] = {
    "the search": ("chain", 1, SEARCH_SECONDS / TRAINING_SECONDS),
    "our members": ("beside", 5, 1.0),
    "base cell": ("beside", 7, 1.0),
    "best cell": ("beside", 5, 1.0),
    "random cells": ("beside", 10, 1.0),
    "best random cell": ("beside", 5, 1.0),
    "deviations": ("beside", 5, 1.0),
    "DARTS searches": ("chain", 5, SEARCH_SECONDS / TRAINING_SECONDS),
    "their cells": ("beside", 5, 1.0),
    "NES-RE": ("chain", 10, 1.0),
    "snapshots": ("chain", 1, 5.0),
    "averaged weights": ("chain", 1, 5.0),
    "one wide network": ("chain", 1, 3.0),
}
SEEDS, STARTING = 10, 10.0


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Options of the benchmark."""

    engines: tuple[Literal["local", "ray"], ...] = ("local", "ray")
    """Engines that train side by side."""
    epochs: int = 30
    """Epochs of every training."""
    channels: int = 16
    """C of the first cell."""
    tasks: int = 100
    """Tasks that do nothing, for the time of one."""
    output: Path = RESULTS / "cost-model"
    """Where OUTPUT.md and OUTPUT.jsonl go."""


def settings(options: CostModel) -> tuple[Any, Any, Any]:
    """Return search, recipe and data."""
    from dnas_ens.config.fields import with_fields
    from dnas_ens.config.presets import retrain_preset, search_preset
    from dnas_ens.data import load_data

    recipe = with_fields(retrain_preset("smoke"), epochs=options.epochs, channels=options.channels)
    return with_fields(search_preset("smoke"), **SEARCH), recipe, load_data("digits")


def plan_search(options: CostModel, folder: Path) -> Estimate:
    """Predict the search."""
    import torch

    from dnas_ens.search.cost import search_facts

    return search_facts(*settings(options), device=torch.device("cpu"))[1]


def do_search(options: CostModel, folder: Path) -> float:
    """Search into the folder; return CPU seconds."""
    from dnas_ens.config.fields import to_dict
    from dnas_ens.run.folder import RunFolder
    from dnas_ens.search.run import run_search

    config, recipe, data = settings(options)
    with RunFolder.create(folder, config=to_dict(config)) as run:
        result = run_search(config, data, run=run, recipe=recipe)
    return float(result.report["cpu_seconds"])


def plan_members(workers: int, engine: Any, options: CostModel, folder: Path) -> Estimate:
    """Predict the training of the members."""
    import torch

    from dnas_ens.training.cost import Fanout, estimate_members

    _, recipe, data = settings(options)
    fanout = Fanout(workers=workers, engine=engine, device=torch.device("cpu"))
    return estimate_members(genotypes_of(folder), data, recipe, fanout)


def do_members(workers: int, engine: Any, options: CostModel, folder: Path) -> float:
    """Train the members into a folder beside; return CPU seconds."""
    from dnas_ens.compare.methods.comparison import trained_files
    from dnas_ens.training.members import train_members

    _, recipe, data = settings(options)
    genotypes, place = genotypes_of(folder), folder.with_name(f"{engine}-{workers}")
    train_members(genotypes, data, recipe, folder=place, workers=workers, engine=engine)
    return sum(float(member["cpu_seconds"]) for member in trained_files(place, len(genotypes)))


def genotypes_of(folder: Path) -> Any:
    """Return the members that the search selected."""
    from dnas_ens.space.genotype import ranked_genotypes, read_genotypes

    return ranked_genotypes(read_genotypes(folder / "genotypes.json"))


def comparison_of(options: CostModel, folder: Path) -> Any:
    """Return the comparison beside the members that were trained one after another."""
    import shutil

    import torch

    from dnas_ens.compare.methods import Budget
    from dnas_ens.compare.methods.comparison import Comparison
    from dnas_ens.run.files import read_json

    config, recipe, data = settings(options)
    place = folder.with_name("local-1")
    shutil.copy(folder / "genotypes.json", place)
    return Comparison(
        folder=place,
        search=config,
        found=read_json(place / "genotypes.json"),
        data=data,
        recipe=recipe,
        device=torch.device("cpu"),
        budget=Budget(**BUDGET),
    )


def plan_comparison(options: CostModel, folder: Path) -> Estimate:
    """Predict the comparison."""
    from dnas_ens.compare.plan import plan_text

    text, estimate = plan_text([comparison_of(options, folder)], METHODS)
    tell(text)
    return estimate


def do_comparison(options: CostModel, folder: Path) -> float:
    """Train what the methods need; return CPU seconds of all trainings."""
    from dnas_ens.compare.methods import METHODS as KNOWN

    comparison = comparison_of(options, folder)
    for method in METHODS:
        name = method.replace("-", "_")
        list(getattr(import_module(f"dnas_ens.compare.methods.{KNOWN[method]}"), name)(comparison))
    files = (comparison.folder / "baselines").rglob("member.json")
    records = (comparison.folder / "baselines" / "records.jsonl").read_text().splitlines()
    return sum(float(json.loads(text)["cpu_seconds"]) for text in [*(file.read_text() for file in files), *records])


def timed_work(work: Callable[[CostModel, Path], float], options: CostModel, folder: Path) -> dict[str, float]:
    """Run work and return wall-clock and CPU seconds, and the peak memory of this process and of a child."""
    settings(options)
    import_module("dnas_ens.compare.run")
    start = time.perf_counter()
    cpu = work(options, folder)
    taken = time.perf_counter() - start
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"wall": taken, "cpu": cpu, "memory_mib": peak_resident_bytes() / 2**20, "child_mib": child / 2**20}


def compared(options: CostModel, folder: Path) -> list[dict[str, Any]]:
    """Predict every piece of work, do it, and return both."""
    pieces: dict[str, tuple[Any, Any, int]] = {
        "search": (plan_search, do_search, 0),
        "4 members, one after another": (
            functools.partial(plan_members, 1, "local"),
            functools.partial(do_members, 1, "local"),
            1,
        ),
        **{
            f"4 members, two side by side, engine {engine}": (
                functools.partial(plan_members, 2, engine),
                functools.partial(do_members, 2, engine),
                2 if engine == "local" else 0,
            )
            for engine in options.engines
        },
        f"comparison: {', '.join(METHODS)}": (plan_comparison, do_comparison, 1),
    }
    rows = []
    for name, (plan, work, processes) in pieces.items():
        predicted = in_fresh_process(plan, options, folder)
        measured = in_fresh_process(timed_work, work, options, folder)
        memory = {0: None, 1: measured["memory_mib"], 2: 2 * measured["child_mib"]}[processes]
        rows.append({"work": name, "predicted": vars(predicted), "measured": {**measured, "memory_mib": memory}})
        tell(f"{name}: {predicted.wall:.1f} s predicted, {measured['wall']:.1f} s measured")
    return rows


def overhead(engine: Any, tasks: int) -> dict[str, float]:
    """Return seconds until a pool of two gives its first result, of each further task, and of ending it."""
    from dnas_ens.training.workers import completed, worker_pool

    start = time.perf_counter()
    with worker_pool(2, engine=engine) as pool:
        list(completed(pool, {"first": functools.partial(int, "1"), "second": functools.partial(int, "1")}))
        first = time.perf_counter()
        list(completed(pool, {number: functools.partial(int, "1") for number in range(tasks)}))
        last = time.perf_counter()
    return {"start": first - start, "task": (last - first) / tasks, "end": time.perf_counter() - last}


def makespan(runs: Iterable[Sequence[tuple[int, float]]], slots: int) -> float:
    """Return when all runs are finished on so many slots; a run is stages of (tasks side by side, seconds of each).

    A stage begins when the one before has ended, and its tasks wait for free slots in that order.
    """
    left = [list(stages) for stages in runs]
    free, ready, ended = [0.0] * slots, [(0.0, number) for number in range(len(left))], 0.0
    while ready:
        now, number = heapq.heappop(ready)
        count, seconds = left[number].pop(0)
        end = now
        for _ in range(count):
            begun = max(free[0], now)
            heapq.heapreplace(free, begun + seconds)
            end = max(end, begun + seconds)
        ended = max(ended, end)
        if left[number]:
            heapq.heappush(ready, (end, number))
    return ended


def stages_of_a_run() -> list[tuple[int, float]]:
    """Return the stages of a comparison of all methods: (tasks side by side, seconds of each)."""
    found = []
    for kind, count, trainings in STAGES.values():
        seconds = trainings * TRAINING_SECONDS + STARTING
        found += [(count, seconds)] if kind == "beside" else [(1, seconds)] * count
    return found


def projection() -> str:
    """Return the table of a study of ten seeds on more and more GPUs, and what it assumes."""
    stages = stages_of_a_run()
    work = SEEDS * sum(count * seconds for count, seconds in stages)
    rows = "".join(
        f"| {slots} | {end / 3600:.1f} | {slots * end / 3600:.0f} | {100 * work / (slots * end):.0f} |\n"
        for slots in (1, 2, 8, 16, 32, 64)
        for end in [makespan([stages] * SEEDS, slots)]
    )
    chain = sum(seconds for _, seconds in stages)
    return (
        "## A projection, not measured\n\n"
        f"A study of {SEEDS} seeds of all methods with five members, preset `fast` in the space `darts` on "
        f"Fashion-MNIST, a command a seed on one Ray cluster, {work / 3600:.0f} GPU-hours:\n\n"
        "| GPUs | hours | GPU-hours paid | busy, % |\n|--:|--:|--:|--:|\n" + rows + "\n"
        f"More GPUs than tasks side by side are of no use: a seed's longest chain takes {chain / 3600:.1f} hours. It "
        "assumes:\n\n"
        f"- a training takes {TRAINING_SECONDS:.0f} s and a search {SEARCH_SECONDS:.0f} s, as the steps measured on "
        "one H200 say ([GPU results](gpu.md), batch 64, bfloat16 recorded as a CUDA graph); other cells than that one "
        "are as fast;\n"
        f"- one task a GPU, and {STARTING:.0f} s until it begins; no time for data, validation and states;\n"
        "- within a seed methods follow one another, as `compare` does it; further searches, the evolution of cells "
        "and long trainings are single tasks one after another, on a GPU of the cluster too;\n"
        "- the wide network takes as long as three trainings, and a search is not spread over GPUs;\n"
        "- no task fails, and a folder that all machines share is fast enough.\n"
    )


def cells(row: dict[str, Any]) -> str:
    """Return the cells of a piece of work: predicted, measured and their ratio, of each quantity."""
    found = []
    for name in ("wall", "cpu", "memory_mib"):
        guess, truth = row["predicted"][name], row["measured"][name]
        known = truth and guess
        digits = 0 if name == "memory_mib" else 1
        found.append(f"{guess:,.{digits}f} | {truth:,.{digits}f} | {guess / truth:.2f}" if known else " |  | ")
    return " | ".join(found)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    from dnas_ens.compare.report import provenance

    options = parse_benchmark("cost_model", __doc__, CostModel(), argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = compared(options, Path(folder) / "run")
    tasks = {engine: in_fresh_process(overhead, engine, options.tasks) for engine in options.engines}
    env = environment(["python", "experiments/benchmarks/cost_model.py", *argv])
    append_line(with_ending(options.output, ".jsonl"), {"rows": rows, "tasks": tasks, "environment": env})
    ratios = [row["predicted"][name] / row["measured"][name] for row in rows for name in ("wall", "cpu")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = (
        "# What will a study take?\n\n"
        f"{provenance(env, hardware=f'no GPU, {cores} CPU core(s)')}\n\n"
        f"Digits, networks of C={options.channels}, {options.epochs} epochs. Each piece of work was first predicted "
        "from a trial of seconds and then done, both in fresh processes. Time is without the start of Python and "
        "reading the data; memory is of what trains. Predicted over measured is between "
        f"{min(ratios):.2f} and {max(ratios):.2f} in time and CPU seconds.\n\n"
        "| work | time predicted, s | measured, s | ratio | CPU s predicted | measured | ratio | MiB predicted | "
        "measured | ratio |\n|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
        + "".join(f"| {row['work']} | {cells(row)} |\n" for row in rows)
        + f"\nA pool of two workers, and {options.tasks} tasks that do nothing:\n\n"
        "| engine | until the first tasks are done, s | each further task, ms | until it has ended, s |\n"
        "|:--|--:|--:|--:|\n"
        + "".join(
            f"| {engine} | {taken['start']:.1f} | {1000 * taken['task']:.1f} | {taken['end']:.1f} |\n"
            for engine, taken in tasks.items()
        )
        + "\n"
        + projection()
    )
    write_atomic(with_ending(options.output, ".md"), text.encode())
    print(text)
    print(f"wrote {with_ending(options.output, '.md')}")


if __name__ == "__main__":
    sys.exit(run_main(main))
