import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from torch import from_numpy
from torchmetrics.functional.classification import multiclass_calibration_error

from dnas_ens.evaluate.tables import result_rows
from dnas_ens.report.members import embed
from dnas_ens.report.predictions import reliability
from dnas_ens.report.results import rows_with_intervals
from dnas_ens.report.run_files import RunFiles


def with_rows(given):
    return rows_with_intervals(RunFiles(folder=Path("run"), config={}, predictions=given, rows=result_rows(given)))


def test_intervals_agree_with_the_normal_approximation(predictions):
    found = with_rows(predictions(3, 2000, 4, sharpness=1.5))
    assert [row.role for row in found] == ["member"] * 3 + ["best", "average", "ensemble"]
    z = norm.ppf(0.975)
    for row in found:
        average = row.role == "average"
        assert row.losses.mean() == pytest.approx(row.values["calibrated_nll"], abs=2e-3 if average else 1e-6)
        low, high = row.calibrated_nll_interval
        assert (high - low) / 2 == pytest.approx(z * row.losses.std() / math.sqrt(len(row.losses)), rel=0.1)
        share, (low, high) = row.values["accuracy"], row.accuracy_interval
        assert low < share < high
        assert average or (high - low) / 2 == pytest.approx(z * math.sqrt(share * (1 - share) / 2000), rel=0.1)
    # There is none where nothing varies.
    sure = with_rows(predictions(2, 12, 3, sharpness=30.0))
    assert all(math.isnan(row.accuracy_interval[0]) for row in sure)


def test_reliability_holds_the_calibration_error(predictions):
    given = predictions(1, 400, 5, sharpness=1.0)
    probs, labels = given.test_probs[0].astype(np.float64), given.test_labels
    bins = reliability(probs, labels)
    error = (bins.counts * np.abs(bins.accuracy - bins.confidence)).sum() / bins.counts.sum()
    witness = multiclass_calibration_error(from_numpy(probs), from_numpy(labels), 5, n_bins=15)
    assert error == pytest.approx(float(witness), abs=1e-6)
    # Wilson's interval in closed form.
    share, number, z = bins.accuracy, bins.counts, norm.ppf(0.975)
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    np.testing.assert_allclose(bins.low, np.clip(middle - half, 0, 1), atol=1e-9)
    np.testing.assert_allclose(bins.high, np.clip(middle + half, 0, 1), atol=1e-9)


def test_the_report_states_what_predict_does(predictions, tmp_path):
    from dnas_ens.metrics.scores import ece15
    from dnas_ens.report.predictions import calibration_section

    given = predictions(3, 500, 4, sharpness=1.0)
    files = RunFiles(folder=tmp_path, config={}, predictions=given, rows=result_rows(given))
    # One temperature is fitted on val.
    mean = given.test_probs.astype(np.float64).mean(axis=0)
    temperature = files.rows[-1]["temperature"]
    assert temperature < 0.9
    powers = mean ** (1 / temperature)
    stated = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(files.stated, stated, rtol=1e-6)
    error = float(multiclass_calibration_error(from_numpy(stated), from_numpy(given.test_labels), 4, n_bins=15))
    assert error < 0.5 * ece15(mean, given.test_labels)
    caption = calibration_section(files).pictures[0].caption
    assert f"error {100 * error:.1f} points; before the temperature" in caption
    assert f"{100 * ece15(mean, given.test_labels):.1f}." in caption


def test_embedding_draws_some_of_many_images_and_none_of_too_few(predictions, monkeypatch):
    # All alike; few images; two classes.
    assert [embed(np.full(shape, 1 / shape[1])) for shape in ((40, 3), (20, 3), (40, 2))] == [None] * 3
    monkeypatch.setattr("dnas_ens.report.members.MAX_EMBEDDED", 40)
    positions, chosen = embed(predictions(1, 60, 3).test_probs[0].astype(np.float64))
    assert positions.shape == (40, 2)
    assert len(set(chosen.tolist())) == 40
