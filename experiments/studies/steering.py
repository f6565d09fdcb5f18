"""How well lambda orders what it is meant to steer."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from dnas_ens.search.family import diversity_curve
from dnas_ens.search.loop import SearchLoop

#: |D - lambda| is judged up to here.
JUDGED_LAMBDA = 0.7


def steering(loop: SearchLoop) -> dict[str, Any]:
    """Return how lambda steers distance and shared edges along the paths of a search, and the curves.

    Returns:
        Measures; ``lam`` (L,), ``distance`` and ``shared`` (R, L), and ``between``, the mean D between members of
        equal lambda, (L,), empty for R = 1.
    """
    curve = diversity_curve(loop.family)
    lam, distance, shared = (
        np.array(values, dtype=float).reshape(loop.config.hypernetwork.directions, -1)
        for values in (curve.lam, curve.distance_to_base, curve.shared_edges)
    )
    return {
        "spearman_distance": rank_correlation(lam[0], distance),
        "spearman_shared": rank_correlation(lam[0], shared),
        "tracking_error": float(np.abs(distance - lam)[lam <= JUDGED_LAMBDA].mean()),
        "lam": lam[0].tolist(),
        "distance": distance.tolist(),
        "shared": shared.tolist(),
        "between": curve.distance_between,
    }


def rank_correlation(lam: np.ndarray, values: np.ndarray) -> float:
    """Return Spearman's correlation of lambda with a quantity along each path, the mean over paths.

    Args:
        lam: (L,), the same on every direction.
        values: (R, L).

    Returns:
        In [-1, 1].
    """
    # A constant has no rank order: lambda steers nothing, which counts as 0.
    return statistics.fmean(0.0 if np.ptp(row) == 0 else float(spearmanr(lam, row)[0]) for row in values)
