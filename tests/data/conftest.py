"""Fixtures: small data made by hand, whose every pixel the tests know."""

import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.data import ImageData, Split


@pytest.fixture
def make_data():
    """Random images: `num` for train, half of it for val and for test (or `num_test`), labels in turn."""

    def make(num=40, *, name="made", channels=1, size=8, classes=4, num_test=None):
        generator = torch.Generator().manual_seed(0)

        def split(count):
            images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
            return Split(images, torch.arange(count) % classes)

        splits = {"train": split(num), "val": split(num // 2), "test": split(num_test or num // 2)}
        return ImageData.from_splits(name, tuple("abcdefghij"[:classes]), **splits, flip=True)

    return make


@pytest.fixture
def write_images():
    """Write `num` random grey PNGs 00.png, 01.png, ... to a folder; their pixels (num, size, size)."""

    def write(folder, num=5, *, size=8, seed=0):
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (num, size, size), dtype=np.uint8)
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{index:02}.png")
        return pixels

    return write
