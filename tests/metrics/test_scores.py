"""Metrics against scikit-learn, torchmetrics and values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from dnas_ens.metrics import scores as metrics


def draw(seed: int, num_images: int = 400, num_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(num_classes, 0.6), size=num_images)
    return probs, generator.integers(num_classes, size=num_images)


@st.composite
def predictions(drawing: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    num_images, num_classes = drawing(st.integers(1, 12)), drawing(st.integers(1, 6))
    shape = (num_images, num_classes)
    masses = drawing(hnp.arrays(np.float64, shape, elements=st.floats(0.0, 1.0, width=16)))
    masses[:, 0] += masses.sum(axis=1) == 0.0
    labels = drawing(hnp.arrays(np.int64, num_images, elements=st.integers(0, num_classes - 1)))
    return masses / masses.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_and_nll_equal_scikit_learn(seed: int) -> None:
    probs, labels = draw(seed)
    assert metrics.accuracy(probs, labels) == accuracy_score(labels, probs.argmax(axis=1))
    assert metrics.nll(probs, labels) == pytest.approx(log_loss(labels, probs, labels=range(5)), rel=1e-12)


def test_brier_sums_over_classes() -> None:
    # (0.3^2 + 0.2^2 + 0.1^2) = 0.14 and (0.5^2 + 0.5^2) = 0.5, mean 0.32
    assert metrics.brier([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]], [0, 0]) == pytest.approx(0.32, rel=1e-12)
    assert metrics.brier([[1.0, 0.0]], [1]) == 2.0


def test_brier_of_two_classes_is_twice_the_binary_score() -> None:
    probs, labels = draw(3, num_classes=2)
    assert metrics.brier(probs, labels) == pytest.approx(2 * np.mean((probs[:, 1] - labels) ** 2), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ece15_equals_torchmetrics(seed: int) -> None:
    probs, labels = draw(seed, num_images=1000)
    witness = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1")
    expected = float(witness(torch.from_numpy(probs), torch.from_numpy(labels)))
    assert metrics.ece15(probs, labels) == pytest.approx(expected, abs=1e-6)


def test_ece15_bins_are_open_below_and_closed_above() -> None:
    # 0.80 and 0.79 lie in (11/15, 12/15], 0.81 in the next bin: |2 - 1.59| / 3 + |0 - 0.81| / 3
    probs = [[0.80, 0.20], [0.79, 0.21], [0.81, 0.19]]
    assert metrics.ece15(probs, [0, 0, 1]) == pytest.approx((0.41 + 0.81) / 3, rel=1e-12)


def test_ece15_counts_a_certain_prediction_with_its_neighbours() -> None:
    # 1.00 right and 0.95 wrong share the last bin: |1 - 1.95| / 2
    assert metrics.ece15([[1.0, 0.0], [0.95, 0.05]], [0, 1]) == pytest.approx(0.475, rel=1e-12)


def test_nll_of_an_impossible_label_is_finite() -> None:
    assert metrics.nll([[1.0, 0.0]], [1]) == pytest.approx(12 * math.log(10), rel=1e-12)
    assert math.copysign(1.0, metrics.nll([[1.0, 0.0]], [0])) == 1.0


def test_evaluate_probs_holds_every_metric() -> None:
    probs, labels = draw(5)
    assert metrics.evaluate_probs(probs, labels) == {
        "accuracy": metrics.accuracy(probs, labels),
        "nll": metrics.nll(probs, labels),
        "brier": metrics.brier(probs, labels),
        "ece15": metrics.ece15(probs, labels),
    }


def test_single_precision_is_computed_in_double() -> None:
    probs, labels = draw(6)
    single = probs.astype(np.float32)
    assert metrics.nll(single, labels) == metrics.nll(single.astype(np.float64), labels)


@given(predictions())
def test_metrics_stay_in_their_ranges(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    values = metrics.evaluate_probs(*drawn)
    limits = {"accuracy": 1.0, "nll": 12 * math.log(10), "brier": 2.0, "ece15": 1.0}
    for name, value in values.items():
        assert 0.0 <= value <= limits[name] + 1e-9, name


@given(predictions(), st.randoms(use_true_random=False))
def test_metrics_do_not_depend_on_the_order_of_images(drawn: tuple[np.ndarray, np.ndarray], random) -> None:
    probs, labels = drawn
    order = list(range(len(labels)))
    random.shuffle(order)
    shuffled = metrics.evaluate_probs(probs[order], labels[order])
    assert shuffled == pytest.approx(metrics.evaluate_probs(probs, labels), abs=1e-9)


@pytest.mark.parametrize("metric", [metrics.accuracy, metrics.nll, metrics.brier, metrics.ece15])
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([0.5, 0.5], [0], "shape"),
        (np.empty((0, 3)), np.empty(0, dtype=int), "empty"),
        ([[0.5, math.nan]], [0], "finite"),
        ([[1.5, -0.5]], [0], "negative"),
        ([[0.5, 0.4]], [0], "sum to 1"),
        ([[0.5, 0.5]], [0, 1], "labels must have shape"),
        ([[0.5, 0.5]], [0.0], "integers"),
        ([[0.5, 0.5]], [2], "0..1"),
        ([[0.5, 0.5]], [-1], "0..1"),
    ],
)
def test_wrong_input_is_named(metric: Callable[..., float], probs, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(probs, labels)
