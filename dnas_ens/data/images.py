"""One image file to pixels: modes, transparency, 16-bit greys, orientation, size.

Training and prediction read images through this module, so that a member sees the same pixels in both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dnas_ens.errors import UserError

PixelArray = NDArray[np.uint8]

# Squares up to this side are kept as they are; anything else becomes a square of this side.
DEFAULT_SIZE = 64

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_GREY_MODES = ("1", "L", "LA", "La")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """All the images of a source in its own order: train, then its val, then its test, where it has them.

    Args:
        name: Name of the data set or folder.
        classes: K class names.
        images: uint8 (N, C, H, H).
        labels: int64 (N,).
        flip: Whether an image means the same after a horizontal flip.
        num_train: Images the source gives for training.
        num_val: Images the source gives for validation, or 0.
        num_test: Images the source gives for test, or 0.
        max_val: See `splits.choose_splits`.
        skipped: Files left out because they could not be read.
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


def read_image(path: str | os.PathLike[str], *, num_channels: int, image_size: int) -> torch.Tensor:
    """Read one image as a trained ensemble wants it.

    A grey image is repeated over three channels; a colour image is accepted for one channel only if it is
    grey in fact (its three channels equal).

    Args:
        path: The image file.
        num_channels: 1 or 3.
        image_size: Side in pixels to which other sizes are resized and centre-cropped.

    Returns:
        uint8 (C, H, H).

    Raises:
        UserError: If the file is missing or unreadable, or is in colour where one channel is wanted.
    """
    pixels = decode_or_error(path, image_size=image_size)
    if isinstance(pixels, Exception):
        raise UserError(
            f"{path} cannot be read as an image ({reason(pixels)}).",
            "Check the path, or convert it to PNG or JPEG.",
        ) from pixels
    if pixels.ndim == 3 and num_channels == 1:
        if not (pixels == pixels[:, :, :1]).all():
            raise UserError(
                f"{path} is in colour, but the ensemble was trained on one grey channel.",
                "Convert the image to grey, or use an ensemble trained on colour images.",
            )
        pixels = np.ascontiguousarray(pixels[:, :, 0])
    return torch.from_numpy(as_planes(pixels, num_channels=num_channels).copy())


def decode(path: str | os.PathLike[str], *, image_size: int | None) -> PixelArray:
    """Decode an image file, the right way up, at the wanted size.

    Args:
        path: The image file; of an animation, the first frame.
        image_size: Side in pixels; None keeps a square of at most 64 pixels and makes anything else 64.

    Returns:
        (H, H) for grey, (H, H, 3) for colour.

    Raises:
        Exception: Whatever Pillow raises on a damaged file; ValueError for pixels without a known range.
    """
    with Image.open(path) as image:
        size = image_size if image_size is not None else preferred_size(image.size)
        # Lets the JPEG decoder leave out detail far below the wanted size; nothing happens to other files.
        image.draft(None, (2 * size, 2 * size))
        upright = ImageOps.exif_transpose(image) if image.info.get("exif") else image
        return np.asarray(fit(plain(upright), size))


def decode_or_error(path: str | os.PathLike[str], *, image_size: int | None) -> PixelArray | Exception:
    """Decode as `decode` does, or return what is wrong with the file; memory that ran out is not the file's fault."""
    try:
        return decode(path, image_size=image_size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        return error


def plain(image: Image.Image) -> Image.Image:
    """The same image in mode L if it is grey, otherwise RGB, transparency laid on white.

    Modes 1, L, LA and 16-bit greys (0 to 65535 scaled to 0 to 255 and rounded) are grey; all others,
    palettes included, are colour.

    Raises:
        ValueError: If the pixels are floats or outside 16 bits, so that their range is unknown.
    """
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values outside 0 to 65535")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.getchannel("R") if grey else image.convert("RGB")
    wanted = "L" if grey else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` (bilinear, antialiased) and crop the centre square."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)


def preferred_size(size: tuple[int, int]) -> int:
    """Side a single image would keep if none is asked for: its own if square and at most 64, else 64."""
    return size[0] if size[0] == size[1] <= DEFAULT_SIZE else DEFAULT_SIZE


def stack(arrays: Sequence[PixelArray], *, image_size: int | None) -> PixelArray:
    """Join decoded images of one data set: one size, one number of channels.

    Args:
        arrays: N arrays (H, W) or (H, W, 3); at least one.
        image_size: Side in pixels; None keeps the one square size of at most 64 that all share, if they
            do, and makes all of them 64 otherwise.

    Returns:
        (N, C, H, H), C = 1 if all are grey, otherwise 3.
    """
    if image_size is None:
        sizes = {array.shape[:2] for array in arrays}
        image_size = preferred_size(next(iter(sizes))) if len(sizes) == 1 else DEFAULT_SIZE
    side = image_size

    def resized(array: PixelArray) -> PixelArray:
        if array.shape[:2] == (side, side):
            return array
        return np.asarray(fit(Image.fromarray(array), side))

    if any(array.shape[:2] != (side, side) for array in arrays):
        arrays = list(in_threads(resized, arrays))
    num_channels = 3 if any(array.ndim == 3 for array in arrays) else 1
    stacked = np.empty((len(arrays), num_channels, side, side), dtype=np.uint8)
    for index, array in enumerate(arrays):
        stacked[index] = as_planes(array, num_channels=num_channels)
    return stacked


def as_planes(array: PixelArray, *, num_channels: int) -> PixelArray:
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
