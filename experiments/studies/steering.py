"""How well lambda orders what it is meant to steer."""

from __future__ import annotations

import statistics

import numpy as np


def rank_correlation(lam: np.ndarray, values: np.ndarray) -> float:
    """Return Spearman's correlation of lambda with a quantity along each path, the mean over paths.

    Args:
        lam: (L,), the same on every direction.
        values: (R, L).

    Returns:
        In [-1, 1].
    """
    from scipy.stats import spearmanr

    # A constant has no rank order: lambda steers nothing, which counts as 0.
    return statistics.fmean(0.0 if np.ptp(row) == 0 else float(spearmanr(lam, row)[0]) for row in values)
