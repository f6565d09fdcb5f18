"""Which candidates to put into an ensemble, by the NLL, calibrated NLL or accuracy of their averaged probabilities.

Legend: M candidates, N images, K classes, S averages. The NLL needs only the probability of the right class, so for
it both algorithms work on an (M, N) matrix, whatever K is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, combinations_with_replacement
from typing import Literal

import numpy as np
import numpy.typing as npt

from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import fit_temperature, tempered
from dnas_ens.metrics.scores import accuracy, check_predictions, label_losses, nll
from dnas_ens.types import FloatArray, IntArray

Criterion = Literal["nll", "calibrated_nll", "accuracy"]

MAX_COMBINATIONS = 1_000_000


def _candidates(
    member_probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    num_members: int,
    replacement: bool,
    criterion: Criterion,
    given: Sequence[int] = (),
) -> tuple[FloatArray, Callable[[FloatArray], FloatArray]]:
    """Check, and return what is averaged, (M, N) or (M, N, K), and the loss of many averages, (S, ...) -> (S,)."""
    members, classes = check_predictions(member_probs, labels, num_dims=3)
    if num_members < 1:
        raise UserError(f"An ensemble of {num_members} members was asked for.", "Ask for 1 or more.")
    if any(not 0 <= index < len(members) for index in given):
        raise ValueError(f"given must lie in 0..{len(members) - 1}, got {list(given)}")
    left = len(members) - len(set(given))
    if num_members > left and not replacement:
        raise UserError(
            f"{num_members} members were asked for, but there are only {left} candidates.",
            "Ask for fewer members, draw more candidates, or allow the same candidate several times.",
        )
    if criterion == "nll":
        return np.ascontiguousarray(members[:, np.arange(len(classes)), classes]), _nll
    averaged_loss(members[0], classes, criterion)  # refuses another criterion
    return members, lambda averages: np.array([averaged_loss(average, classes, criterion) for average in averages])


def averaged_loss(averaged: FloatArray, labels: IntArray, criterion: Criterion) -> float:
    """Return what selection minimises, of averaged probabilities (N, K) and labels (N,) that were checked.

    The criterion is "nll"; "calibrated_nll", the NLL after a temperature that is fitted on the same data; or
    "accuracy", the error rate with ties broken by the NLL (see `tie_broken_error`).

    Raises:
        UserError: Another criterion.
    """
    if criterion == "nll":
        return nll.of(averaged, labels)
    if criterion == "calibrated_nll":
        return nll.of(tempered(averaged, fit_temperature.of(averaged, labels)), labels)
    if criterion == "accuracy":
        error = tie_broken_error(nll.of(averaged, labels), accuracy.of(averaged, labels), len(labels))
        return float(error)
    raise UserError(f"The criterion is {criterion!r}.", 'Give "nll", "calibrated_nll" or "accuracy".')


def tie_broken_error(nll: npt.ArrayLike, accuracy: npt.ArrayLike, num_images: int) -> FloatArray:
    """Return 1 - accuracy + NLL / (28 N), of accuracies in [0, 1] and NLLs in nats of the same shape, over N images.

    An error rate moves in steps of 1/N and says nothing within a step; the second term stays below one step
    because an NLL does not exceed 27.7 nats.
    """
    errors = 1.0 - np.asarray(accuracy, dtype=np.float64)
    ranked: FloatArray = errors + np.asarray(nll, dtype=np.float64) / (28.0 * num_images)
    return ranked


def _nll(averaged: FloatArray) -> FloatArray:
    """NLL over the last axis of probabilities of the right class, nats."""
    result: FloatArray = label_losses(averaged).mean(axis=-1)
    return result


def greedy_selection(
    member_probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    num_members: int,
    replacement: bool = False,
    criterion: Criterion = "nll",
    given: Sequence[int] = (),
) -> list[int]:
    """Forward selection: always add the candidate that leaves the ensemble with the least loss.

    Neural ensemble search (arXiv 2006.08573) picks without replacement; with replacement a candidate may be picked
    again, which weights it (Caruana et al., ICML 2004). The first pick is the single best candidate, a tie goes to the
    lowest index, and exactly ``num_members`` are picked even where fewer had the lower loss. A running sum makes one
    pick O(M N) for the NLL and O(M N K) for another criterion.

    Args:
        member_probs: Candidates' class probabilities on validation data, shape (M, N, K), [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.
        num_members: How many to pick, 1 or more, beside those given.
        replacement: Whether a candidate may be picked several times.
        criterion: The loss of an average; see `averaged_loss`.
        given: Indices of candidates that are in the ensemble already, one named twice with twice the weight. They are
            picked again only with replacement.

    Returns:
        Indices of the candidates in the order they were picked, length ``num_members``, without those given.

    Raises:
        UserError: Another criterion, fewer than one member, or more than there are candidates without replacement.
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `check_labels`; or a given index is out of range.
    """
    candidates, losses = _candidates(member_probs, labels, num_members, replacement, criterion, given)
    total = candidates[list(given)].sum(axis=0)
    available = np.ones(len(candidates), dtype=np.bool_)
    available[list(given)] = replacement
    picked: list[int] = []
    while len(picked) < num_members:
        size = len(given) + len(picked) + 1
        scores = np.where(available, losses((total + candidates) / size), np.inf)
        best = int(scores.argmin())
        picked.append(best)
        total += candidates[best]
        available[best] = replacement
    return picked


def exhaustive_selection(
    member_probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    num_members: int,
    replacement: bool = False,
    criterion: Criterion = "nll",
) -> list[int]:
    """Try every ensemble of the given size and return the one with the least loss.

    Arguments and errors as for `greedy_selection`; UserError also for more than a million combinations. Returns the
    candidates in ascending order; a tie goes to the combination that comes first in lexicographic order.
    """
    candidates, losses = _candidates(member_probs, labels, num_members, replacement, criterion)
    num_candidates = len(candidates)
    distinct = num_candidates + num_members - 1 if replacement else num_candidates
    num_combinations = math.comb(distinct, num_members)
    if num_combinations > MAX_COMBINATIONS:
        raise UserError(
            f"{num_members} of {num_candidates} candidates make {num_combinations} combinations.",
            f"Use greedy selection; exhaustive selection tries at most {MAX_COMBINATIONS}.",
        )
    subsets = (combinations_with_replacement if replacement else combinations)(range(num_candidates), num_members)
    return list(min(subsets, key=lambda subset: float(losses(candidates[list(subset)].mean(axis=0)[None])[0])))
