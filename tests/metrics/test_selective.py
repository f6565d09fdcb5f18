from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnas_ens.metrics.selective import RiskCoverage


def risk_coverage(probs, labels, confidence=None):
    sure = probs.max(axis=1) if confidence is None else confidence
    return RiskCoverage.of(sure, probs.argmax(axis=1) != labels)


def two_classes(errors, confidence):
    """Probabilities and labels of images with the given confidence, wrong where said."""
    top = np.asarray(confidence, dtype=float)
    return np.stack([top, 1.0 - top], axis=1), np.asarray(errors, dtype=int)


def draw(num_images, num_classes, seed, *, total=None):
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.ones(num_classes), size=num_images)
    if total is not None:
        # Counts over a fixed total: many images are equally sure.
        probs = generator.multinomial(total, probs) / total
    return probs, generator.integers(0, num_classes, num_images)


def test_by_hand():
    curve = risk_coverage(*two_classes([0, 1, 0, 1], [0.9, 0.8, 0.7, 0.6]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.aurc == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
    accuracies = [curve.accuracy_at(coverage) for coverage in (0.25, 0.5, 0.6, 1.0)]
    assert accuracies == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    # The second and third are equally sure, and one of them errs: half an error each.
    tied = risk_coverage(*two_classes([0, 1, 0], [0.9, 0.8, 0.8]))
    assert tied.risk == pytest.approx([0, 0.25, 1 / 3])
    # 0.1 * 7 is a little more than 0.7: it is not rounded up by an image.
    ten = risk_coverage(*two_classes([0] * 7 + [1] * 3, np.linspace(0.9, 0.6, 10)))
    assert ten.accuracy_at(0.1 * 7) == 1.0


@given(num_images=st.integers(1, 6), seed=st.integers(0, 500), total=st.integers(2, 5))
def test_the_risk_is_the_mean_over_all_orders_that_sort_by_confidence(num_images, seed, total):
    probs, labels = draw(num_images, 3, seed, total=total)
    errors, sure, counts = probs.argmax(1) != labels, probs.max(1), np.arange(1, num_images + 1)
    orders = [list(order) for order in permutations(range(num_images)) if (np.diff(sure[list(order)]) <= 0).all()]
    expected = np.mean([np.cumsum(errors[order]) / counts for order in orders], axis=0)
    assert risk_coverage(probs, labels).risk == pytest.approx(expected)


@given(num_images=st.integers(2, 40), seed=st.integers(0, 200))
def test_bounds_and_given_scores(num_images, seed):
    probs, labels = draw(num_images, 3, seed)
    errors = (probs.argmax(1) != labels).astype(float)
    curve = risk_coverage(probs, labels)
    best, worst = (risk_coverage(probs, labels, confidence=sign * errors).aurc for sign in (-1, 1))
    assert best - 1e-12 <= curve.aurc <= worst + 1e-12
    # An uninformed confidence leaves the error rate at every coverage.
    uninformed = risk_coverage(probs, labels, confidence=np.zeros(num_images))
    assert uninformed.aurc == pytest.approx(errors.mean())


@pytest.mark.parametrize("coverage", [0.0, float("nan")])
def test_what_does_not_fit(coverage):
    probs, labels = draw(5, 3, 0)
    with pytest.raises(ValueError, match="coverage must lie"):
        risk_coverage(probs, labels).accuracy_at(coverage)
