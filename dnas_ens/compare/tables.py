"""Rows, sentences and spread of a comparison of methods, over one or several search seeds.

Legend: S seeds, N test images; results and rows are of every seed, the same ones in the same order, ours first.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from dnas_ens.compare.methods.comparison import Comparison, Result
from dnas_ens.compare.report import machine
from dnas_ens.evaluate.tables import ensemble_row
from dnas_ens.metrics.calibration import per_image_calibrated_nll
from dnas_ens.metrics.ensemble_size import deep_ensemble_equivalent
from dnas_ens.metrics.significance import compare, image_interval, mean_and_deviation, nested_spread
from dnas_ens.run.files import read_json

COLUMNS = (
    "name",
    "accuracy",
    "nll",
    "calibrated_nll",
    "dee",
    "brier",
    "ece15",
    "disagreement",
    "predictive_js",
    "shared_error_fraction",
    "parameters",
    "networks",
    "cpu_seconds",
)
#: Of the .csv file, a row for each method and seed.
FILE_COLUMNS = ("seed", *COLUMNS, "search_cpu_seconds", "detail")
#: Label of the deep ensemble whose curve the deep-ensemble equivalent is read off from.
BASE_FOR_FREE = "deep ensemble, base cell for free"
#: Shown as percentages, like the tables of `dnas_ens.evaluate`.
PERCENT = ("accuracy", "disagreement")
#: Shown as a mean alone: their spread says little.
COUNTS = ("parameters", "networks")


def rows_of(results: Sequence[Result], *, seed: int) -> list[dict[str, Any]]:
    """Return a row of figures for every result of a search seed, which is noted in it."""
    curve = [option for result in results if result.label == BASE_FOR_FREE for option in result.options]
    curve = [option for option in curve if option.epochs == curve[0].epochs]
    rows = []
    for result in results:
        losses = result.losses()
        row = {
            **ensemble_row(result.name, result.predictions),
            "calibrated_nll": float(losses.mean()),
            "interval": list(image_interval(losses)),
            # With the search where a method's cells come from one, which its own folder does not know.
            "train_seconds": result.cpu_seconds,
            "networks": result.networks,
            "cpu_seconds": result.cpu_seconds,
            "search_cpu_seconds": result.search_seconds,
            "detail": result.detail,
            "seed": seed,
        }
        if curve:
            worth = deep_ensemble_equivalent(
                row["calibrated_nll"],
                [option.calibrated_nll for option in curve],
                sizes=[option.members for option in curve],
            )
            row |= {"dee": worth.value, "dee_relation": worth.relation}
        rows.append(row)
    return rows


def over_seeds(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows as they are shown: as they are for one seed, mean ± standard deviation for several."""
    merged = []
    for of_seeds in zip(*rows, strict=True):
        details = [str(row["detail"]) for row in of_seeds if row["detail"]]
        shown = f" ({' / '.join(dict.fromkeys(details))})" if details else ""
        row: dict[str, Any] = {"name": of_seeds[0]["name"] + shown}
        for column in of_seeds[0]:
            if column == "dee":
                row[column] = merged_equivalents(of_seeds)
            elif column not in ("name", "detail", "seed", "dee_relation", "interval"):
                row[column] = merged_value(column, [one[column] for one in of_seeds])
        merged.append(row)
    return merged


def merged_value(column: str, values: Sequence[Any]) -> Any:
    """Return a cell: the value of one seed, mean and standard deviation of several as text, or None if unknown."""
    if any(value is None for value in values):
        return None
    if column.endswith("seconds"):
        return mean_and_deviation(values, digits=1)
    if len(values) == 1:
        return values[0]
    if any(not math.isfinite(value) for value in values):
        return "-"
    if column in COUNTS:
        return round(float(np.mean(values)))
    if column in PERCENT:
        return mean_and_deviation([100.0 * value for value in values], digits=2)
    return mean_and_deviation(values, digits=4)


def merged_equivalents(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the deep-ensemble equivalent over seeds; < or > where that of a seed is only known to be less or more."""
    bounds = sorted({str(row["dee_relation"]) for row in rows} - {"="})
    text = mean_and_deviation([float(row["dee"]) for row in rows], digits=1)
    return f"{'/'.join(bounds)} {text}" if bounds else text


def stacked(losses: Sequence[np.ndarray]) -> np.ndarray:
    """Return losses of the seeds as (S, N), or (N,) of one seed."""
    return np.stack(losses) if len(losses) > 1 else losses[0]


def differences(results: Sequence[Sequence[Result]]) -> str:
    """Say how the calibrated NLL of the first row differs from every other's, paired by seed and image."""
    return sentences(
        {
            result.name: stacked([of_seed[index].losses() for of_seed in results])
            for index, result in enumerate(results[0])
        }
    )


def spread_sentence(results: Sequence[Sequence[Result]]) -> str:
    """Separate the luck of a search from that of a training, by the networks of the base cells trained by themselves.

    It is empty where no result holds networks of the base cell.
    """
    of_base = [one.predictions for of_seed in results for one in of_seed if one.label == BASE_FOR_FREE]
    if not of_base:
        return ""
    # As many trainings of every search, for searches that cost more pay for more networks.
    trainings = min(predictions.num_members for predictions in of_base)
    values = [
        [
            per_image_calibrated_nll(
                one.val_probs[index], one.val_labels, one.test_probs[index], one.test_labels
            ).mean()
            for index in range(trainings)
        ]
        for one in of_base
    ]
    spread = nested_spread(values)
    between = "" if math.isnan(spread.between) else f"{spread.between:.4f} between search seeds and "
    return (
        f"- One network of the base cell, by itself: calibrated NLL {spread.mean:.4f}, standard deviation {between}"
        f"{spread.within:.4f} between trainings of one cell ({len(of_base)} × {trainings} networks, analysis of "
        "variance).\n"
    )


def sentences(losses: Mapping[str, np.ndarray]) -> str:
    """Return a paragraph on what is compared, and a sentence for each comparison with ours.

    Args:
        losses: Calibrated NLL of every method, (S, N) or (N,) of one seed, ours first.
    """
    (_, ours), *others = losses.items()
    if not others:
        return ""
    num_seeds, images = ours.shape if ours.ndim > 1 else (1, len(ours))
    over = (
        f"over {num_seeds} search seeds (paired t interval) and {images} test images (paired bootstrap)"
        if num_seeds > 1
        else f"over {images} test images (paired bootstrap) of one search seed"
    )
    found = compare(ours, dict(others))
    lines = [f"- {difference.sentence('Ours', f'*{name}*')}\n" for name, difference in found.items()]
    return (
        f"Calibrated NLL on test, ours minus the other, so that less than 0 is better: mean, 95 % intervals {over}, "
        "effect size d, and p of a paired permutation test over images"
        + (f", Holm-corrected for the {len(others)} comparisons" if len(others) > 1 else "")
        + ".\n\n"
        + "".join(lines)
    )


def ranking_sentence(comparisons: Sequence[Comparison]) -> str:
    """Say how the members' order with inherited weights agrees with that after retraining (Kendall's tau)."""
    taus = []
    for comparison in comparisons:
        found, count = comparison.found, comparison.num_members
        places = found.get("ranking", found["selected"])[:count]
        inherited = [found["candidates"][index]["supernet_val_nll"] for index in places]
        if None in inherited or len(set(places)) < 2:
            return ""
        members = comparison.folder / "members"
        retrained = [read_json(members / str(index) / "member.json")["val_nll"] for index in range(count)]
        taus.append(float(kendalltau(inherited, retrained).statistic))
    return (
        "- Kendall's tau between the members' val NLL with inherited weights and retrained: "
        f"{mean_and_deviation(taus, digits=2)} ({comparisons[0].num_members} members).\n"
    )


def provenance(environments: Sequence[Mapping[str, Any]], *, device: str) -> str:
    """Return commands, hardware, versions and date, as the head of a results file has them.

    Args:
        environments: Entries of env.json, the oldest first; a command that was repeated is named once.
    """
    commands: dict[str, dict[str, None]] = {}
    for entry in environments:
        commands.setdefault(shlex.join(entry["command"]), {})[str(entry["git_revision"])] = None
    latest = environments[-1]
    hardware = latest["cuda_device"] if device.startswith("cuda") else "no GPU used"
    typed = "".join(
        f"Command: `{command}` (revision{'s' * (len(revisions) > 1)} {', '.join(revisions)})\n\n"
        for command, revisions in commands.items()
    )
    return f"{typed}{machine(latest, hardware=hardware)} Date: {latest['time']}.\n\n"
