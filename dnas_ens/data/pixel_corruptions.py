"""Corruptions of each pixel for itself: noise, light and compression.

Every function takes float images (B, C, H, W) in [0, 1], a strength and the draws, and returns images of the same
shape that may leave [0, 1]; `dnas_ens.data.corruptions.corrupt` clips and rounds them.
"""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from dnas_ens.data.corruption_draws import CorruptionDraws
from dnas_ens.data.images import PixelArray, in_threads


def gaussian_noise(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Add s n, with n ~ N(0, 1) for each value; s in units of [0, 1] pixels."""
    return images + strength * draws.normal(*images.shape[1:])


def shot_noise(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Poisson(s x) / s: the noise of counting light, at s photons for a white pixel."""
    return draws.poisson(images * strength) / strength


def impulse_noise(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Set a share s of the values to black or white, half of them each."""
    uniform = draws.uniform(*images.shape[1:])
    peppered = torch.where(uniform < strength / 2, 0.0, images)
    return torch.where(uniform >= 1 - strength / 2, 1.0, peppered)


def brightness(images: Tensor, strength: float, _: CorruptionDraws) -> Tensor:
    """Add s, in units of [0, 1] pixels; bright pixels end at white."""
    return images + strength


def contrast(images: Tensor, strength: float, _: CorruptionDraws) -> Tensor:
    """Shrink to g + s (x - g), towards the mean grey g of the image."""
    adjusted: Tensor = functional.adjust_contrast(images, strength)
    return adjusted


def jpeg(images: Tensor, strength: float, _: CorruptionDraws) -> Tensor:
    """JPEG at the quality s in 1 to 95, colour at half the resolution; coded by Pillow, on the CPU.

    torchvision's own coder, behind its transform, is deprecated since 0.29 and announced to go.
    """
    pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy()
    coded = in_threads(partial(_coded, quality=int(strength)), pixels)
    stacked = torch.from_numpy(np.stack(list(coded))).permute(0, 3, 1, 2)
    return stacked.to(images.device).float() / 255


def _coded(pixels: PixelArray, *, quality: int) -> PixelArray:
    """Code and decode one image (H, W, C)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(
        buffer, format="JPEG", quality=quality, subsampling="4:2:0"
    )
    with Image.open(buffer) as decoded:
        return np.asarray(decoded).reshape(pixels.shape)
