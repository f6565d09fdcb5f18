"""Distances of solutions in weight space and in function space (Fort, Hu and Lakshminarayanan, arXiv 1912.02757).

Weights are compared by their cosine, within one architecture; predictions by the share of images on which two most
probable classes differ. In the diversity-accuracy plane that disagreement with a base solution stands over
1 - accuracy. The plane's curves are derived here: the paper's figure has a lower one, of predictions perturbed at
random, and an upper one, of independent errors; the bounds that no classifier can leave lie outside of both.

Legend: M solutions or checkpoints, N images, K classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from dnas_ens.metrics.diversity import pairwise_disagreement
from dnas_ens.metrics.significance import NUM_RESAMPLES
from dnas_ens.types import FloatArray

#: Differences of means below this are rounding.
_ROUNDING = 1e-12


def weight_cosines(model: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> FloatArray:
    """Cosine of the angle between solutions' flattened parameters, w_i . w_j / (|w_i| |w_j|).

    Parameters alone count, not buffers such as BatchNorm's running statistics.

    Args:
        model: A module of the architecture, which says what of a state is a parameter.
        states: M states of that architecture.

    Returns:
        Symmetric matrix, shape (M, M), range [-1, 1], diagonal 1; 0 beside a solution whose weights are all 0.
    """
    trained = [name for name, _ in model.named_parameters()]
    vectors = np.stack(
        [np.concatenate([state[name].detach().double().cpu().numpy().ravel() for name in trained]) for state in states]
    )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(lengths > 0.0, lengths, 1.0)
    cosines: FloatArray = np.clip(vectors @ vectors.T, -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


# Function space


def accuracies_of(member_probs: np.ndarray, labels: np.ndarray) -> FloatArray:
    """Share of images on which each solution's most probable class is the label: (M, N, K) and (N,) -> (M,)."""
    accuracies: FloatArray = (member_probs.argmax(axis=2) == labels).mean(axis=1)
    return accuracies


def normalised_disagreement(member_probs: np.ndarray, labels: np.ndarray) -> FloatArray:
    """Disagreement of two solutions over the mean of their error rates, d_ij / ((e_i + e_j) / 2).

    Two solutions can only disagree where one of them errs, so d grows with the errors; the paper divides by
    1 - accuracy for that, towards a base. This one is symmetric. It is about 2 where errors are few and independent
    of each other.

    Args:
        member_probs: Class probabilities, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        Symmetric matrix, shape (M, M), range [0, 2], zero diagonal; 0 where neither errs.
    """
    errors = 1.0 - accuracies_of(member_probs, labels)
    return _disagreement_over(member_probs, (errors[:, None] + errors[None, :]) / 2.0)


def share_of_independent(member_probs: np.ndarray, labels: np.ndarray) -> FloatArray:
    """Disagreement of two solutions over that of two whose errors are independent, at their accuracies.

    d_ij over `independent_disagreement` at a_i, a_j and K: a second way to compare pairs of unequal accuracy.
    Arguments as in `normalised_disagreement`.

    Returns:
        Symmetric matrix, shape (M, M), 0 or more, zero diagonal; 1 for independent errors, 0 where neither errs.
    """
    accuracies = accuracies_of(member_probs, labels)
    independent = independent_disagreement(accuracies[:, None], accuracies[None, :], member_probs.shape[2])
    return _disagreement_over(member_probs, independent)


def _disagreement_over(member_probs: np.ndarray, scale: FloatArray) -> FloatArray:
    disagreement = pairwise_disagreement(member_probs)
    return np.divide(disagreement, scale, out=np.zeros_like(disagreement), where=scale > 0.0)


def embed_predictions(member_probs: np.ndarray, *, seed: int = 0) -> FloatArray:
    """Embed solutions into the plane by t-SNE of their probabilities (van der Maaten and Hinton, JMLR 9, 2008).

    Each solution is one point with N K coordinates, as in arXiv 1912.02757; scikit-learn computes it, from the
    first two principal components on. Distances between clusters mean little.

    Args:
        member_probs: Class probabilities, shape (M, N, K), range [0, 1], M of 4 or more.
        seed: Of the embedding.

    Returns:
        Shape (M, 2), no unit.
    """
    from sklearn.manifold import TSNE

    # Fewer neighbours than a trajectory has checkpoints, or all points become one ball.
    perplexity = min(15.0, (len(member_probs) - 1) / 3.0)
    embedding = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    points: FloatArray = embedding.fit_transform(member_probs.reshape(len(member_probs), -1))
    return points.astype(np.float64)


# The diversity-accuracy plane


@dataclass(frozen=True, kw_only=True)
class DiversityAccuracy:
    """Solutions in the diversity-accuracy plane, beside a base.

    Args:
        accuracy: Of every solution, shape (M,), range [0, 1].
        diversity: Disagreement with the base over 1 - accuracy of the solution, shape (M,), 0 or more; NaN for a
            solution without errors.
        base_accuracy: Of the base, range [0, 1].
    """

    accuracy: FloatArray
    diversity: FloatArray
    base_accuracy: float


def diversity_accuracy_plane(base_probs: np.ndarray, member_probs: np.ndarray, labels: np.ndarray) -> DiversityAccuracy:
    """Place solutions (M, N, K) in the plane of accuracy and normalised disagreement with a base (N, K)."""
    disagreement = (member_probs.argmax(axis=2) != base_probs.argmax(axis=1)).mean(axis=1)
    accuracies = accuracies_of(member_probs, labels)
    errors, unknown = 1.0 - accuracies, np.full_like(accuracies, np.nan)
    return DiversityAccuracy(
        accuracy=accuracies,
        diversity=np.divide(disagreement, errors, out=unknown, where=errors > 0.0),
        base_accuracy=float(accuracies_of(base_probs[None], labels)[0]),
    )


def independent_disagreement(accuracy: npt.ArrayLike, base_accuracy: npt.ArrayLike, num_classes: int) -> FloatArray:
    """Disagreement of two classifiers whose errors are independent, the upper curve of the plane.

    Given the label, each is right with its own probability and otherwise gives one of the K - 1 wrong classes at
    random, so they agree with probability a a' + (1 - a) (1 - a') / (K - 1).

    Args:
        accuracy: a' of the solution, range [0, 1], any shape.
        base_accuracy: a of the base, range [0, 1], a shape that fits.
        num_classes: K, 2 or more.

    Returns:
        Disagreement in [0, 1], not normalised.
    """
    ours, base = np.asarray(accuracy, dtype=np.float64), np.asarray(base_accuracy, dtype=np.float64)
    disagreement: FloatArray = 1.0 - (ours * base + (1.0 - ours) * (1.0 - base) / (num_classes - 1))
    return np.clip(disagreement, 0.0, 1.0)


def perturbed_disagreement(accuracy: npt.ArrayLike, base_accuracy: float, num_classes: int) -> FloatArray:
    """Disagreement of a base with itself after random changes of its predictions, the lower curve of the plane.

    A share p of predictions is replaced by another class at random. Accuracy falls from a to
    a' = a - p (a K - 1) / (K - 1) while the disagreement is p, so p = (a - a') (K - 1) / (a K - 1). A solution on
    this curve differs from the base by noise and adds nothing to it.

    Args:
        accuracy: a' of the solution, any shape.
        base_accuracy: a of the base, above 1 / K.
        num_classes: K, 2 or more.

    Returns:
        Disagreement in [0, 1], not normalised; NaN where no p gives that accuracy.

    Raises:
        ValueError: The base is no better than chance.
    """
    if base_accuracy * num_classes <= 1.0:
        raise ValueError(f"a base of accuracy {base_accuracy:g} is no better than chance")
    ours = np.asarray(accuracy, dtype=np.float64)
    share = (base_accuracy - ours) * (num_classes - 1) / (base_accuracy * num_classes - 1.0)
    return np.where((share >= 0.0) & (share <= 1.0), share, np.nan)


def disagreement_bounds(accuracy: npt.ArrayLike, base_accuracy: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Least and largest disagreement that two accuracies allow, of more than two classes.

    The best case changes wrong answers only: |a - a'|. At most 2 - a - a', where no image is wrong for both (or
    every one where that exceeds 1). Arguments as in `independent_disagreement`.

    Returns:
        Both bounds in [0, 1], not normalised.
    """
    ours, base = np.asarray(accuracy, dtype=np.float64), np.asarray(base_accuracy, dtype=np.float64)
    return np.abs(ours - base), np.minimum(1.0, 2.0 - ours - base)


# Pairs within groups, such as seeds of one genotype, and between them


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
    matrix: np.ndarray, groups: Sequence[Hashable], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> PairContrast:
    """Compare pairs between groups with pairs within them, and permute members to judge the difference.

    The M (M - 1) / 2 pairs are not independent, because every member is in M - 1 of them; members are. If groups mean
    nothing, members could have been in any group: the difference of means is computed again with members put into
    groups at random, as in Mantel's test (Cancer Research 27, 1967), and
    p = (1 + number of random differences at least as large) / (1 + number drawn), without regard to sign.
    It is about the measured members and images; other groups of the same kind were not drawn.

    Args:
        matrix: The measure of every pair, symmetric, shape (M, M); the diagonal is not read.
        groups: The group of every member, M of them, with pairs within a group and between groups.
        num_resamples: Random groupings.
        seed: Decides them.
    """
    rows, columns = np.triu_indices(len(groups), k=1)
    names = list(dict.fromkeys(groups))
    codes = np.array([names.index(group) for group in groups])
    pairs = matrix[rows, columns]

    def means(of_members: npt.NDArray[np.intp]) -> tuple[float, float]:
        same = of_members[rows] == of_members[columns]
        return float(pairs[same].mean()), float(pairs[~same].mean())

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
    """Return in how many ways members can be put into groups of the given sizes; groups of equal size are alike."""
    count = math.factorial(sizes.total())
    for size in sizes.values():
        count //= math.factorial(size)
    for alike in Counter(sizes.values()).values():
        count //= math.factorial(alike)
    return count


def pair_values(matrix: np.ndarray, groups: Sequence[int]) -> tuple[FloatArray, FloatArray]:
    """Split a pairwise measure (M, M) into pairs within a group and the others, in the order of its upper triangle."""
    rows, columns = np.triu_indices(len(groups), k=1)
    of_members = np.asarray(groups)
    same = of_members[rows] == of_members[columns]
    return matrix[rows, columns][same], matrix[rows, columns][~same]
