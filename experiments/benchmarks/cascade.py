"""How much time does a cascade save, and what does it cost in accuracy?

    python experiments/benchmarks/cascade.py runs/001-digits runs/002-fashion-mnist
    python experiments/benchmarks/cascade.py fashion-mnist --output experiments/results/cascade-fashion-mnist

For every run folder, evaluated before, or ensemble that comes with the package, by name: all members on all test images
against members asked in turn, both timed in turn in one process, with a threshold fitted on val for the stated loss of
accuracy. Writes OUTPUT.md and OUTPUT.jsonl.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timing import RESULTS, parse_benchmark, tell
from tyro.conf import Positional

from dnas_ens.commands.parse import run_main
from dnas_ens.config import require
from dnas_ens.run.machine import environment


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the benchmark."""

    folders: Positional[tuple[Path, ...]] = ()
    """Run folders that were evaluated, and names of ensembles that come with the package."""
    losses: tuple[float, ...] = (0.0, 0.001)
    """Accuracy on val that the cascade may lose."""
    rounds: int = 10
    """Rounds timed; both ways run once in each."""
    threads: int = 1
    """Threads of PyTorch."""
    output: Path = RESULTS / "cascade"
    """Where OUTPUT.md and OUTPUT.jsonl go."""


def measure(folder: Path, options: Options) -> list[dict[str, Any]]:
    """Time both ways on the test images of a run, or of the data set that an ensemble has its name from."""
    from dnas_ens.commands.options import load_configured_data
    from dnas_ens.config import DataConfig
    from dnas_ens.data import load_data
    from dnas_ens.ensembles import load
    from dnas_ens.ensembles.cascade import fit_cascade
    from dnas_ens.ensembles.storage import pretrained_names
    from dnas_ens.evaluate.run import stored_predictions
    from dnas_ens.run.files import read_json

    ensemble = load(folder)
    if str(folder) in pretrained_names():
        data = load_data(str(folder))
        val_probs, weights = ensemble.predict_probs(data.val), ensemble.weights.tolist()
    else:
        fields = read_json(folder / "config.json")["search"]["data"]
        data = load_configured_data(DataConfig(**{**fields, "data_root": None}))
        found = stored_predictions(folder)
        val_probs, weights = found.val_probs, list(found.weights)
    val_labels = data.val.labels.numpy()
    images, labels = data.test.images, data.test.labels.numpy()
    rows = []
    for loss in options.losses:
        cascade = fit_cascade(val_probs, val_labels, weights=weights, accuracy_loss=loss)
        taken: dict[str, list[float]] = {"all": [], "cascade": []}
        for _ in range(options.rounds + 1):
            start = time.perf_counter()
            everyone = ensemble.predict_probs(images)
            middle = time.perf_counter()
            some, asked = ensemble.cascade_probs(images, cascade)
            taken["cascade"].append(time.perf_counter() - middle)
            taken["all"].append(middle - start)
        # The first round warms up.
        ratios = np.divide(taken["all"][1:], taken["cascade"][1:])
        averaged, _ = ensemble.averaged(everyone)
        cascaded, _ = ensemble.averaged(np.nan_to_num(some), cascade)
        right = [(probs.argmax(axis=1) == labels).mean() for probs in (averaged, cascaded)]
        rows.append(
            {
                "run": folder.name,
                "members": ensemble.num_members,
                "loss": loss,
                "images": len(labels),
                "images_per_s": len(labels) / float(np.median(taken["all"][1:])),
                "ratio": float(np.median(ratios)),
                "asked": float(asked.mean()),
                "accuracy": float(right[0]),
                "cascade_accuracy": float(right[1]),
            }
        )
        tell(f"{folder.name}: {rows[-1]['ratio']:.2f} times as fast, {rows[-1]['asked']:.2f} members asked")
    return rows


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    from dnas_ens.compare.report import provenance, write_results

    options = parse_benchmark("cascade", __doc__, Options(), argv)
    require(bool(options.folders), "No run folder was given.", "Give folders that evaluate has read.")
    import torch

    torch.set_num_threads(options.threads)
    rows = [row for folder in options.folders for row in measure(folder, options)]
    head = (
        "| run | members | accuracy on val to lose, % | members asked | throughput, times that of all members | "
        "accuracy of all, % | of the cascade, % | images/s of all |\n|:--|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    lines = [
        f"| {row['run']} | {row['members']} | {100 * row['loss']:g} | {row['asked']:.2f} | {row['ratio']:.2f} | "
        f"{100 * row['accuracy']:.2f} | {100 * row['cascade_accuracy']:.2f} | {row['images_per_s']:,.0f} |\n"
        for row in rows
    ]
    env = environment(["python", "experiments/benchmarks/cascade.py", *argv])
    text = (
        "# How much time does a cascade save?\n\n"
        f"{provenance(env, hardware=f'no GPU, threads: {options.threads}')}\n\n"
        f"Median of {options.rounds} rounds, both ways in turn in one process; accuracy on test.\n\n"
        + head
        + "".join(lines)
    )
    write_results(options.output, text, records=[{"rows": rows, "environment": env}])
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
