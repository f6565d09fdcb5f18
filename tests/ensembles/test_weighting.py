"""Weights of members against a fine grid, finite differences, a closed form and scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from sklearn.metrics import accuracy_score, log_loss

from dnas_ens.ensembles.weighting import (
    caruana_weights,
    criterion_value,
    evolve_weights,
    fit_weights,
    log_loss_and_gradient,
    selection_weights,
    to_simplex,
)
from dnas_ens.errors import UserError


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


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_the_gradient_equals_finite_differences(seed, num_members):
    members, labels = draw(seed, num_members)
    label_probs = members[:, np.arange(len(labels)), labels]
    weights = np.random.default_rng(seed).dirichlet(np.ones(num_members)) + 0.01
    loss, gradient = log_loss_and_gradient(weights, label_probs)
    numeric = approx_fprime(weights, lambda point: log_loss_and_gradient(point, label_probs)[0], 1e-7)
    assert gradient == pytest.approx(numeric, rel=1e-4, abs=1e-5)
    assert loss == pytest.approx(-np.log(weights @ label_probs).mean())


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["nll", "accuracy"]))
def test_weights_lie_on_the_simplex_and_are_never_worse_than_the_simple_choices(seed, num_members, criterion):
    members, labels = draw(seed, num_members, num_images=12)
    simple = [np.full(num_members, 1.0 / num_members), *np.eye(num_members)]
    nlls, accuracies = zip(*(scores(members, weights, labels) for weights in simple), strict=True)
    evolved = evolve_weights(members, labels, criterion=criterion, generations=5, seed=seed)
    fitted, caruana = fit_weights(members, labels, seed=seed), caruana_weights(members, labels, num_picks=7)
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


@given(st.lists(st.floats(0.0, 1e300), min_size=1, max_size=6))
def test_scaling_to_the_simplex(numbers):
    weights = to_simplex(numbers)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert weights.min() >= 0.0
    if max(numbers) == 0.0:
        assert weights == pytest.approx(1.0 / len(numbers))
    elif max(numbers) > 1e-300:
        assert weights * max(numbers) == pytest.approx(np.array(numbers) * weights.max(), rel=1e-9)


def test_a_seed_repeats_itself():
    members, labels = draw(2, 4)
    first, again, other = (evolve_weights(members, labels, generations=5, seed=seed) for seed in (3, 3, 4))
    assert first.weights.tolist() == again.weights.tolist() != other.weights.tolist()
    fits = [fit_weights(members, labels, seed=3).weights.tolist() for _ in range(2)]
    assert fits[0] == fits[1]


def test_frequencies_of_picks_by_hand():
    assert selection_weights([0, 2, 0, 2, 2], 4).tolist() == [0.4, 0.0, 0.6, 0.0]
    # Traced: A (0.9, 0.3) is best alone, then C (0.2, 0.9), then A again: 2/3 and 1/3.
    members = binary([0.9, 0.3], [0.8, 0.3], [0.2, 0.9], [0.5, 0.5])
    assert caruana_weights(members, [0, 0], num_picks=3).weights == pytest.approx([2 / 3, 0, 1 / 3, 0])


def test_accuracy_is_never_overruled_by_its_tie_break():
    wrong_once = criterion_value(0.0, 0.9, num_images=10, criterion="accuracy")
    assert criterion_value(27.7, 1.0, num_images=10, criterion="accuracy") < wrong_once
    assert criterion_value(1.0, 0.9, num_images=10, criterion="accuracy") > wrong_once


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda *data: evolve_weights(*data, criterion="brier"), "'brier'"),
        (lambda *data: evolve_weights(*data, population_size=7), "population of 7"),
        (lambda *data: evolve_weights(*data, generations=0), "0 generations"),
        (lambda *data: fit_weights(*data, random_starts=-1), "-1 random starts"),
        (lambda *data: caruana_weights(*data, num_picks=0), "0 members"),
        (lambda *data: selection_weights([0, 3], 3), "picks"),
    ],
)
def test_mistakes_are_named(call, cause):
    with pytest.raises(UserError, match=cause):
        call(*draw(0, 3))


@pytest.mark.parametrize("fit", [fit_weights, evolve_weights, caruana_weights])
def test_wrong_predictions_are_refused(fit):
    members, labels = draw(0, 3)
    for wrong, given_labels, cause in (
        (members * np.nan, labels, "finite"),
        (members, labels[:5], "labels"),
        (members[:0], labels, "empty"),
    ):
        with pytest.raises(ValueError, match=cause):
            fit(wrong, given_labels)
