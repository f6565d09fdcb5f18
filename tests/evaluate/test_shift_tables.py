import numpy as np
import pytest
import tiny
from scipy.stats import mannwhitneyu
from sklearn.metrics import log_loss

from dnas_ens.evaluate.shift_tables import (
    corruption_rows,
    detection_auroc,
    detection_rows,
    fit_on_clean,
    summarise,
)
from dnas_ens.metrics.calibration import fit_temperature

LABELS = range(4)


def tempered(probs, temperature):
    powers = probs ** (1 / temperature)
    return powers / powers.sum(-1, keepdims=True)


def test_rows_against_scikit_learn_with_temperatures_of_clean_val():
    clean = tiny.predictions(num_images=100, scale=2.0, weights=[0.5, 0.25, 0.25])
    val_probs, val_labels = clean.val_probs, clean.val_labels
    corrupted = tiny.predictions(num_images=80, sharpness=0.4, scale=2.0, seed=1)
    probs, labels = corrupted.test_probs, corrupted.test_labels
    fit = fit_on_clean(clean)
    best = int(np.argmin([log_loss(val_labels, p, labels=LABELS) for p in val_probs]))
    rows = {row["row"]: row for row in corruption_rows(probs, labels, fit, corruption="fog", severity=2)}
    assert list(rows) == ["ensemble", "average member", "best single"]
    assert all((row["corruption"], row["severity"]) == ("fog", 2) for row in rows.values())
    averaged = np.average(probs, axis=0, weights=[0.5, 0.25, 0.25])
    temperature = fit_temperature(np.average(val_probs, axis=0, weights=[0.5, 0.25, 0.25]), val_labels)
    ensemble = rows["ensemble"]
    assert ensemble["accuracy"] == pytest.approx((averaged.argmax(-1) == labels).mean())
    assert ensemble["nll"] == pytest.approx(log_loss(labels, averaged, labels=LABELS))
    assert ensemble["calibrated_nll"] == pytest.approx(log_loss(labels, tempered(averaged, temperature), labels=LABELS))
    own = [
        log_loss(labels, tempered(p, fit_temperature(v, val_labels)), labels=LABELS)
        for p, v in zip(probs, val_probs, strict=True)
    ]
    assert rows["average member"]["calibrated_nll"] == pytest.approx(np.mean(own))
    assert rows["best single"]["calibrated_nll"] == pytest.approx(own[best])
    assert rows["best single"]["nll"] == pytest.approx(log_loss(labels, probs[best], labels=LABELS))


def test_means_by_hand():
    accuracies = {
        ("ensemble", "a"): (0.9, 0.7),
        ("ensemble", "b"): (0.5, 0.1),
        ("best single", "a"): (0.8, 0.6),
        ("best single", "b"): (0.4, 0.0),
    }
    rows = [
        {
            "row": kind,
            "corruption": name,
            "severity": severity,
            "ece15": 0.1,
            "accuracy": accuracy,
            "nll": 1 - accuracy,
            "calibrated_nll": 2 * accuracy,
        }
        for (kind, name), both in accuracies.items()
        for severity, accuracy in zip((1, 5), both, strict=True)
    ]
    ensemble, best = summarise(rows)
    assert (ensemble["row"], best["row"]) == ("ensemble", "best single")
    assert ensemble["severities"][1]["accuracy"] == pytest.approx(0.7)
    assert ensemble["severities"][5]["accuracy"] == pytest.approx(0.4)
    assert ensemble["mean_corruption_error"] == pytest.approx(0.45)
    assert ensemble["calibrated_nll"] == pytest.approx(1.1)
    assert best["mean_corruption_error"] == pytest.approx(0.55)
    assert summarise([]) == []


def test_auroc_by_hand_and_by_the_rank_test():
    assert detection_auroc([0.1, 0.2], [0.3, 0.4]) == 1.0
    assert detection_auroc([0.3, 0.4], [0.1]) == 0.0
    assert detection_auroc([0.1, 0.5], [0.5, 0.9]) == pytest.approx(7 / 8)
    rng = np.random.default_rng(0)
    own, foreign = rng.normal(size=40), rng.normal(0.7, size=90)
    assert detection_auroc(own, foreign) == pytest.approx(mannwhitneyu(foreign, own).statistic / (40 * 90))


def test_disagreeing_members_are_told_by_mutual_information_and_flat_ones_by_entropy():
    sure = np.eye(4)[[0, 1, 2, 3] * 5] * 0.96 + 0.01
    own = np.stack([sure, sure])
    disagreeing = np.stack([sure, sure[::-1]])
    rows = detection_rows(own, disagreeing, None, name="other")
    assert [row["row"] for row in rows] == ["ensemble", "average member"]
    assert rows[0]["auroc_entropy"] == rows[0]["auroc_mutual_information"] == 1.0
    # Each member alone is as sure of these as of its own.
    assert rows[1]["auroc_entropy"] == 0.5
    assert rows[1]["auroc_mutual_information"] is None
    flat = np.full((2, 7, 4), 0.25)
    ensemble, average = detection_rows(own, flat, None, name="flat")
    assert ensemble["num_images"] == 7
    assert (ensemble["auroc_entropy"], average["auroc_entropy"]) == (1.0, 1.0)
    assert ensemble["auroc_mutual_information"] == pytest.approx(0.5, abs=0.5)
    alone, _ = detection_rows(own[:1], own[:1], None, name="same")
    assert (alone["auroc_entropy"], alone["auroc_mutual_information"]) == (0.5, None)
