import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from dnas_ens.data.names import PHOTOGRAPHS
from dnas_ens.data.out_of_distribution import load_out_of_distribution
from dnas_ens.errors import UserError


def write_colour(folder, colours, *, num=10):
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for index in range(num):
            Image.new("RGB", (16, 16), colour).save(folder / name / f"{index}.png")


def test_photographs_are_patches_without_a_download(digits, make_data):
    grey = load_out_of_distribution(PHOTOGRAPHS, digits)
    assert grey.shape == (520, 1, 8, 8)  # 13 x 20 squares of 32 pixels in 427 x 640, twice
    assert grey.dtype == torch.uint8
    colour = load_out_of_distribution(PHOTOGRAPHS, make_data(channels=3, size=32))
    photograph = load_sample_images().images[0]
    np.testing.assert_array_equal(colour[21].permute(1, 2, 0), photograph[32:64, 32:64])
    assert load_out_of_distribution(PHOTOGRAPHS, make_data(size=100)).shape == (48, 1, 100, 100)
    with pytest.raises(UserError, match="no square of 500 pixels"):
        load_out_of_distribution(PHOTOGRAPHS, make_data(4, size=500))


def test_colour_becomes_grey_by_luma_and_grey_is_repeated(tmp_path, make_data, digits):
    write_colour(tmp_path / "c", {"red": (255, 0, 0), "green": (0, 255, 0)})
    images = load_out_of_distribution(str(tmp_path / "c"), make_data())
    assert images.unique().tolist() == [round(0.299 * 255), round(0.587 * 255)]
    repeated = load_out_of_distribution("digits", make_data(channels=3))
    assert torch.equal(repeated, digits.test.images.expand(359, 3, 8, 8))


def test_classes_that_both_have_are_left_out(tmp_path, make_data):
    # `make_data` has the classes a, b, c, d.
    write_colour(tmp_path / "some", {"a": (10, 10, 10), "x": (200, 200, 200)})
    assert load_out_of_distribution(str(tmp_path / "some"), make_data()).unique().tolist() == [200]
    write_colour(tmp_path / "same", {"a": (10, 10, 10), "b": (20, 20, 20)})
    with pytest.raises(UserError, match="not out of distribution"):
        load_out_of_distribution(str(tmp_path / "same"), make_data())
