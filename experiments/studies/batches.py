"""Passes over images for studies: as they are, or shuffled and augmented for a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dnas_ens.config import RetrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dnas_ens.data.dataset import ImageData, Split
    from dnas_ens.training.prediction import Batches

    #: Starts an epoch, given the generators of order and augmentation: inputs (B, C, H, W) and labels (B,).
    TrainingPass = Callable[[torch.Generator, torch.Generator], Iterator[tuple[Tensor, Tensor]]]


def plain_passes(data: ImageData, split: Split) -> Batches:
    """Return passes over a split in its order, normalised and without augmentation."""
    import torch

    from dnas_ens.data.batches import Augmentation, iterate_batches
    from dnas_ens.training.prediction import EVALUATION_BATCH

    augmentation = Augmentation.for_data(data, augment=False)

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in iterate_batches(split, EVALUATION_BATCH, augmentation=augmentation):
            yield images.contiguous(memory_format=torch.channels_last), labels

    return one_pass


def training_passes(data: ImageData, recipe: RetrainConfig) -> TrainingPass:
    """Return epochs over the training images, in whole batches."""
    from dnas_ens.data.batches import Augmentation, iterate_batches

    augmentation = Augmentation.for_data(data, augment=recipe.augment, cutout=recipe.cutout)

    def one_pass(order: torch.Generator, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return iterate_batches(
            data.train,
            recipe.batch_size,
            generator=order,
            augmentation=augmentation,
            augmentation_generator=generator,
            drop_last=True,
        )

    return one_pass
