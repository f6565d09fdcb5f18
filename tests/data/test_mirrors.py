from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from dnas_ens.data import load_data
from dnas_ens.data.loading import mirror_hint


@pytest.mark.parametrize(
    "classes",
    [
        ("left", "right"),
        ("TurnLeft", "TurnRight", "straight"),
        ("turn_left", "forward"),
        ("handleft", "handright"),
        ("Left-Hand", "none"),
        ("L", "R"),
        ("glove l", "glove r"),
        ("links", "rechts"),
        ("gauche", "droite"),
        ("izquierda", "derecha"),
        ("clockwise", "still"),
        ("eye_OD", "eye_OS"),
        ("0", "1", "2"),
        ("b", "d"),
        (*"abcdefghijklmnopqrstuvwxyz", "space", "nothing"),
        ("zero", "one", "two"),
        ("arrow up", "other"),
        ("text", "photo"),
        ("printed_letters", "other"),
    ],
)
def test_names_that_say_a_mirror_matters(classes: tuple[str, ...]) -> None:
    assert mirror_hint(classes)


@pytest.mark.parametrize(
    "classes",
    [
        ("cat", "dog"),
        ("bright", "dark"),
        ("upright", "fallen"),
        ("cleft", "whole"),
        ("copyright", "free"),
        ("glioma", "healthy"),
        ("class1", "class2"),
        ("t-shirt", "ankle boot"),
        ("l_shape", "round"),
    ],
)
def test_names_that_say_nothing_of_it(classes: tuple[str, ...]) -> None:
    assert mirror_hint(classes) is None


@pytest.mark.parametrize(
    ("names", "asked", "flip", "told"),
    [
        (("left", "right"), None, False, True),
        (("left", "right"), True, True, False),
        (("cat", "dog"), None, True, False),
        (("cat", "dog"), False, False, False),
    ],
)
def test_flip_of_a_folder(
    tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture, names, asked, flip: bool, told: bool
) -> None:
    for seed, name in enumerate(names):
        write_images(tmp_path / name, 5, seed=seed)
    data = load_data(tmp_path, flip=asked)
    assert data.flip == flip
    assert ("--flip" in caplog.text) == told
    assert load_data(data, flip=not flip).flip != flip
    assert load_data(data).flip == flip


def test_unnamed_classes_of_a_dataset_are_no_digits() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 1, 6, 6)).astype(np.uint8))
    assert load_data(TensorDataset(images, torch.arange(20) % 2)).flip


@pytest.mark.parametrize("asked", [None, True, False])
def test_flip_of_a_named_data_set(asked: bool | None) -> None:
    assert load_data("digits", flip=asked).flip == bool(asked)
