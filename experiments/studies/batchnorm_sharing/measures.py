"""What is measured on one search, both settings beside each other, and which differences the seeds tell apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from studies.batchnorm_sharing.options import SETTINGS
from studies.batchnorm_sharing.records import Records
from studies.batchnorm_sharing.worker import JUDGED_LAMBDA
from studies.report import markdown_table

#: Seeds below which the verdict says that they are few.
MANY_SEEDS = 10
DECIMALS = 3
MEASURES = {
    "tau_pool": "Kendall's τ, pool",
    "tau_random": "Kendall's τ, random genotypes",
    "tau_searched": "Kendall's τ, candidates",
    "spearman_distance": "Spearman(λ, D to base)",
    "spearman_shared": "Spearman(λ, shared edges)",
    "tracking_error": f"mean abs(D−λ), λ ≤ {JUDGED_LAMBDA}",
    "relaxed_accuracy": "relaxed val accuracy",
    "discretisation_gap": "discretisation gap",
    "random_supernet_nll": "supernet val NLL, random genotypes",
    "searched_supernet_nll": "supernet val NLL, candidates",
    "searched_retrained_nll": "retrained val NLL, candidates",
    "cpu_seconds": "CPU seconds of the search",
}


@dataclass(frozen=True)
class Ranking:
    """Val NLL of a pool with inherited weights and retrained, and which of it is random; arrays (P,)."""

    supernet: np.ndarray
    retrained: np.ndarray
    random: np.ndarray


def ranking(records: Records, setting: str, seed: int) -> Ranking:
    """Return both scores of every genotype in the pool of a search."""
    pool = records.searches[setting, seed]["candidates"]
    return Ranking(
        np.array([candidate["supernet_val_nll"] for candidate in pool]),
        np.array([records.trainings[candidate["cells"], seed]["val_nll"] for candidate in pool]),
        np.array([candidate["lam"] is None for candidate in pool]),
    )


def measures(records: Records, setting: str, seed: int) -> dict[str, float]:
    """Return everything measured on one search."""
    from scipy.stats import kendalltau

    ranks = ranking(records, setting, seed)
    drawn = ranks.random

    def tau(chosen: np.ndarray) -> float:
        # Where nothing is to be ordered, nothing is ordered rightly.
        enough = chosen.sum() > 1
        return float(kendalltau(ranks.supernet[chosen], ranks.retrained[chosen]).statistic) if enough else 0.0

    values = records.searches[setting, seed] | {
        "tau_pool": tau(np.full_like(drawn, True)),
        "tau_random": tau(drawn),
        "tau_searched": tau(~drawn),
        "random_supernet_nll": ranks.supernet[drawn].mean(),
        "searched_supernet_nll": ranks.supernet[~drawn].mean(),
        "searched_retrained_nll": ranks.retrained[~drawn].mean(),
    }
    return {name: float(values[name]) for name in MEASURES}


def table(found: dict[str, list[dict[str, float]]], seeds: Sequence[int]) -> str:
    """Return both settings and their difference at every seed as Markdown.

    Args:
        found: For each setting the measures of every seed.
        seeds: The seeds, in the same order.
    """
    from dnas_ens.metrics.significance import CONFIDENCE, mean_and_deviation, t_interval

    header = [
        "measure",
        *SETTINGS,
        *(f"difference, seed {seed}" for seed in seeds),
        f"mean difference ({100 * CONFIDENCE:.0f} % paired t interval)",
    ]
    lines = []
    for name, label in MEASURES.items():
        columns = [[values[name] for values in found[setting]] for setting in SETTINGS]
        differences = slices_minus_separate(found, name)
        low, high = t_interval(differences)
        ends = "" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})"
        lines.append(
            [
                label,
                *(mean_and_deviation(column, digits=DECIMALS) for column in columns),
                *(f"{value:+.3f}" for value in differences),
                f"{statistics.fmean(differences):+.3f}{ends}",
            ]
        )
    return markdown_table(header, lines)


def slices_minus_separate(found: dict[str, list[dict[str, float]]], name: str) -> list[float]:
    """Return a measure's difference between the settings at every seed."""
    pairs = zip(*(found[setting] for setting in SETTINGS), strict=True)
    return [ours[name] - exact[name] for ours, exact in pairs]


def verdict(found: dict[str, list[dict[str, float]]]) -> str:
    """Say in plain words which differences between the settings are distinguishable from 0."""
    from dnas_ens.metrics.significance import CONFIDENCE, t_interval

    num_seeds = len(found[SETTINGS[0]])
    if num_seeds < 2:
        return "One seed says nothing about how far the two settings differ beyond the luck of a search.\n"
    apart, alike = [], []
    for name, label in MEASURES.items():
        low, high = t_interval(slices_minus_separate(found, name))
        if low > 0 or high < 0:
            apart.append(f"{label} ({'higher' if low > 0 else 'lower'} with shared statistics)")
        else:
            alike.append(label)
    parts = [
        f"By the {100 * CONFIDENCE:.0f} % paired t interval over {num_seeds} seeds, slices minus separate is "
        f"distinguishable from 0 in {'; '.join(apart) or 'no measure'}. "
        f"It is not distinguishable from 0 in {'; '.join(alike) or 'no measure'}."
    ]
    if num_seeds < MANY_SEEDS:
        parts.append(
            f"{num_seeds} seeds are few: only differences that are large against their spread can be seen, and "
            "not distinguishable does not mean equal."
        )
    parts.append(
        f"Each interval stands alone; of {len(MEASURES)} such intervals about one in {round(1 / (1 - CONFIDENCE))} "
        "misses 0 by chance."
    )
    return " ".join(parts) + "\n"
