"""Where solutions lie in weight space and in function space (Fort, Hu and Lakshminarayanan, arXiv 1912.02757).

Weights are compared by their cosine, within one architecture; predictions by the share of images on which two most
probable classes differ, which any two classifiers have. Legend: M solutions or checkpoints, N images, K classes,
P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from dnas_ens.ensembles.averaging import State, check_same_architecture
from dnas_ens.errors import UserError
from dnas_ens.metrics.diversity import pairwise_disagreement
from dnas_ens.metrics.scores import check_probs
from dnas_ens.types import FloatArray
from studies.loss_landscape.diversity_accuracy import accuracies_of, independent_disagreement


class ArchitectureMismatchError(UserError):
    """Weights of different architectures were to be compared, which have no common coordinates."""


# Weight space


def weight_cosines(
    model: nn.Module, states: Sequence[State | nn.Module], *, names: Sequence[str] | None = None
) -> FloatArray:
    """Cosine of the angle between solutions' flattened parameters, w_i . w_j / (|w_i| |w_j|).

    Parameters alone count, not buffers such as BatchNorm's running statistics.

    Args:
        model: A module of the architecture, which says what of a state is a parameter; it is left as it is.
        states: M modules or states of that architecture. Modules tell genotypes apart, states their tensors alone.
        names: What an error calls them; None for "Solution 0", "Solution 1" and so on.

    Returns:
        Symmetric matrix, shape (M, M), range [-1, 1], diagonal 1; 0 beside a solution whose weights are all 0.

    Raises:
        ArchitectureMismatchError: A state is of another architecture than the module.
        UserError: There are no states.
    """
    if not states:
        raise UserError("There are no weights to compare.", "Give at least one state or module.")
    names = [f"Solution {index}" for index in range(len(states))] if names is None else names
    try:
        found = check_same_architecture([model, *states], ["The given module", *names])[1:]
    except UserError as error:
        raise ArchitectureMismatchError(
            error.cause, "Compare the weights of one architecture; compare others by their predictions."
        ) from error
    trained = [name for name, _ in model.named_parameters()]
    vectors = np.stack(
        [
            np.concatenate([state[name].detach().double().cpu().numpy().ravel() for name in trained])
            for state in found
        ]
    )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(lengths > 0.0, lengths, 1.0)
    cosines: FloatArray = np.clip(vectors @ vectors.T, -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


# Function space


def normalised_disagreement(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> FloatArray:
    """Disagreement of two solutions over the mean of their error rates, d_ij / ((e_i + e_j) / 2).

    Two solutions can only disagree where one of them errs, so d grows with the errors; the paper divides by
    1 - accuracy for that. Its measure is towards a base, see `studies.loss_landscape.diversity_accuracy`; this one is
    symmetric. It is about 2 where errors are few and independent of each other.

    Args:
        member_probs: Class probabilities, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        Symmetric matrix, shape (M, M), range [0, 2], zero diagonal; 0 where neither errs.
    """
    members = check_probs(member_probs, num_dims=3)
    errors = 1.0 - accuracies_of(members, labels)
    return _disagreement_over(members, (errors[:, None] + errors[None, :]) / 2.0)


def share_of_independent(member_probs: npt.ArrayLike, labels: npt.ArrayLike) -> FloatArray:
    """Disagreement of two solutions over that of two whose errors are independent, at their accuracies.

    d_ij over `studies.loss_landscape.diversity_accuracy.independent_disagreement` at a_i, a_j and K: a second way to
    compare pairs of unequal accuracy. Arguments as in `normalised_disagreement`.

    Returns:
        Symmetric matrix, shape (M, M), 0 or more, zero diagonal; 1 for independent errors, 0 where neither errs.
    """
    members = check_probs(member_probs, num_dims=3)
    accuracies = accuracies_of(members, labels)
    independent = independent_disagreement(accuracies[:, None], accuracies[None, :], members.shape[2])
    return _disagreement_over(members, independent)


def _disagreement_over(members: FloatArray, scale: FloatArray) -> FloatArray:
    disagreement = pairwise_disagreement(members)
    return np.divide(disagreement, scale, out=np.zeros_like(disagreement), where=scale > 0.0)


def embed_predictions(member_probs: npt.ArrayLike, *, seed: int = 0) -> FloatArray:
    """Embed solutions into the plane by t-SNE of their probabilities (van der Maaten and Hinton, JMLR 9, 2008).

    Each solution is one point with N K coordinates, as in arXiv 1912.02757; scikit-learn computes it, from the
    first two principal components on. Distances between clusters mean little.

    Args:
        member_probs: Class probabilities, shape (M, N, K), range [0, 1], M of 4 or more.
        seed: Of the embedding.

    Returns:
        Shape (M, 2), no unit.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs`; or fewer than 4 solutions.
    """
    from sklearn.manifold import TSNE

    members = check_probs(member_probs, num_dims=3)
    if len(members) < 4:
        raise ValueError(f"an embedding needs 4 solutions or more, got {len(members)}")
    # Fewer neighbours than a trajectory has checkpoints, or all points become one ball.
    perplexity = min(15.0, (len(members) - 1) / 3.0)
    points: FloatArray = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        members.reshape(len(members), -1)
    )
    return points.astype(np.float64)
