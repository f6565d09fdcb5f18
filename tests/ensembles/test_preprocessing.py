import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.data import load_data, read_image
from dnas_ens.ensembles.preprocessing import Preprocessing, check_images
from dnas_ens.errors import UserError

PREPROCESSING = Preprocessing(image_size=8, num_channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def test_preprocessing_survives_json():
    for given in (PREPROCESSING, dataclasses.replace(PREPROCESSING, deep_bits=12)):
        assert Preprocessing.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    # As an earlier version wrote it, which took all deep greys for 16 bits.
    earlier = {name: value for name, value in PREPROCESSING.to_dict().items() if name != "deep_bits"}
    assert Preprocessing.from_dict(earlier).deep_bits == 16


def test_a_file_of_12_bits_is_read_as_it_was_for_training(tmp_path):
    generator = np.random.default_rng(0)
    # One class is dark: by itself it would seem to be of fewer bits.
    for name, highest in (("a", 4096), ("b", 500)):
        (tmp_path / name).mkdir()
        for index in range(5):
            values = generator.integers(0, highest, (8, 8)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{index}.png")
    data = load_data(tmp_path)
    bits = Preprocessing.of(data).deep_bits
    assert bits == 12
    files = [read_image(path, num_channels=1, image_size=8, deep_bits=bits) for path in tmp_path.glob("*/*.png")]
    trained = {image.numpy().tobytes() for split in data.named_splits().values() for image in split.images}
    assert {image.numpy().tobytes() for image in files} == trained


@pytest.mark.parametrize(
    "change",
    [{"image_size": 0}, {"channels": 2}, {"mean": [0.1]}, {"std": [0.2, 0.2, 0.0]}]
    + [{"deep_bits": bits} for bits in (7, 17, 12.0)],
)
def test_impossible_preprocessing(change):
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
def test_wrong_images(images, message):
    with pytest.raises(UserError, match=message):
        check_images(images, PREPROCESSING)
