"""Whether members of different groups lie further apart than members of one group, such as genotypes and seeds.

Legend: M members in G groups.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dnas_ens.metrics.significance import NUM_RESAMPLES
from dnas_ens.types import FloatArray

#: Differences of means below this are rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class PairContrast:
    """A pairwise measure within groups and between them.

    Args:
        within: Mean over pairs of members of one group.
        between: Mean over pairs of members of different groups.
        p_value: Of a permutation of members over groups, two-sided, in (0, 1].
        num_groupings: Ways to put the members into unnamed groups of these sizes; no p-value can be below about
            its inverse.
    """

    within: float
    between: float
    p_value: float
    num_groupings: int

    @property
    def difference(self) -> float:
        """Between minus within, in the unit of the measure."""
        return self.between - self.within


def contrast_pairs(
    matrix: npt.ArrayLike, groups: Sequence[Hashable], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> PairContrast:
    """Compare pairs between groups with pairs within them, and permute members to judge the difference.

    The M (M - 1) / 2 pairs are not independent, for every member is in M - 1 of them; members are. If groups mean
    nothing, members could have stood in any group: the difference of means is computed again with members put into
    groups at random, as in Mantel's test (Cancer Research 27, 1967), and
    p = (1 + number of random differences at least as large) / (1 + number drawn), without regard to sign.
    It is about the measured members and images; other groups of the same kind were not drawn.

    Args:
        matrix: The measure of every pair, symmetric, shape (M, M); the diagonal is not read.
        groups: The group of every member, M of them.
        num_resamples: Random groupings.
        seed: Decides them.

    Returns:
        Both means, and the p-value.

    Raises:
        ValueError: Shapes that do not fit, a matrix that is not symmetric and finite, or no pair of a kind.
    """
    values = np.asarray(matrix, dtype=np.float64)
    num_members = len(groups)
    if values.shape != (num_members, num_members):
        raise ValueError(f"{num_members} members need a matrix of that side, got {values.shape}")
    rows, columns = np.triu_indices(num_members, k=1)
    if not (np.isfinite(values[rows, columns]).all() and np.allclose(values, values.T, equal_nan=True)):
        raise ValueError("the measure of pairs must be symmetric and finite")
    names = list(dict.fromkeys(groups))
    codes = np.array([names.index(group) for group in groups])
    pairs = values[rows, columns]

    def means(of_members: npt.NDArray[np.intp]) -> tuple[float, float]:
        same = of_members[rows] == of_members[columns]
        return float(pairs[same].mean()), float(pairs[~same].mean())

    same = codes[rows] == codes[columns]
    if same.all() or not same.any():
        raise ValueError("there must be pairs within a group and pairs between groups")
    within, between = means(codes)
    generator = np.random.default_rng(seed)
    drawn = np.array([np.subtract(*means(generator.permutation(codes))) for _ in range(num_resamples)])
    as_large = np.abs(drawn) >= abs(between - within) - _ROUNDING
    return PairContrast(
        within=within,
        between=between,
        p_value=float((1 + as_large.sum()) / (1 + num_resamples)),
        num_groupings=_count_groupings(Counter(codes.tolist())),
    )


def _count_groupings(sizes: Counter[int]) -> int:
    """Return in how many ways members fall into groups of the given sizes, groups of a size being alike."""
    count = math.factorial(sizes.total())
    for size in sizes.values():
        count //= math.factorial(size)
    for alike in Counter(sizes.values()).values():
        count //= math.factorial(alike)
    return count


def pair_values(matrix: npt.ArrayLike, groups: Sequence[Hashable]) -> tuple[FloatArray, FloatArray]:
    """Split a pairwise measure into pairs within groups and pairs between them, for a plot.

    Args:
        matrix: The measure of every pair, shape (M, M).
        groups: The group of every member, M of them.

    Returns:
        Values of the pairs within a group and of the others, in the order of the matrix's upper triangle.
    """
    values = np.asarray(matrix, dtype=np.float64)
    rows, columns = np.triu_indices(len(groups), k=1)
    same = np.array(
        [groups[int(row)] == groups[int(column)] for row, column in zip(rows, columns, strict=True)]
    )
    return values[rows, columns][same], values[rows, columns][~same]
