"""The 2-D blobs problem: Gaussian clouds of points, one a class, that overlap (scikit-learn's make_blobs)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from sklearn.datasets import make_blobs

from dnas_ens.errors import UserError

#: Points (N, 2) in float32 and their classes (N,) in int64.
LabelledPoints = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Blobs:
    """Disjoint splits of one draw.

    Args:
        train: Points to learn from, (N, 2), and labels, (N,).
        val: Points to choose, weight and stop by.
        test: Points that only an evaluation reads.
    """

    train: LabelledPoints
    val: LabelledPoints
    test: LabelledPoints


def draw_blobs(
    seed: int,
    *,
    num_train: int = 100,
    num_val: int = 200,
    num_test: int = 1000,
    num_classes: int = 3,
    std: float = 2.0,
) -> Blobs:
    """Draw the problem: class centres uniform in [-10, 10]^2, points N(centre, std^2) around them.

    The few training points and the overlap leave a network of one training run uncertain, which is what averaging
    is for. The classes of the whole draw are balanced to within one point.

    Args:
        seed: Decides centres, points and splits.
        num_train: Training points, at least 1.
        num_val: Validation points, at least 1.
        num_test: Test points, at least 1.
        num_classes: K, at least 2.
        std: Standard deviation of a cloud in both directions, above 0.

    Raises:
        UserError: A split without points, fewer than two classes, or a deviation that is not above 0.
    """
    counts = (num_train, num_val, num_test)
    if min(counts) < 1:
        raise UserError(f"Splits of {counts} points were asked for.", "Give each split at least 1 point.")
    if num_classes < 2:
        raise UserError(f"{num_classes} classes were asked for.", "Ask for 2 or more.")
    if not std > 0.0:
        raise UserError(f"The clouds have a standard deviation of {std}.", "Give a number above 0.")
    points, labels = make_blobs(
        n_samples=sum(counts), n_features=2, centers=num_classes, cluster_std=std, random_state=seed
    )
    # make_blobs shuffles, so that consecutive points make a random split.
    bounds = np.cumsum((0, *counts))

    def between(start: int, end: int) -> LabelledPoints:
        return points[start:end].astype(np.float32), labels[start:end].astype(np.int64)

    train, val, test = (between(start, end) for start, end in pairwise(bounds))
    return Blobs(train=train, val=val, test=test)
