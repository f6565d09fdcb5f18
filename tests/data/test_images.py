import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dnas_ens.data import read_image
from dnas_ens.data.images import (
    common_side,
    decode,
    fit,
    plain,
    stack,
    tell_sizes,
    to_eight_bits,
    with_one_scale,
)
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
        (Image.new("YCbCr", (1, 1), (128, 128, 128)), "RGB", (128, 128, 128)),
        (Image.new("HSV", (1, 1), (0, 255, 255)), "RGB", (255, 0, 0)),
        (Image.new("I;16", (1, 1), 4095), "I;16", 4095),
        (Image.new("I;16B", (1, 1), 65535), "I;16", 65535),
        (Image.new("I", (1, 1), 1000), "I;16", 1000),
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
    assert decode(tmp_path / "palette.png", image_size=4).pixels.shape == (4, 4, 3)
    with Image.open(tmp_path / "palette.png") as opened:
        assert np.asarray(plain(opened)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("bits", range(8, 17))
def test_deep_greys_of_every_depth_keep_their_range(bits: int) -> None:
    values = np.arange(1 << bits, dtype=np.uint16)
    exact = values.astype(np.float64) * 255 / (2**bits - 1)
    scaled = to_eight_bits(values, bits)
    assert np.abs(scaled - exact).max() <= 0.5
    assert len(np.unique(scaled)) == 256


def write_tiff(path: Path, values: np.ndarray, *, order: str = ">", photometric: int = 1) -> None:
    """One strip of 16-bit greys in either byte order."""
    height, width = values.shape
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: 2 * values.size}
    pixels = values.astype(f"{order}u2").tobytes()
    content = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8 + len(pixels)) + pixels
    content += struct.pack(f"{order}H", len(tags))
    for tag, value in sorted(tags.items()):
        content += struct.pack(f"{order}HHII", tag, 4, 1, value)
    path.write_bytes(content + bytes(4))


def deep_png(path: Path, values: np.ndarray, colour_type: int) -> None:
    """16 bits a channel, (H, W, C): 2 is RGB, 4 grey with alpha, 6 RGB with alpha."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


DEEP_WRITERS = {
    "png": lambda path, values: Image.fromarray(values).save(path, "PNG"),
    "tiff": lambda path, values: Image.fromarray(values).save(path, "TIFF"),
    "tiff of 32 bits": lambda path, values: Image.fromarray(values.astype(np.int32)).save(path, "TIFF"),
    "big-endian tiff": write_tiff,
}


@pytest.mark.parametrize("write", DEEP_WRITERS.values(), ids=DEEP_WRITERS.keys())
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_deep_files_of_every_byte_order_are_decoded_as_they_are(tmp_path: Path, write, bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (9, 9)).astype(np.uint16)
    values[4, 4] = (1 << bits) - 1
    write(tmp_path / "deep.png", values)
    picture = decode(tmp_path / "deep.png", image_size=9)
    assert np.array_equal(picture.pixels, values)
    assert picture.peak == (1 << bits) - 1
    # The peak is the file's, not what resizing leaves of it.
    assert decode(tmp_path / "deep.png", image_size=3).peak == picture.peak


def test_resizing_deep_greys_is_that_of_floats(tmp_path: Path) -> None:
    values = (gradient(40, 40)[..., 2].astype(np.uint16) + 1) * 16
    Image.fromarray(values).save(tmp_path / "deep.png")
    expected = np.asarray(fit(Image.fromarray(values.astype(np.float32)), 10))
    assert np.abs(decode(tmp_path / "deep.png", image_size=10).pixels - expected).max() <= 1


def test_one_scale_for_a_set_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dark, bright = (np.full((2, 2), value, dtype=np.uint16) for value in (1000, 4000))
    for index, values in enumerate((dark, bright)):
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    Image.new("L", (2, 2), 77).save(tmp_path / "2.png")
    names = [str(tmp_path / f"{index}.png") for index in range(3)]
    arrays, bits = with_one_scale([decode(name, image_size=2) for name in names], names)
    assert bits == 12
    assert [int(array[0, 0]) for array in arrays] == [round(1000 * 255 / 4095), round(4000 * 255 / 4095), 77]
    (record,) = caplog.records
    assert "2 pictures of 3" in record.getMessage()
    assert "white is 4095 (12 bits)" in record.getMessage()


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_is_read_where_it_uses_16_bits_and_refused_where_not(
    tmp_path: Path, colour_type: int, channels: int
) -> None:
    values = np.full((2, 2, channels), 65535)
    values[0, 0, 0] = 257 * 100
    deep_png(tmp_path / "full.png", values, colour_type)
    names = [str(tmp_path / "full.png")]
    arrays, bits = with_one_scale([decode(names[0], image_size=2)], names)
    assert bits is None
    assert arrays[0][0, 0].flat[0] == 100
    assert arrays[0][1, 1].flat[0] == 255
    values[..., : channels - (channels % 2 == 0)] //= 16
    deep_png(tmp_path / "twelve.png", values, colour_type)
    names = [str(tmp_path / "twelve.png")]
    with pytest.raises(UserError) as caught:
        with_one_scale([decode(names[0], image_size=2)], names)
    assert names[0] in caught.value.cause
    assert "8 bits" in caught.value.remedy


def test_deep_greys_that_would_be_read_wrongly_are_refused(tmp_path: Path) -> None:
    values = np.arange(16, dtype=np.uint16).reshape(4, 4)
    write_tiff(tmp_path / "negative.tif", values, order="<", photometric=0)
    Image.fromarray(values).save(tmp_path / "hole.png", transparency=3)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    for name, words in (
        ("negative.tif", "0 is white"),
        ("hole.png", "transparency"),
        ("float.tif", "floating"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(tmp_path / name, image_size=4)


@pytest.mark.parametrize("ending", [".nef", ".CR2", ".dng", ".dcm", ".svg"])
def test_a_thumbnail_inside_is_not_taken_for_the_picture(tmp_path: Path, ending: str) -> None:
    Image.new("L", (4, 4)).save(tmp_path / f"camera{ending}", "TIFF")
    with pytest.raises(UserError, match="files are not read"):
        read_image(tmp_path / f"camera{ending}", num_channels=1, image_size=4)


@pytest.mark.parametrize(
    ("value", "deep_bits", "expected"),
    [
        (2048, 12, 128),
        (4095, 12, 255),
        (4096, 12, "up to 4096, the training images were of 12 bits"),
        (257 * 30, 16, 30),
        # What saw 8 bits alone is told by the values themselves, or not at all.
        (257 * 200, None, 200),
        (2048, None, "which of them is white is not known"),
    ],
)
def test_read_image_scales_deep_greys_as_the_training_images(
    tmp_path: Path, value: int, deep_bits: int | None, expected: int | str
) -> None:
    Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / "deep.png")

    def read() -> int:
        image = read_image(tmp_path / "deep.png", num_channels=1, image_size=4, deep_bits=deep_bits)
        return int(image[0, 0, 0])

    if isinstance(expected, int):
        assert read() == expected
    else:
        with pytest.raises(UserError, match=expected):
            read()


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(8, 8)] * 3, 8),
        ([(64, 64)], 64),
        ([(65, 65)], 64),
        ([(300, 200)] * 5, 64),
        ([(20, 30)] * 2, 20),
        # One odd file moves nothing.
        ([(32, 32)] * 20 + [(33, 32)], 32),
        ([(32, 32)] * 20 + [(4000, 3000)], 32),
        ([(32, 32)] * 20 + [(1, 1)], 32),
        ([(10, 10), (20, 20)], 10),
    ],
)
def test_side_of_a_set(sizes: list[tuple[int, int]], side: int) -> None:
    assert common_side(sizes) == side


def test_what_becomes_of_sizes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tell_sizes([(8, 8)] * 4, 8)
    assert not caplog.records
    tell_sizes([(64, 64)] * 2 + [(224, 224)] * 5 + [(300, 200)] * 3 + [(30, 40)] * 2 + [(70, 71)], 64)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "11 of 13 pictures become 64x64 (5 of 224x224, 3 of 300x200, 2 of 30x40, 1 of other sizes)" in told
    assert "2 of them enlarged" in told
    assert "--image-size" in told


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
    assert np.abs(decode(tmp_path / "board.png", image_size=16).pixels.astype(int) - 127).max() <= 2


def test_large_jpeg_is_close_to_a_full_decode(tmp_path: Path) -> None:
    Image.fromarray(gradient(1200, 1600)).save(tmp_path / "photo.jpg", quality=95)
    with Image.open(tmp_path / "photo.jpg") as image:
        full = np.asarray(fit(image, 64)).astype(int)
    assert np.abs(decode(tmp_path / "photo.jpg", image_size=64).pixels - full).max() <= 3


def test_photo_on_its_side_is_turned(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the upper half goes right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", image_size=16).pixels
    assert turned[:, 8:].min() == 255
    assert turned[:, :8].max() == 0


def test_stack_grey_stays_grey_and_one_colour_image_makes_all_colour() -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    colour = gradient(4, 4)
    assert np.array_equal(stack([grey, grey + 1], image_size=4), np.stack([grey, grey + 1])[:, None])
    mixed = stack([grey, colour], image_size=4)
    assert mixed.shape == (2, 3, 4, 4)
    assert np.array_equal(mixed[0], np.stack([grey] * 3))
    assert np.array_equal(mixed[1], colour.transpose(2, 0, 1))


def test_stack_sizes() -> None:
    small, other = (np.full((side, side), 9, dtype=np.uint8) for side in (4, 6))
    assert (stack([small, other], image_size=6) == 9).all()
    assert stack([small, other], image_size=5).shape == (2, 1, 5, 5)
    assert stack([np.zeros((20, 28), dtype=np.uint8)] * 2, image_size=20).shape == (2, 1, 20, 20)


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
