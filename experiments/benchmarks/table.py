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

from dnas_ens.commands.parse import parse, run_main
from dnas_ens.config import require
from dnas_ens.run.files import write_atomic

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Options of the script."""

    results: Path = RESULTS / "benchmarks.jsonl"
    """Lines that the benchmarks wrote."""
    output: Path = RESULTS / "benchmarks.md"
    """The table."""


def title(line: dict[str, Any]) -> str:
    """Return what a line measured, in words."""
    options = line["options"]
    # As our side is computed where that is not the default.
    ways = [options.get(name) for name in ("layout", "precision")]
    ways = [way for way in ways if way not in (None, "channels_last", "float32")]
    ways += ["CUDA graph"] if options.get("cuda_graph") else []
    if "threads" in line:
        ways.append(f"{line['threads']} thread{'s' * (line['threads'] > 1)}")
    how = "".join(f", {way}" for way in ways)
    if line["benchmark"] == "search_step":
        size = f"{options['image_size']}×{options['image_size']}"
        return f"search step, {options['members']} members, {size}, C={options['channels']}{how}"
    if line["benchmark"] == "retraining":
        return f"retraining, {options['data']}, C={options['channels']}{how}"
    if line["benchmark"] == "execution":
        what = "a search step" if options["what"] == "search" else "retraining"
        return f"layout and precision of {what}, {options['data']}, C={options['channels']}{how}"
    if line["benchmark"] == "floor":
        size = f"{options['image_size']}×{options['image_size']}"
        return f"search step and its floor, {size}, C={options['channels']}{how}"
    if line["benchmark"] == "side_by_side":
        return f"members side by side, {options['data']}, C={options['channels']}{how}"
    return "`python -m dnas_ens.search --help`"


def rows(lines: list[dict[str, Any]]) -> list[str]:
    """Return a table row for every ratio of the latest line of each kind."""
    latest = {title(line): line for line in lines}
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
    options = parse(
        Table,
        argv,
        prog="python experiments/benchmarks/table.py",
        description=__doc__ or "",
        default=Table(),
    )
    require(options.results.exists(), f"There is no {options.results}.", "Run the benchmarks that write it.")
    lines = [json.loads(line) for line in options.results.read_text().splitlines()]
    head = (
        "# Benchmarks, the latest of each kind\n\n"
        "Both sides are timed in turn in one process: medians, of one step where there are steps, and the quartiles "
        "of the ratio. Commands, versions and all timings are in benchmarks.jsonl.\n\n"
        "| what | beside | its ms | our ms | time, its / ours (quartiles) | memory, ours / its | when, where |\n"
        "|:--|:--|--:|--:|--:|--:|:--|\n"
    )
    write_atomic(options.output, (head + "\n".join(rows(lines)) + "\n").encode())
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
