import numpy as np
import pytest
from methods.searched import LEAST_CROSSED, _by_log_loss, _weighted

from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles.weighting import fit_weights
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.metrics.calibration import per_image_calibrated_nll


def predictions(num_val):
    generator = np.random.default_rng(0)
    labels = {"val": generator.integers(0, 3, num_val), "test": generator.integers(0, 3, 40)}
    probs = {
        name: generator.dirichlet(np.ones(3), size=(2, len(of))) * 0.5
        + 0.5 * np.eye(3)[of] * np.array([1.0, 0.3])[:, None, None]
        for name, of in labels.items()
    }
    return Predictions(
        val_probs=probs["val"] / probs["val"].sum(-1, keepdims=True),
        val_labels=labels["val"],
        test_probs=probs["test"] / probs["test"].sum(-1, keepdims=True),
        test_labels=labels["test"],
        classes=["a", "b", "c"],
        weights=[0.5, 0.5],
    )


def test_weights_and_temperature_come_from_different_halves_of_a_large_val():
    given = predictions(LEAST_CROSSED)
    found = _weighted(given, _by_log_loss)
    assert found["predictions"].weights == pytest.approx(
        fit_weights(given.val_probs, given.val_labels).weights
    )
    losses = []
    halves = alternating_halves(given.val_labels)
    for own, other in (halves, halves[::-1]):
        weights = fit_weights(given.val_probs[:, own], given.val_labels[own]).weights
        val, test = (
            np.tensordot(weights, probs, 1) for probs in (given.val_probs[:, other], given.test_probs)
        )
        losses.append(per_image_calibrated_nll(val, given.val_labels[other], test, given.test_labels))
    np.testing.assert_allclose(found["cross_fit"].per_image_calibrated_nll, np.mean(losses, axis=0))


def test_a_small_val_is_not_halved():
    assert "cross_fit" not in _weighted(predictions(LEAST_CROSSED - 1), _by_log_loss)
