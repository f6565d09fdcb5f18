"""The fitted temperature against a dense grid and against temperatures that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from dnas_ens.metrics.calibration import (
    apply_temperature,
    calibrated_nll,
    fit_temperature,
    per_image_calibrated_nll,
)
from dnas_ens.metrics.scores import accuracy, nll


def draw_calibrated(seed: int, num_images: int, num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels drawn from just these probabilities, so that the best T is 1."""
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.ones(num_classes), size=num_images)
    labels = (generator.random((num_images, 1)) > probs.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return probs, labels


def test_apply_temperature_is_temperature_scaling_of_logits() -> None:
    logits = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = apply_temperature(torch.softmax(logits, dim=1).numpy(), 2.5)
    np.testing.assert_allclose(scaled, softmax(logits.numpy() / 2.5, axis=1), rtol=1e-10)


def test_apply_temperature_by_hand() -> None:
    # T = 1/2 squares: (0.36, 0.16) / 0.52
    np.testing.assert_allclose(apply_temperature([[0.6, 0.4]], 0.5), [[0.36 / 0.52, 0.16 / 0.52]], rtol=1e-12)


def test_temperature_one_is_the_identity() -> None:
    probs = np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    np.testing.assert_array_equal(apply_temperature(probs, 1.0), probs)


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 1.7, 5.0])
def test_a_known_distortion_is_recovered(true_temperature: float) -> None:
    probs, labels = draw_calibrated(0, num_images=40_000)
    distorted = apply_temperature(probs, 1.0 / true_temperature)
    assert fit_temperature(distorted, labels) == pytest.approx(true_temperature, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_fit_equals_a_dense_grid(seed: int) -> None:
    probs, labels = draw_calibrated(seed, num_images=300)
    distorted = apply_temperature(probs, [0.3, 0.8, 1.5, 4.0][seed])
    grid = np.exp(np.linspace(math.log(0.05), math.log(20.0), 3001))
    losses = [nll(apply_temperature(distorted, temperature), labels) for temperature in grid]
    fitted = fit_temperature(distorted, labels)
    assert fitted == pytest.approx(grid[int(np.argmin(losses))], rel=2.1e-3)
    assert nll(apply_temperature(distorted, fitted), labels) <= min(losses) + 1e-12


def test_the_ends_of_the_range_are_reached() -> None:
    right = np.array([[0.6, 0.4], [0.3, 0.7]])
    assert fit_temperature(right, [0, 1]) == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature(right, [1, 0]) == pytest.approx(20.0, rel=1e-3)


def test_uniform_probabilities_keep_temperature_one() -> None:
    assert fit_temperature(np.full((5, 4), 0.25), [0, 1, 2, 3, 0]) == 1.0


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([0.05, 0.5, 1.0]))
def test_never_worse_on_the_data_it_was_fitted_on(seed: int, num_images: int, concentration: float) -> None:
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(3, concentration), size=num_images)
    labels = generator.integers(3, size=num_images)
    temperature = fit_temperature(probs, labels)
    assert 0.05 <= temperature <= 20.0
    assert calibrated_nll(probs, labels, temperature) <= nll(probs, labels)


@given(st.integers(0, 10_000), st.floats(0.1, 10.0))
def test_temperature_keeps_rows_normalised_and_the_ranking(seed: int, temperature: float) -> None:
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.ones(5), size=8)
    scaled = apply_temperature(probs, temperature)
    np.testing.assert_allclose(scaled.sum(axis=1), 1.0, rtol=1e-12)
    assert accuracy(scaled, probs.argmax(axis=1)) == 1.0


def test_overconfident_zeros_survive() -> None:
    probs = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = np.array([0, 0, 1, 1])
    temperature = fit_temperature(probs, labels)
    # 3 of 4 right asks for a top probability of 3/4, 1e12^(1/T) = 3 or T = 25: beyond the range, so 20.
    best = apply_temperature(probs, 20.0)[0, 0]
    assert temperature == pytest.approx(20.0, rel=1e-3)
    assert best == pytest.approx(1 / (1 + 1e-12 ** (1 / 20)), rel=1e-9)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        apply_temperature([[0.5, 0.5]], temperature)


def test_labels_are_validated() -> None:
    with pytest.raises(ValueError, match="labels"):
        fit_temperature([[0.5, 0.5]], [2])


def test_per_image_calibrated_nll_is_that_of_the_temperature_on_val():
    generator = np.random.default_rng(3)
    val, test = (generator.dirichlet(np.ones(4), size=size) for size in (200, 50))
    val_labels, test_labels = (generator.integers(0, 4, size) for size in (200, 50))
    temperature = fit_temperature(val, val_labels)
    raised = test ** (1.0 / temperature)
    expected = -np.log((raised / raised.sum(axis=1, keepdims=True))[np.arange(50), test_labels])
    losses = per_image_calibrated_nll(val, val_labels, test, test_labels)
    np.testing.assert_allclose(losses, expected)
    assert losses.mean() == pytest.approx(calibrated_nll(test, test_labels, temperature))
