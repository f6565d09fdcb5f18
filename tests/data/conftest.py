"""Fixtures: small data made by hand, whose every pixel the tests know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.data import ImageData, Split

MakeData = Callable[..., ImageData]
WriteImages = Callable[..., np.ndarray]


@pytest.fixture
def make_data() -> MakeData:
    """Random images: `num` for train, half of it for val and for test, labels in turn."""

    def make(
        num: int = 40, *, channels: int = 1, size: int = 8, classes: int = 4, seed: int = 0
    ) -> ImageData:
        generator = torch.Generator().manual_seed(seed)

        def split(count: int) -> Split:
            images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
            return Split(images, torch.arange(count) % classes)

        return ImageData.from_splits(
            "made",
            tuple("abcdefghij"[:classes]),
            train=split(num),
            val=split(num // 2),
            test=split(num // 2),
            flip=True,
        )

    return make


@pytest.fixture
def write_images() -> WriteImages:
    """Write `num` random grey PNGs 00.png, 01.png, ... to a folder; their pixels (num, size, size)."""

    def write(folder: Path, num: int = 5, *, size: int = 8, seed: int = 0) -> np.ndarray:
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (num, size, size), dtype=np.uint8)
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{index:02}.png")
        return pixels

    return write
