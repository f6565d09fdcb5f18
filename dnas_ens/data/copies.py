"""Which pictures of a set are copies of others: equal pixel for pixel, or saved again in another quality or size."""

from __future__ import annotations

import hashlib

import numpy as np
from scipy.spatial import cKDTree

from dnas_ens.data.images import PixelArray
from dnas_ens.types import FloatArray, IntArray

# Smaller pictures of one class are too often alike by chance, as scans of digits are.
_LEAST_SIDE = 16
# A copy differs by at most so many of 255 levels: on average over pixels, and in the mean of any of 8x8 blocks, which
# an object that is only in one of two pictures changes by more. Its correlation with the other is at least this.
_MEAN_DIFFERENCE, _BLOCK_DIFFERENCE, _CORRELATION = 4, 6, 0.995
# Distance of two pictures as vectors of mean 0 and length 1 that have the least correlation.
_RADIUS = (2 - 2 * _CORRELATION) ** 0.5
# So many of the nearest pictures are looked at, so that a set of similar ones takes no longer.
_NEIGHBOURS = 8
# A pixel takes up to 16 bytes on the way.
_PIXELS_AT_A_TIME = 2**19


def first_equal(images: PixelArray) -> IntArray:
    """For each image (N, C, H, W) the index of the first that is equal to it, pixel for pixel; maybe its own."""
    seen: dict[bytes, int] = {}
    digests = (hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images)
    return np.array([seen.setdefault(digest, index) for index, digest in enumerate(digests)], dtype=np.int64)


def first_alike(images: PixelArray, labels: IntArray, first: IntArray) -> IntArray:
    """Join pictures that were saved again in another quality or size with the first of them.

    Copies of copies are not joined further than to the first: frames of a film would become one picture.

    Args:
        images: uint8 (N, C, H, W); below 16 pixels a side nothing is joined.
        labels: (N,); only pictures of one class are joined, since two classes may differ by little.
        first: (N,) from `first_equal`.

    Returns:
        For each image the index of the first it is equal to or a copy of; maybe its own.
    """
    if images.shape[-1] < _LEAST_SIDE:
        return first
    different = np.flatnonzero(first == np.arange(len(first)))
    blocks = _block_means(images, different)
    joined = np.arange(len(first))
    for label in np.unique(labels[different]):
        own = np.flatnonzero(labels[different] == label)
        near = own[_near_pairs(blocks[own])]
        for one, other in different[near[_are_copies(images, different[near])]]:
            if joined[one] == one and joined[other] == other:
                joined[other] = one
    return joined[first]


def _block_means(images: PixelArray, indices: IntArray) -> FloatArray:
    """The mean grey of 8x8 blocks of each of n images, (n, 8, 8)."""
    side = images.shape[-1]
    edges = np.arange(8) * side // 8
    lengths = np.diff([*edges, side])
    blocks = np.empty((len(indices), 8, 8))
    chunks = np.array_split(np.arange(len(indices)), max(1, len(indices) * images[0].size // _PIXELS_AT_A_TIME))
    for chunk in chunks:
        grey = images[indices[chunk]].mean(axis=1, dtype=np.float32)
        sums = np.add.reduceat(np.add.reduceat(grey, edges, axis=1), edges, axis=2)
        blocks[chunk] = sums / np.multiply.outer(lengths, lengths)
    return blocks


def _standardised(values: FloatArray) -> FloatArray:
    """Levels (n, C, D) as n vectors of length 1 whose channels have mean 0, (n, C, D); what is flat becomes about 0."""
    centred: FloatArray = values - values.mean(axis=2, keepdims=True)
    centred /= np.maximum(np.sqrt(np.square(centred).sum(axis=(1, 2), keepdims=True)), 1)
    return centred


def _near_pairs(blocks: FloatArray) -> IntArray:
    """Pairs (P, 2) of indices, the smaller first and in order, of images whose blocks (n, 8, 8) are nearly equal."""
    coarse = _standardised(blocks.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 1, 16))[:, 0]
    _, found = cKDTree(coarse).query(coarse, k=_NEIGHBOURS + 1, distance_upper_bound=_RADIUS)
    pairs = np.stack([np.broadcast_to(np.arange(len(found))[:, None], found.shape), found], axis=2).reshape(-1, 2)
    # The tree gives n where there are fewer neighbours.
    pairs = np.unique(np.sort(pairs[(pairs[:, 1] < len(found)) & (pairs[:, 0] != pairs[:, 1])], axis=1), axis=0)
    differences = np.abs(blocks[pairs[:, 0]] - blocks[pairs[:, 1]]).max(axis=(1, 2))
    near: IntArray = pairs[differences <= _BLOCK_DIFFERENCE]
    return near


def _are_copies(images: PixelArray, pairs: IntArray) -> np.ndarray:
    """Whether the images of each of P pairs (P, 2) are the same picture, (P,)."""
    found = [np.zeros(0, dtype=bool)]
    for some in np.array_split(pairs, max(1, len(pairs) * images[0].size // _PIXELS_AT_A_TIME)):
        shape = (len(some), images.shape[1], images[0, 0].size)
        one, other = (images[some[:, place]].reshape(shape).astype(float) for place in (0, 1))
        close = np.abs(one - other).mean(axis=(1, 2)) <= _MEAN_DIFFERENCE
        correlation = (_standardised(one) * _standardised(other)).sum(axis=(1, 2))
        found.append(close & (correlation >= _CORRELATION))
    return np.concatenate(found)
