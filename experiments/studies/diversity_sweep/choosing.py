"""What is chosen on val and drawn from a search: ensembles, samples with their deviations, what is retrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dnas_ens.space.genotype import Genotype
from studies.diversity_sweep.options import (
    BASE_SETTING,
    RETRAINED_LIMITS,
    RETRAINED_POINTS,
    STEERED,
)

#: Edges shared or replaced, at which samples are compared with random deviations.
NUM_EDGES = range(4)


def chosen_on_other_half(probs: np.ndarray, labels: np.ndarray, num_members: int) -> np.ndarray:
    """Return ensemble probabilities (N, K), each half of the images predicted by members the other half chose.

    Args:
        probs: (P, N, K) of the candidates.
        labels: (N,).
        num_members: M; all candidates where there are fewer.
    """
    from dnas_ens.data.splits import alternating_halves
    from dnas_ens.ensembles.selection import greedy_selection

    averaged = np.empty(probs.shape[1:])
    halves = alternating_halves(labels)
    for choosing, judging in (halves, halves[::-1]):
        picked = greedy_selection(
            probs[:, choosing], labels[choosing], num_members=min(num_members, len(probs))
        )
        averaged[judging] = probs[picked][:, judging].mean(axis=0)
    return averaged


def limited_ensemble(
    limit: float, nearest: Mapping[str, float], probs: np.ndarray, labels: np.ndarray, num_members: int
) -> dict[str, Any]:
    """Choose an ensemble greedily on val from the genotypes that lie at a lambda up to a limit.

    Args:
        limit: Lambda's limit.
        nearest: The smallest lambda of each genotype, by its cells.
        probs: (P or more, N, K), the first P those of the genotypes.
        labels: (N,).
        num_members: M; all there are where there are fewer.
    """
    from dnas_ens.ensembles.selection import greedy_selection

    within = [index for index, lam in enumerate(nearest.values()) if lam <= limit + 1e-6]
    picked = greedy_selection(probs[within], labels, num_members=min(num_members, len(within)))
    cells = list(nearest)
    return {
        "limit": limit,
        "candidates": len(within),
        "cells": [cells[within[index]] for index in picked],
    }


def matched_samples(
    genotypes: Mapping[str, Genotype],
    base: Genotype,
    *,
    num_samples: int,
    operations: Sequence[str],
    seed: int,
) -> tuple[list[str], list[Genotype]]:
    """Draw samples with 0 to 3 edges shared with the base, or 0 to 3 replaced, and a deviation that shares as many.

    Args:
        genotypes: Those of a search by their cells.
        base: Its base.
        num_samples: For each number of shared edges, or as many as there are.
        operations: What deviations are drawn from.
        seed: Decides samples and deviations.

    Returns:
        The samples' cells, and for each a random deviation of the base, all deviations different.
    """
    from dnas_ens.baselines import deviations_sharing

    generator = np.random.default_rng(seed)
    shared = {cells: base.shared_edges(genotype) for cells, genotype in genotypes.items()}
    samples: list[str] = []
    for count in sorted({*NUM_EDGES, *(base.num_edges - each for each in NUM_EDGES)} - {base.num_edges}):
        having = [cells for cells, number in shared.items() if number == count]
        samples += [str(cells) for cells in generator.permutation(having)[:num_samples]]
    deviations = deviations_sharing(
        base, [shared[cells] for cells in samples], operations=operations, seed=seed
    )
    return samples, deviations


def to_retrain(record: Mapping[str, Any]) -> dict[str, Genotype]:
    """Return the genotypes of a search that are trained from scratch, by their cells."""
    if record["setting"] == BASE_SETTING:
        return {}
    wanted = [
        cells
        for ensemble in record["ensembles"]
        if ensemble["share"] in (RETRAINED_LIMITS if record["setting"] in STEERED else (1.0,))
        for cells in ensemble["cells"]
    ]
    by_cells = dict(record["genotypes"])
    if record["setting"] in STEERED:
        wanted += [path_cells(record, share) for share in RETRAINED_POINTS]
        wanted += [sample["cells"] for sample in record["samples"]]
        for entry in (record["base"], *record["deviations"]):
            by_cells[entry["cells"]] = entry["genotype"]
            wanted.append(entry["cells"])
    return {cells: Genotype.from_dict(by_cells[cells]) for cells in dict.fromkeys(wanted)}


def path_cells(record: Mapping[str, Any], share: float, direction: int = 0) -> str:
    """Return the cells at a share of the largest lambda on a direction."""
    path = [point for point in record["points"] if point["direction"] == direction]
    return str(path[round(share * (len(path) - 1))]["cells"])
