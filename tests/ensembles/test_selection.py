"""Greedy and exhaustive selection, traced by hand and against a naive implementation."""

import math
from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from dnas_ens.ensembles.selection import exhaustive_selection, greedy_selection
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import calibrated_nll, fit_temperature
from dnas_ens.metrics.scores import accuracy, nll


def draw(seed, num_members, num_images=20):
    generator = np.random.default_rng(seed)
    members = generator.dirichlet(np.ones(3), size=(num_members, num_images))
    return members, generator.integers(3, size=num_images)


def ensemble_nll(members, labels, subset):
    return log_loss(labels, np.mean([members[index] for index in subset], axis=0), labels=range(3))


def binary(*label_probs):
    """Candidates by their probability of class 0 on each image, shape (M, N, 2)."""
    of_label = np.array(label_probs)
    return np.stack([of_label, 1.0 - of_label], axis=2)


def test_greedy_selection_by_hand():
    # -ln of the product over both images ranks ensembles: the larger the product of averages, the better.
    # A (0.9, 0.3) 0.27, B (0.8, 0.3) 0.24, C (0.2, 0.9) 0.18, D (0.5, 0.5) 0.25: A is picked first.
    # With A: B (0.85, 0.30) 0.255, C (0.55, 0.60) 0.33, D (0.7, 0.4) 0.28: C is picked second.
    # With A, C: B (1.9, 1.5)/3 0.3167, D (1.6, 1.7)/3 0.3022; with replacement A (2.0, 1.5)/3 0.3333.
    traced = binary([0.9, 0.3], [0.8, 0.3], [0.2, 0.9], [0.5, 0.5])
    assert greedy_selection(traced, [0, 0], num_members=4) == [0, 2, 1, 3]
    assert greedy_selection(traced, [0, 0], num_members=3, replacement=True) == [0, 2, 0]
    # A tie goes to the lowest index.
    members = binary([0.4, 0.4], [0.6, 0.6], [0.6, 0.6], [0.6, 0.6])
    assert greedy_selection(members, [0, 0], num_members=3) == [1, 2, 3]
    assert exhaustive_selection(members, [0, 0], num_members=2) == [1, 2]
    # A candidate that is certain and wrong is survived.
    assert greedy_selection(binary([0.0, 0.0], [0.5, 0.5]), [0, 0], num_members=2) == [1, 0]


@given(st.integers(0, 10_000), st.integers(1, 6), st.data())
def test_exhaustive_is_never_worse_and_both_are_subsets(seed, num_members, data):
    members, labels = draw(seed, num_members, num_images=5)
    size = data.draw(st.integers(1, num_members))
    greedy = greedy_selection(members, labels, num_members=size)
    exhaustive = exhaustive_selection(members, labels, num_members=size)
    assert len(set(greedy)) == len(set(exhaustive)) == size
    assert set(greedy) | set(exhaustive) <= set(range(num_members))
    assert ensemble_nll(members, labels, exhaustive) <= ensemble_nll(members, labels, greedy) + 1e-12


def criterion_loss(criterion, probs, labels):
    if criterion == "accuracy":
        return (-accuracy(probs, labels), nll(probs, labels))
    if criterion == "calibrated_nll":
        return calibrated_nll(probs, labels, fit_temperature(probs, labels))
    return log_loss(labels, probs, labels=range(3))


@pytest.mark.parametrize("criterion", ["nll", "accuracy", "calibrated_nll"])
@pytest.mark.parametrize(("replacement", "start"), [(False, []), (True, []), (False, [4]), (True, [2, 5, 2])])
def test_every_criterion_against_naive_loops(criterion, replacement, start):
    generator = np.random.default_rng(int(replacement))
    labels = generator.integers(3, size=40)
    certain = generator.uniform(0, 0.5, size=(6, 40, 1))
    probs = (1 - certain) * generator.dirichlet(np.ones(3), size=(6, 40)) + certain * np.eye(3)[labels]
    picked = list(start)
    for _ in range(4):
        rest = [index for index in range(6) if replacement or index not in picked]
        picked.append(min(rest, key=lambda i: criterion_loss(criterion, probs[[*picked, i]].mean(axis=0), labels)))
    options = {"replacement": replacement, "criterion": criterion}
    assert [*start, *greedy_selection(probs, labels, num_members=4, given=start, **options)] == picked
    if not start:
        subsets = (combinations_with_replacement if replacement else combinations)(range(6), 3)
        best = min(subsets, key=lambda s: criterion_loss(criterion, probs[list(s)].mean(axis=0), labels))
        assert exhaustive_selection(probs, labels, num_members=3, **options) == list(best)


def test_what_cannot_be_selected():
    members, labels = draw(0, num_members=4)
    assert len(greedy_selection(members, labels, num_members=2, given=[0, 3, 0])) == 2
    with pytest.raises(UserError, match="only 2 candidates"):
        greedy_selection(members, labels, num_members=3, given=[0, 3])
    with pytest.raises(ValueError, match=r"0\.\.3"):
        greedy_selection(members, labels, num_members=1, given=[4])
    for select in (greedy_selection, exhaustive_selection):
        for asked, cause in (
            ({"num_members": 5}, "only 4 candidates"),
            ({"num_members": 0}, "0 members"),
            ({"num_members": 1, "criterion": "brier"}, "'brier'"),
        ):
            with pytest.raises(UserError, match=cause):
                select(members, labels, **asked)
        with pytest.raises(ValueError, match="labels"):
            select(members, labels + 3, num_members=1)
    # Too many combinations are refused before they are tried.
    for replacement, total in ((False, math.comb(60, 10)), (True, math.comb(69, 10))):
        with pytest.raises(UserError, match=str(total)):
            exhaustive_selection(*draw(0, 60, num_images=2), num_members=10, replacement=replacement)
