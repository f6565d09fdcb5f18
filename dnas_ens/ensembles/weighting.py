"""Combining weights of members, from their probabilities on validation data alone.

Three ways over the simplex {w : w_m >= 0, sum_m w_m = 1}: log-loss by sequential quadratic programming
(snapshot ensembles, arXiv 1704.00109, and stacking, Wolpert 1992), differential evolution (Storn and Price,
Journal of Global Optimization 11, 1997), and the frequencies of greedy selection with replacement (Caruana
et al., ICML 2004). Networks run once, in `dnas_ens.training.prediction.predict_members`.

Legend: M members, N validation images, K classes, S weightings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, differential_evolution, minimize

from dnas_ens.ensembles import selection
from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import PROB_FLOOR, check_predictions, label_losses
from dnas_ens.types import FloatArray, IntArray

Criterion = Literal["nll", "accuracy"]

#: Numbers of averaged probabilities in memory at once during an evolution; 64 MiB.
_CHUNK = 2**23


@dataclass(frozen=True, kw_only=True)
class FittedWeights:
    """Weights of members and what they reach on the data that they were fitted on.

    Args:
        weights: Combining weights, shape (M,), range [0, 1], sum 1.
        val_nll: NLL of the weighted average on that data, nats.
        val_accuracy: Its accuracy on that data, in [0, 1].
        evaluations: How often the criterion was evaluated.
    """

    weights: FloatArray
    val_nll: float
    val_accuracy: float
    evaluations: int


def to_simplex(points: npt.ArrayLike) -> FloatArray:
    """Scale non-negative numbers (..., M) to sum 1 over the last axis; where all are 0 the result is uniform."""
    clipped = np.maximum(np.asarray(points, dtype=np.float64), 0.0)
    # The largest becomes 1 first: tiny numbers would lose their last places in the sum.
    largest = clipped.max(axis=-1, keepdims=True)
    scaled = np.where(largest > 0.0, clipped / np.where(largest > 0.0, largest, 1.0), 1.0)
    normalised: FloatArray = scaled / scaled.sum(axis=-1, keepdims=True)
    return normalised


def criterion_value(
    nll: npt.ArrayLike, accuracy: npt.ArrayLike, *, num_images: int, criterion: Criterion
) -> FloatArray:
    """Return what is minimised: the NLL for "nll", the error rate with ties broken by the NLL for "accuracy".

    Arguments as for `dnas_ens.ensembles.selection.tie_broken_error`; UserError for another criterion.
    """
    if criterion == "nll":
        return np.asarray(nll, dtype=np.float64)
    if criterion == "accuracy":
        return selection.tie_broken_error(nll, accuracy, num_images)
    raise UserError(f"The criterion is {criterion!r}.", 'Give "nll" or "accuracy".')


def log_loss_and_gradient(weights: npt.ArrayLike, label_probs: FloatArray) -> tuple[float, FloatArray]:
    """NLL of a weighted average and its gradient with respect to the weights.

    L(w) = -1/N sum_n ln max(sum_m w_m p_mn, 1e-12) with p_mn the probability that member m gives the label of
    image n, and dL/dw_m = -1/N sum_n p_mn / sum_j w_j p_jn, where an image at the floor contributes nothing.
    Above the floor L is convex in w.

    Args:
        weights: Combining weights, shape (M,).
        label_probs: Probabilities of the labels, shape (M, N), range [0, 1].

    Returns:
        L in nats, and its gradient, shape (M,).
    """
    averaged = np.asarray(weights, dtype=np.float64) @ label_probs
    above = averaged > PROB_FLOOR
    inverse = np.where(above, 1.0 / np.where(above, averaged, 1.0), 0.0)
    gradient: FloatArray = -(label_probs @ inverse) / label_probs.shape[1]
    return float(-np.log(np.maximum(averaged, PROB_FLOOR)).mean()), gradient


def fit_weights(
    val_probs: npt.ArrayLike, val_labels: npt.ArrayLike, *, random_starts: int = 4, seed: int = 0
) -> FittedWeights:
    """Find the weights with the least log-loss, by SLSQP from several starts (stacking, Wolpert 1992).

    The starts are the uniform weights, every member alone softened to 0.9 e_m + 0.1/M (the floor of the logarithm may
    hide the gradient at a vertex itself), and random Dirichlet(1) weights. The best of what they reach, the uniform
    weights and every member alone is returned, so on the fitted data the result is never worse than the latter. On
    the members' training data weights favour whoever overfits: fit on validation data only, and on other images than
    a temperature.

    Args:
        val_probs: Members' class probabilities on validation data, shape (M, N, K), range [0, 1].
        val_labels: Class indices, shape (N,), integers in 0..K-1.
        random_starts: How many random starts there are, 0 or more.
        seed: Of the random starts.

    Raises:
        UserError: A negative number of starts.
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    members, classes = check_predictions(val_probs, val_labels, num_dims=3)
    if random_starts < 0:
        raise UserError(f"{random_starts} random starts were asked for.", "Ask for 0 or more.")
    label_probs = _label_probs(members, classes)
    num_members = len(members)
    corners = _corners(num_members)
    softened = 0.9 * corners[1:] + 0.1 / num_members
    drawn = np.random.default_rng(seed).dirichlet(np.ones(num_members), size=random_starts)
    evaluations = len(corners)
    reached = []
    for start in [corners[0], *softened, *drawn] if num_members > 1 else []:
        found = minimize(
            log_loss_and_gradient,
            start,
            args=(label_probs,),
            jac=True,
            method="SLSQP",
            bounds=Bounds(np.zeros(num_members), np.ones(num_members)),
            constraints=LinearConstraint(np.ones((1, num_members)), 1.0, 1.0),
            options={"ftol": 1e-12, "maxiter": 500},
        )
        evaluations += int(found.nfev)
        if np.isfinite(found.x).all():
            reached.append(to_simplex(found.x))
    candidates = np.stack([*corners, *reached])
    losses = [log_loss_and_gradient(weights, label_probs)[0] for weights in candidates]
    return _fitted(candidates[int(np.argmin(losses))], members, classes, evaluations)


def evolve_weights(
    val_probs: npt.ArrayLike,
    val_labels: npt.ArrayLike,
    *,
    criterion: Criterion = "nll",
    population_size: int | None = None,
    generations: int = 200,
    polish: bool = False,
    seed: int = 0,
) -> FittedWeights:
    """Find weights by differential evolution (best1bin) over points of [0, 1]^M that are scaled to sum 1.

    A whole generation is scored by one matrix product. The first one holds the uniform weights, every member
    alone and random Dirichlet(1) weights, and the best point always survives, so the result is never worse by
    the criterion than uniform weights or the best single member. For the NLL, which is convex, `fit_weights`
    is exact and faster; accuracy is piecewise constant and has no gradient. Predictions as for `fit_weights`.

    Args:
        criterion: "nll", or "accuracy" with ties broken by the NLL.
        population_size: Points of a generation, at least M + 5; None for the larger of 30 and 10 M.
        generations: Generations after the first, 1 or more; fewer where the population has converged.
        polish: Whether scipy's L-BFGS-B continues from the best point.
        seed: Of the first generation and of the evolution.

    Raises:
        UserError: Another criterion, a population that is too small, or no generations.
        ValueError: See `fit_weights`.
    """
    members, classes = check_predictions(val_probs, val_labels, num_dims=3)
    num_members = len(members)
    size = max(30, 10 * num_members) if population_size is None else population_size
    if size < num_members + 5:
        raise UserError(
            f"A population of {size} is too small for {num_members} members.",
            f"Give {num_members + 5} or more.",
        )
    if generations < 1:
        raise UserError(f"{generations} generations were asked for.", "Ask for 1 or more.")
    generator = np.random.default_rng(seed)
    corners = _corners(num_members)
    drawn = generator.dirichlet(np.ones(num_members), size=size - len(corners))
    evaluations = 0
    best_value, best_weights = math.inf, corners[0]

    def values(points: FloatArray) -> FloatArray:
        """Score points (M, S), remembering the best: scipy's own rounding then cannot lose a start."""
        nonlocal evaluations, best_value, best_weights
        weights = to_simplex(points.reshape(num_members, -1).T)
        nlls, accuracies = _score(weights, members, classes)
        scores = criterion_value(nlls, accuracies, num_images=len(classes), criterion=criterion)
        evaluations += len(scores)
        leader = int(scores.argmin())
        if scores[leader] < best_value:
            best_value, best_weights = float(scores[leader]), weights[leader]
        return scores

    values(corners.T)
    if num_members > 1:
        differential_evolution(
            cast(Any, values),  # one value a point, where the stubs know only one value
            bounds=Bounds(np.zeros(num_members), np.ones(num_members)),
            init=np.concatenate([corners, drawn]),
            maxiter=generations,
            tol=1e-8,
            polish=polish,
            seed=generator,
            vectorized=True,
            updating="deferred",
        )
    return _fitted(best_weights, members, classes, evaluations)


def caruana_weights(
    val_probs: npt.ArrayLike,
    val_labels: npt.ArrayLike,
    *,
    num_picks: int = 50,
    criterion: selection.Criterion = "nll",
) -> FittedWeights:
    """Weight members by how often greedy selection with replacement picks them (Caruana et al., ICML 2004).

    Weights are multiples of one over the picks; a member that never helps gets none. The best number of picks
    up to ``num_picks``, 1 or more, is taken, so the result is never worse by the criterion than the best single
    member. Predictions as for `fit_weights`, the criterion as for `dnas_ens.ensembles.selection.averaged_loss`.

    Raises:
        UserError: No picks, or another criterion.
        ValueError: See `fit_weights`.
    """
    members, classes = check_predictions(val_probs, val_labels, num_dims=3)
    picks = selection.greedy_selection(members, classes, num_members=num_picks, replacement=True, criterion=criterion)
    prefixes = [np.bincount(picks[:end], minlength=len(members)) / end for end in range(1, len(picks) + 1)]
    losses = [
        selection.averaged_loss(np.tensordot(weights, members, axes=1), classes, criterion) for weights in prefixes
    ]
    # Each pick compares all M members.
    return _fitted(prefixes[int(np.argmin(losses))], members, classes, num_picks * len(members))


def _label_probs(members: FloatArray, classes: IntArray) -> FloatArray:
    """Return every member's probability of the label, shape (M, N)."""
    # Rounded probabilities may exceed 1 in the last place, where the metric clips them.
    return np.minimum(members[:, np.arange(len(classes)), classes], 1.0)


def _corners(num_members: int) -> FloatArray:
    """Return the uniform weights and every member alone, shape (1 + M, M)."""
    return np.concatenate([np.full((1, num_members), 1.0 / num_members), np.eye(num_members)])


def _score(weights: FloatArray, members: FloatArray, classes: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return NLL and accuracy of many weightings (S, M), each of shape (S,)."""
    num_members, num_images, num_classes = members.shape
    losses = label_losses(weights @ _label_probs(members, classes))
    hits = np.zeros(len(weights))
    step = max(1, _CHUNK // (len(weights) * num_classes))
    for start in range(0, num_images, step):
        part = members[:, start : start + step]
        probs = weights @ part.reshape(num_members, -1)
        predicted = probs.reshape(len(weights), -1, num_classes).argmax(axis=2)
        hits += (predicted == classes[start : start + step]).sum(axis=1)
    return losses.mean(axis=1), hits / num_images


def _fitted(weights: FloatArray, members: FloatArray, classes: IntArray, evaluations: int) -> FittedWeights:
    nlls, accuracies = _score(weights[None], members, classes)
    return FittedWeights(
        weights=weights,
        val_nll=float(nlls[0]),
        val_accuracy=float(accuracies[0]),
        evaluations=evaluations,
    )
