from __future__ import annotations

import numpy as np
import pytest

from dnas_ens.metrics.significance import paired_difference
from dnas_ens.report import wording


def test_headline():
    said = wording.headline(5, different=True, accuracy=0.98607, num_images=1359, data="digits")
    assert (
        said == "Five different networks together classify 98.6\u202f% of 1,359 test images of digits right."
    )
    assert wording.headline(1, different=True, accuracy=1.0, num_images=1, data="x") == (
        "One network classifies 100.0\u202f% of 1 test image of x right."
    )


def against(first, second):
    difference = paired_difference(first, second)
    return wording.against_best(difference, num_images=len(first), ours=first.mean(), other=second.mean())


def test_losses_are_told_as_plainly_as_wins():
    rng = np.random.default_rng(0)
    low, high = rng.normal(1.0, 0.1, 200), rng.normal(2.0, 0.1, 200)
    assert against(low, high).startswith("Together they are better than the best one of them alone: 1.0")
    assert against(high, low).startswith("Together they are worse than the best one of them alone: 1.99")
    assert "cannot be told from 200 images" in against(low, rng.permutation(low))
    assert against(low, low) == "The ensemble predicts the same as its best member."


def test_place_among_methods():
    rows = [
        {"name": "ours", "calibrated_nll": 0.03, "cpu_seconds": 10.0},
        {"name": "other", "calibrated_nll": 0.02, "cpu_seconds": 25.0},
        {"name": "third", "calibrated_nll": 0.04},
    ]
    assert wording.place_among(rows, 0) == (
        "Of the 3 rows compared it comes second in calibrated NLL (0.0300); the lowest is 0.0200, of “other”, "
        "for 2.5 times the CPU time."
    )
    assert wording.place_among(rows, 1) == "Of the 3 rows compared it comes first in calibrated NLL (0.0200)."


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(9.6, "10 s"), (99.4, "99 s"), (372, "6 min 12 s"), (1800, "30 min"), (7260, "2 h 1 min")],
)
def test_duration(seconds, said):
    assert wording.duration(seconds).replace("\u202f", " ") == said


def test_signs():
    assert wording.minus_signs("(-0.1 to -2e-05), well-known, p-1") == "(−0.1 to −2e-05), well-known, p-1"
    assert wording.interval((float("nan"), float("nan")), digits=2) == ""
