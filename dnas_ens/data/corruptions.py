"""Test images under corruption, at five severities, in the style of CIFAR-10-C (arXiv 1903.12261).

Kinds and severities follow the paper; the implementations and strengths are this project's own, so figures are not
comparable with those on the published files, which `dnas_ens.data.cifar10_c` reads.

What is random about an image's corruption depends only on the seed, the corruption and the image's index, not on its
batch or device (a device may round a pixel differently). All severities of a corruption share these draws (the same
noise grows, the same square widens), so that a curve over severities shows no luck of five draws. Shot noise is the
exception: its counts are drawn at a rate.

Images may have any size and one or three channels. Lengths that follow the content (blurs) are given in pixels of a
32 x 32 image and grow with the square root of the side, between the paper's strengths for 32 and for 224 pixels. What
lies outside an image continues its border, so that no black corners come in. Legend: B batch, C channels, H x W.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from dnas_ens.data.images import PixelArray, in_threads
from dnas_ens.data.names import STRENGTHS, check_corruption, check_severity
from dnas_ens.errors import UserError

#: Images corrupted at once. It bounds the memory: every step holds a few float copies of them.
_CHUNK = 1024
#: Width of the bumps of an elastic deformation (a standard deviation) as a share of the side.
_ELASTIC_SMOOTHNESS = 0.12


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
        name: One of `dnas_ens.data.names.CORRUPTION_NAMES`.
        severity: 1 (weak) to 5 (strong).
        seed: At least 0.
        indices: B indices, at least 0, of the images in their data set; by default 0 to B - 1.

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
        corrupted[start : start + _CHUNK] = _bytes(_OPERATIONS[name](chunk.float() / 255, strength, draws))
    return corrupted


class CorruptionDraws:
    """Random numbers for a batch, each image's from a NumPy generator seeded by (seed, corruption, index).

    They are drawn on the CPU and moved to the images' device, because a device's generator has a stream of its own.
    """

    def __init__(self, seed: int, name: str, indices: Sequence[int], *, device: torch.device | str = "cpu") -> None:
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


# Every corruption below takes float images (B, C, H, W) in [0, 1], a strength s and the draws, and returns images of
# the same shape, which may leave [0, 1]: `corrupt` clips and rounds them.


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
    """JPEG at the quality s in 1 to 95, colour at half the resolution; coded by Pillow, on the CPU."""
    # torchvision's own coder is deprecated since 0.29.
    pixels = _bytes(images).cpu().permute(0, 2, 3, 1).numpy()
    coded = in_threads(partial(_coded, quality=int(strength)), pixels)
    stacked = torch.from_numpy(np.stack(list(coded))).permute(0, 3, 1, 2)
    return stacked.to(images.device).float() / 255


def gaussian_blur(images: Tensor, strength: float, _: CorruptionDraws) -> Tensor:
    """Convolution with a Gaussian of standard deviation s pixels at 32 x 32."""
    return _gaussian(images, strength * _scale(images))


def defocus_blur(images: Tensor, strength: float, _: CorruptionDraws) -> Tensor:
    """Convolution with a disc of radius s pixels at 32 x 32, its edge antialiased."""
    radius = strength * _scale(images)
    rows, columns = _offsets(math.ceil(radius), images)
    kernel = (radius + 0.5 - torch.hypot(rows, columns)).clamp(0, 1)
    return _convolve(images, kernel.expand(len(images), -1, -1))


def motion_blur(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Convolution with a line of s pixels at 32 x 32, in a direction drawn for each image."""
    half = (strength * _scale(images) - 1) / 2
    rows, columns = _offsets(max(1, math.ceil(half)), images)
    angle = math.pi * draws.uniform(1, 1)
    along = columns * angle.cos() + rows * angle.sin()
    across = rows * angle.cos() - columns * angle.sin()
    # A line one pixel wide, antialiased at its ends and along its sides.
    return _convolve(images, (half + 1 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(min=0))


def pixelate(images: Tensor, strength: float, _: CorruptionDraws) -> Tensor:
    """Average over square cells of 1/s pixels, laid out from the centre of the image.

    A pixel across the border of cells takes its share of each. With whole pixels instead, a mild severity could be
    worse than the next one on small images, by how cells and pixels happen to meet.
    """
    for axis in (-2, -1):
        overlap = _overlap(images.shape[axis], 1 / strength, images)
        mix = overlap.T @ (overlap / overlap.sum(dim=1, keepdim=True))
        images = (images.movedim(axis, -1) @ mix.T).movedim(-1, axis)
    return images


def rotation(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Turn around the centre by s degrees, to the left or to the right as drawn for each image."""
    sign = torch.where(draws.uniform() < 0.5, -1.0, 1.0)
    angle = sign * math.radians(strength)
    zero = torch.zeros_like(angle)
    matrix = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1)
    return _sample(images, F.affine_grid(matrix.view(-1, 2, 3), list(images.shape), align_corners=False))


def translation(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Shift by s times the side, in a direction drawn for each image."""
    angle = 2 * math.pi * draws.uniform(1, 1)
    shift = strength * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return _sample(images, _identity(images) + 2 * shift)


def elastic(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Move each pixel along a smooth random field whose root mean square is s times the side."""
    side = max(images.shape[-2:])
    field = _gaussian(draws.normal(2, *images.shape[-2:]), _ELASTIC_SMOOTHNESS * side)
    length = field.square().sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True).sqrt()
    displacement = (strength * field / length.clamp_min(1e-12)).permute(0, 2, 3, 1)
    return _sample(images, _identity(images) + 2 * displacement)


def occlusion(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Cover a square of s times the side with mid-grey; its centre is uniform, and the border cuts it off."""
    height, width = images.shape[-2:]
    centre = draws.uniform(2)
    reach = strength * max(height, width) / 2

    def covered(position: Tensor, size: int) -> Tensor:
        pixels = torch.arange(size, device=images.device) + 0.5
        return (pixels - position[:, None] * size).abs() <= reach

    mask = covered(centre[:, 0], height)[:, :, None] & covered(centre[:, 1], width)[:, None, :]
    return torch.where(mask[:, None], 0.5, images)


_OPERATIONS = {
    operation.__name__: operation
    for operation in (
        *(gaussian_noise, shot_noise, impulse_noise, gaussian_blur, defocus_blur, motion_blur, brightness),
        *(contrast, jpeg, pixelate, rotation, translation, elastic, occlusion),
    )
}


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def _coded(pixels: PixelArray, *, quality: int) -> PixelArray:
    """Code and decode one image (H, W, C)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(
        buffer, format="JPEG", quality=quality, subsampling="4:2:0"
    )
    with Image.open(buffer) as decoded:
        return np.asarray(decoded).reshape(pixels.shape)


def _scale(images: Tensor) -> float:
    """What a length at 32 x 32 is multiplied by."""
    return math.sqrt(max(images.shape[-2:]) / 32)


def _overlap(num_pixels: int, width: float, images: Tensor) -> Tensor:
    """Length (cells, pixels), in pixels, that cells of a width, laid out from the centre, share with pixels."""
    pixels = torch.arange(num_pixels, device=images.device, dtype=images.dtype)
    reach = math.ceil(num_pixels / 2 / width - 1e-6)
    cells = torch.arange(-reach, reach, device=images.device, dtype=images.dtype)[:, None]
    first = num_pixels / 2 + cells * width
    return (torch.minimum(first + width, pixels + 1) - torch.maximum(first, pixels)).clamp_min(0)


def _gaussian(images: Tensor, sigma: float) -> Tensor:
    # torchvision reflects at the border, which reaches no further than the image.
    radius = max(1, min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1))
    blurred: Tensor = functional.gaussian_blur(images, [2 * radius + 1] * 2, [sigma, sigma])
    return blurred


def _offsets(radius: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns (2 radius + 1, 2 radius + 1) of a kernel, counted from its centre."""
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    return steps[:, None].expand(-1, len(steps)), steps[None, :].expand(len(steps), -1)


def _convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve every image (B, C, H, W) with its own kernel (B, side, side), normalised to the sum 1."""
    batch, channels, height, width = images.shape
    kernels = kernels / kernels.sum(dim=(1, 2), keepdim=True)
    padded = F.pad(images, (kernels.shape[-1] // 2,) * 4, mode="replicate")
    weight = kernels.repeat_interleave(channels, dim=0)[:, None]
    mixed = F.conv2d(padded.flatten(0, 1)[None], weight, groups=batch * channels)
    return mixed.view(batch, channels, height, width)


def _identity(images: Tensor) -> Tensor:
    """The sampling grid (1, H, W, 2) that changes nothing; x and y from -1 to 1."""
    unchanged = torch.eye(2, 3, device=images.device, dtype=images.dtype)[None]
    return F.affine_grid(unchanged, [1, *images.shape[1:]], align_corners=False)


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    """Read images bilinearly at the positions (B, H, W, 2) of a grid."""
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
