"""Data sets by name: scikit-learn's digits, and torchvision's Fashion-MNIST, MNIST, CIFAR and SVHN."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from dnas_ens.data.images import LabelledImages, reason, stack
from dnas_ens.data.names import KNOWN_SOURCES, KnownSource
from dnas_ens.errors import UserError

# Validation images cut off the training images of a source with its own test: Fashion-MNIST and MNIST
# 50k/10k/10k, CIFAR 40k/10k/10k, SVHN 63,257/10k/26,032.
_NUM_VAL = 10_000

_SILENCE_BEFORE_GIVING_UP = 60.0  # seconds

_READING_ERRORS = (
    *(RuntimeError, OSError, AssertionError, ValueError, EOFError, LookupError, TypeError, UnpicklingError),
)


def load_source(name: str, data_root: Path, *, image_size: int | None = None, download: bool = True) -> LabelledImages:
    """Read a data set known by name.

    Args:
        name: One of `SOURCE_NAMES`.
        data_root: Folder in which torchvision keeps its data sets.
        image_size: Side in pixels to resize to; None keeps the data set's own.
        download: Whether files that are absent, or have another MD5 than torchvision's, may be downloaded.

    Returns:
        The training images in file order, then the test images, if the source has its own.

    Raises:
        UserError: The files are absent and cannot be downloaded, or are damaged.
    """
    known = KNOWN_SOURCES[name]
    if known.torchvision_class is None:
        return _load_digits(image_size=image_size)
    parts = [_read_part(name, known, data_root=data_root, train=train, download=download) for train in (True, False)]
    images = [_to_channels_first(np.asarray(part.data)) for part in parts]
    labels = [np.asarray(part.labels if hasattr(part, "labels") else part.targets, dtype=np.int64) for part in parts]
    classes = tuple(map(str, range(10))) if known.digit_classes else tuple(parts[0].classes)
    for pixels, numbers in zip(images, labels, strict=True):
        if len(pixels) != len(numbers) or numbers.max() >= len(classes):
            cause = f"{len(pixels)} images, {len(numbers)} labels up to {numbers.max()}, {len(classes)} classes"
            raise _damaged(name, known, data_root, cause=cause)
    return LabelledImages(
        name=name,
        classes=classes,
        images=_resized(np.concatenate(images), image_size=image_size),
        labels=np.concatenate(labels),
        flip=known.flip,
        num_train=len(labels[0]),
        num_test=len(labels[1]),
        max_val=_NUM_VAL,
    )


def _load_digits(*, image_size: int | None) -> LabelledImages:
    """The 1,797 scans of 8x8 pixels that come with scikit-learn, 0..16 scaled to 0..255 and rounded."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return LabelledImages(
        name="digits",
        classes=tuple(str(name) for name in digits.target_names),
        images=_resized(images, image_size=image_size),
        labels=digits.target.astype(np.int64),
        flip=KNOWN_SOURCES["digits"].flip,
        num_train=len(images),
    )


def _read_part(name: str, known: KnownSource, *, data_root: Path, train: bool, download: bool) -> Any:
    """Open with torchvision; `download` is attempted only if the files are not there."""
    try:
        return _open(known, data_root=data_root, train=train, download=False)
    except _READING_ERRORS as error:
        if not (isinstance(error, RuntimeError) and "not found" in str(error)):  # torchvision's words
            raise _damaged(name, known, data_root, cause=f"{type(error).__name__}: {reason(error)}") from error
        if not download:
            raise _absent(name, known, data_root, cause="and downloading is off") from error
    try:
        with _limited_silence():
            return _open(known, data_root=data_root, train=train, download=True)
    except _READING_ERRORS as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise _absent(name, known, data_root, cause=f"and cannot be downloaded ({told[-1]})") from error


def _open(known: KnownSource, *, data_root: Path, train: bool, download: bool) -> Any:
    from torchvision import datasets

    original = getattr(datasets, str(known.torchvision_class))
    # Otherwise torchvision would torch.load a pre-2020 processed/training.pt instead of reading the raw files. The
    # class keeps its name, because torchvision takes the folder's name from it.
    cls = type(original.__name__, (original,), {"_check_legacy_exist": lambda self: False})
    part = {"split": "train" if train else "test"} if original is datasets.SVHN else {"train": train}
    with warnings.catch_warnings():
        # NumPy 2.4.0 to 2.4.4 warns of the way in which CIFAR's old pickles write a dtype.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        return cls(data_root, **part, download=download)


def _absent(name: str, known: KnownSource, data_root: Path, *, cause: str) -> UserError:
    return UserError(
        f"{name!r} is not in {data_root} {cause}.",
        f"Put its files at {data_root / known.where} as torchvision lays them out, "
        "name another folder with --data-root, or use --data digits, which needs no download.",
    )


def _damaged(name: str, known: KnownSource, data_root: Path, *, cause: str) -> UserError:
    return UserError(
        f"The files of {name!r} at {data_root / known.where} are damaged ({cause}).",
        "Delete them, so that they are downloaded again.",
    )


@contextmanager
def _limited_silence() -> Iterator[None]:
    """Give torchvision's downloads a timeout: they have none, and would wait for ever without a network."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_BEFORE_GIVING_UP)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _to_channels_first(images: np.ndarray) -> np.ndarray:
    """(N, H, W), (N, H, W, 3) or (N, 3, H, W) to (N, C, H, W)."""
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] == 3 else images.transpose(0, 3, 1, 2)


def _resized(images: np.ndarray, *, image_size: int | None) -> np.ndarray:
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return np.ascontiguousarray(images)
    layout = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    return stack([np.ascontiguousarray(image) for image in layout], image_size=image_size)
