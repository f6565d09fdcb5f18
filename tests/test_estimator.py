from contextlib import nullcontext

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import cross_val_score

from dnas_ens import EnsembleSearchClassifier, UserError


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    return found.images[:600], found.target[:600]


@pytest.fixture(scope="module")
def fitted(digits):
    images, labels = digits
    # Labels need not be numbers from 0 on.
    names = np.array([f"digit {label}" for label in labels])
    return EnsembleSearchClassifier(budget=12, device="cpu").fit(images[:400], names[:400]), names


def test_it_learns_and_scores_as_a_classifier_does(digits, fitted):
    images, _ = digits
    classifier, names = fitted
    probs = classifier.predict_proba(images[400:])
    np.testing.assert_allclose(probs.sum(axis=1), 1.0)
    assert classifier.classes_.tolist() == [f"digit {index}" for index in range(10)]
    assert log_loss(names[400:], probs, labels=classifier.classes_) < 1.5
    found = classifier.predict(images[400:])
    assert classifier.score(images[400:], names[400:]) == accuracy_score(names[400:], found) > 0.6
    assert (found == classifier.classes_[probs.argmax(axis=1)]).all()


def test_floats_are_scaled_as_in_fit_and_uint8_is_taken_as_it_is(digits, fitted):
    images, _ = digits
    classifier, _ = fitted
    assert classifier.pixel_range_ == (0.0, 16.0)
    pixels = np.rint(images[:5] / 16 * 255).astype(np.uint8)
    expected = classifier.ensemble_.predict_probs(pixels[:, None]).mean(axis=0)
    expected = expected ** (1 / float(classifier.ensemble_.temperature))
    np.testing.assert_allclose(
        classifier.predict_proba(images[:5]), expected / expected.sum(axis=1, keepdims=True), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("of_fit", "images", "refused"),
    [
        ((0.0, 255.0), np.linspace(0, 1, 64), True),
        ((0.0, 255.0), np.linspace(0, 255, 64), False),
        ((0.0, 255.0), np.zeros(64), False),
        ((0.0, 255.0), np.eye(8, dtype=np.uint8), False),
        ((0.0, 1.0), np.arange(64, dtype=np.uint8), True),
        ((0.0, 1.0), np.linspace(-0.1, 1.2, 64), False),
        ((0.0, 16.0), np.arange(64) % 17, False),
        ((0.0, 16.0), np.linspace(0, 1, 64), True),
        ((-2.0, 2.5), np.linspace(-2, 0.8, 64), False),
        ((-2.0, 2.5), np.arange(64, dtype=np.uint8), True),
    ],
)
def test_pixels_of_another_scale_than_those_of_fit_are_refused(of_fit, images, refused):
    classifier = EnsembleSearchClassifier()
    classifier.pixel_range_ = of_fit
    with pytest.raises(UserError, match="those of fit had") if refused else nullcontext():
        classifier._pixels(images.reshape(1, 8, 8))


def test_it_can_be_cloned_and_cross_validated(digits):
    classifier = EnsembleSearchClassifier(budget=1, device="cpu", random_state=3)
    assert clone(classifier).get_params() == classifier.get_params()
    scores = cross_val_score(classifier, digits[0][:200], digits[1][:200], cv=2)
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()


def test_a_search_is_what_it_does_without_a_budget(digits):
    classifier = EnsembleSearchClassifier(members=2, device="cpu", n_jobs=-1).fit(digits[0][:120], digits[1][:120])
    assert classifier.ensemble_.num_members == 2


def test_predict_before_fit_says_so(digits):
    with pytest.raises(NotFittedError):
        EnsembleSearchClassifier().predict(digits[0])


@pytest.mark.parametrize("jobs", [0, -2])
def test_a_number_of_jobs_that_means_nothing_is_refused(digits, jobs):
    with pytest.raises(UserError, match=f"n_jobs is {jobs}"):
        EnsembleSearchClassifier(budget=1, n_jobs=jobs).fit(*digits)


@pytest.mark.parametrize(
    ("images", "labels", "cause"),
    [
        (np.zeros((4, 64)), [0, 1, 0, 1], "of shape"),
        (np.zeros((4, 8, 6)), [0, 1, 0, 1], "of shape"),
        (np.zeros((4, 8, 8)), [0, 1, 0], "4 images and 3 labels"),
        (np.full((4, 8, 8), np.nan), [0, 1, 0, 1], "not finite"),
        (np.zeros((3, 8, 8)), [0, 1, 2], "cannot be split"),
    ],
)
def test_what_cannot_be_learnt_is_refused(images, labels, cause):
    with pytest.raises(UserError, match=cause):
        EnsembleSearchClassifier(budget=1).fit(images, labels)
