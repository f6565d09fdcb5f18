"""Landscape measures against known angles, simulation and exact permutations."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from sklearn.metrics.pairwise import cosine_similarity
from studies.loss_landscape.landscape import (
    contrast_pairs,
    disagreement_bounds,
    diversity_accuracy_plane,
    independent_disagreement,
    normalised_disagreement,
    perturbed_disagreement,
    share_of_independent,
    weight_cosines,
)

from dnas_ens.metrics.diversity import pairwise_disagreement
from dnas_ens.nn.reference_models import reference_model

IMAGES = 200_000


ANGLES = np.array([0.0, 0.3, 1.2, np.pi])


def test_linear_models_of_known_angles():
    weights = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1) * np.array([[1], [5], [0.1], [2]])
    model = torch.nn.Linear(2, 1, bias=False)
    states = [{"weight": torch.from_numpy(weight)[None]} for weight in weights]
    apart = np.abs(ANGLES[:, None] - ANGLES[None, :])
    np.testing.assert_allclose(weight_cosines(model, states), np.cos(apart), atol=1e-12)
    # Two lines at an angle tell a share of angle / pi of a circle apart; no point lies on a boundary.
    around = (np.arange(3600) + 0.5) * 2 * np.pi / 3600
    points = np.stack([np.cos(around), np.sin(around)], axis=1)
    right = 1 / (1 + np.exp(-2 * weights @ points.T))
    probs = np.stack([right, 1 - right], axis=2)
    np.testing.assert_allclose(pairwise_disagreement(probs), apart / np.pi, atol=1 / 1800)
    labels = (points[:, 0] < 0).astype(int)
    errors = ANGLES / np.pi
    means = (errors[:, None] + errors[None, :]) / 2
    # Of two classes, independent votes of accuracies a and b differ on a (1 - b) + b (1 - a).
    both = (1 - errors)[:, None] * errors[None, :] + errors[:, None] * (1 - errors)[None, :]
    for measure, scale in ((normalised_disagreement, means), (share_of_independent, both)):
        expected = np.divide(apart / np.pi, scale, out=np.zeros_like(scale), where=scale > 0)
        np.testing.assert_allclose(measure(probs, labels), expected, atol=0.01)


def test_cosines_of_a_network_are_those_of_its_flat_parameters():
    torch.manual_seed(0)
    models = [reference_model("resnet20", 1, 10, 8) for _ in range(3)]
    flat = np.stack(
        [torch.cat([weight.detach().double().ravel() for weight in model.parameters()]) for model in models]
    )
    states = [model.state_dict() for model in models]
    # Running statistics are not weights.
    next(value for name, value in states[1].items() if name.endswith("running_mean")).fill_(1e6)
    found = weight_cosines(models[0], states)
    np.testing.assert_allclose(found, cosine_similarity(flat), atol=1e-12)
    assert found[0, 1] == pytest.approx(1 - cosine(flat[0], flat[1]))
    assert np.array_equal(np.diag(found), np.ones(3))
    # Weights of zero point nowhere.
    zero = {name: torch.zeros_like(value) for name, value in states[0].items()}
    assert weight_cosines(models[0], [zero, states[0]]).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def answers(generator, labels, accuracy, num_classes):
    """Votes that are right with a probability and otherwise a random wrong class, independent of all else."""
    wrong = (labels + generator.integers(1, num_classes, len(labels))) % num_classes
    return np.where(generator.random(len(labels)) < accuracy, labels, wrong)


@pytest.mark.parametrize(("ours", "base", "num_classes"), [(0.7, 0.9, 10), (0.5, 0.6, 3)])
def test_independent_errors_by_simulation(ours, base, num_classes):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_classes, IMAGES)
    votes = [answers(generator, labels, accuracy, num_classes) for accuracy in (ours, base)]
    expected = float(independent_disagreement(ours, base, num_classes))
    # Four standard errors of a share.
    assert (votes[0] != votes[1]).mean() == pytest.approx(expected, abs=4 * np.sqrt(0.25 / IMAGES))


@pytest.mark.parametrize(("share", "base", "num_classes"), [(0.1, 0.9, 10), (0.5, 0.6, 3)])
def test_perturbed_base_by_simulation(share, base, num_classes):
    generator = np.random.default_rng(1)
    labels = generator.integers(0, num_classes, IMAGES)
    votes = answers(generator, labels, base, num_classes)
    other = (votes + generator.integers(1, num_classes, IMAGES)) % num_classes
    perturbed = np.where(generator.random(IMAGES) < share, other, votes)
    accuracy, base_accuracy = (perturbed == labels).mean(), (votes == labels).mean()
    expected = float(perturbed_disagreement(accuracy, base_accuracy, num_classes))
    assert (perturbed != votes).mean() == pytest.approx(expected, abs=0.006)


def test_perturbed_curve_ends_at_the_base_and_nowhere_above():
    assert perturbed_disagreement([0.9, 0.95], 0.9, 10)[0] == 0.0
    assert np.isnan(perturbed_disagreement([0.9, 0.95], 0.9, 10)[1])
    # All predictions replaced: only those that were wrong can have become right.
    assert perturbed_disagreement(0.1 / 9, 0.9, 10) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no better than chance"):
        perturbed_disagreement(0.05, 0.1, 10)


@given(st.integers(0, 2**32 - 1), st.integers(3, 6), st.floats(0, 1), st.floats(0, 1))
def test_no_pair_leaves_the_bounds(seed, num_classes, first, second):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, 30)
    votes = [answers(generator, labels, accuracy, num_classes) for accuracy in (first, second)]
    accuracies = [(vote == labels).mean() for vote in votes]
    least, largest = disagreement_bounds(*accuracies)
    assert least - 1e-12 <= (votes[0] != votes[1]).mean() <= largest + 1e-12


def test_bounds_are_reached():
    labels = np.zeros(10, dtype=int)
    base = np.array([0] * 8 + [1] * 2)
    better = np.array([0] * 9 + [1])
    disjoint = np.array([1] * 3 + [0] * 7)
    plane = diversity_accuracy_plane(np.eye(3)[base], np.eye(3)[[better, disjoint]], labels)
    least, largest = disagreement_bounds(plane.accuracy, plane.base_accuracy)
    assert plane.base_accuracy == pytest.approx(0.8)
    assert plane.accuracy.tolist() == pytest.approx([0.9, 0.7])
    # 1 of 10 differs, error 0.1; 5 of 10 differ, error 0.3.
    assert plane.diversity.tolist() == pytest.approx([1.0, 5 / 3])
    assert plane.diversity[0] * 0.1 == pytest.approx(least[0])
    assert plane.diversity[1] * 0.3 == pytest.approx(largest[1])


def distances(points):
    return np.linalg.norm(points[:, None] - points[None, :], axis=-1)


def exact_p_value(matrix, groups):
    """Over all orders of the groups, which is what random ones sample."""
    rows, columns = np.triu_indices(len(groups), k=1)

    def difference(of_members):
        same = np.array([of_members[i] == of_members[j] for i, j in zip(rows, columns, strict=True)])
        return matrix[rows, columns][~same].mean() - matrix[rows, columns][same].mean()

    observed = abs(difference(groups)) - 1e-9
    drawn = [abs(difference(order)) >= observed for order in itertools.permutations(groups)]
    return np.mean(drawn)


def test_means_by_hand_and_exact_p_value():
    matrix = np.array([[0, 1, 5, 6], [1, 0, 7, 8], [5, 7, 0, 3], [6, 8, 3, 0]], dtype=float)
    found = contrast_pairs(matrix, ["a", "a", "b", "b"])
    assert (found.within, found.between, found.difference) == (2.0, 6.5, 4.5)
    assert found.num_groupings == 3
    assert found.p_value == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(("groups", "groupings"), [("aabbcc", 15), ("aaabbc", 60)])
def test_p_value_is_that_of_all_permutations(groups, groupings):
    matrix = distances(np.random.default_rng(3).normal(size=(6, 2)))
    found = contrast_pairs(matrix, groups)
    assert found.p_value == pytest.approx(exact_p_value(matrix, groups), abs=0.02)
    # 6! / (2! 2! 2!) / 3! and 6! / (3! 2! 1!).
    assert found.num_groupings == groupings
