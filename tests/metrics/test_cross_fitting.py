import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles import fit_weights
from dnas_ens.metrics.calibration import fit_temperature, per_image_calibrated_nll
from dnas_ens.metrics.cross_fitting import cross_fit


def predictions(num_images=120, seed=0):
    generator = np.random.default_rng(seed)

    def draw():
        labels = generator.integers(0, 3, num_images)
        logits = generator.normal(size=(4, num_images, 3))
        # Members of different worth.
        logits[:, np.arange(num_images), labels] += np.array([[0.2], [0.8], [1.5], [2.0]])
        return softmax(2 * logits, axis=-1), labels

    return (*draw(), *draw())


def log_loss_weights(probs, labels):
    return fit_weights(probs, labels).weights


def test_by_hand_both_ways_round():
    val, val_labels, test, test_labels = predictions()
    found = cross_fit(val, val_labels, test, test_labels, fit=log_loss_weights)
    losses = []
    halves = alternating_halves(val_labels)
    for index, (mine, other) in enumerate((halves, halves[::-1])):
        weights = log_loss_weights(val[:, mine], val_labels[mine])
        temperature = fit_temperature(np.tensordot(weights, val[:, other], 1), val_labels[other])
        assert found.weights[index] == pytest.approx(weights)
        assert found.temperatures[index] == pytest.approx(temperature)
        logits = np.log(np.tensordot(weights, test, 1)) / temperature
        losses.append(log_loss(test_labels, softmax(logits, axis=1)))
    assert found.weights[0] != pytest.approx(found.weights[1])
    assert found.calibrated_nll == pytest.approx(np.mean(losses))
    assert found.per_image_calibrated_nll.shape == test_labels.shape


def test_each_fit_sees_its_half_alone_and_never_test():
    val, val_labels, test, test_labels = predictions()
    seen = []

    def fit(probs, labels):
        seen.append((probs, labels))
        return np.ones(len(probs))

    found = cross_fit(val, val_labels, test, test_labels, fit=fit)
    for (probs, labels), half in zip(seen, alternating_halves(val_labels), strict=True):
        np.testing.assert_array_equal(probs, val[:, half])
        np.testing.assert_array_equal(labels, val_labels[half])
    np.testing.assert_allclose(found.weights, 0.25)
    shuffled = cross_fit(val, val_labels, test, test_labels[::-1], fit=fit)
    assert shuffled.temperatures == found.temperatures
    assert shuffled.calibrated_nll != found.calibrated_nll


def test_a_temperature_fitted_with_the_weights_flatters_on_val():
    # Weights that look up the labels they are fitted on: with the same images the temperature believes them.
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 40)
    guesses = generator.integers(0, 2, (2000, 80))
    probs = np.where(guesses[..., None] == np.arange(2), 0.9, 0.1)

    def fit(members, classes):
        right = (members.argmax(-1) == classes).mean(1)
        return np.eye(len(members))[right.argmax()]

    val, test = probs[:, :40], probs[:, 40:]
    test_labels = generator.integers(0, 2, 40)
    weights = fit(val, labels)
    naive = per_image_calibrated_nll(
        np.tensordot(weights, val, 1), labels, np.tensordot(weights, test, 1), test_labels
    ).mean()
    assert cross_fit(val, labels, test, test_labels, fit=fit).calibrated_nll < naive


def test_too_few_images():
    val, val_labels, test, test_labels = predictions()
    with pytest.raises(ValueError, match="cannot be halved"):
        cross_fit(val[:, :1], val_labels[:1], test, test_labels, fit=log_loss_weights)


def test_halves_are_as_stratified_as_scikit_learns():
    labels = np.random.default_rng(1).integers(0, 5, 101)
    ours = sorted(np.bincount(labels[half], minlength=5).tolist() for half in alternating_halves(labels))
    folds = StratifiedKFold(2).split(labels[:, None], labels)
    theirs = [np.bincount(labels[half], minlength=5) for _, half in folds]
    assert np.abs(np.subtract(*ours)).max() <= 1
    assert np.abs(np.subtract(*theirs)).max() <= 1
