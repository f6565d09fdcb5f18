import struct
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dnas_ens.data import load_data, read_image
from dnas_ens.data.images import common_side, decode, fit, plain, tell_sizes, with_one_scale
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.errors import UserError


def gradient(height, width):
    """Smooth colours, (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    colours = [y * 255 // height, x * 255 // width, (x + y) * 255 // (height + width)]
    return np.stack(colours, -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "value", "wanted", "expected"),
    [
        ("1", 1, "L", 255),
        ("LA", (0, 51), "L", 204),  # a fifth of black on white: 255 * (1 - 51 / 255)
        ("RGBA", (255, 0, 0, 51), "RGB", (255, 204, 204)),
        ("CMYK", (255, 0, 0, 0), "RGB", (0, 255, 255)),
        ("I;16", 4095, "I;16", 4095),
        ("I;16B", 65535, "I;16", 65535),
    ],
)
def test_modes(mode, value, wanted, expected):
    result = plain(Image.new(mode, (1, 1), value))
    assert (result.mode, result.getpixel((0, 0))) == (wanted, expected)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    with Image.open(tmp_path / "palette.png") as opened:
        assert np.asarray(plain(opened)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def deep_png(path, values, colour_type):
    """16 bits a channel, (H, W, C): 2 is RGB, 4 grey with alpha, 6 RGB with alpha."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


DEEP_WRITERS = [
    lambda path, values: Image.fromarray(values).save(path, "PNG"),
    lambda path, values: Image.fromarray(values.astype(np.int32)).save(path, "TIFF"),
    lambda path, values: Image.fromarray(values.astype(">u2")).save(path, "TIFF"),
]


@pytest.mark.parametrize("write", DEEP_WRITERS)
@pytest.mark.parametrize("bits", [10, 16])
def test_deep_files_of_every_byte_order_are_decoded_as_they_are(tmp_path, write, bits):
    values = np.random.default_rng(bits).integers(0, 1 << bits, (9, 9)).astype(np.uint16)
    values[4, 4] = (1 << bits) - 1
    write(tmp_path / "deep.png", values)
    picture = decode(tmp_path / "deep.png", image_size=9)
    assert np.array_equal(picture.pixels, values)
    assert picture.peak == (1 << bits) - 1
    # The peak is the file's, not what resizing leaves of it.
    assert decode(tmp_path / "deep.png", image_size=3).peak == picture.peak


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_is_read_where_it_uses_16_bits_and_refused_where_not(tmp_path, colour_type, channels):
    values = np.full((2, 2, channels), 65535)
    values[0, 0, 0] = 257 * 100
    path = str(tmp_path / "deep.png")
    deep_png(tmp_path / "deep.png", values, colour_type)
    (pixels,), bits = with_one_scale([decode(path, image_size=2)], [path])
    assert bits is None
    assert (pixels[0, 0].flat[0], pixels[1, 1].flat[0]) == (100, 255)
    values[..., : channels - (channels % 2 == 0)] //= 16
    deep_png(tmp_path / "deep.png", values, colour_type)
    # A dark one is read where others of the training used 16 bits.
    assert int(read_image(path, num_channels=3, image_size=2, deep_colour=True).max()) == 15
    with pytest.raises(UserError, match="which of them is white is not known"):
        read_image(path, num_channels=3, image_size=2)
    with pytest.raises(UserError, match=r"deep\.png") as caught:
        with_one_scale([decode(path, image_size=2)], [path])
    assert "8 bits" in caught.value.remedy


def test_that_16_bit_colour_was_seen_reaches_the_ensemble(tmp_path):
    for name, top in (("a", 65535), ("b", 5000)):
        (tmp_path / name).mkdir()
        for index in range(5):
            deep_png(tmp_path / f"{name}/{index}.png", np.full((4, 4, 3), top - 257 * index), 2)
    data = load_data(tmp_path, limit_train=5)
    how = Preprocessing.from_dict(Preprocessing.of(data.limited(4, seed=0)).to_dict())
    assert how.read(tmp_path / "b/0.png").unique().tolist() == [5000 // 256]


def test_deep_greys_that_would_be_read_wrongly_are_refused(tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(4, 4)
    white = tmp_path / "0 is white.tif"
    Image.fromarray(values).save(white)
    photometric = struct.pack("<HHIH", 262, 3, 1, 1)  # the tag, a short, one of them: black is zero
    assert photometric in white.read_bytes()
    white.write_bytes(white.read_bytes().replace(photometric, struct.pack("<HHIH", 262, 3, 1, 0)))
    Image.fromarray(values).save(tmp_path / "transparency.png", transparency=3)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "floating.tif")
    Image.fromarray(values.astype(np.int32) - 1).save(tmp_path / "outside.tif")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.stem):
            decode(path, image_size=4)


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
def test_read_image_scales_deep_greys_as_the_training_images(tmp_path, value, deep_bits, expected):
    Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=expected) if isinstance(expected, str) else nullcontext():
        read = read_image(tmp_path / "deep.png", num_channels=1, image_size=4, deep_bits=deep_bits)
        assert int(read[0, 0, 0]) == expected


def test_side_of_a_set_and_what_becomes_of_its_sizes(caplog):
    assert [common_side([(side, side + 9)] * 5) for side in (20, 64, 200)] == [20, 64, 64]
    assert common_side([(10, 10), (20, 20)]) == 10
    assert common_side([(32, 32)] * 20 + [(4000, 3000), (1, 1)]) == 32
    tell_sizes([(8, 8)] * 4, 8)
    assert not caplog.records
    tell_sizes([(64, 64)] * 2 + [(224, 224)] * 5 + [(300, 200)] * 3 + [(30, 40)] * 2 + [(70, 71)], 64)
    told = "11 of 13 pictures become 64x64 (5 of 224x224, 3 of 300x200, 2 of 30x40, 1 of other sizes)"
    assert told in caplog.text
    assert "2 of them enlarged" in caplog.text


@pytest.mark.parametrize(("height", "width", "size"), [(96, 48, 32), (20, 30, 40), (100, 100, 16)])
def test_fit_is_torchvisions_antialiased_resize_and_centre_crop(height, width, size):
    pixels = gradient(height, width)
    resized = v2.functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), [size], antialias=True)
    reference = v2.functional.center_crop(resized, [size, size])
    fitted = np.asarray(fit(Image.fromarray(pixels), size)).transpose(2, 0, 1)
    assert fitted.shape == (3, size, size)
    assert np.abs(fitted.astype(int) - reference.numpy().astype(int)).max() <= 3


def test_large_jpeg_is_close_to_a_full_decode(tmp_path):
    Image.fromarray(gradient(600, 800)).save(tmp_path / "photo.jpg", quality=95)
    with Image.open(tmp_path / "photo.jpg") as image:
        full = np.asarray(fit(image, 64)).astype(int)
    assert np.abs(decode(tmp_path / "photo.jpg", image_size=64).pixels - full).max() <= 3


def test_photo_on_its_side_is_turned(tmp_path):
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the upper half goes right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", image_size=16).pixels
    assert np.array_equal(turned, np.rot90(pixels, -1))


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("way", ["before", "after the pixels", "as text", "TIFF"])
def test_the_orientation_is_found_wherever_a_file_keeps_it(tmp_path, way):
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, "TIFF" if way == "TIFF" else "PNG", **({"exif": exif} if way == "TIFF" else {}))
    note, content = exif.tobytes(), path.read_bytes()
    as_text = f"\nexif\n{len(note):8d}\n{note.hex()}\n".encode()
    added, place = {
        "before": (chunk(b"eXIf", note[6:]), content.find(b"IDAT") - 4),
        "after the pixels": (chunk(b"eXIf", note[6:]), content.find(b"IEND") - 4),
        "as text": (
            chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(as_text)),
            content.find(b"IDAT") - 4,
        ),
        "TIFF": (b"", 0),
    }[way]
    path.write_bytes(content[:place] + added + content[place:])
    assert np.array_equal(decode(path, image_size=16).pixels, np.rot90(pixels, -1))


def test_read_image_channels(tmp_path):
    grey, colour = np.arange(64, dtype=np.uint8).reshape(8, 8), gradient(8, 8)
    grey_as_colour = np.stack([grey] * 3, -1)
    path = tmp_path / "image.png"
    for pixels, num_channels, expected in (
        (grey, 1, grey[None]),
        (grey_as_colour, 1, grey[None]),
        (grey, 3, grey_as_colour.transpose(2, 0, 1)),
        (colour, 3, colour.transpose(2, 0, 1)),
    ):
        Image.fromarray(pixels).save(path)
        assert np.array_equal(read_image(path, num_channels=num_channels, image_size=8).numpy(), expected)
    with pytest.raises(UserError, match="is in colour, but the ensemble was trained on one grey channel"):
        read_image(path, num_channels=1, image_size=8)


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_read_image_names_what_it_cannot_read(tmp_path, content):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_image(path, num_channels=1, image_size=8)
    assert f"{path} cannot be read as an image" in caught.value.cause
    assert "\n" not in str(caught.value)


def test_a_thumbnail_inside_is_not_taken_for_the_picture(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "camera.CR2", "TIFF")
    with pytest.raises(UserError, match="files are not read"):
        read_image(tmp_path / "camera.CR2", num_channels=1, image_size=4)
