"""Intervals and tests against scipy, closed forms and simulation."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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


def test_the_interval_over_images_is_the_normal_one_for_many_images():
    gap = draws(0, 4000) * 0.3 - 0.02
    found = paired_difference(gap + 1.0, np.ones(4000))
    half = 1.96 * gap.std(ddof=1) / math.sqrt(4000)
    assert found.mean == pytest.approx(gap.mean())
    assert found.over_images == pytest.approx((gap.mean() - half, gap.mean() + half), abs=half / 15)
    assert found.effect_size == pytest.approx(gap.mean() / gap.std(ddof=1))


def test_the_p_value_is_that_of_all_sign_changes():
    gap = np.array([0.5, -0.1, 0.9, 0.3, 0.7, -0.2, 0.4, 0.8])
    means = [np.mean(gap * signs) for signs in product((-1, 1), repeat=8)]
    exact = np.mean(np.abs(means) >= abs(gap.mean()) - 1e-12)
    assert paired_difference(gap, np.zeros(8)).p_value == pytest.approx(exact)


def test_the_interval_over_seeds_is_students():
    gaps = np.array([[0.1, 0.3], [0.2, 0.0], [0.6, 0.2]])
    found = paired_difference(gaps, np.zeros((3, 2)))
    low, high = stats.t.interval(0.95, 2, loc=0.7 / 3, scale=stats.sem([0.2, 0.1, 0.4]))
    assert found.over_seeds == pytest.approx((low, high))


def test_intervals_cover_at_their_level():
    """Of 200 simulated comparisons with a true difference of 0.1 about 95 % of the intervals hold it."""
    hits_images = hits_seeds = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        values = 0.1 + generator.normal(size=60)
        drawn = paired_difference(values, np.zeros(60)).over_images
        hits_images += drawn[0] <= 0.1 <= drawn[1]
        ends = t_interval(0.1 + generator.normal(size=5))
        hits_seeds += ends[0] <= 0.1 <= ends[1]
    # Four standard deviations of a binomial of 200 and 0.95 are 0.062; a bootstrap is a little narrow at N=60.
    assert 0.88 <= hits_images / 200 <= 1.0
    assert 0.888 <= hits_seeds / 200 <= 1.0


def test_p_values_are_uniform_where_nothing_differs():
    p_values = [paired_difference(draws(seed, 80), np.zeros(80)).p_value for seed in range(200)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    corrected = holm(p_values)
    for raw, value in zip(p_values, corrected, strict=True):
        assert min(raw, 1.0) <= value <= 1.0
    smallest = int(np.argmin(p_values))
    assert corrected[smallest] == pytest.approx(min(1.0, len(p_values) * p_values[smallest]))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)


def test_compare_corrects_for_the_number_of_methods():
    first = draws(1, 3, 200) * 0.1
    others = {"a": first + 0.02 + 0.1 * draws(2, 3, 200), "b": first + 0.1 * draws(3, 3, 200)}
    found = compare(first, others)
    alone = {name: paired_difference(first, losses).p_value for name, losses in others.items()}
    assert list(found) == ["a", "b"]
    assert [each.p_value for each in found.values()] == pytest.approx(holm([alone["a"], alone["b"]]))


def test_verdicts():
    images = draws(4, 500) * 0.05
    # A difference that is the same everywhere has no spread; small losses may differ.
    assert paired_difference(images + 0.5, images).effect_size == np.inf
    assert paired_difference(images, images + 0.5).effect_size == -np.inf
    small = np.tile([2e-5, 3e-5], 250)
    assert not paired_difference(small, 4 * small).same
    same = paired_difference(images, images + 1e-6)
    assert same.same
    assert same.verdict == "the same"
    assert same.sentence("A", "B") == "A predicts the same as B."
    noise = paired_difference(draws(5, 500), draws(6, 500))
    assert noise.verdict == "not distinguishable at this size"
    assert noise.sentence("A", "B").startswith("A and B are not distinguishable at this size (")
    one = paired_difference(images - 0.1, np.zeros(500))
    assert one.sentence("A", "B").startswith(
        "A is better than B on these networks; one seed tells nothing beyond them (-0.0998, "
    )
    steady = np.stack([images + 0.1, images + 0.11, images + 0.12])
    assert paired_difference(steady, np.zeros((3, 500))).verdict == "worse"
    unsteady = np.stack([images - 0.3, images + 0.02, images - 0.02])
    assert (
        paired_difference(unsteady, np.zeros((3, 500))).verdict
        == "better on these networks, but not distinguishable over seeds"
    )


def test_nested_spread_recovers_both_deviations():
    generator = np.random.default_rng(0)
    values = 5.0 + 2.0 * generator.normal(size=(4000, 1)) + 0.5 * generator.normal(size=(4000, 3))
    found = nested_spread(values)
    assert found.mean == pytest.approx(5.0, abs=0.1)
    assert found.between == pytest.approx(2.0, rel=0.04)
    assert found.within == pytest.approx(0.5, rel=0.04)


@pytest.mark.parametrize(
    ("values", "between", "within"),
    [
        ([[1.0, 3.0]], math.nan, math.sqrt(2.0)),
        ([[1.0], [3.0]], math.sqrt(2.0), math.nan),
        # What retraining adds explains the spread of the means: nothing is left for the searches.
        ([[0.0, 2.0], [0.1, 2.1]], 0.0, math.sqrt(2.0)),
    ],
)
def test_nested_spread_of_few_seeds(values, between, within):
    found = nested_spread(values)
    assert (found.between, found.within) == pytest.approx((between, within), nan_ok=True)


def test_mean_and_deviation():
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


@pytest.mark.parametrize("values", [[1.0, 2.0], [[]]])
def test_spread_needs_two_axes(values):
    with pytest.raises(ValueError, match="shape"):
        nested_spread(values)
