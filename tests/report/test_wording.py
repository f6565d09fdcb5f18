import numpy as np

from dnas_ens.metrics.significance import paired_difference
from dnas_ens.report.build import against_best, place_among
from dnas_ens.report.parts import duration, interval, minus_signs
from dnas_ens.report.results import Row


def against(*losses):
    unknown = {"accuracy_interval": (0.0, 1.0), "calibrated_nll_interval": (0.0, 1.0)}
    ours, best = (Row(values={"calibrated_nll": each.mean()}, role="", losses=each, **unknown) for each in losses)
    return against_best(paired_difference(*losses), ours=ours, best=best)


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
    assert place_among(rows, 0).endswith("the lowest is 0.0200, of “other”, for 2.5 times the CPU time.")
    assert "comes first in calibrated NLL (0.0200)" in place_among(rows, 1)


def test_figures_in_words():
    said = [duration(seconds).replace("\u202f", " ") for seconds in (9.6, 372, 1800, 7260)]
    assert said == ["10 s", "6 min 12 s", "30 min", "2 h 1 min"]
    assert minus_signs("(-0.1 to -2e-05), well-known, p-1") == "(−0.1 to −2e-05), well-known, p-1"
    assert interval((float("nan"), float("nan")), digits=2) == ""
