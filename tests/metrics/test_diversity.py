"""Diversity measures against scipy, naive loops and values computed by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from dnas_ens.metrics import diversity
from dnas_ens.metrics.scores import evaluate_probs, nll


def draw(seed: int, num_members: int = 4, num_images: int = 60, num_classes: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(num_classes, 0.7), size=(num_members, num_images))


def certain(*votes: list[int], num_classes: int = 3) -> np.ndarray:
    """Members that give all probability to the named class of each image."""
    return np.eye(num_classes)[np.array(votes)]


def test_pairwise_disagreement_by_hand() -> None:
    members = certain([0, 1, 2, 0], [0, 1, 1, 1], [0, 1, 2, 0])
    expected = [[0.0, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.0]]
    np.testing.assert_array_equal(diversity.pairwise_disagreement(members), expected)
    assert diversity.mean_disagreement(members) == pytest.approx(1 / 3, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_predictive_js_equals_scipy(seed: int) -> None:
    members = draw(seed)
    distances = diversity.predictive_js(members)
    for i, j in combinations(range(4), 2):
        expected = jensenshannon(members[i], members[j], base=2, axis=1).mean()
        assert distances[i, j] == distances[j, i] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_array_equal(np.diag(distances), 0.0)
    assert diversity.mean_predictive_js(members) == pytest.approx(
        np.mean([distances[i, j] for i, j in combinations(range(4), 2)]), rel=1e-12
    )


def test_predictive_js_is_one_for_contradictions_and_zero_for_copies() -> None:
    np.testing.assert_allclose(
        diversity.predictive_js(certain([0, 1], [1, 2], [0, 1])),
        [[0, 1, 0], [1, 0, 1], [0, 1, 0]],
        atol=1e-12,
    )


def test_shared_error_fraction_by_hand() -> None:
    # labels all 0; errors: A on {1, 2}, B on {2, 3, 4}, C on {1, 2, 3, 4}
    members = certain([0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 2, 2, 2, 2])
    # A and B share {2} of A's 2; A and C share both of A's 2; B and C share all of B's 3
    assert diversity.shared_error_fraction(members, [0] * 5) == pytest.approx((1 / 2 + 1 + 1) / 3, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_shared_error_fraction_equals_sets(seed: int) -> None:
    members = draw(seed)
    labels = np.random.default_rng(seed + 100).integers(3, size=60)
    errors = [set(np.flatnonzero(member.argmax(axis=1) != labels)) for member in members]
    shares = [len(a & b) / len(min(a, b, key=len)) for a, b in combinations(errors, 2)]
    assert diversity.shared_error_fraction(members, labels) == pytest.approx(np.mean(shares), rel=1e-12)


def test_shared_error_fraction_without_errors_is_zero() -> None:
    assert diversity.shared_error_fraction(certain([0, 1], [0, 2]), [0, 1]) == 0.0


def test_shared_error_fraction_of_one_member() -> None:
    assert diversity.shared_error_fraction(certain([0, 1]), [0, 2]) == 1.0
    assert diversity.shared_error_fraction(certain([0, 1]), [0, 1]) == 0.0


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 5.0]])
def test_mutual_information_equals_mean_divergence_from_the_average(weights: list[float] | None) -> None:
    members = draw(1)
    shares = np.full(4, 0.25) if weights is None else np.array(weights) / 8.0
    average = (shares[:, None, None] * members).sum(axis=0)
    expected = sum(
        share * scipy_entropy(member, average, axis=1) for share, member in zip(shares, members, strict=True)
    )
    np.testing.assert_allclose(diversity.mutual_information(members, weights), expected, atol=1e-12)


def test_mutual_information_of_two_sure_opponents_is_ln_two() -> None:
    np.testing.assert_allclose(diversity.mutual_information(certain([0, 1], [1, 1])), [math.log(2), 0.0])


def test_average_and_oracle_nll_by_hand() -> None:
    members = np.array([[[0.5, 0.5], [0.25, 0.75]], [[0.125, 0.875], [0.5, 0.5]]])
    # probabilities of the labels: member 0 (1/2, 1/4), member 1 (1/8, 1/2), in bits 1, 2, 3, 1
    assert diversity.average_member_nll(members, [0, 0]) == pytest.approx(7 / 4 * math.log(2), rel=1e-12)
    assert diversity.oracle_nll(members, [0, 0]) == pytest.approx(math.log(2), rel=1e-12)


def test_entropy_equals_scipy_and_takes_zeros() -> None:
    members = np.concatenate([draw(2), certain([0] * 60)])
    np.testing.assert_allclose(diversity.entropy(members), scipy_entropy(members, axis=-1), atol=1e-12)


def test_evaluate_members_combines_both() -> None:
    members = draw(3)
    labels = np.random.default_rng(3).integers(3, size=60)
    values = diversity.evaluate_members(members, labels, [3.0, 1.0, 0.0, 0.0])
    average = 0.75 * members[0] + 0.25 * members[1]
    expected = {
        **evaluate_probs(average, labels),
        "disagreement": diversity.mean_disagreement(members),
        "predictive_js": diversity.mean_predictive_js(members),
        "shared_error_fraction": diversity.shared_error_fraction(members, labels),
        "mutual_information": diversity.mutual_information(members, [3.0, 1.0, 0.0, 0.0]).mean(),
        "average_member_nll": np.mean([nll(member, labels) for member in members]),
        "oracle_nll": diversity.oracle_nll(members, labels),
    }
    assert values == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in values.values())


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 10), st.integers(2, 4))
def test_bounds_and_order(seed: int, num_members: int, num_images: int, num_classes: int) -> None:
    members = draw(seed, num_members, num_images, num_classes)
    labels = np.random.default_rng(seed).integers(num_classes, size=num_images)
    values = diversity.evaluate_members(members, labels)
    for name in ("accuracy", "disagreement", "predictive_js", "shared_error_fraction"):
        assert 0.0 <= values[name] <= 1.0, name
    assert 0.0 <= values["mutual_information"] <= math.log(min(num_members, num_classes)) + 1e-12
    assert values["oracle_nll"] <= values["nll"] + 1e-12
    assert values["nll"] <= values["average_member_nll"] + 1e-12


@given(st.integers(0, 10_000))
def test_predictive_js_is_a_metric(seed: int) -> None:
    distances = diversity.predictive_js(draw(seed, num_members=3, num_images=4))
    np.testing.assert_array_equal(distances, distances.T)
    assert distances[0, 1] <= distances[0, 2] + distances[2, 1] + 1e-12


def test_one_member_differs_from_nothing() -> None:
    members = draw(4, num_members=1)
    assert diversity.mean_disagreement(members) == diversity.mean_predictive_js(members) == 0.0
    np.testing.assert_allclose(diversity.mutual_information(members), 0.0, atol=1e-12)


def test_weights_are_normalised() -> None:
    np.testing.assert_allclose(diversity.normalise_weights([1.0, 3.0], 2), [0.25, 0.75])
    np.testing.assert_allclose(diversity.normalise_weights([1e308, 1e308], 2), [0.5, 0.5])
    np.testing.assert_allclose(diversity.normalise_weights(None, 4), 0.25)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_wrong_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        diversity.normalise_weights(weights, 2)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(M, N, K\)"):
        diversity.pairwise_disagreement([[0.5, 0.5]])
    with pytest.raises(ValueError, match="labels must have shape"):
        diversity.oracle_nll([[[0.5, 0.5]]], [0, 1])
