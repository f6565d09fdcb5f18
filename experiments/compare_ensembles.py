"""Is the searched ensemble better than a deep ensemble of its base cell, trained with the same recipe?

    python experiments/compare_ensembles.py runs/001-digits

Trains the deep ensemble of the run's base cell (as many members, the recipe of the run, other seeds), predicts val and
test with both, and writes one table with the cost of each and a paired bootstrap interval of the difference. The
published comparison is EdgeNES's on CIFAR-100 (one cell searched, two stacked): DARTS 46.8 ± 1.7, EdgeNES 48.1 ± 1.7 %
accuracy. Cost: once more the retraining of the run. Finished members are kept; run it again after an interruption.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tyro.conf import Positional

from dnas_ens.cli import parse, run_main
from dnas_ens.commands import data_of_run
from dnas_ens.config_file import override

PROG = "python experiments/compare_ensembles.py"
BASELINE = "baselines/deep-ensemble-of-base"
COLUMNS = (
    "name",
    "accuracy",
    "nll",
    "calibrated_nll",
    "brier",
    "ece15",
    "disagreement",
    "predictive_js",
    "shared_error_fraction",
    "parameters",
    "cpu_seconds",
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Options of the comparison."""

    run_dir: Positional[Path]
    """Run folder whose members are trained."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 0
    """Members trained side by side on a CPU, each on its share of the cores; 0 for one a core."""
    output: Path | None = None
    """Copy the table to OUTPUT.md, .csv and .json as well."""


def main(argv: list[str]) -> None:
    """Run the comparison."""
    comparison = parse(
        Comparison, argv, prog=PROG, description=__doc__ or "", default=Comparison(run_dir=tyro.MISSING)
    )
    from dnas_ens.config import RetrainConfig
    from dnas_ens.device import resolve_device
    from dnas_ens.errors import UserError
    from dnas_ens.evaluate.predictions import Predictions
    from dnas_ens.evaluate.run import predict_folder, write_tables
    from dnas_ens.evaluate.tables import best_single, ensemble_row, result_rows, to_csv, to_markdown
    from dnas_ens.files import write_atomic, write_json
    from dnas_ens.genotype import Genotype
    from dnas_ens.retrain.members import train_members
    from dnas_ens.runs import RunFolder

    device = resolve_device(comparison.device)
    with RunFolder.open(comparison.run_dir, command=[*PROG.split(), *argv]) as run:
        if not run.file("ensemble.json").exists():
            raise UserError(
                f"The members of {run.path} are not trained.", f"Run python -m dnas_ens.retrain {run.path}."
            )
        data = data_of_run(run)
        run.write_env({"device": str(device), "data": data.describe()})
        found = run.read_json("genotypes.json")
        base = Genotype.from_dict(found["base"]["genotype"])
        recipe = override(RetrainConfig(), run.config["retrain"])
        # Another root, so that no member of the baseline repeats one of ours where the cells agree.
        recipe = replace(recipe, seed=recipe.seed + 1)
        folder = run.path / BASELINE
        folder.mkdir(parents=True, exist_ok=True)
        genotypes = [base] * len(found["selected"])
        train_members(genotypes, data, recipe, device=device, folder=folder, workers=comparison.workers)

        stored = run.file("predictions.npz")
        ours = Predictions.load(stored) if stored.exists() else predict_folder(run.path, data, device=device)
        theirs = predict_folder(folder, data, device=device)
        search_seconds = found["report"].get("cpu_seconds", 0.0)
        our_seconds, their_seconds = training_seconds(run.path), training_seconds(folder)
        best = best_single(ours)
        rows = [
            {
                **ensemble_row("ours (searched ensemble)", ours),
                "cpu_seconds": search_seconds + sum(our_seconds),
            },
            {
                **ensemble_row("deep ensemble of the base cell", theirs),
                "cpu_seconds": search_seconds + sum(their_seconds),
            },
            {
                **result_rows(ours)[best],
                "name": "best single searched member",
                "cpu_seconds": search_seconds + our_seconds[best],
            },
            {**average_row("average searched member", ours)},
            {**average_row("average base member", theirs)},
        ]
        write_tables(run.path, rows, name="comparison")
        verdict = difference_sentence(ours, theirs) + ranking_sentence(found, run.path)
        text = to_markdown(rows, COLUMNS) + "\n" + verdict + "\n"
        print(f"{data.name}, {len(data.test)} test images")
        print(text, end="")
        if comparison.output is not None:
            environment = run.read_json("env.json")
            header = (
                f"# Searched ensemble and deep ensemble of its base cell: {data.name}\n\n"
                + "".join(
                    f"Command: `{' '.join(entry['command'])}` (revision {entry['git_revision']})\n\n"
                    for entry in environment
                )
                + f"Hardware: {environment[-1]['cpu']}, {environment[-1]['num_cpus']} cores, device {device}. "
                f"Versions: torch {environment[-1]['packages']['torch']}, "
                f"numpy {environment[-1]['packages']['numpy']}. Date: {environment[-1]['time']}. "
                f"Search seed {run.config['search']['seed']}, recipe seeds {recipe.seed - 1} and {recipe.seed}, "
                f"split seed {run.config['search']['data']['split_seed']}. "
                f"{len(data.train)} training, {len(data.val)} val and {len(data.test)} test images; "
                f"{recipe.epochs} epochs, {recipe.num_cells} cells, C={recipe.channels}, "
                f"{len(found['selected'])} members. cpu seconds include the search.\n\n"
            )
            comparison.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(comparison.output.with_suffix(".md"), (header + text).encode())
            write_atomic(comparison.output.with_suffix(".csv"), to_csv(rows, COLUMNS).encode())
            write_json(comparison.output.with_suffix(".json"), {"rows": rows, "verdict": verdict})
        print(f"wrote {run.path}/comparison.md, .csv and .json")


def training_seconds(folder: Path) -> list[float]:
    """Return the CPU seconds of every member of an ensemble's folder."""
    from dnas_ens.files import read_json

    members = read_json(folder / "ensemble.json")["members"]
    return [
        read_json(folder / "members" / str(index) / "member.json")["cpu_seconds"]
        for index in range(len(members))
    ]


def average_row(name: str, predictions: Any) -> dict[str, Any]:
    """Return the mean of the members' metrics."""
    from dnas_ens.evaluate.tables import result_rows

    return {**result_rows(predictions)[-2], "name": name}


def per_image_calibrated_nll(predictions: Any) -> np.ndarray:
    """Return the calibrated NLL of the ensemble on every test image, (N,), in nats."""
    from dnas_ens.analysis.calibration import apply_temperature, fit_temperature

    weights = np.asarray(predictions.weights)
    val = np.tensordot(weights, predictions.val_probs.astype(np.float64), axes=1)
    test = np.tensordot(weights, predictions.test_probs.astype(np.float64), axes=1)
    calibrated = apply_temperature(test, fit_temperature(val, predictions.val_labels))
    picked = calibrated[np.arange(len(calibrated)), predictions.test_labels]
    return np.asarray(-np.log(np.clip(picked, 1e-12, None)))


def difference_sentence(ours: Any, theirs: Any) -> str:
    """Say in words how the calibrated NLLs differ, with a paired bootstrap interval over test images."""
    from scipy.stats import bootstrap

    difference = per_image_calibrated_nll(ours) - per_image_calibrated_nll(theirs)
    interval = bootstrap(
        (difference,), np.mean, n_resamples=9999, batch=500, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    if interval.low > 0:
        verdict = "The deep ensemble of the base cell is better."
    elif interval.high < 0:
        verdict = "The searched ensemble is better."
    else:
        verdict = "The two are not distinguishable at this size."
    return (
        f"Calibrated NLL, ours minus deep ensemble: {difference.mean():+.4f} (95 % interval "
        f"{interval.low:+.4f} to {interval.high:+.4f}, paired bootstrap over {len(difference)} test images). "
        + verdict
    )


def ranking_sentence(found: dict[str, Any], folder: Path) -> str:
    """Say how the members' order with inherited weights agrees with that after retraining (Kendall's tau)."""
    from scipy.stats import kendalltau

    from dnas_ens.files import read_json

    inherited = [found["candidates"][index]["supernet_val_nll"] for index in found["selected"]]
    if None in inherited or len(set(found["selected"])) < 2:
        return ""
    retrained = [
        read_json(folder / "members" / str(index) / "member.json")["val_nll"]
        for index in range(len(inherited))
    ]
    tau = float(kendalltau(inherited, retrained).statistic)
    return (
        f" Kendall's tau between the members' val NLL with inherited weights and retrained: {tau:+.2f} "
        f"({len(inherited)} members)."
    )


if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))
