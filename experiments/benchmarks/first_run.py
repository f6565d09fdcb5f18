"""What does the README's first run take: wall time, CPU time and memory of ``python -m dnas_ens`` on this machine?

    python experiments/benchmarks/first_run.py

One run in a fresh folder, as the README types it, searches, retrains and evaluates on digits; there is no other side
to time beside it. More are with other seeds of search and training. Writes experiments/results/first-run.md and a line
a run to first-run.jsonl. A run takes a minute on two CPU cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import RESULTS, parse_benchmark

from dnas_ens.commands.parse import run_main
from dnas_ens.compare.records import append_line, read_lines
from dnas_ens.compare.study import require_positive
from dnas_ens.metrics.significance import mean_and_deviation
from dnas_ens.run.files import read_json, with_ending, write_atomic
from dnas_ens.run.machine import environment


@dataclass(frozen=True, kw_only=True)
class FirstRun:
    """Options of the benchmark."""

    config: Path | None = None
    """Configuration file of the run; default: none, as in the README."""
    seeds: int = 1
    """Runs, with the seeds from 0 on."""
    output: Path = RESULTS / "first-run"
    """Where OUTPUT.md and OUTPUT.jsonl go."""


def measure(config: Path | None, seed: int) -> dict[str, Any]:
    """Run once in a folder of its own and return its cost and its results."""
    options = [] if config is None else ["--config", str(config.resolve())]
    options += ["--seed", str(seed), "--retrain.seed", str(seed)] if seed else []
    command = [sys.executable, "-m", "dnas_ens", *options]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Of this run alone; what the system keeps of all children has the largest memory of any.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        wall = time.perf_counter() - start
        run = next((Path(folder) / "runs").iterdir())
        ensemble = read_json(run / "results.json")[-1]
    return {
        "command": "python -m dnas_ens" + ("" if config is None else f" --config {config.name}"),
        "seed": seed,
        "wall_seconds": wall,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        # Of the largest process: members trained side by side are processes of their own.
        "peak_memory_mib": used.ru_maxrss / 1024,
        "accuracy": ensemble["accuracy"],
        "nll": ensemble["nll"],
        "calibrated_nll": ensemble["calibrated_nll"],
    }


def over_seeds(lines: list[dict[str, Any]]) -> str:
    """Return mean ± standard deviation over the seeds of the latest revision, where there are several."""
    latest = lines[-1]["environment"]["git_revision"]
    same = {line.get("seed", 0): line for line in lines if line["environment"].get("git_revision") == latest}
    if len(same) < 2:
        return ""
    told = {
        name: mean_and_deviation([factor * line[field] for line in same.values()], digits=digits)
        for name, field, factor, digits in (
            ("wall seconds", "wall_seconds", 1, 0),
            ("accuracy, %,", "accuracy", 100, 2),
            ("calibrated NLL", "calibrated_nll", 1, 4),
        )
    }
    return f"\nOver the {len(same)} seeds of the last revision: {', '.join(f'{k} {v}' for k, v in told.items())}.\n"


def table(lines: list[dict[str, Any]]) -> str:
    """Return all lines as Markdown, the latest last."""
    rows = [
        f"| {line['environment']['time'][:10]} "
        f"| {line['environment']['cpu']}, {line['environment']['num_cpus']} cores "
        f"| {line.get('seed', 0)} | {line['wall_seconds']:.0f} | {line['cpu_seconds']:.0f} "
        f"| {line['peak_memory_mib']:,.0f} | "
        f"{100 * line['accuracy']:.2f} | {line['nll']:.4f} | {line['calibrated_nll']:.4f} |\n"
        for line in lines
    ]
    return (
        "# The first run\n\n"
        f"`{lines[-1]['command']}`, once each; figures of the ensemble on test. Peak memory is that of the largest "
        "process. Versions and revisions are in first-run.jsonl.\n\n"
        "| date | where | seed | wall s | CPU s | peak MiB | accuracy % | NLL | calibrated NLL |\n"
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|\n" + "".join(rows) + over_seeds(lines)
    )


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("first_run", __doc__, FirstRun(), argv)
    command = ["python", "experiments/benchmarks/first_run.py", *argv]
    require_positive(options, "seeds")
    lines_file = with_ending(options.output, ".jsonl")
    for seed in range(options.seeds):
        append_line(lines_file, {**measure(options.config, seed), "environment": environment(command)})
    lines = read_lines(lines_file)
    same = [entry for entry in lines if entry["command"] == lines[-1]["command"]]
    write_atomic(with_ending(options.output, ".md"), table(same).encode())
    print(table(same), end="")


if __name__ == "__main__":
    sys.exit(run_main(main))
