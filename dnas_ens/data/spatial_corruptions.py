"""Corruptions that move or mix pixels: blurs, geometry, occlusion.

Every function takes float images (B, C, H, W) in [0, 1], a strength and the draws, and returns images of the same
shape. What lies outside an image is taken to go on like its border, so that no black corners come in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from dnas_ens.data.corruption_draws import CorruptionDraws

#: Width of the bumps of an elastic deformation (a standard deviation) as a share of the side.
ELASTIC_SMOOTHNESS = 0.12


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

    A pixel that lies across the border of cells takes its share of each. Whole numbers of cells, and pixels that
    are repeated, would make some mild severities worse than the next on small images, as the cells happen to meet
    the pixels or not.
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
    field = _gaussian(draws.normal(2, *images.shape[-2:]), ELASTIC_SMOOTHNESS * side)
    length = field.square().sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True).sqrt()
    displacement = (strength * field / length.clamp_min(1e-12)).permute(0, 2, 3, 1)
    return _sample(images, _identity(images) + 2 * displacement)


def occlusion(images: Tensor, strength: float, draws: CorruptionDraws) -> Tensor:
    """Cover a square of s times the side with mid-grey; its centre is uniform, what stands out is cut."""
    height, width = images.shape[-2:]
    centre = draws.uniform(2)
    reach = strength * max(height, width) / 2

    def covered(position: Tensor, size: int) -> Tensor:
        pixels = torch.arange(size, device=images.device) + 0.5
        return (pixels - position[:, None] * size).abs() <= reach

    mask = covered(centre[:, 0], height)[:, :, None] & covered(centre[:, 1], width)[:, None, :]
    return torch.where(mask[:, None], 0.5, images)


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
