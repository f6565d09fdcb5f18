"""Intervals and tests against scipy, closed forms and simulation."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from dnas_ens.metrics.significance import (
    compare,
    holm,
    mean_and_deviation,
    nested_spread,
    paired_difference,
    t_interval,
)


def draws(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_intervals_and_p_values_against_scipy():
    gap = draws(0, 4000) * 0.3 - 0.005
    found = paired_difference(gap + 1.0, np.ones(4000))
    student = stats.ttest_1samp(gap, 0.0)
    assert found.mean == pytest.approx(gap.mean())
    assert found.over_images == pytest.approx(tuple(student.confidence_interval(0.95)), abs=6e-4)
    assert found.p_value == pytest.approx(student.pvalue, abs=0.02)
    assert found.effect_size == pytest.approx(gap.mean() / gap.std(ddof=1))
    # Few images have few changes of sign: all of them are counted.
    gap = np.array([0.5, -0.1, 0.9, 0.3, 0.7, -0.2, 0.4, 0.8])
    means = [np.mean(gap * signs) for signs in product((-1, 1), repeat=8)]
    exact = np.mean(np.abs(means) >= abs(gap.mean()) - 1e-12)
    assert paired_difference(gap, np.zeros(8)).p_value == pytest.approx(exact)
    seeds = paired_difference(np.array([[0.1, 0.3], [0.2, 0.0], [0.6, 0.2]]), np.zeros((3, 2))).over_seeds
    assert seeds == pytest.approx(stats.t.interval(0.95, 2, loc=0.7 / 3, scale=stats.sem([0.2, 0.1, 0.4])))
    assert t_interval([0.2, 0.2]) == (0.2, 0.2)


def test_compare_corrects_for_the_number_of_methods():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    first = draws(1, 3, 200) * 0.1
    others = {"a": first + 0.02 + 0.1 * draws(2, 3, 200), "b": first + 0.1 * draws(3, 3, 200)}
    alone = [paired_difference(first, losses).p_value for losses in others.values()]
    found = compare(first, others)
    assert [(name, each.p_value) for name, each in found.items()] == list(zip("ab", holm(alone), strict=True))


def test_verdicts():
    images = draws(4, 500) * 0.05
    # A difference that is the same everywhere has no spread; small losses may differ.
    assert paired_difference(images + 0.5, images).effect_size == np.inf
    small = np.tile([2e-5, 3e-5], 250)
    assert not paired_difference(small, 4 * small).same
    same = paired_difference(images, images + 1e-6)
    assert (same.same, same.verdict) == (True, "the same")
    assert same.sentence("A", "B") == "A predicts the same as B."
    noise = paired_difference(draws(5, 500), draws(6, 500))
    assert noise.verdict == "not distinguishable at this size"
    assert noise.sentence("A", "B").startswith("A and B are not distinguishable at this size (")
    one = paired_difference(images - 0.1, np.zeros(500))
    assert one.sentence("A", "B").startswith("A is better than B on these networks; one seed tells nothing beyond them")
    steady = np.stack([images + 0.1, images + 0.11, images + 0.12])
    assert paired_difference(steady, np.zeros((3, 500))).verdict == "worse"
    unsteady = paired_difference(np.stack([images - 0.3, images + 0.02, images - 0.02]), np.zeros((3, 500)))
    assert unsteady.verdict == "better on these networks, but not distinguishable over seeds"


def test_nested_spread():
    generator = np.random.default_rng(0)
    values = 5.0 + 2.0 * generator.normal(size=(4000, 1)) + 0.5 * generator.normal(size=(4000, 3))
    found = nested_spread(values)
    assert (found.mean, found.between, found.within) == pytest.approx((5.0, 2.0, 0.5), rel=0.04)
    for few, between, within in (
        ([[1.0, 3.0]], math.nan, math.sqrt(2.0)),
        ([[1.0], [3.0]], math.sqrt(2.0), math.nan),
        # What retraining adds explains the spread of the means: nothing is left for the searches.
        ([[0.0, 2.0], [0.1, 2.1]], 0.0, math.sqrt(2.0)),
    ):
        found = nested_spread(few)
        assert (found.between, found.within) == pytest.approx((between, within), nan_ok=True)
    with pytest.raises(ValueError, match="shape"):
        nested_spread([1.0, 2.0])
    assert mean_and_deviation([1.0, 2.0, 3.0], digits=2) == "2.00 ± 1.00"
    assert mean_and_deviation([1.5], digits=1) == "1.5"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.zeros(3), np.zeros(4), "the same seeds and images"),
        (np.zeros(1), np.zeros(1), "N of 2 or more"),
        (np.array([0.0, np.nan]), np.zeros(2), "finite"),
        (np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), "shape"),
    ],
)
def test_what_cannot_be_compared(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second)
