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


# -ln of the product over both images ranks ensembles: the larger the product of averages, the better.
# A (0.9, 0.3) 0.27, B (0.8, 0.3) 0.24, C (0.2, 0.9) 0.18, D (0.5, 0.5) 0.25: A is picked first.
# With A: B (0.85, 0.30) 0.255, C (0.55, 0.60) 0.33, D (0.7, 0.4) 0.28: C is picked second.
# With A, C: B (1.9, 1.5)/3 0.3167, D (1.6, 1.7)/3 0.3022; with replacement A (2.0, 1.5)/3 0.3333.
TRACED = binary([0.9, 0.3], [0.8, 0.3], [0.2, 0.9], [0.5, 0.5])


def test_greedy_selection_by_hand():
    assert greedy_selection(TRACED, [0, 0], num_members=4) == [0, 2, 1, 3]
    assert greedy_selection(TRACED, [0, 0], num_members=3, replacement=True) == [0, 2, 0]


def test_a_tie_goes_to_the_lowest_index():
    members = binary([0.4, 0.4], [0.6, 0.6], [0.6, 0.6], [0.6, 0.6])
    assert greedy_selection(members, [0, 0], num_members=3) == [1, 2, 3]
    assert exhaustive_selection(members, [0, 0], num_members=2) == [1, 2]


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("start", [[], [4], [2, 6, 2]])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_selection_equals_a_naive_loop(seed, start, replacement):
    members, labels = draw(seed, num_members=7)
    picked = list(start)
    for _ in range(4):
        rest = [index for index in range(7) if replacement or index not in picked]
        picked.append(min(rest, key=lambda index: ensemble_nll(members, labels, [*picked, index])))
    found = greedy_selection(members, labels, num_members=4, replacement=replacement, given=start)
    assert [*start, *found] == picked


@given(st.integers(0, 10_000), st.integers(1, 6), st.data())
def test_exhaustive_is_never_worse_and_both_are_subsets(seed, num_members, data):
    members, labels = draw(seed, num_members, num_images=5)
    size = data.draw(st.integers(1, num_members))
    greedy = greedy_selection(members, labels, num_members=size)
    exhaustive = exhaustive_selection(members, labels, num_members=size)
    assert len(set(greedy)) == len(set(exhaustive)) == size
    assert set(greedy) | set(exhaustive) <= set(range(num_members))
    assert ensemble_nll(members, labels, exhaustive) <= ensemble_nll(members, labels, greedy) + 1e-12
    if size in (1, num_members):
        assert sorted(greedy) == exhaustive


def test_a_candidate_that_is_certain_and_wrong_is_survived():
    members = binary([0.0, 0.0], [0.5, 0.5])
    assert greedy_selection(members, [0, 0], num_members=2) == [1, 0]


def test_what_cannot_be_selected():
    members, labels = draw(0, num_members=4)
    assert len(greedy_selection(members, labels, num_members=5, replacement=True)) == 5
    assert len(greedy_selection(members, labels, num_members=2, given=[0, 3, 0])) == 2
    with pytest.raises(UserError, match="3 members were asked for, but there are only 2 candidates"):
        greedy_selection(members, labels, num_members=3, given=[0, 3])
    with pytest.raises(ValueError, match=r"0\.\.3"):
        greedy_selection(members, labels, num_members=1, given=[4])
    for select in (greedy_selection, exhaustive_selection):
        with pytest.raises(UserError, match="only 4 candidates"):
            select(members, labels, num_members=5)
        with pytest.raises(UserError, match="0 members"):
            select(members, labels, num_members=0)
        with pytest.raises(UserError, match="'brier'"):
            select(members, labels, num_members=1, criterion="brier")
        with pytest.raises(ValueError, match="labels"):
            select(TRACED, [0, 5], num_members=1)


def test_too_many_combinations_are_refused_before_they_are_tried():
    members, labels = draw(0, num_members=60, num_images=2)
    for replacement, total in ((False, math.comb(60, 10)), (True, math.comb(69, 10))):
        with pytest.raises(UserError, match=str(total)):
            exhaustive_selection(members, labels, num_members=10, replacement=replacement)


def _criterion_loss(criterion, probs, labels):
    if criterion == "accuracy":
        return (-accuracy(probs, labels), nll(probs, labels))
    if criterion == "calibrated_nll":
        return calibrated_nll(probs, labels, fit_temperature(probs, labels))
    return nll(probs, labels)


@pytest.mark.parametrize("criterion", ["nll", "accuracy", "calibrated_nll"])
@pytest.mark.parametrize("replacement", [False, True])
def test_every_criterion_against_naive_loops(criterion, replacement):
    generator = np.random.default_rng(int(replacement))
    labels = generator.integers(3, size=40)
    certain = generator.uniform(0, 0.5, size=(6, 40, 1))
    probs = (1 - certain) * generator.dirichlet(np.ones(3), size=(6, 40)) + certain * np.eye(3)[labels]
    picked = []
    for _ in range(4):
        rest = [index for index in range(6) if replacement or index not in picked]
        picked.append(min(rest, key=lambda i: _criterion_loss(criterion, probs[[*picked, i]].mean(axis=0), labels)))
    chosen = greedy_selection(probs, labels, num_members=4, replacement=replacement, criterion=criterion)
    assert chosen == picked
    subsets = (combinations_with_replacement if replacement else combinations)(range(6), 3)
    best = min(subsets, key=lambda s: _criterion_loss(criterion, probs[list(s)].mean(axis=0), labels))
    found = exhaustive_selection(probs, labels, num_members=3, replacement=replacement, criterion=criterion)
    assert found == list(best)
