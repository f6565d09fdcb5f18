from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from dnas_ens.ensembles.preprocessing import Preprocessing, check_images
from dnas_ens.errors import UserError

PREPROCESSING = Preprocessing(image_size=8, num_channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def test_preprocessing_survives_json() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(PREPROCESSING.to_dict()))) == PREPROCESSING


@pytest.mark.parametrize(
    "change",
    [{"image_size": 0}, {"image_size": 8.5}, {"channels": 2}, {"mean": [0.1]}, {"std": [0.2, 0.2, 0.0]}],
)
def test_impossible_preprocessing(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="preprocessing"):
        Preprocessing.from_dict({**PREPROCESSING.to_dict(), **change})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "1 channels"),
        (torch.zeros(2, 3, 9, 9, dtype=torch.uint8), "9x9"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        (torch.zeros(3, 8, 8), "shape"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.full((2, 3, 8, 8), float("inf")), "not finite"),
    ],
)
def test_wrong_images(images: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_images(images, PREPROCESSING)


def test_uint8_images_need_a_preprocessing() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    check_images(images, PREPROCESSING)
    check_images(images.float(), None)
    with pytest.raises(UserError, match="preprocessing="):
        check_images(images, None)
