"""What does the README's first run take: wall time, CPU time and memory of ``python -m dnas_ens`` on this machine?

    python experiments/benchmarks/first_run.py

One run in a fresh folder, as the README types it, searches, retrains and evaluates on digits; there is no other side
to time beside it. Writes experiments/results/first-run.md and a line to first-run.jsonl. As long as the
run itself: two minutes on two CPU cores.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import RESULTS, parse_benchmark

from dnas_ens.commands.parse import run_main
from dnas_ens.run.files import read_json, with_ending, write_atomic
from dnas_ens.run.machine import environment


@dataclass(frozen=True, kw_only=True)
class FirstRun:
    """Options of the benchmark."""

    config: Path | None = None
    """Configuration file of the run; default: none, as in the README."""
    output: Path = RESULTS / "first-run"
    """Where OUTPUT.md and OUTPUT.jsonl go."""


def measure(config: Path | None) -> dict[str, Any]:
    """Run once in a folder of its own and return its cost and its results."""
    options = [] if config is None else ["--config", str(config.resolve())]
    command = [sys.executable, "-m", "dnas_ens", *options]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = next((Path(folder) / "runs").iterdir())
        ensemble = read_json(run / "results.json")[-1]
    return {
        "command": "python -m dnas_ens" + ("" if config is None else f" --config {config.name}"),
        "wall_seconds": wall,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        # Of the largest process: members trained side by side are processes of their own.
        "peak_memory_mib": used.ru_maxrss / 1024,
        "accuracy": ensemble["accuracy"],
        "nll": ensemble["nll"],
        "calibrated_nll": ensemble["calibrated_nll"],
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Return all lines as Markdown, the latest last."""
    rows = [
        f"| {line['environment']['time'][:10]} "
        f"| {line['environment']['cpu']}, {line['environment']['num_cpus']} cores "
        f"| {line['wall_seconds']:.0f} | {line['cpu_seconds']:.0f} | {line['peak_memory_mib']:,.0f} | "
        f"{100 * line['accuracy']:.2f} | {line['nll']:.4f} | {line['calibrated_nll']:.4f} |\n"
        for line in lines
    ]
    return (
        "# The first run\n\n"
        f"`{lines[-1]['command']}`, once each; figures of the ensemble on test. Peak memory is that of the largest "
        "process. Versions and revisions are in first-run.jsonl.\n\n"
        "| date | where | wall s | CPU s | peak MiB | accuracy % | NLL | calibrated NLL |\n"
        "|:--|:--|--:|--:|--:|--:|--:|--:|\n" + "".join(rows)
    )


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("first_run", __doc__, FirstRun(), argv)
    command = ["python", "experiments/benchmarks/first_run.py", *argv]
    line = {**measure(options.config), "environment": environment(command)}
    lines_file = with_ending(options.output, ".jsonl")
    before = lines_file.read_text() if lines_file.exists() else ""
    text = before + json.dumps(line) + "\n"
    lines = [json.loads(entry) for entry in text.splitlines()]
    same = [entry for entry in lines if entry["command"] == line["command"]]
    write_atomic(lines_file, text.encode())
    write_atomic(with_ending(options.output, ".md"), table(same).encode())
    print(table(same), end="")


if __name__ == "__main__":
    sys.exit(run_main(main))
