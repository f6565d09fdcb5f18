"""Which candidates to put into an ensemble, by the NLL of their averaged probabilities.

Legend: M candidates, N images, K classes. Only the probability of the right class enters the NLL, so
both algorithms work on an (M, N) matrix, whatever K is.
"""

from __future__ import annotations

import math
from itertools import combinations, combinations_with_replacement

import numpy as np
import numpy.typing as npt

from dnas_ens.analysis.metrics import PROB_FLOOR, FloatArray, check_labels, check_probs
from dnas_ens.errors import UserError

MAX_COMBINATIONS = 1_000_000


def _label_probs(
    member_probs: npt.ArrayLike, labels: npt.ArrayLike, num_members: int, replacement: bool
) -> FloatArray:
    """Validate and return every candidate's probability of the right class, shape (M, N)."""
    members = check_probs(member_probs, num_dims=3)
    classes = check_labels(labels, num_images=members.shape[1], num_classes=members.shape[2])
    if num_members < 1:
        raise UserError(f"An ensemble of {num_members} members was asked for.", "Ask for 1 or more.")
    if num_members > len(members) and not replacement:
        raise UserError(
            f"{num_members} members were asked for, but there are only {len(members)} candidates.",
            "Ask for fewer members, draw more candidates, or allow the same candidate several times.",
        )
    return np.ascontiguousarray(members[:, np.arange(len(classes)), classes])


def _nll(averaged: FloatArray) -> FloatArray:
    """NLL over the last axis of probabilities of the right class, nats."""
    result: FloatArray = -np.log(np.clip(averaged, PROB_FLOOR, 1.0)).mean(axis=-1)
    return result


def greedy_selection(
    member_probs: npt.ArrayLike, labels: npt.ArrayLike, *, num_members: int, replacement: bool = False
) -> list[int]:
    """Forward selection: always add the candidate that leaves the ensemble with the least NLL.

    Neural ensemble search (arXiv 2006.08573) picks without replacement; with it a candidate may be
    picked again, which weights it (Caruana et al., ICML 2004). The first pick is the single best
    candidate, a tie goes to the lowest index, and exactly ``num_members`` are picked even where a
    smaller ensemble had the lower NLL. A running sum makes one pick O(M N).

    Args:
        member_probs: Candidates' class probabilities on validation data, shape (M, N, K), [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.
        num_members: How many to pick, 1 or more.
        replacement: Whether a candidate may be picked several times.

    Returns:
        Indices of the candidates in the order they were picked, length ``num_members``.

    Raises:
        UserError: Fewer than one member, or more than there are candidates without replacement.
        ValueError: See `dnas_ens.analysis.metrics.check_probs` and `check_labels`.
    """
    candidates = _label_probs(member_probs, labels, num_members, replacement)
    total = np.zeros(candidates.shape[1])
    available = np.ones(len(candidates), dtype=np.bool_)
    picked: list[int] = []
    while len(picked) < num_members:
        scores = np.where(available, _nll((total + candidates) / (len(picked) + 1)), np.inf)
        best = int(scores.argmin())
        picked.append(best)
        total += candidates[best]
        available[best] = replacement
    return picked


def exhaustive_selection(
    member_probs: npt.ArrayLike, labels: npt.ArrayLike, *, num_members: int, replacement: bool = False
) -> list[int]:
    """Try every ensemble of the given size and return the one with the least NLL.

    Args:
        member_probs: Candidates' class probabilities on validation data, shape (M, N, K), [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.
        num_members: Size of the ensemble, 1 or more.
        replacement: Whether a candidate may be picked several times.

    Returns:
        Indices of the candidates in ascending order, length ``num_members``; a tie goes to the
        combination that comes first in lexicographic order.

    Raises:
        UserError: Fewer than one member, more than there are candidates without replacement, or more
            than a million combinations.
        ValueError: See `dnas_ens.analysis.metrics.check_probs` and `check_labels`.
    """
    candidates = _label_probs(member_probs, labels, num_members, replacement)
    num_candidates = len(candidates)
    distinct = num_candidates + num_members - 1 if replacement else num_candidates
    num_combinations = math.comb(distinct, num_members)
    if num_combinations > MAX_COMBINATIONS:
        raise UserError(
            f"{num_members} of {num_candidates} candidates make {num_combinations} combinations.",
            f"Use greedy selection; exhaustive selection tries at most {MAX_COMBINATIONS}.",
        )
    subsets = (combinations_with_replacement if replacement else combinations)(
        range(num_candidates), num_members
    )
    return list(min(subsets, key=lambda subset: float(_nll(candidates[list(subset)].mean(axis=0)))))
