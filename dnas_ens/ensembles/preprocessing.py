"""What turns images into the members' input, and which images the members cannot have been trained on.

Legend: N images, C channels, H x W.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dnas_ens.data.batches import normalise
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.data.images import read_image
from dnas_ens.errors import UserError

if TYPE_CHECKING:
    from dnas_ens.data.trunk import Trunk

#: What to tell somebody whose ensemble does not know its preprocessing.
GIVE_PREPROCESSING = "Build the ensemble with preprocessing=Preprocessing(...)."


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns an image file into a member's input.

    Args:
        image_size: H = W in pixels: the short side is resized to it and the centre cropped.
        num_channels: C, 1 or 3.
        mean: C means of the training pixels, in [0, 1].
        std: C standard deviations of the training pixels, in the same unit, above 0.
        deep_bits: Bits, 8 to 16, of the training images' greys where those are more than 8; None where they are not.
        deep_colour: Whether training images were in colour of 16 bits.
        trunk: What makes the members' maps of pictures, whose size is then its own and whose C is that of the maps in
            mean and std; None where the members take pictures.

    Raises:
        UserError: A number is out of range, or there are not C means and deviations.
    """

    image_size: int
    num_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    deep_bits: int | None = None
    deep_colour: bool = False
    trunk: Trunk | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        # NumPy's numbers, as statistics are computed with, are numbers too.
        object.__setattr__(self, "mean", tuple(_plain(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(_plain(value) for value in self.std))
        object.__setattr__(self, "image_size", _plain(self.image_size))
        statistics = (*self.mean, *self.std)
        if not (
            type(self.image_size) is int
            and self.image_size > 0
            and self.num_channels in (1, 3)
            and len(self.mean) == len(self.std) == self.input_shape[0]
            and all(type(value) in (int, float) and math.isfinite(value) for value in statistics)
            and min(self.std) > 0
            and (self.deep_bits is None or (type(self.deep_bits) is int and 8 <= self.deep_bits <= 16))
            and type(self.deep_colour) is bool
        ):
            raise UserError(
                f"The preprocessing {self} is not possible.",
                "Give a size above 0, 1 or 3 channels, and a finite mean and a deviation above 0 for each.",
            )

    @property
    def input_shape(self) -> tuple[int, int]:
        """Channels and side of what a member takes: pictures, or a trunk's maps."""
        return (
            (self.num_channels, self.image_size)
            if self.trunk is None
            else (self.trunk.num_channels, self.trunk.map_size)
        )

    @classmethod
    def of(cls, data: ImageData) -> Preprocessing:
        """Return the preprocessing of networks that are trained on some data."""
        pictures = data.train.images if data.pictures is None else data.pictures
        return cls(
            image_size=pictures.shape[-1],
            num_channels=pictures.shape[1],
            mean=data.mean,
            std=data.std,
            deep_bits=data.deep_bits,
            deep_colour=data.deep_colour,
            trunk=data.trunk,
        )

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """Read an image file as uint8 (C, H, H); see `dnas_ens.data.images.read_image`."""
        return read_image(
            path,
            num_channels=self.num_channels,
            image_size=self.image_size,
            deep_bits=self.deep_bits,
            deep_colour=self.deep_colour,
        )

    def inputs(self, images: Tensor) -> Tensor:
        """Return uint8 pictures, or a trunk's maps, (B, C, H, W) as the members take them: normalised."""
        if self.trunk is not None and images.shape[1] == self.num_channels:
            images = self.trunk.to(images.device)(images)
        return normalise(images, mean=self.mean, std=self.std)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as ensemble.json holds them: image_size, channels, mean, std, deep_bits, deep_colour."""
        return {
            "image_size": self.image_size,
            "channels": self.num_channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "deep_bits": self.deep_bits,
            "deep_colour": self.deep_colour,
            **({} if self.trunk is None else {"trunk": self.trunk.describe()}),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, trunk: Trunk | None = None) -> Preprocessing:
        """Build from what `to_dict` returned, ignoring other keys; UserError for a field that is missing or wrong.

        Args:
            trunk: The one that the fields describe, with its weights.
        """
        try:
            return cls(
                image_size=fields["image_size"],
                num_channels=fields["channels"],
                mean=tuple(fields["mean"]),
                std=tuple(fields["std"]),
                # Earlier versions did not keep it and scaled all images as if they had 16 bits.
                deep_bits=fields.get("deep_bits", 16),
                deep_colour=fields.get("deep_colour", False),
                trunk=trunk,
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"The preprocessing lacks or misspells a field ({error!r}).",
                "Give image_size, channels, mean and std as an ensemble's save writes them.",
            ) from error


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def as_pixels(images: object) -> Tensor:
    """Return the images of a split, an array or a tensor as a tensor; UserError for anything else."""
    if isinstance(images, Split):
        return images.images
    if isinstance(images, Tensor):
        return images
    try:
        # As a copy: torch takes no negative strides, as of images[..., ::-1].
        return torch.tensor(np.ascontiguousarray(images))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"A {type(images).__name__} was given where images are wanted.",
            "Give a split, an array or a tensor (N, C, H, W); evaluate, calibrate and fit_weights take a DataLoader, "
            "and so does dnas_ens.training.prediction.predict_members.",
        ) from error


def check_images(images: Tensor, preprocessing: Preprocessing | None) -> None:
    """Raise UserError for images (N, C, H, W) that the members cannot have been trained on."""
    shape = tuple(images.shape)
    if images.ndim != 4 or images.numel() == 0:
        raise UserError(f"The images have shape {shape}.", "Give at least one image, as (N, C, H, W).")
    if images.dtype == torch.uint8:
        if preprocessing is None:
            raise UserError("uint8 images must be normalised, but it is not known how.", GIVE_PREPROCESSING)
    elif not images.is_floating_point():
        raise UserError(f"The images are {images.dtype}.", "Give uint8 images, or normalised float images.")
    elif not images.isfinite().all():
        raise UserError("The images hold values that are not finite.", "Look for NaN in what made them.")
    if preprocessing is None:
        return
    # Floats are what the members take; a trunk takes pictures, and its maps are taken too.
    sizes = dict([preprocessing.input_shape])
    if images.dtype == torch.uint8:
        sizes[preprocessing.num_channels] = preprocessing.image_size
        if shape[1] in sizes and shape[2:] != (sizes[shape[1]],) * 2:
            raise UserError(
                f"The images are {shape[2]}x{shape[3]}, the ensemble's {sizes[shape[1]]} squared.",
                "Load the data with the image size that the members were trained on.",
            )
    if shape[1] not in sizes:
        if preprocessing.trunk is not None and shape[1] == preprocessing.num_channels:
            raise UserError(
                f"The images are {images.dtype}, but pictures go through a trunk, which takes uint8.",
                "Give uint8 pictures, with values 0 to 255 and not normalised.",
            )
        raise UserError(
            f"The images have {shape[1]} channels, the ensemble's have {preprocessing.num_channels}.",
            "Convert the images, or use an ensemble that was trained on such images.",
        )
