"""Channel means and standard deviations: measured once on the training images, applied to every batch."""

from __future__ import annotations

from functools import lru_cache

import torch

from dnas_ens.errors import UserError


def measure_normalisation(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of every channel, exactly, from integer sums.

    Args:
        images: uint8 (N, C, H, W), N at least 1.

    Returns:
        C means and C standard deviations in units of [0, 1] pixels; the deviation of a constant channel is
        given as 1, so that dividing by it is safe.

    Raises:
        UserError: If there are no images.
    """
    if images.numel() == 0:
        raise UserError("There are no training images to measure.", "Give the train split some images.")
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    total_of_squares = torch.zeros_like(total)
    for chunk in images.split(1024):
        values = chunk.to(torch.int32)
        total += values.sum(dim=(0, 2, 3)).cpu()
        total_of_squares += values.square().sum(dim=(0, 2, 3)).cpu()
    count = images.numel() // images.shape[1]
    mean = [int(value) / count for value in total]
    # Whole numbers up to the last division: the textbook E[x^2] - E[x]^2 loses no digit this way.
    spread = [
        int(square) * count - int(value) ** 2 for value, square in zip(total, total_of_squares, strict=True)
    ]
    std = [value**0.5 / count / 255 if value else 1.0 for value in spread]
    return tuple(value / 255 for value in mean), tuple(std)


def normalise(images: torch.Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(x / 255 - mean) / std for each channel.

    Args:
        images: uint8 (B, C, H, W).
        mean: C means in [0, 1].
        std: C standard deviations, above 0, in the same unit.

    Returns:
        float32 (B, C, H, W) on the device of `images`.
    """
    scale, shift = _scale_and_shift(mean, std, images.device)
    return images.float().mul_(scale).add_(shift)


@lru_cache(maxsize=32)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / (255 std) and -mean / std as (1, C, 1, 1); kept, so that no batch waits for a copy to a device."""
    scale = torch.tensor([1 / (255 * deviation) for deviation in std], device=device)
    shift = torch.tensor(
        [-average / deviation for average, deviation in zip(mean, std, strict=True)], device=device
    )
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
