import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from dnas_ens.metrics.deep_ensemble_equivalent import deep_ensemble_equivalent

falling = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12).map(
    lambda steps: np.cumsum([0.2, *steps])[::-1].copy()
)


@given(curve=falling)
def test_a_deep_ensemble_of_k_is_worth_k(curve):
    for size, loss in enumerate(curve, start=1):
        found = deep_ensemble_equivalent(loss, curve)
        assert (found.value, found.relation) == (size, "=")


def test_members_added_in_another_order_are_worth_the_same():
    # As a row and the curve it ends may add them: a sum's last digits follow the order.
    members = np.random.default_rng(0).dirichlet([2.0, 1.0, 1.0], size=(5, 200))
    curve = [-np.log(members[:size].mean(axis=0)[:, 0]).mean() for size in range(1, 6)]
    best = np.argmin(curve)
    losses = {
        float(-np.log(members[list(order)].sum(axis=0)[:, 0] / (best + 1)).mean())
        for order in itertools.permutations(range(best + 1))
    }
    assert len(losses) > 1
    assert {str(deep_ensemble_equivalent(loss, curve)) for loss in losses} == {f"{best + 1:.1f}"}


@given(curve=falling, share=st.floats(0.0, 1.0))
def test_between_sizes_against_a_root_search(curve, share):
    loss = curve[-1] + share * (curve[0] - curve[-1])
    found = deep_ensemble_equivalent(loss, curve)
    sizes = np.arange(1, len(curve) + 1)
    root = brentq(lambda size: np.interp(size, sizes, curve) - loss, 1, len(curve), xtol=1e-12)
    assert found.relation == "="
    assert found.value == pytest.approx(root, abs=1e-6)


@given(
    curve=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=10), losses=st.tuples(*[st.floats(0, 1.2)] * 2)
)
def test_a_better_loss_is_never_worth_less(curve, losses):
    better, worse = (deep_ensemble_equivalent(loss, curve) for loss in sorted(losses))
    assert better.value >= worse.value
    assert 1 <= worse.value <= better.value <= len(curve)


def test_past_both_ends_it_says_so_and_does_not_extrapolate():
    curve = [0.5, 0.4, 0.35]
    above, below = deep_ensemble_equivalent(0.3, curve), deep_ensemble_equivalent(0.6, curve)
    assert (above.value, above.relation, str(above)) == (3, ">", "> 3")
    assert (below.value, below.relation, str(below)) == (1, "<", "< 1")
    assert str(deep_ensemble_equivalent(0.45, curve)) == "1.5"


def test_noise_is_levelled_by_the_running_best():
    # The third is worse than the second, as noise makes it: 0.4 is reached by two, and 0.38 between three and four.
    curve = [0.5, 0.4, 0.42, 0.36]
    assert deep_ensemble_equivalent(0.4, curve).value == 2
    assert deep_ensemble_equivalent(0.41, curve).value == pytest.approx(1.9)
    assert deep_ensemble_equivalent(0.38, curve).value == pytest.approx(3.5)


def test_sizes_that_were_skipped_are_interpolated():
    found = deep_ensemble_equivalent(0.35, [0.5, 0.4, 0.3], sizes=[1, 2, 10])
    assert found.value == pytest.approx(6)
    assert str(deep_ensemble_equivalent(0.2, [0.5, 0.4, 0.3], sizes=[1, 2, 10])) == "> 10"


@pytest.mark.parametrize(
    ("curve", "sizes", "message"),
    [
        ([], None, "same shape"),
        ([0.5, 0.4], [1], "same shape"),
        ([0.5, 0.4], [2, 3], "rise from 1"),
        ([0.5, 0.4], [1, 1], "rise from 1"),
        ([0.5, float("nan")], None, "finite"),
    ],
)
def test_what_does_not_fit(curve, sizes, message):
    with pytest.raises(ValueError, match=message):
        deep_ensemble_equivalent(0.4, curve, sizes=sizes)
