"""Diversity measures against scipy, naive loops and values computed by hand."""

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

PAIRS = list(combinations(range(4), 2))


def draw(seed, num_members=4, num_images=60, num_classes=3):
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(num_classes, 0.7), size=(num_members, num_images))
    return probs, generator.integers(num_classes, size=num_images)


def certain(*votes, num_classes=3):
    """Members that give all probability to the named class of each image."""
    return np.eye(num_classes)[np.array(votes)]


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.0, 4.0]])
def test_every_figure_against_scipy_and_loops(weights):
    members, labels = draw(0)
    shares = np.full(4, 0.25) if weights is None else np.array(weights) / 8.0
    average = (shares[:, None, None] * members).sum(axis=0)
    distances = diversity.predictive_js(members)
    for i, j in PAIRS:
        expected = jensenshannon(members[i], members[j], base=2, axis=1).mean()
        assert distances[i, j] == distances[j, i] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_array_equal(np.diag(distances), 0.0)
    information = sum(
        share * scipy_entropy(member, average, axis=1) for share, member in zip(shares, members, strict=True)
    )
    np.testing.assert_allclose(diversity.mutual_information(members, weights), information, atol=1e-12)
    votes = members.argmax(axis=2)
    errors = [set(np.flatnonzero(vote != labels)) for vote in votes]
    losses = -np.log(members[:, np.arange(60), labels])
    expected = {
        **evaluate_probs(average, labels),
        "disagreement": np.mean([(votes[i] != votes[j]).mean() for i, j in PAIRS]),
        "predictive_js": np.mean([distances[pair] for pair in PAIRS]),
        "shared_error_fraction": np.mean([len(a & b) / len(min(a, b, key=len)) for a, b in combinations(errors, 2)]),
        "mutual_information": information.mean(),
        "average_member_nll": np.mean([nll(member, labels) for member in members]),
        "oracle_nll": losses.min(axis=0).mean(),
    }
    values = diversity.evaluate_members(members, labels, weights)
    assert values == pytest.approx(expected, rel=1e-12)


def test_pairs_by_hand():
    # Labels all 0; errors: A on {1, 2}, B on {2, 3, 4}, C on {1, 2, 3, 4}. A and B share {2} of A's 2, A and C both
    # of A's 2, B and C all of B's 3.
    members = certain([0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 2, 2, 2, 2])
    shared = [[1, 0.5, 1], [0.5, 1, 1], [1, 1, 1]]
    np.testing.assert_allclose(diversity.pairwise_shared_errors(members, [0] * 5), shared)
    np.testing.assert_allclose(diversity.mutual_information(certain([0, 1], [1, 1])), [math.log(2), 0.0])


@pytest.mark.parametrize(
    ("members", "labels", "share"),
    [
        (certain([0, 1], [0, 2]), [0, 1], 0.0),  # the better member errs nowhere
        (certain([0, 1]), [0, 2], 1.0),
        (certain([0, 1]), [0, 1], 0.0),
    ],
)
def test_few_errors_and_one_member(members, labels, share):
    values = diversity.evaluate_members(members, labels)
    assert values["shared_error_fraction"] == share
    if len(members) == 1:
        names = ("disagreement", "predictive_js", "mutual_information")
        assert [values[name] for name in names] == [0.0, 0.0, 0.0]


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 10), st.integers(2, 4))
def test_bounds_and_order(seed, num_members, num_images, num_classes):
    members, labels = draw(seed, num_members, num_images, num_classes)
    values = diversity.evaluate_members(members, labels)
    for name in ("accuracy", "disagreement", "predictive_js", "shared_error_fraction"):
        assert 0.0 <= values[name] <= 1.0, name
    assert 0.0 <= values["mutual_information"] <= math.log(min(num_members, num_classes)) + 1e-12
    assert values["oracle_nll"] <= values["nll"] + 1e-12
    assert values["nll"] <= values["average_member_nll"] + 1e-12
    distances = diversity.predictive_js(members)
    around = distances[:, :, None] + distances[None, :, :]  # over a third member: the triangle inequality
    assert (distances[:, None, :] <= around + 1e-12).all()


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]])
def test_wrong_input_is_refused(weights):
    np.testing.assert_allclose(diversity.normalise_weights([1e308, 1e308], 2), [0.5, 0.5])
    with pytest.raises(ValueError, match="weights"):
        diversity.normalise_weights(weights, 2)
    with pytest.raises(ValueError, match=r"\(M, N, K\)"):
        diversity.pairwise_disagreement([[0.5, 0.5]])
    with pytest.raises(ValueError, match="labels must have shape"):
        diversity.evaluate_members([[[0.5, 0.5]]], [0, 1])
