from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve

from dnas_ens.metrics.selective import aurc, risk_coverage, selective_accuracy


def two_classes(answers, *, errors, confidence):
    """Probabilities and labels of images with the given confidence, wrong where said."""
    top = np.asarray(confidence, dtype=float)
    probs = np.stack([top, 1.0 - top], axis=1)
    assert len(answers) == len(probs)
    return probs, np.asarray(errors, dtype=int)


def draw(num_images, num_classes, seed, *, decimals=None):
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.ones(num_classes), size=num_images)
    if decimals is not None:
        # Counts over a fixed total: many images are equally sure.
        probs = generator.multinomial(decimals, probs) / decimals
    return probs, generator.integers(0, num_classes, num_images)


def brute_force(probs, labels, confidence):
    """Mean risk of every prefix over all orders that sort by confidence."""
    errors = probs.argmax(1) != labels
    orders = [
        order for order in permutations(range(len(labels))) if (np.diff(confidence[list(order)]) <= 0).all()
    ]
    return np.mean([np.cumsum(errors[list(o)]) / np.arange(1, len(o) + 1) for o in orders], axis=0)


def test_by_hand():
    probs, labels = two_classes("abcd", errors=[0, 1, 0, 1], confidence=[0.9, 0.8, 0.7, 0.6])
    curve = risk_coverage(probs, labels)
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.aurc == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert selective_accuracy(probs, labels, coverages=[0.25, 0.5, 0.6, 1.0]) == pytest.approx(
        [1, 1 / 2, 2 / 3, 1 / 2]
    )


def test_a_tie_is_the_mean_over_its_orders():
    # The second and third are equally sure, and one of them errs: half an error each.
    probs, labels = two_classes("abc", errors=[0, 1, 0], confidence=[0.9, 0.8, 0.8])
    assert risk_coverage(probs, labels).risk == pytest.approx([0, 0.25, 1 / 3])


@given(num_images=st.integers(1, 6), seed=st.integers(0, 500), total=st.integers(2, 5))
def test_against_all_orders(num_images, seed, total):
    probs, labels = draw(num_images, 3, seed, decimals=total)
    expected = brute_force(probs, labels, probs.max(1))
    assert risk_coverage(probs, labels).risk == pytest.approx(expected)


@given(num_images=st.integers(1, 60), seed=st.integers(0, 500), total=st.integers(2, 9))
def test_order_of_images_does_not_matter(num_images, seed, total):
    probs, labels = draw(num_images, 4, seed, decimals=total)
    order = np.random.default_rng(seed).permutation(num_images)
    np.testing.assert_array_equal(
        risk_coverage(probs, labels).risk, risk_coverage(probs[order], labels[order]).risk
    )


def test_against_scikit_learns_precision():
    # Accuracy of what is at least so sure is the precision of "the answer is right" at that threshold.
    probs, labels = draw(400, 3, 0, decimals=30)
    right, confidence = probs.argmax(1) == labels, probs.max(1)
    precision, _, thresholds = precision_recall_curve(right, confidence)
    coverages = [(confidence >= threshold).mean() for threshold in thresholds]
    assert len(thresholds) > 5
    assert selective_accuracy(probs, labels, coverages=coverages) == pytest.approx(precision[:-1])


@given(num_images=st.integers(2, 40), seed=st.integers(0, 200))
def test_bounds(num_images, seed):
    probs, labels = draw(num_images, 3, seed)
    errors = (probs.argmax(1) != labels).astype(float)
    best, worst = (aurc(probs, labels, confidence=sign * errors) for sign in (-1, 1))
    assert best - 1e-12 <= aurc(probs, labels) <= worst + 1e-12
    # An uninformed confidence leaves the error rate at every coverage.
    assert aurc(probs, labels, confidence=np.zeros(num_images)) == pytest.approx(errors.mean())
    assert selective_accuracy(probs, labels, coverages=[1.0])[0] == pytest.approx(1 - errors.mean())


def test_only_the_order_of_given_scores_counts():
    probs, labels = draw(50, 3, 1)
    top = probs.max(1)
    np.testing.assert_array_equal(
        risk_coverage(probs, labels).risk, risk_coverage(probs, labels, confidence=np.exp(9 * top)).risk
    )


def test_coverage_in_floating_point_is_not_rounded_up_by_one_image():
    probs, labels = two_classes(range(10), errors=[0] * 7 + [1] * 3, confidence=np.linspace(0.9, 0.6, 10))
    # 0.1 * 7 is a little more than 0.7.
    assert selective_accuracy(probs, labels, coverages=[0.1 * 7]) == [1.0]


@pytest.mark.parametrize("coverage", [0.0, 1.1, float("nan")])
def test_a_coverage_that_is_none(coverage):
    with pytest.raises(ValueError, match="coverage must lie"):
        selective_accuracy(*draw(5, 3, 0), coverages=[coverage])


def test_scores_that_do_not_fit():
    probs, labels = draw(5, 3, 0)
    with pytest.raises(ValueError, match="shape"):
        aurc(probs, labels, confidence=[1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        aurc(probs, labels, confidence=[1.0, 2.0, 3.0, 4.0, float("inf")])
