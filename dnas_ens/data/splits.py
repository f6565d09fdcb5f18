"""Disjoint, stratified, seeded splits of labelled images.

Every random choice draws from its own stream of the seed, so that one choice never moves another: the test
images do not depend on how many validation images there are, or on a limit on training images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dnas_ens.errors import UserError
from dnas_ens.types import IntArray

_TEST_STREAM, _VAL_STREAM, _LIMIT_STREAM, _HALVES_STREAM = range(4)


def choose_splits(
    labels: IntArray,
    *,
    classes: Sequence[str],
    num_train: int,
    num_val: int = 0,
    num_test: int = 0,
    max_val: int | None = None,
    first_equal: IntArray | None = None,
    seed: int,
) -> dict[str, IntArray]:
    """Say which images of a source are for training, validation and test.

    The source's images come in the order train, val, test. A part that the source lacks takes one fifth of
    every class of its training images: 60/20/20 % where it has neither, 80/20 % where it has only a test.

    Args:
        labels: (num_train + num_val + num_test,) class indices.
        classes: K class names, for messages.
        num_train: Images the source gives for training, at least 1.
        num_val: Images it gives for validation, or 0.
        num_test: Images it gives for test, or 0.
        max_val: Where val is cut off train: the number of validation images, or a fifth of the
            training images if that is less; exact in total, each class within one image of its share.
        first_equal: For each image the index of the first that it is a copy of. Where a part is cut off train, equal
            images then stay together and count once, except in a class with too few different ones for every part.
        seed: At least 0.

    Returns:
        "train", "val" and "test": disjoint, sorted indices that together cover all the images.

    Raises:
        UserError: A class has too few images to be in every split.
    """
    _check_seed(seed)
    if num_train + num_val + num_test != len(labels):
        raise ValueError(f"{num_train} + {num_val} + {num_test} images, but {len(labels)} labels")
    num_parts = 1 + (num_val == 0) + (num_test == 0)
    _check_class_sizes(np.bincount(labels[:num_train], minlength=len(classes)), classes, num_parts=num_parts)
    first = _standing_for(labels, num_train, first_equal=first_equal, num_parts=num_parts)
    train: IntArray = np.unique(first[:num_train])
    source_counts = np.bincount(labels[train], minlength=len(classes))
    # Halves round up, and a class of three images has one in each of three parts.
    fifth = np.minimum(source_counts, np.maximum(1, (2 * source_counts + 5) // 10))
    parts: dict[str, IntArray] = {}
    if num_test == 0:
        parts["test"], train = _draw(train, labels, counts=fifth, seed=seed, stream=_TEST_STREAM)
    if num_val == 0:
        counts = fifth if max_val is None else proportional_counts(source_counts, min(max_val, num_train // 5))
        parts["val"], train = _draw(train, labels, counts=counts, seed=seed, stream=_VAL_STREAM)
    parts["train"] = train
    # The equals of a drawn image come with it.
    drawn = {name: np.flatnonzero(np.isin(first[:num_train], chosen)) for name, chosen in parts.items()}
    own = {
        "train": np.arange(num_train),
        "val": np.arange(num_train, num_train + num_val),
        "test": np.arange(num_train + num_val, len(labels)),
    }
    return own | drawn


def _standing_for(labels: IntArray, num_train: int, *, first_equal: IntArray | None, num_parts: int) -> IntArray:
    """For each image the index of the equal one to draw for it; its own in a class with too few different ones."""
    own = np.arange(len(labels))
    if first_equal is None:
        return own
    # An image that another class has too counts in both.
    different = np.unique(np.stack([labels[:num_train], first_equal[:num_train]]), axis=1)[0]
    too_few = np.bincount(different, minlength=labels.max() + 1) < num_parts
    return np.where(too_few[labels], own, first_equal)


def draw_limited(labels: IntArray, num_images: int, *, classes: Sequence[str], seed: int) -> IntArray:
    """A stratified subset with at least one image of every class.

    Args:
        labels: (N,) class indices of the training images.
        num_images: Size of the subset, from K to N.
        classes: K class names.
        seed: At least 0. Subsets of one seed are nested, up to the rounding of the class counts.

    Returns:
        Sorted indices (num_images,) into `labels`.

    Raises:
        UserError: `num_images` is out of range.
    """
    _check_seed(seed)
    if not len(classes) <= num_images <= len(labels):
        raise UserError(
            f"The limit is {num_images} training images, of {len(labels)} in {len(classes)} classes.",
            f"Give --limit-train a number from {len(classes)} to {len(labels)}.",
        )
    counts = proportional_counts(np.bincount(labels, minlength=len(classes)), num_images, at_least_one=True)
    chosen, _ = _draw(np.arange(len(labels)), labels, counts=counts, seed=seed, stream=_LIMIT_STREAM)
    return chosen


def halve(labels: IntArray, *, seed: int) -> tuple[IntArray, IntArray]:
    """Stratified halves of N images, by their labels (N,).

    Returns:
        Sorted indices of N - N // 2 and of N // 2 images; each class within one image of its half.
    """
    _check_seed(seed)
    counts = proportional_counts(np.bincount(labels), len(labels) // 2)
    second, first = _draw(np.arange(len(labels)), labels, counts=counts, seed=seed, stream=_HALVES_STREAM)
    return first, second


def alternating_halves(labels: IntArray) -> tuple[IntArray, IntArray]:
    """Stratified halves without chance, every other image of each class, by their labels (N,).

    Returns:
        Sorted indices of both halves, disjoint, together all N; each class within one image of its half.
    """
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        chosen = np.flatnonzero(labels == label)
        # Classes take turns in who gets the odd image.
        ranks[chosen] = np.arange(len(chosen)) + label
    return np.flatnonzero(ranks % 2 == 0), np.flatnonzero(ranks % 2 == 1)


def proportional_counts(class_sizes: IntArray, num_images: int, *, at_least_one: bool = False) -> IntArray:
    """Share `num_images` among K classes in proportion to their sizes (K,), by largest remainders (Hamilton).

    `at_least_one` raises every class from 0 to 1 at the expense of those furthest above their share. The counts (K,)
    sum to `num_images`; otherwise each is within one of its exact share.
    """
    total = int(class_sizes.sum())
    counts, remainders = np.divmod(class_sizes.astype(np.int64) * num_images, max(total, 1))
    by_remainder = np.argsort(-remainders, kind="stable")
    counts[by_remainder[: num_images - int(counts.sum())]] += 1
    while at_least_one and (missing := np.flatnonzero(counts == 0)).size:
        excess = np.where(counts > 1, counts * total - class_sizes * num_images, np.iinfo(np.int64).min)
        counts[np.argmax(excess)] -= 1
        counts[missing[0]] += 1
    return counts


def _draw(
    candidates: IntArray, labels: IntArray, *, counts: IntArray, seed: int, stream: int
) -> tuple[IntArray, IntArray]:
    """Draw `counts[k]` of the candidates of every class k; sorted indices of the drawn and of the rest."""
    generator = np.random.default_rng([seed, stream])
    drawn = [
        generator.permutation(candidates[labels[candidates] == label])[:count] for label, count in enumerate(counts)
    ]
    chosen = np.sort(np.concatenate(drawn))
    return chosen, np.setdiff1d(candidates, chosen, assume_unique=True)


def _check_class_sizes(counts: IntArray, classes: Sequence[str], *, num_parts: int) -> None:
    small = [f"{name!r} ({count})" for name, count in zip(classes, counts, strict=True) if count < num_parts]
    if small:
        raise UserError(
            f"Too few training images to be in every split: class {', '.join(small[:5])}"
            + (f" and {len(small) - 5} more." if len(small) > 5 else "."),
            f"Give every class at least {num_parts} images, or leave the class out.",
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"The seed is {seed}.", "Give a seed of 0 or more.")
