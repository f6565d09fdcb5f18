"""What are several cores worth to a budget of time? Networks one after another, and side by side.

    python experiments/benchmarks/budget_workers.py

The command `python -m dnas_ens --budget`, with all threads for one network at a time and with a share of them for each
of several, in turns, a seed of search and training after the other. Writes experiments/results/budget-workers.md and a
line a run to budget-workers.jsonl. Eight minutes on two CPU cores.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, parse_benchmark

from dnas_ens.commands.parse import run_main
from dnas_ens.compare.report import markdown_table, provenance, write_results
from dnas_ens.compare.study import require_positive
from dnas_ens.metrics.significance import mean_and_deviation
from dnas_ens.run.files import read_json
from dnas_ens.run.machine import environment


@dataclass(frozen=True, kw_only=True)
class BudgetWorkers:
    """Options of the benchmark."""

    data: str = "fashion-mnist"
    """Images."""
    limit_train: int = 2000
    """Training images."""
    image_size: int = 14
    """Pixels a side."""
    budget: str = "90s"
    """What every run may spend."""
    workers: tuple[int, ...] = tuple(dict.fromkeys((1, torch.get_num_threads())))
    """Networks side by side."""
    seeds: int = 2
    """Runs with each, with the seeds from 0 on."""
    output: Path = RESULTS / "budget-workers"
    """Where OUTPUT.md and OUTPUT.jsonl go."""

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "limit_train", "image_size")


def measure(options: BudgetWorkers, workers: int, seed: int) -> dict[str, Any]:
    """Spend the budget once and return what it came to."""
    images = ["--data", options.data, "--limit-train", options.limit_train, "--image-size", options.image_size]
    seeds = ["--seed", seed, "--retrain.seed", seed]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "R"
        spent = ["--budget", options.budget, "--workers", workers, "--run-dir", run]
        command = [sys.executable, "-m", "dnas_ens", *images, *spent, *seeds]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        ledger = read_json(run / "budget.json")
        done = ledger["done"]
        ensemble = read_json(run / "results.json")[-1]
    return {
        "workers": workers,
        "seed": seed,
        "trainings": len(done),
        "epochs": sum(unit["epochs"] for unit in done),
        "spent": ledger["spent"],
        "networks": len(done[-1]["members"]),
        "val_nll": done[-1]["loss"],
        "calibrated_nll": ensemble["calibrated_nll"],
        "accuracy": 100 * ensemble["accuracy"],
    }


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("budget_workers", __doc__, BudgetWorkers(), argv)
    runs = []
    for seed in range(options.seeds):
        for workers in options.workers:
            runs.append(measure(options, workers, seed))
            print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in runs[-1].items()), flush=True)
    columns = {"spent": 0, "trainings": 1, "epochs": 0, "networks": 1, "val_nll": 4, "calibrated_nll": 4, "accuracy": 2}
    rows = []
    for workers in options.workers:
        own = [run for run in runs if run["workers"] == workers]
        figures = [mean_and_deviation([run[name] for run in own], digits=digits) for name, digits in columns.items()]
        rows.append([str(workers), *figures])
    header = [
        "side by side",
        "seconds",
        "trainings",
        "epochs",
        "networks join",
        "NLL on val",
        "calibrated NLL",
        "accuracy, %",
    ]
    command = ["python", "experiments/benchmarks/budget_workers.py", *argv]
    text = (
        "# What are several cores worth to a budget of time?\n\n"
        f"{provenance(environment(command), hardware=f'no GPU, {torch.get_num_threads()} threads')}\n\n"
        f"{options.data}, {options.limit_train:,} training images at {options.image_size}×{options.image_size} pixels, "
        f"a budget of {options.budget}. Mean ± standard deviation over {options.seeds} seeds; NLL on val is "
        "cross-fitted, the last two columns are on test.\n\n" + markdown_table(header, rows)
    )
    write_results(options.output, text, records=runs)
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
