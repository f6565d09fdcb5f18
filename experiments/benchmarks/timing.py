"""What the benchmarks share: options, sides timed in turn, peak memory, processes of their own, the line of results.

Every measurement runs in a fresh process, so that no side inherits memory or allocator settings of another, and the
parent never imports torch before the last child has ended.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from dnas_ens.commands.parse import parse
from dnas_ens.config import require
from dnas_ens.run.machine import peak_resident_bytes

if TYPE_CHECKING:
    import torch

    from dnas_ens.nn.execution import Execution

T = TypeVar("T")
#: A side of a comparison: runs once and says how many seconds it took.
Side = Callable[[], float]
#: Builds a side from its name, the options and the device.
Build = Callable[[str, Any, "torch.device"], Side]

RESULTS = Path(__file__).parents[1] / "results"
MEBIBYTE = 2**20
#: Options that may be 0; every other count is 1 or more.
MAY_BE_ZERO = ("warmup", "workers")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options every benchmark has.

    Raises:
        UserError: A count is too small, or there are none.
    """

    rounds: int = 20
    """Rounds timed; every side runs once in each."""
    warmup: int = 3
    """Rounds before them, not counted."""
    output: Path = RESULTS / "benchmarks.jsonl"
    """File to which the line of results is appended."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            values = value if isinstance(value, tuple) else (value,)
            if any(type(each) is not int for each in values):
                continue
            flag, least = "--" + entry.name.replace("_", "-"), 0 if entry.name in MAY_BE_ZERO else 1
            require(
                bool(values) and min(values) >= least,
                f"{flag} is {' '.join(map(str, values)) or 'empty'}.",
                f"Give {flag} {least} or more.",
            )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Options of the benchmarks that train."""

    threads: int | None = None
    """Threads of PyTorch; default: as many as it takes by itself."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep_memory: bool = True
    """Keep freed memory for the next step on both sides, as our commands do; --no-keep-memory leaves the C library's
    allocator as it is."""
    memory: bool = True
    """Measure peak memory too, each side alone in a process."""
    memory_steps: int = 3
    """Runs of a side over which its peak memory is taken."""


@dataclass(frozen=True, kw_only=True)
class ExecutedOptions(TrainingOptions):
    """Options of the benchmarks in which our side can be computed in several ways."""

    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Memory layout of our side."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of our side; bfloat16 is autocast."""
    cuda_graph: bool = False
    """Replay the steps of our side as CUDA graphs."""

    @property
    def execution(self) -> Execution:
        """How our side is computed."""
        from dnas_ens.nn.execution import Execution

        return Execution(layout=self.layout, precision=self.precision, cuda_graph=self.cuda_graph)


def parse_benchmark(script: str, doc: str | None, default: T, argv: Sequence[str], **more: Any) -> T:
    """Read a benchmark's options; its docstring is its help."""
    prog = f"python experiments/benchmarks/{script}.py"
    return parse(type(default), argv, prog=prog, description=doc or "", default=default, **more)


# Time


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU is done already."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], device: torch.device) -> Side:
    """Return the side that runs a step once on an idle device and waits for its end."""

    def side() -> float:
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        return time.perf_counter() - start

    return side


def in_turn(sides: Mapping[str, Side], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Time all sides in every round, A B A B ..., so that a busy moment of the machine falls on each of them.

    Returns:
        Seconds of every round without the warm-up, for each side.
    """
    taken = [{name: side() for name, side in sides.items()} for _ in range(warmup + rounds)]
    return {name: [one[name] for one in taken[warmup:]] for name in sides}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles of values, and the values themselves in the order they were measured."""
    lower, median, upper = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "values": list(values)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Return the quotient of two sides' medians, and the quartiles of the quotients round by round."""
    quartiles = spread(np.divide(slow, fast).tolist())
    return {
        "ratio": float(np.median(slow)) / float(np.median(fast)),
        "lower_quartile": quartiles["lower_quartile"],
        "upper_quartile": quartiles["upper_quartile"],
    }


# Memory


def peak_memory(side: Callable[[], object], steps: int, device: torch.device) -> dict[str, int]:
    """Run a side and return in bytes its peak memory before and after, and what the steps added.

    On a CPU the peak is that of the process: call this in a fresh one with the model built. On a GPU it is that of
    PyTorch's tensors, and "before" is what they hold before the first step.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = peak_resident_bytes()
    for _ in range(steps):
        side()
    synchronise(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
    return {"before_bytes": before, "peak_bytes": peak, "added_bytes": peak - before}


# Processes


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module's function in a new interpreter and return its result; the process ends with the call.

    Raises:
        Exception: What the function raises.
        BrokenProcessPool: Its process died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as processes:
        try:
            return processes.submit(function, *arguments).result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def prepare(options: TrainingOptions) -> torch.device:
    """Set up a measuring process as the options say and return its device."""
    from dnas_ens.run.machine import keep_freed_memory

    if options.keep_memory:
        keep_freed_memory()
    import torch

    from dnas_ens.run.machine import resolve_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return resolve_device(options.device)


def conditions(device: torch.device) -> dict[str, Any]:
    """Return what a measuring process ran under that the environment does not say."""
    import torch

    return {"device": str(device), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}


# Comparisons


def run_benchmark(
    script: str,
    argv: Sequence[str],
    options: TrainingOptions,
    build: Build,
    sides: Sequence[str],
    *,
    ours: str,
    heading: str,
    **more: Any,
) -> None:
    """Compare sides in time and memory, print the result, and append it to the file; see `measure` and `report`."""
    tell(heading)
    results = measure(build, options, sides, ours=ours)
    tell_sides(results)
    report(script, argv, options, {**more, **results})


def measure(build: Build, options: TrainingOptions, sides: Sequence[str], *, ours: str) -> dict[str, Any]:
    """Compare sides in time and, if the options ask for it, in memory, each measurement in a fresh process.

    Args:
        build: A module's function.
        options: For timing and for ``build``.
        sides: Their names, in the order of their turns.
        ours: Which of them is ours.
    """
    seconds, under = in_fresh_process(_time_sides, build, options, sides)
    memory = {side: in_fresh_process(_memory_of_side, build, options, side) for side in sides} if options.memory else {}
    return {**compared(seconds, memory, ours=ours), **under}


def _time_sides(
    build: Build, options: TrainingOptions, sides: Sequence[str]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    device = prepare(options)
    built = {side: build(side, options, device) for side in sides}
    seconds = in_turn(built, rounds=options.rounds, warmup=options.warmup)
    return seconds, conditions(device)


def _memory_of_side(build: Build, options: TrainingOptions, side: str) -> dict[str, int]:
    device = prepare(options)
    _start_libraries(device)
    return peak_memory(build(side, options, device), options.memory_steps, device)


def _start_libraries(device: torch.device) -> None:
    """Take a tiny step of either form, because first-use allocations of libraries and threads belong to no side."""
    import torch

    from dnas_ens.nn.fast_supernet import FastSupernet
    from dnas_ens.nn.supernet import Supernet
    from dnas_ens.space.search_space import SearchSpace
    from dnas_ens.space.stack import StackSpec

    space = SearchSpace.for_stack(1, operations=("max_pool_3x3", "sep_conv_5x5"), num_nodes=1)
    stack = StackSpec(num_cells=1, channels=2, in_channels=1, num_classes=2)
    reference = Supernet(space, stack).to(device)
    mixture, images = torch.ones(space.shape, device=device), torch.zeros(4, 1, 8, 8, device=device)
    for form in (reference, FastSupernet.from_reference(reference)):
        form(images, mixture).sum().backward()


def compared(
    seconds: Mapping[str, Sequence[float]],
    memory: Mapping[str, Mapping[str, int]],
    *,
    ours: str,
) -> dict[str, Any]:
    """Return sides, and ours against every other one: time ratios other / ours, memory ratios ours / other.

    Args:
        seconds: Of every round, for each side.
        memory: Peak memory of each side; empty if it was not measured. A ratio is None where the other side adds none
            that is seen.
        ours: Which side is ours.
    """
    others = [name for name in seconds if name != ours]
    added = {name: peak["added_bytes"] for name, peak in memory.items()}
    return {
        "sides": {
            name: {"seconds": spread(values), "peak_memory": memory.get(name)} for name, values in seconds.items()
        },
        "time_ratios": {f"{name} / {ours}": ratio(seconds[name], seconds[ours]) for name in others},
        "memory_ratios": {
            f"{ours} / {name}": added[ours] / added[name] if added[name] else None for name in others if name in added
        },
    }


# Results


def report(script: str, argv: Sequence[str], options: Options, results: Mapping[str, Any]) -> dict[str, Any]:
    """Print the results with options, hardware, versions and revision as one line of JSON, and append it to the file.

    Args:
        script: The script's name without its ending, which is the benchmark's too.
        argv: What was typed after it.
        options: As parsed.
        results: What was measured.

    Returns:
        Hardware, versions, revision, command and date.
    """
    from dnas_ens.run.machine import environment

    settings = {name: value for name, value in asdict(options).items() if not isinstance(value, Path)}
    env = environment(["python", f"experiments/benchmarks/{script}.py", *argv])
    line = json.dumps({"benchmark": script, "options": settings, **results, "environment": env})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)
    return env


def tell(text: str) -> None:
    """Print a line for the human reader, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def tell_sides(results: Mapping[str, Any]) -> None:
    """Print the times, memory and ratios of a comparison for a reader."""
    for name, side in results["sides"].items():
        seconds = side["seconds"]
        text = f"{name}: {1000 * seconds['median']:.1f} ms " + _range(seconds, 1000, 1)
        if side.get("peak_memory"):
            text += f", {side['peak_memory']['added_bytes'] / MEBIBYTE:.1f} MiB added"
        tell(text)
    for name, quotient in results["time_ratios"].items():
        tell(f"time, {name}: {quotient['ratio']:.2f} " + _range(quotient, 1, 2))
    for name, share in results.get("memory_ratios", {}).items():
        tell(f"memory, {name}: " + ("not seen" if share is None else f"{share:.2f}"))


def _range(values: Mapping[str, float], unit: float, digits: int) -> str:
    lower, upper = values["lower_quartile"] * unit, values["upper_quartile"] * unit
    return f"(quartiles {lower:.{digits}f} to {upper:.{digits}f})"
