"""How differently the members of an ensemble predict, and what the difference is worth.

Legend: M members, N images, K classes. Divergences and entropies are in nats unless [0, 1] is said. A
value over pairs of members is that of distinct members; one member alone counts as two copies of
itself, so its disagreement and distance are 0. All members count equally here, whatever their
combining weights, except in `mutual_information`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dnas_ens.metrics.scores import PROB_FLOOR, check_labels, check_probs, evaluate_probs
from dnas_ens.types import FloatArray, IntArray


def normalise_weights(weights: npt.ArrayLike | None, num_members: int) -> FloatArray:
    """Combining weights that sum to 1.

    Args:
        weights: Non-negative numbers, shape (M,); None for equal weights.
        num_members: M.

    Returns:
        Weights in float64, shape (M,), range [0, 1], sum 1.

    Raises:
        ValueError: Wrong shape, a negative value, a value that is not finite, or nothing but zeros.
    """
    if weights is None:
        return np.full(num_members, 1.0 / num_members)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (num_members,):
        raise ValueError(f"weights must have shape ({num_members},), one a member, got {array.shape}")
    if not np.isfinite(array).all() or array.min() < 0.0 or array.max() == 0.0:
        raise ValueError(f"weights must be finite, non-negative and not all 0, got {array.tolist()}")
    scaled = array / array.max()  # a sum of huge weights would overflow
    normalised: FloatArray = scaled / scaled.sum()
    return normalised


def entropy(probs: npt.ArrayLike) -> FloatArray:
    """Shannon entropy over the last axis, -sum_k p_k ln p_k with 0 ln 0 = 0.

    Args:
        probs: Class probabilities, shape (..., K), range [0, 1].

    Returns:
        Entropy in nats, shape (...), range [0, ln K].
    """
    array = np.asarray(probs, dtype=np.float64)
    result: FloatArray = -(array * np.log(np.where(array > 0.0, array, 1.0))).sum(axis=-1) + 0.0
    return result


def _mean_over_pairs(matrix: FloatArray) -> float:
    """Mean over distinct pairs of a symmetric (M, M) matrix; of its one entry where M = 1."""
    num_members = len(matrix)
    if num_members == 1:
        return float(matrix[0, 0])
    return float(matrix[np.triu_indices(num_members, k=1)].mean())


def _errors(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return which member errs on which image, shape (M, N)."""
    members, classes = _check_members(member_probs, labels)
    errors: npt.NDArray[np.bool_] = members.argmax(axis=2) != classes
    return errors


def _check_members(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[FloatArray, IntArray]:
    """Validate members' probabilities (M, N, K) together with their labels (N,)."""
    members = check_probs(member_probs, num_dims=3)
    return members, check_labels(labels, num_images=members.shape[1], num_classes=members.shape[2])


def pairwise_disagreement(member_probs: npt.ArrayLike) -> FloatArray:
    """Share of images on which two members' most probable classes differ (arXiv 1912.02757).

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].

    Returns:
        Symmetric matrix, shape (M, M), range [0, 1], zero diagonal.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs`.
    """
    votes = check_probs(member_probs, num_dims=3).argmax(axis=2)
    return np.stack([(votes != vote).mean(axis=1) for vote in votes])


def mean_disagreement(member_probs: npt.ArrayLike) -> float:
    """Mean of `pairwise_disagreement` over distinct pairs.

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].

    Returns:
        Share of images in [0, 1]; 0 for one member.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs`.
    """
    return _mean_over_pairs(pairwise_disagreement(member_probs))


def predictive_js(member_probs: npt.ArrayLike) -> FloatArray:
    """Jensen-Shannon distance of two members' predictions, averaged over images.

    1/N sum_n sqrt(JSD(p_n, q_n) / ln 2) with JSD(p, q) = H((p + q)/2) - (H(p) + H(q))/2; the square
    root is a metric (Endres and Schindelin, IEEE Transactions on Information Theory 49, 2003).

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].

    Returns:
        Symmetric matrix, shape (M, M), range [0, 1], zero diagonal.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs`.
    """
    members = check_probs(member_probs, num_dims=3)
    entropies = entropy(members)
    distances = np.zeros((len(members), len(members)))
    for i in range(len(members)):
        for j in range(i):
            divergence = entropy((members[i] + members[j]) / 2.0) - (entropies[i] + entropies[j]) / 2.0
            # The sums of rounded probabilities can leave [0, ln 2] by the last places.
            distance = np.sqrt(np.clip(divergence / math.log(2.0), 0.0, 1.0)).mean()
            distances[i, j] = distances[j, i] = distance
    return distances


def mean_predictive_js(member_probs: npt.ArrayLike) -> float:
    """Mean of `predictive_js` over distinct pairs.

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].

    Returns:
        Jensen-Shannon distance in [0, 1]; 0 for one member.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs`.
    """
    return _mean_over_pairs(predictive_js(member_probs))


def pairwise_shared_errors(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> FloatArray:
    """Share of the better member's errors that the other member repeats, for every pair.

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        Symmetric matrix, shape (M, M), range [0, 1]; the diagonal is 1 for a member that errs at all, else 0.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    errors = _errors(member_probs, labels).astype(np.float64)
    shared = errors @ errors.T
    num_errors = errors.sum(axis=1)
    fewest = np.minimum(num_errors[:, None], num_errors[None, :])
    shares: FloatArray = shared / np.maximum(fewest, 1.0)
    return shares


def shared_error_fraction(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean of `pairwise_shared_errors` over distinct pairs.

    Unlike disagreement it does not grow merely because members err more. A pair whose better member
    makes no error counts 0: there is no error that both make.

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        Share in [0, 1]; for one member 1 if it errs at all, else 0.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    return _mean_over_pairs(pairwise_shared_errors(member_probs, labels))


def mutual_information(member_probs: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> FloatArray:
    """Mutual information between the prediction and the member, H(sum_m w_m p_m) - sum_m w_m H(p_m).

    The part of the predictive entropy that comes from the members' differences (Houlsby et al., arXiv
    1112.5745), high on images unlike the training data.

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].
        weights: Combining weights, shape (M,), non-negative; None for equal weights.

    Returns:
        Nats per image, shape (N,), range [0, min(ln M, ln K)].

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `normalise_weights`.
    """
    members = check_probs(member_probs, num_dims=3)
    shares = normalise_weights(weights, len(members))
    information = entropy(np.tensordot(shares, members, axes=1)) - shares @ entropy(members)
    return np.maximum(information, 0.0)


def _label_nll(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> FloatArray:
    """Return -ln p of the label, nats, shape (M, N)."""
    members, classes = _check_members(member_probs, labels)
    of_labels = members[:, np.arange(len(classes)), classes]
    return -np.log(np.clip(of_labels, PROB_FLOOR, 1.0)) + 0.0


def average_member_nll(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean over members of their own NLL, an upper bound of the NLL of their average (Jensen).

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        Nats, in [0, 27.7].

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    return float(_label_nll(member_probs, labels).mean())


def oracle_nll(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """NLL if the best member were known for every image, 1/N sum_n min_m -ln p_mn[y_n].

    Low where members complement each other (neural ensemble search, arXiv 2006.08573).

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        Nats, in [0, 27.7], never above the NLL of the members' average.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    return float(_label_nll(member_probs, labels).min(axis=0).mean())


def evaluate_members(
    member_probs: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> dict[str, float]:
    """Metrics of the averaged probabilities together with the members' diversity.

    Args:
        member_probs: Members' class probabilities, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.
        weights: Combining weights, shape (M,), non-negative; None for equal weights.

    Returns:
        ``accuracy``, ``nll``, ``brier``, ``ece15`` of the average; ``disagreement``,
        ``predictive_js``, ``shared_error_fraction`` in [0, 1] over pairs; ``mutual_information``,
        ``average_member_nll``, ``oracle_nll`` in nats.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs`, `check_labels`, `normalise_weights`.
    """
    members, classes = _check_members(member_probs, labels)
    shares = normalise_weights(weights, len(members))
    return {
        **evaluate_probs(np.tensordot(shares, members, axes=1), classes),
        "disagreement": mean_disagreement(members),
        "predictive_js": mean_predictive_js(members),
        "shared_error_fraction": shared_error_fraction(members, classes),
        "mutual_information": float(mutual_information(members, shares).mean()),
        "average_member_nll": average_member_nll(members, classes),
        "oracle_nll": oracle_nll(members, classes),
    }
