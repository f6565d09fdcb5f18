"""One image file to pixels: modes, transparency, 16-bit greys, orientation, size.

Training and prediction read images through this module, so that a member sees the same pixels in both.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dnas_ens.data.large import room_for
from dnas_ens.errors import UserError

PixelArray = NDArray[np.uint8]

#: Pictures that are not read. Pillow would take the thumbnail within some of them for the picture.
FOREIGN_EXTENSIONS = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),
    *(".dcm", ".dicom", ".eps", ".exr", ".jxl", ".psd", ".svg"),
)

#: The largest side that is chosen where none is asked for.
_DEFAULT_SIZE = 64
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_GREY_MODES = ("1", "L", "LA", "La")
# A value this large needs all 16 bits.
_HALF_OF_16_BITS = 1 << 15
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a tag of TIFF
_ORIENTATION = 0x0112  # a tag of EXIF
_SIZES_NAMED = 3

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """All the images of a source in its own order: train, then its val, then its test, where it has them.

    Images are uint8 (N, C, H, H) and labels int64 (N,); `num_train`, `num_val` and `num_test` are how many the source
    gives for each (see `splits.choose_splits` for these and `max_val`); `paths` are the images' files, where each has
    one; `named` says whether the source names its classes, which are numbered otherwise; the rest is as in
    `dataset.ImageData`.
    """

    name: str
    classes: tuple[str, ...]
    images: PixelArray
    labels: NDArray[np.int64]
    flip: bool
    num_train: int
    num_val: int = 0
    num_test: int = 0
    max_val: int | None = None
    skipped: tuple[str, ...] = ()
    deep_bits: int | None = None
    deep_colour: bool = False
    paths: tuple[str, ...] = ()
    named: bool = True


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded file. Deep greys (of more than 8 bits) are still as in the file: the whole set decides their range.

    Args:
        pixels: uint8 (H, H) or (H, H, 3); uint16 (H, H) for deep greys.
        peak: Largest value in the file, 0 to 65535, of deep greys and of 16-bit colour, of which Pillow keeps the
            upper 8 bits; None for pixels of 8 bits.
    """

    pixels: NDArray[np.uint8] | NDArray[np.uint16]
    peak: int | None = None

    @property
    def is_deep_grey(self) -> bool:
        """Whether the pixels are greys of more than 8 bits."""
        return self.pixels.dtype == np.uint16

    @property
    def is_deep_colour(self) -> bool:
        """Whether the file holds 16 bits a channel, of which the pixels are the upper 8."""
        return self.peak is not None and not self.is_deep_grey


def read_image(
    path: str | os.PathLike[str],
    *,
    num_channels: int,
    image_size: int,
    deep_bits: int | None = None,
    deep_colour: bool = False,
) -> torch.Tensor:
    """Read one image in the form that a trained ensemble takes.

    A grey image is repeated over three channels; one in colour gives one channel only if its three are equal.

    Args:
        num_channels: 1 or 3.
        image_size: Side in pixels to which other sizes are resized and centre-cropped.
        deep_bits: Bits of the deep greys the ensemble was trained on; None where it saw none, so that only
            values that plainly use 16 bits are accepted.
        deep_colour: Whether it was trained on 16-bit colour, so that any values of such are.

    Returns:
        uint8 (C, H, H).

    Raises:
        UserError: This is no path; or the file is missing or unreadable, is in colour where one channel is wanted, or
            has values of another range than the training images.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(
            f"A {type(path).__name__} was given where the path of an image file is wanted.",
            "Give paths; an ensemble's predict_probs takes images themselves, as a uint8 array (N, C, H, W).",
        )
    picture = decode_or_error(path, image_size=image_size)
    if isinstance(picture, Exception):
        raise UserError(
            f"{path} cannot be read as an image ({reason(picture)}).",
            remedy_for({os.fspath(path): picture}, otherwise="Check the path, or convert it to PNG or JPEG."),
        ) from picture
    pixels = to_eight_bits(picture.pixels, _bits_of_one(path, picture, deep_bits, deep_colour))
    if pixels.ndim == 3 and num_channels == 1:
        if not (pixels == pixels[:, :, :1]).all():
            raise UserError(
                f"{path} is in colour, but the ensemble was trained on one grey channel.",
                "Convert the image to grey, or use an ensemble trained on colour images.",
            )
        pixels = np.ascontiguousarray(pixels[:, :, 0])
    return torch.from_numpy(_as_planes(pixels, num_channels=num_channels).copy())


def _bits_of_one(path: str | os.PathLike[str], picture: Picture, deep_bits: int | None, deep_colour: bool) -> int:
    """The bits of a single picture's values; UserError where the training images do not determine them."""
    if picture.peak is None:
        return 8
    if picture.is_deep_grey and deep_bits is not None:
        if picture.peak >= 1 << deep_bits:
            raise UserError(
                f"{path} has grey values up to {picture.peak}, the training images were of {deep_bits} bits.",
                f"Scale its values to 0 to {(1 << deep_bits) - 1}, white being the highest.",
            )
        return deep_bits
    known = deep_bits == 16 or (deep_colour and picture.is_deep_colour)
    if picture.peak < _HALF_OF_16_BITS and not known:
        raise UserError(
            f"{path} has values of 16 bits up to about {picture.peak}, and which of them is white is not known.",
            "Convert it to 8 bits.",
        )
    return 16


def remedy_for(faults: Mapping[str, Exception], *, otherwise: str) -> str:
    """What to do about files that cannot be read, each with what is wrong; `otherwise` where nothing else is known."""
    if all(isinstance(fault, Image.DecompressionBombError) for fault in faults.values()):
        return f"Scale {'it' if len(faults) == 1 else 'them'} down below 178 million pixels."
    endings = {os.path.splitext(path)[1].lower() for path in faults}
    if endings & {".heic", ".heif", ".hif"} and not _reads_heif():
        return "Install the reader of HEIC, `pip install 'dnas_ens[heif]'`, or convert them to PNG or JPEG."
    return otherwise


@functools.cache
def _reads_heif() -> bool:
    """Let Pillow read HEIC where pillow-heif is installed, and say whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def open_image(path: str | os.PathLike[str], *, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open a file as Pillow does, HEIC included where pillow-heif is installed.

    Raises:
        ValueError: The file is one of `FOREIGN_EXTENSIONS`.
        Exception: Whatever Pillow raises on a damaged file.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending in FOREIGN_EXTENSIONS:
        raise ValueError(f"{ending} files are not read")
    _reads_heif()
    return Image.open(path, formats=formats)


def decode(path: str | os.PathLike[str], *, image_size: int | None) -> Picture:
    """Decode an image file (of an animation, the first frame), the right way up, at a side of `image_size` pixels.

    None leaves it whole: its pixels (H, W) or (H, W, 3) need not be square.

    Raises:
        ValueError: The pixels have no known range.
        Exception: Whatever Pillow raises on a damaged file.
    """
    with open_image(path) as image:
        # The JPEG decoder leaves out detail far below the wanted size; other files are decoded whole.
        if image_size is not None:
            image.draft(None, (2 * image_size, 2 * image_size))
        deep_colour = _is_deep_colour(image)
        turned = upright(image)
        flat = plain(turned)
        peak = None
        if deep_colour:
            # The upper of two bytes, transparency left out.
            peak = 257 * int(np.asarray(turned)[..., :3].max())
        elif flat.mode == "I;16":
            peak = int(np.asarray(flat).max())
        return Picture(np.asarray(flat if image_size is None else fit(flat, image_size)), peak=peak)


def decode_or_error(path: str | os.PathLike[str], *, image_size: int | None) -> Picture | Exception:
    """Decode as `decode` does, or return what is wrong with the file; memory that ran out is not the file's fault."""
    try:
        return decode(path, image_size=image_size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        return error


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether a file that is not loaded yet holds 16 bits a channel, of which Pillow will keep the upper 8."""
    if image.mode in _DEEP_MODES:
        return False
    layouts = [tile[3] for tile in getattr(image, "tile", [])]
    names = [layout if isinstance(layout, str) else (layout or ("",))[0] for layout in layouts]
    return any(";16" in str(name) for name in names)


def upright(image: Image.Image) -> Image.Image:
    """The same image turned as its camera noted; one without a note, or with a broken one, stays as it is."""
    # A note may come after the pixels; what is wrong with those is no matter of the note.
    image.load()
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    except (SyntaxError, ValueError, struct.error):
        return image


def plain(image: Image.Image) -> Image.Image:
    """The same image in mode L if it is grey, I;16 if its greys are deep, otherwise RGB, transparency laid on white.

    Modes 1, L and LA are grey; I and the kinds of I;16 are deep greys, whose values stay as they are; all others,
    palettes included, are colour.

    Raises:
        ValueError: The range is unknown: floats, or deep greys with transparency or outside 16 bits.
    """
    if image.mode in _DEEP_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values outside 0 to 65535")
        if "transparency" in image.info:
            raise ValueError("16-bit greys with transparency are not read")
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise ValueError("16-bit greys of which 0 is white are not read")
        return Image.fromarray(values.astype(np.uint16))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.getchannel("R") if grey else image.convert("RGB")
    wanted = "L" if grey else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def to_eight_bits(values: NDArray[np.uint8] | NDArray[np.uint16], bits: int) -> PixelArray:
    """Scale deep greys from 0 to 2^bits - 1 to 0 to 255, rounded; uint8 values stay as they are."""
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    top = (1 << bits) - 1
    return ((values.astype(np.int64) * 255 + top // 2) // top).astype(np.uint8)


def with_one_scale(pictures: Sequence[Picture], names: Sequence[str]) -> tuple[list[PixelArray], int | None]:
    """Bring all pictures of a set to 8 bits, its deep greys by one scale, and say by which.

    The scale has the fewest bits, from 8 to 16, that hold every deep grey of the set: microscopes and X-ray
    machines write 10, 12 or 14 bits into files of 16, and no file says so.

    Args:
        names: What a message calls each.

    Returns:
        Arrays (H, H) or (H, H, 3), and the bits; None where there is no deep grey.

    Raises:
        UserError: 16-bit colours use fewer than 16 bits, of which Pillow keeps the upper 8.
    """
    colours = [
        (picture.peak, name)
        for picture, name in zip(pictures, names, strict=True)
        if picture.peak is not None and picture.is_deep_colour
    ]
    if colours and max(colours)[0] < _HALF_OF_16_BITS:
        raise UserError(
            f"{_counted(len(colours), 'picture')} such as {max(colours)[1]} hold 16-bit colour with values up to "
            f"about {max(colours)[0]} of 65535, of which only the upper 8 bits can be read.",
            "Convert them to 8 bits, white being their highest value.",
        )
    peaks = [picture.peak for picture in pictures if picture.is_deep_grey and picture.peak is not None]
    if not peaks:
        return [to_eight_bits(picture.pixels, 8) for picture in pictures], None
    bits = max(8, max(peaks).bit_length())
    _logger.warning(
        "%s of %d with greys of more than 8 bits: the highest value is %d, so white is %d (%d bits).",
        _counted(len(peaks), "picture"),
        len(pictures),
        max(peaks),
        (1 << bits) - 1,
        bits,
    )
    return [to_eight_bits(picture.pixels, bits) for picture in pictures], bits


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` (bilinear, antialiased) and crop the centre square."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)


def common_side(sizes: Sequence[tuple[int, int]]) -> int:
    """The side for a set of images of these widths and heights, where none is asked for.

    It is the median of their short sides, the lower one of two, but 64 at most: few odd images do not move it.
    """
    return min(_DEFAULT_SIZE, sorted(map(min, sizes))[(len(sizes) - 1) // 2])


def tell_sizes(sizes: Sequence[tuple[int, int]], side: int) -> None:
    """Say how many images of a set change their size, from what to what; nothing where none does."""
    changed = Counter(size for size in sizes if size != (side, side))
    if not changed:
        return
    most_common = changed.most_common(_SIZES_NAMED)
    named = [f"{count} of {width}x{height}" for (width, height), count in most_common]
    rest = changed.total() - sum(count for _, count in most_common)
    named += [f"{rest} of other sizes"] if rest else []
    enlarged = sum(count for size, count in changed.items() if min(size) < side)
    _logger.warning(
        "%d of %s become %dx%d (%s): the short side is resized%s and the centre cropped. "
        "Another side is given by --image-size or image_size=.",
        changed.total(),
        _counted(len(sizes), "picture"),
        side,
        side,
        ", ".join(named),
        f", {enlarged} of them enlarged," if enlarged else "",
    )


def stack(arrays: Sequence[PixelArray], *, image_size: int) -> PixelArray:
    """Join N decoded images (H, W) or (H, W, 3) to (N, C, side, side), C = 1 if all are grey, otherwise 3."""
    square = (image_size, image_size)

    def resized(array: PixelArray) -> PixelArray:
        return array if array.shape[:2] == square else np.asarray(fit(Image.fromarray(array), image_size))

    if any(array.shape[:2] != square for array in arrays):
        arrays = list(in_threads(resized, arrays))
    num_channels = 3 if any(array.ndim == 3 for array in arrays) else 1
    stacked: PixelArray = room_for(len(arrays), num_channels, *square).numpy()
    for index, array in enumerate(arrays):
        stacked[index] = _as_planes(array, num_channels=num_channels)
    return stacked


def _as_planes(array: PixelArray, *, num_channels: int) -> PixelArray:
    """(H, W) or (H, W, 3) to (C, H, W), a grey image repeated over `num_channels`."""
    if array.ndim == 3:
        return array.transpose(2, 0, 1)
    return np.broadcast_to(array, (num_channels, *array.shape))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterable[Result]:
    """Apply `function` to all items in a few threads, results in order; Pillow frees Python's lock."""
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool:
        yield from pool.map(function, items)


def reason(error: Exception) -> str:
    """One line that says why an image could not be read."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
