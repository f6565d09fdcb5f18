"""Images of other classes than a data set's own, in its form: a measure of uncertainty should tell them apart.

Images are resized as all images here are (short side bilinear and antialiased, centre cropped); grey ones are
repeated over three channels, and colour becomes grey by luma (0.299 R + 0.587 G + 0.114 B, ITU-R BT.601).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from dnas_ens.data.dataset import ImageData
from dnas_ens.data.images import PixelArray, stack
from dnas_ens.data.loading import load_data
from dnas_ens.data.names import PHOTOGRAPHS
from dnas_ens.errors import UserError

_PATCH = 32


def load_out_of_distribution(
    name: str, data: ImageData, *, data_root: Path | None = None, download: bool = True
) -> Tensor:
    """Read the test images of another data set in the form of a run's own.

    Images of a class that the run's data have as well, by name, are left out.

    Args:
        name: A name or a path that `load_data` knows; or "photographs": patches of the two photographs that come with
            scikit-learn, which need no download.
        data: The run's data, for size, channels and classes.

    Returns:
        uint8 (N, C, H, W), N at least 1.

    Raises:
        UserError: The data cannot be read, or all of their classes are the run's own.
    """
    if name == PHOTOGRAPHS:
        return _with_channels(_photograph_patches(data.image_size), data.num_channels)
    other = load_data(name, data_root=data_root, image_size=data.image_size, download=download, flip=False)
    foreign = [index for index, label in enumerate(other.classes) if label not in data.classes]
    if not foreign:
        raise UserError(
            f"The classes of {name!r} are those of {data.name}: its images are not out of distribution.",
            "Give --ood a data set of other classes.",
        )
    chosen = torch.isin(other.test.labels, torch.tensor(foreign))
    return _with_channels(other.test.images[chosen], data.num_channels)


def _with_channels(images: Tensor, num_channels: int) -> Tensor:
    if images.shape[1] == num_channels:
        return images
    if num_channels == 3:
        return images.expand(-1, 3, -1, -1)
    # On bytes torchvision rounds down, so that grey in three channels would lose a step.
    luma: Tensor = functional.rgb_to_grayscale(images.float()).round()
    return luma.to(torch.uint8)


def _photograph_patches(image_size: int) -> Tensor:
    """The squares, of 32 pixels or the wanted size if that is more, that the two photographs fall into."""
    from sklearn.datasets import load_sample_images

    side = max(_PATCH, image_size)
    patches: list[PixelArray] = []
    for photograph in load_sample_images().images:
        height, width = photograph.shape[:2]
        patches += [
            np.ascontiguousarray(photograph[row : row + side, column : column + side])
            for row in range(0, height - side + 1, side)
            for column in range(0, width - side + 1, side)
        ]
    if not patches:
        raise UserError(f"The sample photographs have no square of {side} pixels.", "Give --ood another data set.")
    return torch.from_numpy(stack(patches, image_size=image_size))
