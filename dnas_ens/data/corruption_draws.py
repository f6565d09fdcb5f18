"""The random numbers of corruptions: a stream for every image, whatever batch and device it is on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class CorruptionDraws:
    """Draws for a batch, each image's from a generator of its own, seeded by (seed, corruption, index).

    They are made by NumPy on the CPU and moved to the device of the images: generators on a device have streams of
    their own kind and none an image.

    Args:
        seed: At least 0.
        name: Name of the corruption; two corruptions draw different numbers.
        indices: B indices of the images, at least 0.
        device: Of the images.
    """

    def __init__(
        self, seed: int, name: str, indices: Sequence[int], *, device: torch.device | str = "cpu"
    ) -> None:
        stream = zlib.crc32(name.encode())
        self._generators = [np.random.default_rng([seed, stream, int(index)]) for index in indices]
        self._device = device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 (B, *shape)."""
        return self._stacked([rng.standard_normal(shape, dtype=np.float32) for rng in self._generators])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), float32 (B, *shape)."""
        return self._stacked([rng.random(shape, dtype=np.float32) for rng in self._generators])

    def poisson(self, rates: Tensor) -> Tensor:
        """Poisson counts at the given rates (B, ...), float32 of the same shape."""
        # In double precision, and rounded, so that no device's last place moves a count.
        each = zip(self._generators, rates.double().cpu().numpy().round(6), strict=True)
        return self._stacked([rng.poisson(rate).astype(np.float32) for rng, rate in each])

    def _stacked(self, values: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(values)).to(self._device)
