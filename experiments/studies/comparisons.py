"""Pairs of predictors, compared on the same seeds and test images and corrected for their number."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from dnas_ens.metrics.significance import PairedDifference

Name = TypeVar("Name", bound=Hashable)


def compare_pairs(
    losses: Mapping[Name, np.ndarray], pairs: Iterable[tuple[Name, Name]]
) -> dict[tuple[Name, Name], PairedDifference]:
    """Compare predictors pair by pair, the p-values of all pairs corrected together by Holm's procedure.

    Args:
        losses: Of every predictor on each test image of each seed, (S, N) in nats.
        pairs: First and second predictor; a pair that comes twice is one comparison.

    Returns:
        First minus second, in the given order.
    """
    from dnas_ens.metrics.significance import holm, paired_difference

    found = {
        (first, second): paired_difference(losses[first], losses[second])
        for first, second in dict.fromkeys(pairs)
    }
    corrected = holm([each.p_value for each in found.values()])
    return {
        pair: replace(each, p_value=p_value)
        for (pair, each), p_value in zip(found.items(), corrected, strict=True)
    }


def how_to_read(num_comparisons: int) -> str:
    """Say what the sentences and verdicts on calibrated NLL rest on."""
    return (
        "Calibrated NLL on test, first minus second, with 95 % intervals: the paired t interval over seeds and the "
        "paired bootstrap over test images of the mean over seeds; d is the mean over the standard deviation of the "
        "images' differences, p that of a paired permutation test over images, corrected for all "
        f"{num_comparisons} comparisons together (Holm). *Better* and *worse* alone need p below 0.05 and an interval "
        "over seeds that leaves out 0."
    )
