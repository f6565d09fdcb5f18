from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.data.splits import alternating_halves, choose_splits, draw_limited, halve
from dnas_ens.errors import UserError

NAMES = tuple("abcdefghij")
class_sizes = st.lists(st.integers(3, 60), min_size=2, max_size=6)
seeds = st.integers(0, 2**32)


def labels_of(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(len(labels)).permutation(labels)


def split(labels, num_train=None, **options):
    """Lists instead of arrays, for a source without parts of its own unless it is said."""
    options = {"classes": NAMES[: labels.max() + 1], "seed": 0, **options}
    parts = choose_splits(labels, num_train=len(labels) if num_train is None else num_train, **options)
    return {name: part.tolist() for name, part in parts.items()}


@given(sizes=class_sizes, seed=seeds)
def test_60_20_20_is_disjoint_complete_stratified_and_repeatable(sizes, seed):
    labels = labels_of(sizes)
    parts = split(labels, seed=seed)
    assert sorted(chain(*parts.values())) == list(range(len(labels)))
    for name, share in (("train", Fraction(3, 5)), ("val", Fraction(1, 5)), ("test", Fraction(1, 5))):
        assert parts[name] == sorted(parts[name])
        for label, size in enumerate(sizes):
            count = int((labels[parts[name]] == label).sum())
            assert count >= 1
            assert abs(count - share * size) <= 1
    assert split(labels, seed=seed) == parts
    # Images without copies change nothing, and test does not depend on val.
    assert split(labels, seed=seed, first_equal=np.arange(len(labels))) == parts
    small_val = split(labels, seed=seed, max_val=1)
    assert len(small_val["val"]) == 1
    assert small_val["test"] == parts["test"]


@settings(max_examples=30)
@given(
    kinds=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=30, max_size=60),
    seed=st.integers(0, 1000),
)
def test_equal_images_stay_together_and_distinct_ones_are_stratified(kinds, seed):
    kinds += [(label, 1) for label in (0, 1, 2) for _ in range(3)]
    groups = np.repeat(np.arange(len(kinds)), [number for _, number in kinds])
    groups = groups[np.random.default_rng(seed).permutation(len(groups))]
    labels = np.array([label for label, _ in kinds])[groups]
    first = np.array([int(np.flatnonzero(groups == group)[0]) for group in groups])
    parts = split(labels, first_equal=first, seed=seed)
    assert sorted(chain(*parts.values())) == list(range(len(labels)))
    held = {name: set(groups[part]) for name, part in parts.items()}
    assert sum(map(len, held.values())) == len(kinds)
    sizes = np.bincount([label for label, _ in kinds])
    for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        counts = np.bincount([kinds[group][0] for group in held[name]], minlength=3)
        assert (np.abs(counts - share * sizes) <= 1).all()


def test_own_parts_stay_as_the_source_has_them():
    labels = np.arange(100) % 2
    with_test, with_both = split(labels, 80, num_test=20), split(labels, 50, num_val=30, num_test=20)
    assert with_test["test"] == with_both["test"] == list(range(80, 100))
    assert len(with_test["val"]) == 16
    assert sorted(with_test["train"] + with_test["val"]) == list(range(80))
    assert with_both["val"] == list(range(50, 80))
    with_val = split(labels, 50, num_val=50)
    assert with_val["val"] == list(range(50, 100))
    assert len(with_val["test"]) == 10


@pytest.mark.parametrize("options", [{}, {"num_train": 32, "num_test": 2}])
def test_a_small_class_is_in_every_split(options):
    labels = np.array([0, 0, *[1] * 30, 0, 1])
    assert [int((labels[part] == 0).sum()) for part in split(labels, **options).values()] == [1, 1, 1]


def test_too_small_classes_are_named_and_a_source_that_miscounts_its_parts():
    with pytest.raises(UserError) as caught:
        split(np.array([0] * 10 + [1] * 2 + [2] * 3), classes=("cat", "dog", "owl"))
    assert caught.value.cause == "Too few training images to be in every split: class 'dog' (2)."
    with pytest.raises(UserError, match=r"'b' \(1\), .*'f' \(1\) and 2 more"):
        split(np.repeat(np.arange(8), [9] + [1] * 7))
    with pytest.raises(ValueError, match="5 labels"):
        split(np.array([0, 1, 0, 1, 0]), 4)


@given(sizes=class_sizes, seed=seeds, data=st.data())
def test_limit_is_an_exact_stratified_subset(sizes, seed, data):
    labels = labels_of(sizes)
    num = data.draw(st.integers(len(sizes), len(labels)))
    chosen = draw_limited(labels, num, classes=NAMES[: len(sizes)], seed=seed)
    assert len(set(chosen)) == len(chosen) == num
    counts = np.bincount(labels[chosen], minlength=len(sizes))
    assert counts.min() >= 1
    if min(sizes) * num >= len(labels):  # every share is at least one image, so none had to be raised
        assert (np.abs(counts - np.array(sizes) * num / len(labels)) < 1).all()


def test_limits_of_one_seed_are_nested():
    small, large = (set(draw_limited(labels_of([99, 200]), num, classes="ab", seed=5)) for num in (30, 150))
    assert small < large


@given(sizes=st.lists(st.integers(0, 40), min_size=2, max_size=6), seed=seeds)
def test_halves_are_disjoint_complete_and_stratified(sizes, seed):
    labels = labels_of([*sizes, 1])
    for halves in (halve(labels, seed=seed), alternating_halves(labels)):
        assert sorted([*halves[0], *halves[1]]) == list(range(len(labels)))
        assert all((np.diff(half) > 0).all() for half in halves)
        first, second = (np.bincount(labels[half], minlength=len(sizes) + 1) for half in halves)
        assert np.abs(first - second).max() <= 1
    assert len(halve(labels, seed=seed)[0]) == (len(labels) + 1) // 2
