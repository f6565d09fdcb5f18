"""Metrics against scikit-learn, torchmetrics and values computed by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from dnas_ens.metrics import scores as metrics


def test_against_scikit_learn_and_torchmetrics():
    generator = np.random.default_rng(0)
    probs, labels = generator.dirichlet(np.full(5, 0.6), size=400), generator.integers(5, size=400)
    witness = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1")
    found = metrics.evaluate_probs(probs.astype(np.float32), labels)
    expected = {
        "accuracy": accuracy_score(labels, probs.argmax(axis=1)),
        "nll": log_loss(labels, probs, labels=range(5)),
        "brier": ((probs - np.eye(5)[labels]) ** 2).sum(axis=1).mean(),
        "ece15": float(witness(torch.from_numpy(probs), torch.from_numpy(labels))),
    }
    assert found == pytest.approx(expected, abs=1e-6)
    for name, value in metrics.evaluate_probs(probs, labels).items():
        assert getattr(metrics, name)(probs, labels) == getattr(metrics, name).of(probs, labels) == value
    assert metrics.nll(probs, labels) == pytest.approx(expected["nll"], rel=1e-12)


@pytest.mark.parametrize(
    ("metric", "probs", "labels", "expected"),
    [
        # A sum over classes: (0.3^2 + 0.2^2 + 0.1^2) = 0.14 and (0.5^2 + 0.5^2) = 0.5, mean 0.32.
        (metrics.brier, [[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]], [0, 0], 0.32),
        (metrics.brier, [[1.0, 0.0]], [1], 2.0),
        # Bins are open below and closed above: 0.80 and 0.79 lie in (11/15, 12/15], 0.81 in the next one.
        (metrics.ece15, [[0.80, 0.20], [0.79, 0.21], [0.81, 0.19]], [0, 0, 1], (0.41 + 0.81) / 3),
        # 1.00 right and 0.95 wrong share the last bin: |1 - 1.95| / 2.
        (metrics.ece15, [[1.0, 0.0], [0.95, 0.05]], [0, 1], 0.475),
        # An impossible label costs -ln 1e-12, a certain one 0 and not -0.
        (metrics.nll, [[1.0, 0.0]], [1], 12 * math.log(10)),
        (lambda *given: math.copysign(1.0, metrics.nll(*given)), [[1.0, 0.0]], [0], 1.0),
        # One of two cats right, all of the six ships: (1/2 + 1) / 2; dogs do not occur.
        (metrics.balanced_accuracy, np.eye(3)[[0, *[1] * 7]], [0, 0] + [1] * 6, 0.75),
    ],
)
def test_by_hand(metric, probs, labels, expected):
    assert metric(probs, labels) == pytest.approx(expected, rel=1e-12)


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
        ([[0.5, 0.5]], [-1], "0..1"),
    ],
)
def test_wrong_input_is_named(probs, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.nll(probs, labels)
