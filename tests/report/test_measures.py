from __future__ import annotations

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
    """Rows with intervals as a report has them."""
    return rows_with_intervals(RunFiles(folder=Path("run"), config={}, predictions=given, rows=result_rows(given)))


def test_intervals_agree_with_the_normal_approximation(predictions):
    given = predictions(3, 2000, 4, sharpness=1.5)
    found = with_rows(given)
    assert [row.role for row in found] == ["member"] * 3 + ["best", "average", "ensemble"]
    for row in found:
        assert row.losses.mean() == pytest.approx(
            row.values["calibrated_nll"], abs=2e-3 if row.role == "average" else 1e-6
        )
        half = norm.ppf(0.975) * row.losses.std() / math.sqrt(len(row.losses))
        low, high = row.calibrated_nll_interval
        assert (high - low) / 2 == pytest.approx(half, rel=0.1)
        share = row.values["accuracy"]
        low, high = row.accuracy_interval
        assert low < share < high
        if row.role != "average":
            assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 2000), rel=0.1)


def test_no_interval_where_nothing_varies(predictions):
    given = predictions(2, 12, 3, sharpness=30.0)
    assert all(math.isnan(row.accuracy_interval[0]) for row in with_rows(given))


def test_reliability_holds_the_calibration_error(predictions):
    given = predictions(1, 400, 5, sharpness=1.0)
    probs, labels = given.test_probs[0].astype(np.float64), given.test_labels
    bins = reliability(probs, labels)
    error = (bins.counts * np.abs(bins.accuracy - bins.confidence)).sum() / bins.counts.sum()
    witness = multiclass_calibration_error(from_numpy(probs), from_numpy(labels), 5, n_bins=15)
    assert error == pytest.approx(float(witness), abs=1e-6)
    assert bins.histogram.sum() == pytest.approx(1.0)
    assert len(bins.histogram) == 15
    # Wilson's interval in closed form.
    share, number, z = bins.accuracy, bins.counts, norm.ppf(0.975)
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    np.testing.assert_allclose(bins.low, np.clip(middle - half, 0, 1), atol=1e-9)
    np.testing.assert_allclose(bins.high, np.clip(middle + half, 0, 1), atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 3), (20, 3), (40, 2)], ids=["all alike", "few images", "two classes"])
def test_embedding_says_nothing_of_too_little(shape):
    assert embed(np.full(shape, 1 / shape[1])) is None


def test_embedding_of_many_images_draws_some(predictions, monkeypatch):
    monkeypatch.setattr("dnas_ens.report.members.MAX_EMBEDDED", 40)
    found = embed(predictions(1, 60, 3).test_probs[0].astype(np.float64))
    assert found is not None
    positions, chosen = found
    assert positions.shape == (40, 2)
    assert len(set(chosen.tolist())) == 40
