"""The fitted temperature against a dense grid and against temperatures that are known; cross-fitting by hand."""

import math

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import log_loss

from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles import fit_weights
from dnas_ens.metrics.calibration import (
    apply_temperature,
    calibrated_nll,
    cross_fit,
    fit_temperature,
    per_image_calibrated_nll,
)
from dnas_ens.metrics.scores import accuracy, nll


def draw_calibrated(seed, num_images, num_classes=4):
    """Probabilities and labels drawn from just these probabilities, so that the best T is 1."""
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.ones(num_classes), size=num_images)
    labels = (generator.random((num_images, 1)) > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return probs, labels


def test_apply_temperature_is_temperature_scaling_of_logits():
    logits = np.random.default_rng(0).normal(size=(50, 6))
    scaled = apply_temperature(softmax(logits, axis=1), 2.5)
    np.testing.assert_allclose(scaled, softmax(logits / 2.5, axis=1), rtol=1e-10)
    labels = np.arange(50) % 6
    assert calibrated_nll(softmax(logits, axis=1), labels, 2.5) == pytest.approx(log_loss(labels, scaled))
    probs = np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    np.testing.assert_array_equal(apply_temperature(probs, 1.0), probs)


def cost(probs, labels, temperature):
    """N NLL(T) + (ln T)^2 / (2 s^2), s = 0.5."""
    return len(labels) * nll(apply_temperature(probs, temperature), labels) + 2 * math.log(temperature) ** 2


@pytest.mark.parametrize(
    ("images", "seed", "distortion"), [(300, 0, 0.3), (300, 3, 4.0), (20, 0, 0.3), (20, 3, 4.0), (5000, 1, 6.0)]
)
def test_fit_equals_a_dense_grid(images, seed, distortion):
    probs, labels = draw_calibrated(seed, num_images=images)
    distorted = apply_temperature(probs, distortion)
    grid = np.exp(np.linspace(math.log(0.05), math.log(20.0), 3001))
    costs = [cost(distorted, labels, temperature) for temperature in grid]
    fitted = fit_temperature(distorted, labels)
    assert fitted == pytest.approx(grid[int(np.argmin(costs))], rel=2.1e-3)
    assert cost(distorted, labels, fitted) <= min(costs) + 1e-6
    if images == 5000:
        # With many images what was distorted is undone, whatever was expected.
        assert fitted == pytest.approx(1 / distortion, rel=0.1)


def test_images_without_an_error_or_without_information():
    # By hand: of N images with p = 1 / (1 + e^-m) of the right class, N m / (T (1 + e^(m / T))) = 4 ln (1 / T).
    margin = math.log(0.6 / 0.4)
    for count in (2, 60):
        fitted = fit_temperature([[0.6, 0.4]] * count, [0] * count)
        assert count * margin / (fitted * (1 + math.exp(margin / fitted))) == pytest.approx(
            -4 * math.log(fitted), rel=1e-3
        )
    # Sixty right answers leave something to doubt.
    assert apply_temperature([[0.6, 0.4]], fitted)[0, 0] < 0.96
    # Three of four sure answers are right.
    assert fit_temperature([[1.0, 0.0]] * 300 + [[0.0, 1.0]] * 100, [0] * 200 + [1] * 200) == pytest.approx(
        20.0, rel=1e-3
    )
    assert fit_temperature(np.full((5, 4), 0.25), [0, 1, 2, 3, 0]) == 1.0


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([0.05, 0.5, 1.0]), st.floats(0.1, 10.0))
def test_never_worse_on_val_and_the_ranking_stays(seed, num_images, concentration, other):
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(3, concentration), size=num_images)
    labels = generator.integers(3, size=num_images)
    temperature = fit_temperature(probs, labels)
    assert 0.05 <= temperature <= 20.0
    # Up to the floor of probabilities.
    assert calibrated_nll(probs, labels, temperature) <= nll(probs, labels) + 1e-10
    scaled = apply_temperature(probs, other)
    np.testing.assert_allclose(scaled.sum(axis=1), 1.0, rtol=1e-12)
    if probs.min() > 1e-12:
        assert accuracy(scaled, probs.argmax(axis=1)) == 1.0


@pytest.mark.parametrize("temperature", [0.0, math.nan])
def test_wrong_input_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        apply_temperature([[0.5, 0.5]], temperature)
    with pytest.raises(ValueError, match="labels"):
        fit_temperature([[0.5, 0.5]], [2])


def test_cross_fitting_by_hand_both_ways_round():
    made = tiny.predictions(4, 120, 3, sharpness=np.array([[0.2], [0.8], [1.5], [2.0]]), scale=2.0)
    val, val_labels, test, test_labels = made.val_probs, made.val_labels, made.test_probs, made.test_labels
    seen = []

    def fit(probs, labels):
        seen.append((probs, labels))
        return fit_weights(probs, labels).weights

    found = cross_fit(val, val_labels, test, test_labels, fit=fit)
    losses = []
    halves = alternating_halves(val_labels)
    for index, (mine, other) in enumerate((halves, halves[::-1])):
        # Each fit sees its half alone.
        np.testing.assert_array_equal(seen[index][0], val[:, mine])
        np.testing.assert_array_equal(seen[index][1], val_labels[mine])
        weights = fit_weights(val[:, mine], val_labels[mine]).weights
        temperature = fit_temperature(np.tensordot(weights, val[:, other], 1), val_labels[other])
        assert found.weights[index] == pytest.approx(weights)
        assert found.temperatures[index] == pytest.approx(temperature)
        logits = np.log(np.tensordot(weights, test, 1)) / temperature
        losses.append(log_loss(test_labels, softmax(logits, axis=1)))
    assert found.weights[0] != pytest.approx(found.weights[1])
    assert found.calibrated_nll == pytest.approx(np.mean(losses))
    assert found.per_image_calibrated_nll.shape == test_labels.shape
    alone = calibrated_nll(test[0], test_labels, fit_temperature(val[0], val_labels))
    assert per_image_calibrated_nll(val[0], val_labels, test[0], test_labels).mean() == pytest.approx(alone)
    with pytest.raises(ValueError, match="cannot be halved"):
        cross_fit(val[:, :1], val_labels[:1], test, test_labels, fit=fit)
