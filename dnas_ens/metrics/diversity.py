"""How differently the members of an ensemble predict, and how much that helps.

Legend: M members, N images, K classes. Members' class probabilities have shape (M, N, K) and range [0, 1], labels are
class indices, shape (N,), integers in 0..K-1; both are checked, and a ValueError says what does not fit (see
`dnas_ens.metrics.scores.check_predictions`). Divergences and entropies are in nats unless [0, 1] is said. A
value over pairs is over pairs of distinct members; one member alone counts as two copies of
itself, so its disagreement and distance are 0. All members count equally, not by their
combining weights, except in `mutual_information`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dnas_ens.metrics.scores import check_predictions, check_probs, evaluate_probs, label_losses
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
    """Shannon entropy of probabilities (..., K), -sum_k p_k ln p_k with 0 ln 0 = 0: nats, shape (...), in [0, ln K]."""
    array = np.asarray(probs, dtype=np.float64)
    result: FloatArray = -(array * np.log(np.where(array > 0.0, array, 1.0))).sum(axis=-1) + 0.0
    return result


def pairwise_disagreement(member_probs: npt.ArrayLike) -> FloatArray:
    """Share of images on which two members' most probable classes differ (arXiv 1912.02757).

    A symmetric matrix, shape (M, M), range [0, 1], zero diagonal.
    """
    return _disagreement(check_probs(member_probs, num_dims=3))


def predictive_js(member_probs: npt.ArrayLike) -> FloatArray:
    """Jensen-Shannon distance of two members' predictions, averaged over images.

    1/N sum_n sqrt(JSD(p_n, q_n) / ln 2) with JSD(p, q) = H((p + q)/2) - (H(p) + H(q))/2; the square
    root is a metric (Endres and Schindelin, IEEE Transactions on Information Theory 49, 2003). A symmetric
    matrix, shape (M, M), range [0, 1], zero diagonal.
    """
    return _jensen_shannon(check_probs(member_probs, num_dims=3))


def pairwise_shared_errors(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> FloatArray:
    """Share of the better member's errors that the other member repeats, for every pair.

    Unlike disagreement it does not grow merely because members err more. A pair whose better member makes no error
    counts 0: there is no error that both make. A symmetric matrix, shape (M, M), range [0, 1]; the diagonal is 1 for
    a member that errs at all, else 0.
    """
    return _shared_errors(*check_predictions(member_probs, labels, num_dims=3))


def mutual_information(member_probs: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> FloatArray:
    """Mutual information between the prediction and the member, H(sum_m w_m p_m) - sum_m w_m H(p_m).

    The part of the predictive entropy that comes from the members' differences (Houlsby et al., arXiv
    1112.5745), high on images unlike the training data.

    Args:
        weights: Combining weights; see `normalise_weights`.

    Returns:
        Nats per image, shape (N,), range [0, min(ln M, ln K)].
    """
    members = check_probs(member_probs, num_dims=3)
    return _information(members, normalise_weights(weights, len(members)))


def evaluate_members(
    member_probs: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> dict[str, float]:
    """Metrics of the averaged probabilities together with the members' diversity.

    Args:
        weights: Combining weights; see `normalise_weights`.

    Returns:
        ``accuracy``, ``nll``, ``brier``, ``ece15`` of the average; ``disagreement``, ``predictive_js`` and
        ``shared_error_fraction`` in [0, 1], means over distinct pairs (see `pairwise_disagreement`, `predictive_js`,
        `pairwise_shared_errors`); the mean ``mutual_information`` in nats; ``average_member_nll``, the mean of the
        members' own NLL, an upper bound of the average's (Jensen); and ``oracle_nll``, that of the best member for
        every image, 1/N sum_n min_m -ln p_mn[y_n], low where members complement each other (arXiv 2006.08573).
    """
    members, classes = check_predictions(member_probs, labels, num_dims=3)
    shares = normalise_weights(weights, len(members))
    of_labels = members[:, np.arange(len(classes)), classes]
    losses = label_losses(of_labels)
    return {
        **evaluate_probs.of(np.tensordot(shares, members, axes=1), classes),
        "disagreement": _mean_over_pairs(_disagreement(members)),
        "predictive_js": _mean_over_pairs(_jensen_shannon(members)),
        "shared_error_fraction": _mean_over_pairs(_shared_errors(members, classes)),
        "mutual_information": float(_information(members, shares).mean()),
        "average_member_nll": float(losses.mean()),
        "oracle_nll": float(losses.min(axis=0).mean()),
    }


def _mean_over_pairs(matrix: FloatArray) -> float:
    """Mean over distinct pairs of a symmetric (M, M) matrix; its one entry where M = 1."""
    if len(matrix) == 1:
        return float(matrix[0, 0])
    return float(matrix[np.triu_indices(len(matrix), k=1)].mean())


def _disagreement(members: FloatArray) -> FloatArray:
    votes = members.argmax(axis=2)
    return np.stack([(votes != vote).mean(axis=1) for vote in votes])


def _jensen_shannon(members: FloatArray) -> FloatArray:
    entropies = entropy(members)
    distances = np.zeros((len(members), len(members)))
    for i in range(len(members)):
        for j in range(i):
            divergence = entropy((members[i] + members[j]) / 2.0) - (entropies[i] + entropies[j]) / 2.0
            # The sums of rounded probabilities can leave [0, ln 2] by the last places.
            distance = np.sqrt(np.clip(divergence / math.log(2.0), 0.0, 1.0)).mean()
            distances[i, j] = distances[j, i] = distance
    return distances


def _shared_errors(members: FloatArray, labels: IntArray) -> FloatArray:
    errors = (members.argmax(axis=2) != labels).astype(np.float64)
    num_errors = errors.sum(axis=1)
    fewest = np.minimum(num_errors[:, None], num_errors[None, :])
    shares: FloatArray = errors @ errors.T / np.maximum(fewest, 1.0)
    return shares


def _information(members: FloatArray, shares: FloatArray) -> FloatArray:
    information = entropy(np.tensordot(shares, members, axes=1)) - shares @ entropy(members)
    return np.maximum(information, 0.0)
