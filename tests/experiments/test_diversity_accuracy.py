import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies.loss_landscape.diversity_accuracy import (
    disagreement_bounds,
    diversity_accuracy_plane,
    independent_disagreement,
    perturbed_disagreement,
)

IMAGES = 200_000


def one_hot(votes, num_classes):
    return np.eye(num_classes)[votes]


def answers(generator, labels, accuracy, num_classes):
    """Votes that are right with a probability and otherwise a random wrong class, independent of all else."""
    wrong = (labels + generator.integers(1, num_classes, len(labels))) % num_classes
    return np.where(generator.random(len(labels)) < accuracy, labels, wrong)


@pytest.mark.parametrize(("ours", "base", "num_classes"), [(0.7, 0.9, 10), (0.5, 0.6, 3), (0.95, 0.8, 100)])
def test_independent_errors_by_simulation(ours, base, num_classes):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_classes, IMAGES)
    votes = [answers(generator, labels, accuracy, num_classes) for accuracy in (ours, base)]
    expected = float(independent_disagreement(ours, base, num_classes))
    # Four standard errors of a share.
    assert (votes[0] != votes[1]).mean() == pytest.approx(expected, abs=4 * np.sqrt(0.25 / IMAGES))


@pytest.mark.parametrize(("share", "base", "num_classes"), [(0.1, 0.9, 10), (0.5, 0.6, 3), (0.3, 0.99, 100)])
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


@given(st.floats(0.35, 1), st.floats(0.35, 1), st.integers(3, 100))
def test_curves_lie_within_the_bounds(ours, base, num_classes):
    least, largest = disagreement_bounds(ours, base)
    independent = independent_disagreement(ours, base, num_classes)
    assert least - 1e-12 <= independent <= largest + 1e-12
    perturbed = perturbed_disagreement(ours, base, num_classes)
    assert np.isnan(perturbed) or least - 1e-12 <= perturbed


def test_bounds_are_reached():
    labels = np.zeros(10, dtype=int)
    base = np.array([0] * 8 + [1] * 2)
    better = np.array([0] * 9 + [1])
    disjoint = np.array([1] * 3 + [0] * 7)
    plane = diversity_accuracy_plane(
        one_hot(base, 3), np.stack([one_hot(better, 3), one_hot(disjoint, 3)]), labels
    )
    least, largest = disagreement_bounds(plane.accuracy, plane.base_accuracy)
    assert plane.base_accuracy == pytest.approx(0.8)
    assert plane.accuracy.tolist() == pytest.approx([0.9, 0.7])
    # 1 of 10 differs, error 0.1; 5 of 10 differ, error 0.3.
    assert plane.diversity.tolist() == pytest.approx([1.0, 5 / 3])
    assert plane.diversity[0] * 0.1 == pytest.approx(least[0])
    assert plane.diversity[1] * 0.3 == pytest.approx(largest[1])


def test_a_solution_without_errors_has_no_place_in_the_plane():
    labels = np.array([0, 1, 2])
    plane = diversity_accuracy_plane(one_hot([0, 1, 1], 3), one_hot(labels, 3)[None], labels)
    assert plane.accuracy.tolist() == [1.0]
    assert np.isnan(plane.diversity).all()
