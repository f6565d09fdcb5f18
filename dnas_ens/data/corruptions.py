"""Test images under corruption, at five severities, in the style of CIFAR-10-C (arXiv 1903.12261).

What is random about an image's corruption depends on the seed, the corruption and the image's index alone: not on
the batch it comes in nor on the device, which changes at most the rounding of a pixel. The severities of one
corruption share these draws (the same noise grows, the same square widens), so that a curve over severities
shows the severity and not the luck of five draws; shot noise alone cannot, for its counts are drawn at a rate.

Images of any size and of one or three channels are corrupted. Lengths that follow the content (blurs) are pixels
of a 32 x 32 image and grow with the square root of the side, which lies between the strengths that the paper has
for 32 and for 224 pixels. Legend: B batch, C channels, H x W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dnas_ens.data import pixel_corruptions, spatial_corruptions
from dnas_ens.data.corruption_draws import CorruptionDraws
from dnas_ens.data.corruption_names import STRENGTHS, check_corruption, check_severity
from dnas_ens.errors import UserError

_OPERATIONS = {
    "gaussian_noise": pixel_corruptions.gaussian_noise,
    "shot_noise": pixel_corruptions.shot_noise,
    "impulse_noise": pixel_corruptions.impulse_noise,
    "gaussian_blur": spatial_corruptions.gaussian_blur,
    "defocus_blur": spatial_corruptions.defocus_blur,
    "motion_blur": spatial_corruptions.motion_blur,
    "brightness": pixel_corruptions.brightness,
    "contrast": pixel_corruptions.contrast,
    "jpeg": pixel_corruptions.jpeg,
    "pixelate": spatial_corruptions.pixelate,
    "rotation": spatial_corruptions.rotation,
    "translation": spatial_corruptions.translation,
    "elastic": spatial_corruptions.elastic,
    "occlusion": spatial_corruptions.occlusion,
}

#: Images corrupted at once: what bounds the memory, for every step holds a few float copies of them.
_CHUNK = 1024


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Corrupt images.

    Args:
        images: uint8 (B, C, H, W), C 1 or 3, on any device.
        name: One of `dnas_ens.data.corruption_names.CORRUPTION_NAMES`.
        severity: 1 (weak) to 5 (strong).
        seed: At least 0.
        indices: B indices, at least 0, that say which image of its data set each one is; by default 0 to B - 1.

    Returns:
        uint8 (B, C, H, W) on the same device.

    Raises:
        UserError: An unknown name or severity, a negative seed or index, or images of another kind.
    """
    check_corruption(name)
    check_severity(severity)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"The images to corrupt are {images.dtype} of shape {tuple(images.shape)}.",
            "Give a torch.uint8 tensor of shape (B, C, H, W) with one or three channels.",
        )
    numbers = list(range(len(images)) if indices is None else indices)
    if len(numbers) != len(images):
        raise UserError(f"{len(images)} images have {len(numbers)} indices.", "Give one index an image.")
    if min([seed, *numbers]) < 0:
        raise UserError("The seed or an index is negative.", "Give whole numbers from 0 up.")
    strength = STRENGTHS[name][severity - 1]
    corrupted = torch.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        draws = CorruptionDraws(seed, name, numbers[start : start + _CHUNK], device=images.device)
        pixels = _OPERATIONS[name](chunk.float() / 255, strength, draws)
        corrupted[start : start + _CHUNK] = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return corrupted
