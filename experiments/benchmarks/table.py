"""Write the table of benchmarks from their results, the latest of each kind.

    python experiments/benchmarks/table.py

Writes experiments/results/benchmarks.md; ``--results`` names other lines, ``--output`` another place. A second.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import RESULTS, parse_benchmark

from dnas_ens.commands.parse import run_main
from dnas_ens.config import require
from dnas_ens.run.files import write_atomic

#: What a benchmark measured, in words.
TITLES = {
    "search_step": "search step, {members} members, {image_size}×{image_size}, C={channels}",
    "retraining": "retraining, {data}, C={channels}",
    "execution": "layout and precision of {step}, {data}, C={channels}",
    "by_hand": "training step of the {network}, {data}, C={channels}",
    "floor": "search step and its floor, {image_size}×{image_size}, C={channels}",
    "side_by_side": "members side by side, {data}, C={channels}",
    "startup": "`python -m dnas_ens.search --help`",
}
HEAD = """\
# Benchmarks, the latest of each kind

Both sides are timed in turn in one process: medians, of one step where there are steps, and the quartiles of the \
ratio. Commands, versions and all timings are in benchmarks.jsonl.

| what | beside | its ms | our ms | time, its / ours (quartiles) | memory, ours / its | when, where |
|:--|:--|--:|--:|--:|--:|:--|
"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Options of the script."""

    results: Path = RESULTS / "benchmarks.jsonl"
    """Lines that the benchmarks wrote."""
    output: Path = RESULTS / "benchmarks.md"
    """The table."""


def title(line: dict[str, Any]) -> str:
    """Return what a line measured, and how our side is computed where that is not the default."""
    options = line["options"]
    step = "a search step" if options.get("what") == "search" else "retraining"
    ways = [options.get(name) for name in ("layout", "precision")]
    ways = [way for way in ways if way not in (None, "channels_last", "float32")]
    ways += ["CUDA graph"] if options.get("cuda_graph") else []
    if "threads" in line:
        ways.append(f"{line['threads']} thread{'s' * (line['threads'] > 1)}")
    return ", ".join([TITLES[line["benchmark"]].format(**options, step=step), *ways])


def rows(lines: list[dict[str, Any]]) -> list[str]:
    """Return a table row for every ratio of the latest line of each kind."""
    latest = {title(line): line for line in lines if line["benchmark"] in TITLES}
    result = []
    for name, line in latest.items():
        env = line["environment"]
        for comparison, quotient in line["time_ratios"].items():
            other, ours = comparison.split(" / ")
            memory = line.get("memory_ratios", {}).get(f"{ours} / {other}")
            # A round may be several steps, differently many in different lines.
            steps = line["options"].get("batches", 1)
            seconds = [1000 * line["sides"][side]["seconds"]["median"] / steps for side in (other, ours)]
            result.append(
                f"| {name} | {other} | {seconds[0]:,.0f} | {seconds[1]:,.0f} | **{_times(quotient['ratio'])}×** "
                f"({_times(quotient['lower_quartile'])} to {_times(quotient['upper_quartile'])}) | "
                f"{'' if memory is None else f'{memory:.2f}×'} | {env['time'][:10]}, {env['cpu']} |"
            )
    return result


def _times(quotient: float) -> str:
    # Sides that are close differ in the second digit.
    return f"{quotient:.2f}" if 0.5 < quotient < 2 else f"{quotient:.1f}"


def main(argv: list[str]) -> None:
    """Write the table."""
    options = parse_benchmark("table", __doc__, Table(), argv)
    require(options.results.exists(), f"There is no {options.results}.", "Run the benchmarks that write it.")
    lines = [json.loads(line) for line in options.results.read_text().splitlines()]
    write_atomic(options.output, (HEAD + "\n".join(rows(lines)) + "\n").encode())
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
