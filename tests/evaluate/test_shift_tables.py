from itertools import product

import numpy as np
import pytest
import tiny
from sklearn.metrics import log_loss

from dnas_ens.evaluate.shift_tables import corruption_rows, detection_rows, fit_on_clean, summarise
from dnas_ens.metrics.calibration import fit_temperature

LABELS = range(4)


def tempered(probs, temperature):
    powers = probs ** (1 / temperature)
    return powers / powers.sum(-1, keepdims=True)


def test_rows_against_scikit_learn_with_temperatures_of_clean_val():
    weights = [0.5, 0.25, 0.25]
    clean = tiny.predictions(num_images=100, scale=2.0, weights=weights)
    val_probs, val_labels = clean.val_probs, clean.val_labels
    corrupted = tiny.predictions(num_images=80, sharpness=0.4, scale=2.0, seed=1)
    probs, labels = corrupted.test_probs, corrupted.test_labels
    best = int(np.argmin([log_loss(val_labels, p, labels=LABELS) for p in val_probs]))
    found = corruption_rows(probs, labels, fit_on_clean(clean), corruption="fog", severity=2)
    rows = {row["row"]: row for row in found}
    averaged = np.average(probs, axis=0, weights=weights)
    temperature = fit_temperature(np.average(val_probs, axis=0, weights=weights), val_labels)
    ensemble = rows["ensemble"]
    assert ensemble["accuracy"] == pytest.approx((averaged.argmax(-1) == labels).mean())
    assert ensemble["nll"] == pytest.approx(log_loss(labels, averaged, labels=LABELS))
    assert ensemble["calibrated_nll"] == pytest.approx(log_loss(labels, tempered(averaged, temperature), labels=LABELS))
    fitted = [tempered(p, fit_temperature(v, val_labels)) for p, v in zip(probs, val_probs, strict=True)]
    own = [log_loss(labels, p, labels=LABELS) for p in fitted]
    assert rows["average member"]["calibrated_nll"] == pytest.approx(np.mean(own))
    assert rows["best single"]["calibrated_nll"] == pytest.approx(own[best])
    assert rows["best single"]["nll"] == pytest.approx(log_loss(labels, probs[best], labels=LABELS))


def test_means_by_hand():
    rows = [
        {"row": kind, "corruption": name, "severity": severity, "accuracy": accuracy, "ece15": 0.1, "nll": 1.0}
        for kind, accuracies in (("ensemble", (0.9, 0.7, 0.5, 0.1)), ("best single", (0.8, 0.6, 0.4, 0.0)))
        for (name, severity), accuracy in zip(product("ab", (1, 5)), accuracies, strict=True)
    ]
    ensemble, best = summarise([{**row, "calibrated_nll": 2 * row["accuracy"]} for row in rows])
    assert (ensemble["row"], best["row"]) == ("ensemble", "best single")
    assert ensemble["severities"][1]["accuracy"] == pytest.approx(0.7)
    assert ensemble["severities"][5]["accuracy"] == pytest.approx(0.4)
    assert ensemble["mean_corruption_error"] == pytest.approx(0.45)
    assert ensemble["calibrated_nll"] == pytest.approx(1.1)
    assert best["mean_corruption_error"] == pytest.approx(0.55)


def test_disagreeing_members_are_told_by_mutual_information_and_flat_ones_by_entropy():
    sure = np.eye(4)[[0, 1, 2, 3] * 5] * 0.96 + 0.01
    own = np.stack([sure, sure])
    ensemble, average = detection_rows(own, np.stack([sure, sure[::-1]]), None, name="disagreeing")
    assert ensemble["auroc_entropy"] == ensemble["auroc_mutual_information"] == 1.0
    # Each member alone is as sure of these as of its own.
    assert (average["auroc_entropy"], average["auroc_mutual_information"]) == (0.5, None)
    ensemble, average = detection_rows(own, np.full((2, 7, 4), 0.25), None, name="flat")
    assert (ensemble["num_images"], ensemble["auroc_entropy"], average["auroc_entropy"]) == (7, 1.0, 1.0)
    alone, _ = detection_rows(own[:1], own[:1], None, name="same")
    assert (alone["auroc_entropy"], alone["auroc_mutual_information"]) == (0.5, None)
