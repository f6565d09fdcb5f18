"""Choosing and weighing members: by hand, against naive loops, a fine grid, finite differences and scikit-learn."""

import math
from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss

from dnas_ens.ensembles.selection import exhaustive_selection, greedy_selection
from dnas_ens.ensembles.weighting import caruana_weights, evolve_weights, fit_weights
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import calibrated_nll, fit_temperature


def draw(seed, num_members, num_images=40):
    """Members that know something each: a share of the label mixed into noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=num_images)
    noise = generator.dirichlet(np.ones(3), size=(num_members, num_images))
    skill = generator.uniform(0.0, 0.5, size=(num_members, num_images, 1))
    return (1.0 - skill) * noise + skill * np.eye(3)[labels], labels


def scores(members, weights, labels):
    probs = np.einsum("m,mnk->nk", weights, members)
    return log_loss(labels, probs, labels=range(3)), accuracy_score(labels, probs.argmax(axis=1))


def binary(*label_probs):
    """Members by their probability of class 0 on each image, shape (M, N, 2)."""
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
    picked = [select(members, labels, num_members=size) for select in (greedy_selection, exhaustive_selection)]
    assert all(len({*subset} & {*range(num_members)}) == size for subset in picked)
    losses = [log_loss(labels, members[subset].mean(axis=0), labels=range(3)) for subset in picked]
    assert losses[1] <= losses[0] + 1e-12


def criterion_loss(criterion, probs, labels):
    if criterion == "accuracy":
        return (-accuracy_score(labels, probs.argmax(axis=1)), log_loss(labels, probs, labels=range(3)))
    if criterion == "calibrated_nll":
        return calibrated_nll(probs, labels, fit_temperature(probs, labels))
    return log_loss(labels, probs, labels=range(3))


@pytest.mark.parametrize("criterion", ["nll", "accuracy", "calibrated_nll"])
@pytest.mark.parametrize(("replacement", "start"), [(False, []), (True, []), (False, [4]), (True, [2, 5, 2])])
def test_every_criterion_against_naive_loops(criterion, replacement, start):
    probs, labels = draw(int(replacement), 6)
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


@pytest.mark.parametrize("seed", range(3))
def test_two_members_against_a_grid(seed):
    members, labels = draw(seed, 2)
    grid = np.linspace(0.0, 1.0, 10_001)[:, None, None]
    probs = grid * members[0] + (1.0 - grid) * members[1]
    losses = -np.log(probs[:, np.arange(40), labels]).mean(axis=1)
    accuracies = (probs.argmax(axis=2) == labels).mean(axis=1)
    best = grid[losses.argmin(), 0, 0]
    fitted, evolved = fit_weights(members, labels), evolve_weights(members, labels)
    assert fitted.weights[0] == pytest.approx(best, abs=1.1e-4)
    assert fitted.val_nll <= losses.min() + 1e-12
    assert evolved.weights[0] == pytest.approx(best, abs=1e-3)
    assert evolved.val_nll == pytest.approx(losses.min(), abs=1e-7)
    evolved = evolve_weights(members, labels, criterion="accuracy")
    assert evolved.val_accuracy == accuracies.max()
    # Among weights of the best accuracy those of the least NLL are wanted.
    assert evolved.val_nll <= losses[accuracies == accuracies.max()].min() + 1e-4


def test_three_members_in_closed_form():
    # Each image is known to one member alone: L = -sum_m n_m/N ln w_m is least at w_m = n_m/N.
    members = binary([1.0] * 5 + [0.0] * 5, [0.0] * 5 + [1.0] * 3 + [0.0] * 2, [0.0] * 8 + [1.0] * 2)
    expected = [0.5, 0.3, 0.2]
    entropy = -sum(share * math.log(share) for share in expected)
    fitted = fit_weights(members, [0] * 10)
    assert fitted.weights == pytest.approx(expected, abs=1e-4)
    assert fitted.val_nll == pytest.approx(entropy, abs=1e-7)
    polished = evolve_weights(members, [0] * 10, generations=30, polish=True)
    assert polished.val_nll == pytest.approx(entropy, abs=1e-6)
    useless = binary([0.9, 0.8, 0.7], [0.0, 0.0, 0.0])
    for fit in (fit_weights, evolve_weights):
        assert fit(useless[:1], [0] * 3).weights.tolist() == [1.0]
        assert fit(useless, [0] * 3).weights.tolist() == [1.0, 0.0]


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["nll", "accuracy"]))
def test_weights_lie_on_the_simplex_and_are_never_worse_than_the_simple_choices(seed, num_members, criterion):
    members, labels = draw(seed, num_members, num_images=12)
    simple = [np.full(num_members, 1.0 / num_members), *np.eye(num_members)]
    nlls, accuracies = zip(*(scores(members, weights, labels) for weights in simple), strict=True)
    evolved = evolve_weights(members, labels, criterion=criterion, generations=5, seed=seed)
    fitted, caruana = fit_weights(members, labels, seed=seed), caruana_weights(members, labels, num_picks=7)
    again = evolve_weights(members, labels, criterion=criterion, generations=5, seed=seed)
    assert np.array_equal(again.weights, evolved.weights)
    assert np.array_equal(fit_weights(members, labels, seed=seed).weights, fitted.weights)
    for found in (fitted, evolved, caruana):
        assert found.weights.shape == (num_members,)
        assert found.weights.min() >= 0.0
        assert found.weights.sum() == pytest.approx(1.0, abs=1e-12)
        assert (found.val_nll, found.val_accuracy) == pytest.approx(scores(members, found.weights, labels), abs=1e-9)
    assert fitted.val_nll <= min(nlls) + 1e-12
    assert caruana.val_nll <= min(nlls[1:]) + 1e-12
    if criterion == "accuracy":
        assert evolved.val_accuracy >= max(accuracies)
    else:
        assert evolved.val_nll <= min(nlls) + 1e-12


def test_frequencies_of_picks_by_hand():
    # Traced: A (0.9, 0.3) is best alone, then C (0.2, 0.9), then A again: 2/3 and 1/3.
    members = binary([0.9, 0.3], [0.8, 0.3], [0.2, 0.9], [0.5, 0.5])
    assert caruana_weights(members, [0, 0], num_picks=3).weights == pytest.approx([2 / 3, 0, 1 / 3, 0])


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda *data: evolve_weights(*data, criterion="brier"), "'brier'"),
        (lambda *data: evolve_weights(*data, population_size=7), "population of 7"),
        (lambda *data: evolve_weights(*data, generations=0), "0 generations"),
        (lambda *data: fit_weights(*data, random_starts=-1), "-1 random starts"),
        (lambda *data: caruana_weights(*data, num_picks=0), "0 members"),
        (lambda members, labels: fit_weights(members * np.nan, labels), "finite"),
        (lambda members, labels: evolve_weights(members, labels[:5]), "labels"),
        (lambda members, labels: caruana_weights(members[:0], labels), "empty"),
    ],
)
def test_mistakes_are_named(call, cause):
    with pytest.raises((UserError, ValueError), match=cause):
        call(*draw(0, 3))
