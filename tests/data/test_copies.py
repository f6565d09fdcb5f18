import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dnas_ens.data import ImageData, load_data
from dnas_ens.data.loading import first_equal
from dnas_ens.data.splits import choose_splits


def shared_images(data: ImageData, one: str, other: str) -> int:
    """Images of one split whose bytes are in the other."""
    known = {image.numpy().tobytes() for image in getattr(data, one).images}
    return sum(image.numpy().tobytes() in known for image in getattr(data, other).images)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_first_equal_is_the_first_index(values: list[int]) -> None:
    images = np.array(values, dtype=np.uint8)[:, None, None, None]
    assert first_equal(images).tolist() == [values.index(value) for value in values]


@given(
    kinds=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=30, max_size=60),
    seed=st.integers(0, 1000),
)
def test_equal_images_stay_together_and_distinct_ones_are_stratified(
    kinds: list[tuple[int, int]], seed: int
) -> None:
    kinds += [(label, 1) for label in (0, 1, 2) for _ in range(3)]
    groups = np.repeat(np.arange(len(kinds)), [number for _, number in kinds])
    order = np.random.default_rng(seed).permutation(len(groups))
    groups, labels = groups[order], np.array([label for label, _ in kinds])[groups[order]]
    first = np.array([int(np.flatnonzero(groups == group)[0]) for group in groups])
    parts = choose_splits(labels, classes="abc", num_train=len(labels), first_equal=first, seed=seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    held = {name: set(groups[part]) for name, part in parts.items()}
    assert sum(map(len, held.values())) == len(kinds)
    sizes = np.bincount([label for label, _ in kinds])
    for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        counts = np.bincount([kinds[group][0] for group in held[name]], minlength=3)
        assert (np.abs(counts - share * sizes) <= 1).all()


def test_without_copies_the_splits_are_what_they_were() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    options = {"classes": "abcd", "num_train": 200, "seed": 3}
    before = choose_splits(labels, **options)
    after = choose_splits(labels, **options, first_equal=np.arange(200))
    assert {name: part.tolist() for name, part in before.items()} == {
        name: part.tolist() for name, part in after.items()
    }


def test_copies_under_other_names_and_formats_stay_on_one_side(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("cat", "ship")):
        write_images(tmp_path / name, 20, seed=seed)
        for path in list((tmp_path / name).iterdir()):
            shutil.copy(path, tmp_path / name / f"copy of {path.name}")
            with Image.open(path) as image:
                image.save(path.with_suffix(".bmp"))
    for seed in range(3):
        data = load_data(tmp_path, seed=seed)
        assert len(data.train) + len(data.val) + len(data.test) == 120
        assert [len(split) for split in (data.val, data.test)] == [24, 24]
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            assert shared_images(data, one, other) == 0
    assert "80 of 120 images are equal to others" in caplog.text
    assert "in train too" not in caplog.text


def test_images_shared_by_the_folders_own_splits_are_counted(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("a", "b")):
        write_images(tmp_path / "train" / name, 20, seed=seed)
        write_images(tmp_path / "test" / name, 5, seed=10 + seed)
        for index in range(3):
            shutil.copy(
                tmp_path / "train" / name / f"{index:02}.png", tmp_path / "test" / name / f"x{index}.png"
            )
    with caplog.at_level(logging.WARNING):
        data = load_data(tmp_path)
    assert data.splits["test"] == list(range(40, 56))
    assert shared_images(data, "train", "val") == 0
    shared = {name: shared_images(data, name, "test") for name in ("train", "val")}
    assert sum(shared.values()) == 6
    for name, count in shared.items():
        assert (f"{count} of 16 test images are in {name} too" in caplog.text) == (count > 0)


def test_equal_images_of_two_classes_are_told(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(("a", "b")):
        write_images(tmp_path / name, 10, seed=seed)
    shutil.copy(tmp_path / "a" / "00.png", tmp_path / "b" / "wrong.png")
    load_data(tmp_path)
    assert "1 of 21 images are equal to others" in caplog.text
    assert "1 of them lie in another class" in caplog.text


def test_a_class_of_one_image_many_times_is_in_every_split_and_told(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "a", 10)
    write_images(tmp_path / "blank", 1, seed=1)
    for index in range(9):
        shutil.copy(tmp_path / "blank" / "00.png", tmp_path / "blank" / f"{index}.png")
    data = load_data(tmp_path)
    assert [split.labels.bincount().tolist() for split in (data.train, data.val, data.test)] == [
        [6, 6],
        [2, 2],
        [2, 2],
    ]
    assert "2 of 4 test images are in train too" in caplog.text
