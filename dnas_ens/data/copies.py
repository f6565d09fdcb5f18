"""Images that are equal pixel for pixel: an image to be tested on must not be one that was learnt from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import numpy as np

from dnas_ens.data.images import LabelledImages, PixelArray
from dnas_ens.data.splits import IntArray

_logger = logging.getLogger(__name__)


def first_equal(images: PixelArray) -> IntArray:
    """For each image, the index of the first that is equal to it; its own where there is none before it.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        (N,) indices.
    """
    seen: dict[bytes, int] = {}
    digests = (hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images)
    return np.array([seen.setdefault(digest, index) for index, digest in enumerate(digests)], dtype=np.int64)


def tell_copies(source: LabelledImages, first: IntArray, splits: Mapping[str, IntArray]) -> None:
    """Say how many images are equal to others, and where that spoils what is measured.

    Args:
        source: The images.
        first: What `first_equal` says of them.
        splits: Indices of "train", "val" and "test".
    """
    copies = np.flatnonzero(first != np.arange(len(first)))
    if not len(copies):
        return
    example = ""
    if source.paths:
        example = f" (such as {source.paths[copies[0]]} of {source.paths[first[copies[0]]]})"
    _logger.warning(
        "%d of %d images are equal to others, pixel for pixel%s; random splits keep equal ones together.",
        len(copies),
        len(first),
        example,
    )
    contradictory = copies[source.labels[copies] != source.labels[first[copies]]]
    if len(contradictory):
        _logger.warning(
            "%d of them lie in another class than the image they are equal to.", len(contradictory)
        )
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = int(np.isin(first[splits[other]], first[splits[one]]).sum())
        if shared:
            _logger.warning(
                "%d of %d %s images are in %s too: what is measured on them says little.",
                shared,
                len(splits[other]),
                other,
                one,
            )
