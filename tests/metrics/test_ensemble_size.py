from itertools import combinations, permutations

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from sklearn.metrics import accuracy_score, log_loss

from dnas_ens.metrics.calibration import fit_temperature
from dnas_ens.metrics.ensemble_size import CURVE_METRICS, deep_ensemble_equivalent, draw_subsets, ensemble_size_curve


def predictions(num_members, seed=0):
    made = tiny.predictions(num_members, sharpness=1.0, scale=3.0, seed=seed)
    return made.val_probs, made.val_labels, made.test_probs, made.test_labels


def test_against_scikit_learn_on_every_subset():
    val, val_labels, test, test_labels = predictions(4)
    rows = ensemble_size_curve(val, val_labels, test, test_labels)
    assert [(row["size"], row["subsets"]) for row in rows] == [(1, 4), (2, 6), (3, 4), (4, 1)]
    for size, row in enumerate(rows, start=1):
        accuracies, losses, calibrated = [], [], []
        for subset in combinations(range(4), size):
            averaged = test[list(subset)].mean(0)
            temperature = fit_temperature(val[list(subset)].mean(0), val_labels)
            tempered = averaged ** (1 / temperature)
            tempered /= tempered.sum(1, keepdims=True)
            accuracies.append(accuracy_score(test_labels, averaged.argmax(1)))
            losses.append(log_loss(test_labels, averaged, labels=range(4)))
            calibrated.append(log_loss(test_labels, tempered, labels=range(4)))
        for name, values in zip(CURVE_METRICS, (accuracies, losses, calibrated), strict=True):
            assert row[name] == pytest.approx(np.mean(values))
            deviation = row[f"{name}_deviation"]
            assert deviation is None if size == 4 else deviation == pytest.approx(np.std(values, ddof=1))


def test_a_sample_is_seeded_and_has_no_subset_twice():
    first, again = (draw_subsets(12, 5, 40, generator=np.random.default_rng(7)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 40
    assert all(len(set(subset)) == 5 and max(subset) < 12 for subset in first)
    rows = ensemble_size_curve(*predictions(6), max_subsets=5)
    assert [row["subsets"] for row in rows] == [5, 5, 5, 5, 5, 1]


def test_what_does_not_fit():
    val, val_labels, test, test_labels = predictions(3)
    with pytest.raises(ValueError, match="same members"):
        ensemble_size_curve(val[:2], val_labels, test, test_labels)
    with pytest.raises(ValueError, match="max_subsets"):
        ensemble_size_curve(val, val_labels, test, test_labels, max_subsets=0)


def test_members_added_in_another_order_are_worth_the_same():
    # As a row and the curve it ends may add them: a sum's last digits follow the order.
    members = np.random.default_rng(0).dirichlet([2.0, 1.0, 1.0], size=(5, 200))
    curve = [-np.log(members[:size].mean(axis=0)[:, 0]).mean() for size in range(1, 6)]
    best = np.argmin(curve)
    losses = {
        float(-np.log(members[list(order)].sum(axis=0)[:, 0] / (best + 1)).mean())
        for order in permutations(range(best + 1))
    }
    assert len(losses) > 1
    assert {str(deep_ensemble_equivalent(loss, curve)) for loss in losses} == {f"{best + 1:.1f}"}


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12), st.floats(0.0, 1.0))
def test_between_sizes_against_a_root_search(steps, share):
    curve = np.cumsum([0.2, *steps])[::-1]
    loss = curve[-1] + share * (curve[0] - curve[-1])
    found = deep_ensemble_equivalent(loss, curve)
    sizes = np.arange(1, len(curve) + 1)
    root = brentq(lambda size: np.interp(size, sizes, curve) - loss, 1, len(curve), xtol=1e-12)
    assert found.relation == "="
    assert found.value == pytest.approx(root, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "curve", "sizes", "expected"),
    [
        # Past both ends it says so and does not extrapolate.
        (0.3, [0.5, 0.4, 0.35], None, "> 3"),
        (0.6, [0.5, 0.4, 0.35], None, "< 1"),
        (0.45, [0.5, 0.4, 0.35], None, "1.5"),
        # The third is worse than the second, as noise makes it: the running best counts.
        (0.4, [0.5, 0.4, 0.42, 0.36], None, "2.0"),
        (0.38, [0.5, 0.4, 0.42, 0.36], None, "3.5"),
        # Sizes that were skipped are interpolated.
        (0.35, [0.5, 0.4, 0.3], [1, 2, 10], "6.0"),
    ],
)
def test_equivalent_by_hand(loss, curve, sizes, expected):
    assert str(deep_ensemble_equivalent(loss, curve, sizes=sizes)) == expected


@pytest.mark.parametrize(
    ("curve", "sizes", "message"),
    [([0.5, 0.4], [1], "same shape"), ([0.5, 0.4], [2, 3], "rise from 1"), ([0.5, float("nan")], None, "finite")],
)
def test_no_equivalent_of_what_does_not_fit(curve, sizes, message):
    with pytest.raises(ValueError, match=message):
        deep_ensemble_equivalent(0.4, curve, sizes=sizes)
