import numpy as np
import pytest
from scipy import stats

from dnas_ens.errors import UserError
from dnas_ens.metrics.conformal import conformal_threshold, prediction_sets


def drawn(generator, count, num_classes=4):
    """Probabilities and labels that are drawn from them with other sharpness: not calibrated, but exchangeable."""
    probs = generator.dirichlet(np.ones(num_classes), size=count)
    truth = probs**2 / (probs**2).sum(axis=1, keepdims=True)
    labels = np.array([generator.choice(num_classes, p=row) for row in truth])
    return probs, labels


@pytest.mark.parametrize(("images", "coverage"), [(19, 0.9), (50, 0.5), (30, 0.75)])
def test_sets_cover_as_the_theory_says(images, coverage):
    """Over splits, coverage follows Beta(r, n + 1 - r) with r = ceil((n + 1) c), arXiv 2107.07511."""
    generator = np.random.default_rng(0)
    rank = int(np.ceil((images + 1) * coverage - 1e-9))
    law = stats.beta(rank, images + 1 - rank)
    found = []
    for _ in range(300):
        threshold = conformal_threshold(*drawn(generator, images), coverage)
        probs, labels = drawn(generator, 200)
        found.append((probs >= threshold)[np.arange(200), labels].mean())
        sets = prediction_sets(probs, threshold)
        assert sets[np.arange(200), labels].mean() >= found[-1]
    assert np.mean(found) == pytest.approx(law.mean(), abs=4 * np.sqrt((law.var() + 0.25 / 200) / 300))
    assert law.mean() >= coverage


def test_thresholds_by_hand():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    labels = np.array([0, 0, 1, 1])
    # Probabilities of the right classes: 0.9, 0.8, 0.7, 0.4; ceil(5 * 0.6) = 3.
    assert conformal_threshold(probs, labels, 0.6) == 0.7
    assert conformal_threshold(probs, labels, 0.8) == 0.4
    # Four images cannot promise 90 %: all classes.
    assert conformal_threshold(probs, labels, 0.9) == 0.0
    sets = prediction_sets(np.array([[0.75, 0.25], [0.55, 0.45]]), 0.7)
    assert sets.tolist() == [[True, False], [True, False]]
    assert prediction_sets(probs, 0.0).all()


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.1, float("nan")])
def test_a_coverage_that_is_no_share_is_refused(coverage):
    with pytest.raises(UserError, match="The coverage is"):
        conformal_threshold(np.array([[1.0, 0.0]]), np.array([0]), coverage)
