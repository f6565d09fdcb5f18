"""Is the searched ensemble better than what else could be had, for as many members and for the same cost?

    python experiments/compare_ensembles.py runs/001-digits
    python experiments/compare_ensembles.py runs/001-digits --methods ours base-cell

Trains the chosen methods of ``methods.py`` with the recipe of the run and seeds of their own, predicts val and test,
and writes one table with the cost of each, what the difference to ours is worth (paired bootstrap and permutation test
over test images, Holm-corrected), and a plot of calibrated NLL against cost. The published comparison is EdgeNES's on
CIFAR-100 (one cell searched, two stacked; accuracy %, GPU-hours): DARTS 46.8 ± 1.7, 1.2; DartsEns 48.2 ± 1.5, 3.6;
Random-NES 46.9 ± 5.2, 0; RandomD-NES 47.7 ± 3.4, 1.2; EdgeNES 48.1 ± 1.7, 2.1. Cost: about 45
trainings of one member for five members, minutes on digits. Finished members are kept: run it again after an
interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from methods import METHODS, Comparison, Result
from tyro.conf import Positional

from dnas_ens.cli import parse, run_main
from dnas_ens.commands import data_of_run
from dnas_ens.config_file import override

PROG = "python experiments/compare_ensembles.py"
#: A corrected p-value above this is called not distinguishable.
SIGNIFICANCE = 0.05
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
    "networks",
    "cpu_seconds",
)


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Options of the comparison."""

    run_dir: Positional[Path]
    """Run folder whose members are trained."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods to compare with."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 0
    """Members trained side by side on a CPU, each on its share of the cores; 0 for one a core."""
    output: Path | None = None
    """Copy the table to OUTPUT.md, .csv and .json as well."""


def main(argv: list[str]) -> None:
    """Run the comparison."""
    command = parse(
        CompareCommand,
        argv,
        prog=PROG,
        description=__doc__ or "",
        default=CompareCommand(run_dir=tyro.MISSING),
    )
    from dnas_ens.config import RetrainConfig
    from dnas_ens.device import resolve_device
    from dnas_ens.errors import UserError
    from dnas_ens.evaluate.run import write_tables
    from dnas_ens.evaluate.tables import ensemble_row, to_markdown
    from dnas_ens.runs import RunFolder

    for name in command.methods:
        if name not in METHODS:
            raise UserError(f"There is no method {name}.", f"Choose from {', '.join(METHODS)}.")
    device = resolve_device(command.device)
    with RunFolder.open(command.run_dir, command=[*PROG.split(), *argv]) as run:
        if not run.file("ensemble.json").exists():
            raise UserError(
                f"The members of {run.path} are not trained.", f"Run python -m dnas_ens.retrain {run.path}."
            )
        data = data_of_run(run)
        run.write_env({"device": str(device), "data": data.describe()})
        comparison = Comparison(
            run.path,
            run.read_json("genotypes.json"),
            data,
            override(RetrainConfig(), run.config["retrain"]),
            device=device,
            workers=command.workers,
        )
        results = [
            result
            for name, method in METHODS.items()
            if name in {"ours", *command.methods}
            for result in method(comparison)
        ]
        rows = [
            {
                **ensemble_row(result.name, result.predictions),
                "networks": result.networks,
                "cpu_seconds": result.cpu_seconds,
                # With the search where a method's cells come from one, which its own folder does not know.
                "train_seconds": result.cpu_seconds,
            }
            for result in results
        ]
        write_tables(run.path, rows, name="comparison")
        text = to_markdown(rows, COLUMNS) + "\n" + differences(results) + ranking_sentence(comparison) + "\n"
        print(f"{data.name}, {len(data.test)} test images")
        print(text, end="")
        places = [run.file("comparison.png")]
        if command.output is not None:
            write_report(command.output, text, rows, comparison, environment=run.read_json("env.json"))
            places.append(command.output.with_suffix(".png"))
        for place in places:
            plot(results, rows, place)
        print(f"wrote {run.path}/comparison.md, .csv, .json and .png")


def write_report(
    output: Path,
    text: str,
    rows: list[dict[str, Any]],
    comparison: Comparison,
    *,
    environment: list[dict[str, Any]],
) -> None:
    """Write the table with all that is needed to repeat it to OUTPUT.md, and the rows to OUTPUT.csv and .json."""
    from dnas_ens.evaluate.tables import to_csv
    from dnas_ens.files import read_json, write_atomic, write_json

    data, recipe, latest = comparison.data, comparison.recipe, environment[-1]
    search = read_json(comparison.folder / "config.json")["search"]
    header = (
        f"# Searched ensemble and other methods: {data.name}\n\n"
        + "".join(
            f"Command: `{' '.join(entry['command'])}` (revision {entry['git_revision']})\n\n"
            for entry in environment
        )
        + f"Hardware: {latest['cpu']}, {latest['num_cpus']} cores, device {comparison.device}. "
        f"Versions: torch {latest['packages']['torch']}, numpy {latest['packages']['numpy']}. "
        f"Date: {latest['time']}. Search seed {search['seed']}, recipe seed {recipe.seed}, "
        f"split seed {search['data']['split_seed']}. "
        f"{len(data.train)} training, {len(data.val)} val and {len(data.test)} test images; "
        f"{recipe.epochs} epochs, {recipe.num_cells} cells, C={recipe.channels}, "
        f"{comparison.num_members} members. cpu seconds hold all the training a row needs: the search where its cells "
        "come from it, and networks that were trained and not chosen. Weights and temperature are fitted on val.\n\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output.with_suffix(".md"), (header + text).encode())
    write_atomic(output.with_suffix(".csv"), to_csv(rows, COLUMNS).encode())
    write_json(output.with_suffix(".json"), rows)


def per_image_calibrated_nll(predictions: Any) -> np.ndarray:
    """Return the calibrated NLL of the ensemble on every test image, (N,), in nats."""
    from dnas_ens.analysis.calibration import apply_temperature, fit_temperature

    weights = np.asarray(predictions.weights)
    val = np.tensordot(weights, predictions.val_probs.astype(np.float64), axes=1)
    test = np.tensordot(weights, predictions.test_probs.astype(np.float64), axes=1)
    calibrated = apply_temperature(test, fit_temperature(val, predictions.val_labels))
    picked = calibrated[np.arange(len(calibrated)), predictions.test_labels]
    return np.asarray(-np.log(np.clip(picked, 1e-12, None)))


def differences(results: Sequence[Result]) -> str:
    """Say in words how the calibrated NLL of ours differs from every other row's.

    A paired bootstrap over test images gives each interval, a paired permutation test each p-value, and Holm's
    step-down procedure corrects them for the number of rows. Seeds are not resampled: it is about these networks.
    """
    from scipy.stats import bootstrap, permutation_test

    ours, others = results[0], results[1:]
    per_image = per_image_calibrated_nll(ours.predictions)
    gaps = [per_image - per_image_calibrated_nll(other.predictions) for other in others]
    p_values = [
        float(
            permutation_test(
                (gap,), np.mean, permutation_type="samples", n_resamples=9999, batch=500, rng=0, axis=0
            ).pvalue
        )
        for gap in gaps
    ]
    lines = []
    for other, gap, p_value in zip(others, gaps, holm(p_values), strict=True):
        interval = bootstrap(
            (gap,), np.mean, n_resamples=9999, batch=500, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        if p_value > SIGNIFICANCE:
            verdict = "not distinguishable at this size"
        else:
            verdict = "ours is better" if gap.mean() < 0 else "ours is worse"
        lines.append(
            f"- Calibrated NLL, ours minus {other.name}: {gap.mean():+.4f} (95 % interval {interval.low:+.4f} to "
            f"{interval.high:+.4f}, corrected p {p_value:.3f}): {verdict}.\n"
        )
    return "".join(lines)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's step-down procedure: p_(i) times the number still to test, never falling."""
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return [float(value) for value in corrected]


def ranking_sentence(comparison: Comparison) -> str:
    """Say how the members' order with inherited weights agrees with that after retraining (Kendall's tau)."""
    from scipy.stats import kendalltau

    from dnas_ens.files import read_json

    found = comparison.found
    inherited = [found["candidates"][index]["supernet_val_nll"] for index in found["selected"]]
    if None in inherited or len(set(found["selected"])) < 2:
        return ""
    retrained = [
        read_json(comparison.folder / "members" / str(index) / "member.json")["val_nll"]
        for index in range(len(inherited))
    ]
    tau = float(kendalltau(inherited, retrained).statistic)
    return (
        f"- Kendall's tau between the members' val NLL with inherited weights and retrained: {tau:+.2f} "
        f"({len(inherited)} members).\n"
    )


def plot(results: Sequence[Result], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw calibrated NLL against training cost, a point a row."""
    from dnas_ens.analysis.style import BLUE, MUTED_COLOUR, font, new_figure, style_axis

    figure = new_figure(760, 440)
    axis = figure.subplots()
    for index, (result, row) in enumerate(zip(results, rows, strict=True)):
        colour = BLUE if index == 0 else MUTED_COLOUR
        axis.plot(result.cpu_seconds, row["calibrated_nll"], "o", color=colour, markersize=6)
        axis.annotate(
            str(index + 1),
            (result.cpu_seconds, row["calibrated_nll"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontproperties=font(9),
        )
    style_axis(axis, x_label="CPU seconds of training, search included", y_label="calibrated NLL, nats")
    names = "\n".join(f"{index + 1}  {result.name}" for index, result in enumerate(results))
    figure.text(0.56, 0.95, names, fontproperties=font(8), va="top")
    figure.subplots_adjust(left=0.1, right=0.54, bottom=0.13, top=0.95)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))
