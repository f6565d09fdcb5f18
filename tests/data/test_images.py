from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dnas_ens.data import read_image
from dnas_ens.data.images import decode, fit, plain, preferred_size, stack
from dnas_ens.errors import UserError


def gradient(height: int, width: int) -> np.ndarray:
    """Smooth colours, (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) * 255 // (height + width)], -1).astype(
        np.uint8
    )


@pytest.mark.parametrize(
    ("image", "mode", "expected"),
    [
        (Image.new("1", (1, 1), 1), "L", 255),
        (Image.new("L", (1, 1), 77), "L", 77),
        (Image.new("LA", (1, 1), (100, 255)), "L", 100),
        (Image.new("LA", (1, 1), (100, 0)), "L", 255),
        # Half of black on white: 255 * (1 - 51 / 255).
        (Image.new("LA", (1, 1), (0, 51)), "L", 204),
        (Image.new("RGB", (1, 1), (1, 2, 3)), "RGB", (1, 2, 3)),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 255)), "RGB", (1, 2, 3)),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), "RGB", (255, 255, 255)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 51)), "RGB", (255, 204, 204)),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "RGB", (0, 255, 255)),
        (Image.new("P", (1, 1), 0), "RGB", (0, 0, 0)),
        (Image.new("I;16", (1, 1), 65535), "L", 255),
        (Image.new("I;16", (1, 1), 257 * 40 + 128), "L", 40),
        (Image.new("I;16", (1, 1), 257 * 40 + 129), "L", 41),
        (Image.new("I", (1, 1), 257 * 200), "L", 200),
    ],
)
def test_modes(image: Image.Image, mode: str, expected: object) -> None:
    result = plain(image)
    assert result.mode == mode
    assert result.getpixel((0, 0)) == expected


@pytest.mark.parametrize("value", [-1, 65536])
def test_values_outside_16_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="outside 0 to 65535"):
        plain(Image.new("I", (1, 1), value))


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="no known range"):
        plain(Image.new("F", (1, 1), 0.5))


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    assert decode(tmp_path / "palette.png", image_size=None).shape == (64, 64, 3)
    with Image.open(tmp_path / "palette.png") as opened:
        assert np.asarray(plain(opened)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_16_bit_png_from_disk(tmp_path: Path) -> None:
    values = np.array([[0, 257], [257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert decode(tmp_path / "deep.png", image_size=None).tolist() == [[0, 1], [128, 255]]


@pytest.mark.parametrize(("side", "expected"), [(8, 8), (64, 64), (65, 64), (200, 64)])
def test_size_of_squares(side: int, expected: int) -> None:
    assert preferred_size((side, side)) == expected
    assert preferred_size((side, side + 1)) == 64


@pytest.mark.parametrize(
    ("height", "width", "size"), [(96, 48, 32), (48, 96, 32), (20, 30, 40), (100, 100, 16)]
)
def test_fit_is_torchvisions_antialiased_resize_and_centre_crop(height: int, width: int, size: int) -> None:
    pixels = gradient(height, width)
    reference = v2.functional.center_crop(
        v2.functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), [size], antialias=True), [size, size]
    )
    fitted = np.asarray(fit(Image.fromarray(pixels), size)).transpose(2, 0, 1)
    assert fitted.shape == (3, size, size)
    assert np.abs(fitted.astype(int) - reference.numpy().astype(int)).max() <= 3


def test_resizing_down_does_not_alias(tmp_path: Path) -> None:
    # A fine checkerboard averages to middle grey; without antialiasing it would stay black and white.
    Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)).save(tmp_path / "board.png")
    assert np.abs(decode(tmp_path / "board.png", image_size=16).astype(int) - 127).max() <= 2


def test_large_jpeg_is_close_to_a_full_decode(tmp_path: Path) -> None:
    Image.fromarray(gradient(1200, 1600)).save(tmp_path / "photo.jpg", quality=95)
    with Image.open(tmp_path / "photo.jpg") as image:
        full = np.asarray(fit(image, 64)).astype(int)
    assert np.abs(decode(tmp_path / "photo.jpg", image_size=None) - full).max() <= 3


def test_photo_on_its_side_is_turned(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the upper half goes right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", image_size=None)
    assert turned[:, 8:].min() == 255
    assert turned[:, :8].max() == 0


def test_stack_grey_stays_grey_and_one_colour_image_makes_all_colour() -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    colour = gradient(4, 4)
    assert np.array_equal(stack([grey, grey + 1], image_size=None), np.stack([grey, grey + 1])[:, None])
    mixed = stack([grey, colour], image_size=None)
    assert mixed.shape == (2, 3, 4, 4)
    assert np.array_equal(mixed[0], np.stack([grey] * 3))
    assert np.array_equal(mixed[1], colour.transpose(2, 0, 1))


def test_stack_sizes() -> None:
    small, other = (np.full((side, side), 9, dtype=np.uint8) for side in (4, 6))
    assert stack([small, small], image_size=None).shape == (2, 1, 4, 4)
    mixed = stack([small, other], image_size=None)
    assert mixed.shape == (2, 1, 64, 64)
    assert (mixed == 9).all()
    assert stack([small, other], image_size=5).shape == (2, 1, 5, 5)
    assert stack([np.zeros((20, 28), dtype=np.uint8)] * 2, image_size=None).shape == (2, 1, 64, 64)


def test_read_image_channels(tmp_path: Path) -> None:
    grey, colour = np.arange(64, dtype=np.uint8).reshape(8, 8), gradient(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "grey_as_colour.png")
    one = read_image(tmp_path / "grey.png", num_channels=1, image_size=8)
    assert one.dtype == torch.uint8
    assert np.array_equal(one.numpy(), grey[None])
    assert torch.equal(one, read_image(tmp_path / "grey_as_colour.png", num_channels=1, image_size=8))
    assert torch.equal(one.expand(3, 8, 8), read_image(tmp_path / "grey.png", num_channels=3, image_size=8))
    three = read_image(str(tmp_path / "colour.png"), num_channels=3, image_size=8)
    assert np.array_equal(three.permute(1, 2, 0).numpy(), colour)
    assert read_image(tmp_path / "colour.png", num_channels=3, image_size=5).shape == (3, 5, 5)
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "colour.png", num_channels=1, image_size=8)
    assert "is in colour, but the ensemble was trained on one grey channel" in caught.value.cause
    assert "Convert the image to grey" in caught.value.remedy


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_read_image_names_what_it_cannot_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(path, num_channels=1, image_size=8)
    assert str(path) in caught.value.cause
    assert "cannot be read as an image" in caught.value.cause
    assert "\n" not in str(caught.value)
