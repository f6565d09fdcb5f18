from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from dnas_ens.data.splits import alternating_halves, choose_splits, draw_limited, halve, proportional_counts
from dnas_ens.errors import UserError

NAMES = tuple("abcdefghij")
class_sizes = st.lists(st.integers(3, 60), min_size=2, max_size=6)
seeds = st.integers(0, 2**32)


def labels_of(sizes: list[int]) -> np.ndarray:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(len(labels)).permutation(labels)


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), data=st.data())
def test_proportional_counts_are_exact_in_total_and_within_one_of_the_share(
    sizes: list[int], data: st.DataObject
) -> None:
    total = sum(sizes)
    num = data.draw(st.integers(0, total))
    counts = proportional_counts(np.array(sizes), num)
    assert counts.sum() == num
    for count, size in zip(counts, sizes, strict=True):
        assert 0 <= count <= size
        assert abs(Fraction(int(count)) - (Fraction(size * num, total) if total else 0)) < 1


def test_proportional_counts_by_hand() -> None:
    # Hamilton's method: shares 4.7, 3.2, 2.1 of 10 give 4 + 3 + 2 and the one left to the largest remainder.
    assert proportional_counts(np.array([47, 32, 21]), 10).tolist() == [5, 3, 2]
    # Shares 9.82, 0.09, 0.09: the small ones are raised at the cost of the large one only when asked.
    assert proportional_counts(np.array([110, 1, 1]), 10).tolist() == [10, 0, 0]
    assert proportional_counts(np.array([110, 1, 1]), 10, at_least_one=True).tolist() == [8, 1, 1]


@given(sizes=class_sizes, seed=seeds)
def test_60_20_20_is_disjoint_complete_and_stratified(sizes: list[int], seed: int) -> None:
    labels = labels_of(sizes)
    parts = choose_splits(labels, classes=NAMES[: len(sizes)], num_train=len(labels), seed=seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    for name, share in (("train", Fraction(3, 5)), ("val", Fraction(1, 5)), ("test", Fraction(1, 5))):
        assert (np.diff(parts[name]) > 0).all()
        for label, size in enumerate(sizes):
            count = int((labels[parts[name]] == label).sum())
            assert count >= 1
            assert abs(count - share * size) <= 1


@given(sizes=class_sizes, seed=seeds)
def test_same_seed_same_splits_and_test_does_not_depend_on_val(sizes: list[int], seed: int) -> None:
    labels = labels_of(sizes)
    classes = NAMES[: len(sizes)]
    one = choose_splits(labels, classes=classes, num_train=len(labels), seed=seed)
    two = choose_splits(labels, classes=classes, num_train=len(labels), seed=seed)
    small_val = choose_splits(labels, classes=classes, num_train=len(labels), max_val=1, seed=seed)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert np.array_equal(one["test"], small_val["test"])
    assert len(small_val["val"]) == 1


def test_another_seed_gives_other_splits() -> None:
    labels = labels_of([50, 50, 50])
    one, two = (choose_splits(labels, classes=NAMES[:3], num_train=150, seed=seed) for seed in (0, 1))
    assert all(not np.array_equal(one[name], two[name]) for name in one)


def test_own_parts_stay_as_the_source_has_them() -> None:
    labels = np.arange(100) % 2
    with_test = choose_splits(labels, classes=NAMES[:2], num_train=80, num_test=20, seed=3)
    assert with_test["test"].tolist() == list(range(80, 100))
    assert len(with_test["val"]) == 16
    assert set(with_test["train"]) | set(with_test["val"]) == set(range(80))
    with_both = choose_splits(labels, classes=NAMES[:2], num_train=50, num_val=30, num_test=20, seed=3)
    assert {name: part.tolist() for name, part in with_both.items()} == {
        "train": list(range(50)),
        "val": list(range(50, 80)),
        "test": list(range(80, 100)),
    }
    with_val = choose_splits(labels, classes=NAMES[:2], num_train=50, num_val=50, seed=3)
    assert with_val["val"].tolist() == list(range(50, 100))
    assert len(with_val["test"]) == 10
    assert set(with_val["train"]) | set(with_val["test"]) == set(range(50))


@pytest.mark.parametrize(
    ("num_train", "num_test", "expected"),
    [
        (60_000, 10_000, (50_000, 10_000)),
        (50_000, 10_000, (40_000, 10_000)),
        (73_257, 26_032, (63_257, 10_000)),
    ],
)
def test_protocol_sizes_and_class_counts_of_scikit_learn(
    num_train: int, num_test: int, expected: tuple[int, int]
) -> None:
    labels = np.random.default_rng(0).choice(10, num_train + num_test, p=np.arange(1, 11) / 55)
    parts = choose_splits(
        labels, classes=NAMES, num_train=num_train, num_test=num_test, max_val=10_000, seed=0
    )
    assert (len(parts["train"]), len(parts["val"])) == expected
    _, reference = train_test_split(labels[:num_train], test_size=10_000, stratify=labels[:num_train])
    difference = np.bincount(labels[parts["val"]], minlength=10) - np.bincount(reference, minlength=10)
    assert np.abs(difference).max() <= 1


@given(sizes=class_sizes, seed=seeds, data=st.data())
def test_limit_is_an_exact_stratified_subset(sizes: list[int], seed: int, data: st.DataObject) -> None:
    labels = labels_of(sizes)
    num = data.draw(st.integers(len(sizes), len(labels)))
    chosen = draw_limited(labels, num, classes=NAMES[: len(sizes)], seed=seed)
    assert len(set(chosen)) == len(chosen) == num
    counts = np.bincount(labels[chosen], minlength=len(sizes))
    assert counts.min() >= 1
    if min(sizes) * num >= len(labels):  # every share is at least one image, so none had to be raised
        assert (np.abs(counts - np.array(sizes) * num / len(labels)) < 1).all()


def test_limits_of_one_seed_are_nested() -> None:
    labels = labels_of([100, 200])
    small, large = (set(draw_limited(labels, num, classes=NAMES[:2], seed=5)) for num in (30, 150))
    assert small < large


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6), seed=seeds)
def test_halves_are_disjoint_complete_and_stratified(sizes: list[int], seed: int) -> None:
    labels = labels_of(sizes)
    first, second = halve(labels, seed=seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert len(first) - len(second) == len(labels) % 2
    counts = np.bincount(labels[first], minlength=len(sizes))
    assert (np.abs(counts - np.array(sizes) / 2) < 1).all()


def test_a_class_of_two_is_in_train_and_val_where_the_source_has_a_test() -> None:
    labels = np.array([0] * 2 + [1] * 30 + [0, 1])
    parts = choose_splits(labels, classes=("rare", "often"), num_train=32, num_test=2, seed=0)
    assert [int((labels[part] == 0).sum()) for part in parts.values()] == [1, 1, 1]


def test_choices_of_one_seed_are_not_the_same_choice() -> None:
    labels = labels_of([100, 100])
    limited = draw_limited(labels, 100, classes=NAMES[:2], seed=0)
    test = choose_splits(labels, classes=NAMES[:2], num_train=200, seed=0)["test"]
    for half in halve(labels, seed=0):
        assert 30 <= len(np.intersect1d(half, limited)) <= 70
        assert len(np.intersect1d(half, test)) < len(test)
    assert len(np.intersect1d(limited, test)) < len(test)


def test_tiny_classes_are_named() -> None:
    labels = np.array([0] * 10 + [1] * 2 + [2] * 3)
    with pytest.raises(UserError) as caught:
        choose_splits(labels, classes=("cat", "dog", "owl"), num_train=15, seed=0)
    assert caught.value.cause == "Too few training images to be in every split: class 'dog' (2)."
    assert caught.value.remedy == "Give every class at least 3 images, or leave the class out."


def test_a_class_of_three_is_in_every_split() -> None:
    labels = np.array([0] * 3 + [1] * 30)
    parts = choose_splits(labels, classes=("rare", "often"), num_train=33, seed=0)
    assert [int((labels[part] == 0).sum()) for part in parts.values()] == [1, 1, 1]


@pytest.mark.parametrize("num", [1, 13])
def test_limit_out_of_range(num: int) -> None:
    with pytest.raises(UserError) as caught:
        draw_limited(np.arange(12) % 2, num, classes=("a", "b"), seed=0)
    assert caught.value.cause == f"The limit is {num} training images, of 12 in 2 classes."
    assert caught.value.remedy == "Give --limit-train a number from 2 to 12."


def test_negative_seed() -> None:
    with pytest.raises(UserError, match="The seed is -1"):
        halve(np.array([0, 1]), seed=-1)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_alternating_halves_are_disjoint_complete_and_stratified(sizes: list[int]) -> None:
    labels = labels_of(sizes)
    first, second = alternating_halves(labels)
    assert sorted([*first, *second]) == list(range(len(labels)))
    difference = np.bincount(labels[first], minlength=len(sizes)) - np.bincount(
        labels[second], minlength=len(sizes)
    )
    assert np.abs(difference).max() <= 1
    for half in (first, second):
        assert (np.diff(half) > 0).all()


def test_alternating_halves_by_hand() -> None:
    # Class 0 at 0, 2, 3 begins in the first half, class 1 at 1, 4, 5 in the second.
    first, second = alternating_halves(np.array([0, 1, 0, 0, 1, 1]))
    assert first.tolist() == [0, 3, 4]
    assert second.tolist() == [1, 2, 5]
