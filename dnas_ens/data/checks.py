"""What a split and a data set must satisfy, each with a line of cause and a line of remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dnas_ens.errors import UserError

if TYPE_CHECKING:
    from dnas_ens.data.dataset import ImageData, Split


def check_split(images: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse tensors of another type or shape, or two that disagree in length or device.

    Args:
        images: Should be uint8 (N, C, H, W), or floating where they are normalised.
        labels: Should be int64 (N,) on the same device.

    Raises:
        UserError: If they are not.
    """
    if not (images.dtype == torch.uint8 or images.is_floating_point()) or images.ndim != 4:
        raise UserError(
            f"A split's images are {images.dtype} of shape {tuple(images.shape)}.",
            "Give a torch.uint8 tensor of shape (N, C, H, W) with values 0 to 255, or normalised floats to be "
            "predicted.",
        )
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise UserError(
            f"A split's labels are {labels.dtype} of shape {tuple(labels.shape)}.",
            "Give a torch.int64 tensor of shape (N,).",
        )
    if len(images) != len(labels):
        raise UserError(
            f"A split has {len(images)} images but {len(labels)} labels.", "Give one label an image."
        )
    if images.device != labels.device:
        raise UserError(
            f"A split's images are on {images.device}, its labels on {labels.device}.",
            "Move both to one device.",
        )


def check_pixels(split: Split, name: str) -> None:
    """Refuse images that are normalised already where they will be.

    Raises:
        UserError: The images of the split are not uint8.
    """
    if split.images.dtype != torch.uint8:
        raise UserError(
            f"The images of {name} are {split.images.dtype}, but they are to be normalised here.",
            "Give a torch.uint8 tensor of shape (N, C, H, W) with values 0 to 255.",
        )


def check_image_data(data: ImageData) -> None:
    """Refuse a data set whose parts contradict each other.

    Args:
        data: Should have square images of one shape, one mean and one deviation a channel, no empty split,
            labels below the number of classes and one source index an image.

    Raises:
        UserError: If it has not.
    """
    shape = tuple(data.train.images.shape[1:])
    if shape[1] != shape[2]:
        raise UserError(f"The images are {shape[1]}x{shape[2]}.", "Crop or resize them to squares.")
    if shape[0] not in (1, 3):
        raise UserError(f"The images have {shape[0]} channels.", "Give images of one or three channels.")
    if len(data.mean) != shape[0] or len(data.std) != shape[0] or min(data.std) <= 0:
        raise UserError(
            f"Mean {data.mean} and standard deviation {data.std} do not fit {shape[0]} channels.",
            "Give one of each a channel, deviations above 0, or build with ImageData.from_splits.",
        )
    for name, split in data.named_splits().items():
        check_pixels(split, name)
        if len(split) == 0:
            raise UserError(f"The {name} split is empty.", "Give every split some images.")
        if tuple(split.images.shape[1:]) != shape:
            raise UserError(
                f"Images of {name} are {tuple(split.images.shape[1:])}, of train {shape}.",
                "Give all the images one number of channels and one size.",
            )
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= data.num_classes:
            raise UserError(
                f"Labels of {name} reach from {low} to {high}, but there are {data.num_classes} classes.",
                "Give labels from 0 to the number of classes less one.",
            )
        if len(data.splits.get(name, ())) != len(split):
            raise UserError(
                f"The split indices of {name} do not number {len(split)}.",
                "Give one source index an image in splits['train'], splits['val'] and splits['test'].",
            )
