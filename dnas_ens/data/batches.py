"""Batches on the device that holds the images: shuffling, normalisation, augmentation.

The images stay uint8 on the device and are cropped, flipped and normalised a batch at a time, as in airbench
(arXiv 2404.00498); there is no worker process and no loop over images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from dnas_ens.data.dataset import ImageData, Split, check_pixels
from dnas_ens.errors import UserError


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
    shift = torch.tensor([-average / deviation for average, deviation in zip(mean, std, strict=True)], device=device)
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class AugmentationDraws:
    """The random numbers of one augmented batch, all int64 (B,) but `flips`; None where a part is off.

    Args:
        crop_rows: First row of the crop in the padded image, 0 to 2 pad.
        crop_columns: First column of the crop, 0 to 2 pad.
        flips: bool (B,), whether an image is flipped.
        cutout_rows: Row of the cutout's centre, 0 to H - 1.
        cutout_columns: Column of the cutout's centre, 0 to W - 1.
    """

    crop_rows: torch.Tensor | None = None
    crop_columns: torch.Tensor | None = None
    flips: torch.Tensor | None = None
    cutout_rows: torch.Tensor | None = None
    cutout_columns: torch.Tensor | None = None

    def part(self, images: slice) -> AugmentationDraws:
        """Return the numbers of some of the images."""
        drawn = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return AugmentationDraws(**{name: None if each is None else each[images] for name, each in drawn})


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop of the zero-padded image, horizontal flip, normalisation, cutout, in this order.

    Args:
        pad: Pixels of black padding on every side before an H x W crop at a uniform offset; 0 for none.
        flip: Whether each image is flipped with probability 1/2.
        cutout: Side, in pixels, of the square set to 0 after normalisation; its centre is uniform over the
            image and the square is clipped at the borders (arXiv 1708.04552); 0 for none.
        mean: C channel means in [0, 1].
        std: C channel standard deviations, above 0, in the same unit.

    Raises:
        UserError: A number is out of range.
    """

    pad: int
    flip: bool
    cutout: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.pad < 0 or self.cutout < 0:
            raise UserError(
                f"Augmentation with padding {self.pad} and cutout {self.cutout}.",
                "Give 0 or more pixels for both.",
            )
        if len(self.mean) != len(self.std) or not self.std or min(self.std) <= 0:
            raise UserError(
                f"Normalisation by mean {self.mean} and standard deviation {self.std}.",
                "Give as many of one as of the other, and deviations above 0.",
            )

    @classmethod
    def for_data(cls, data: ImageData, *, augment: bool = True, cutout: int = 0) -> Augmentation:
        """The usual augmentation for a data set.

        The padding is 4 pixels from 28 x 28 up, and one seventh of the side (at least 1) below.

        Args:
            augment: False for normalisation only (`cutout` is then ignored).
        """
        if not augment:
            return cls(pad=0, flip=False, cutout=0, mean=data.mean, std=data.std)
        pad = min(4, max(1, data.image_size // 7))
        return cls(pad=pad, flip=data.flip, cutout=cutout, mean=data.mean, std=data.std)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(x / 255 - mean) / std for each channel: uint8 (B, C, H, W) to float32 (B, C, H, W)."""
        return normalise(images, mean=self.mean, std=self.std)

    def draw(self, num_images: int, *, height: int, width: int, generator: torch.Generator) -> AugmentationDraws:
        """Draw what a batch of B = `num_images` needs, for `apply`; the generator is on the images' device."""

        def integers(high: int) -> torch.Tensor:
            return torch.randint(high, (num_images,), generator=generator, device=generator.device)

        return AugmentationDraws(
            crop_rows=integers(2 * self.pad + 1) if self.pad else None,
            crop_columns=integers(2 * self.pad + 1) if self.pad else None,
            flips=integers(2).bool() if self.flip else None,
            cutout_rows=integers(height) if self.cutout else None,
            cutout_columns=integers(width) if self.cutout else None,
        )

    def apply(self, images: torch.Tensor, draws: AugmentationDraws) -> torch.Tensor:
        """Augment by numbers already drawn; uint8 (B, C, H, W) to float32 (B, C, H, W)."""
        height, width = images.shape[-2:]
        if draws.crop_rows is not None and draws.crop_columns is not None:
            padded = F.pad(images, (self.pad,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            each = torch.arange(len(images), device=images.device)
            images = windows[each, :, draws.crop_rows, draws.crop_columns]
        if draws.flips is not None:
            images = torch.where(draws.flips[:, None, None, None], images.flip(-1), images)
        normalised = self.normalise(images)
        if draws.cutout_rows is not None and draws.cutout_columns is not None:
            rows = self._in_cutout(draws.cutout_rows, size=height)
            columns = self._in_cutout(draws.cutout_columns, size=width)
            normalised.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
        return normalised

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw and apply: uint8 (B, C, H, W) to float32 (B, C, H, W); the generator is on the images' device."""
        height, width = images.shape[-2:]
        return self.apply(images, self.draw(len(images), height=height, width=width, generator=generator))

    def _in_cutout(self, centres: torch.Tensor, *, size: int) -> torch.Tensor:
        """Whether (B, size) the square around each centre covers a position along one side."""
        first = centres[:, None] - self.cutout // 2
        positions = torch.arange(size, device=centres.device)
        return (positions >= first) & (positions < first + self.cutout)


def iterate_batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    augmentation: Augmentation | None = None,
    augmentation_generator: torch.Generator | None = None,
    drop_last: bool = False,
    first_batch: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of batches on the split's device.

    Args:
        batch_size: B, at least 1.
        generator: On the CPU; one permutation is drawn from it, before the first batch. None keeps the order.
        augmentation: Normalises, and augments if `augmentation_generator` is given. None only scales to [0, 1].
        augmentation_generator: On the split's device, drawn from for every batch.
        drop_last: Leave out a smaller last batch, unless it is the only one.
        first_batch: Batches to skip without drawing for them, to resume in mid-epoch with `generator` as it was
            before the epoch and `augmentation_generator` as it was after the last batch.

    Yields:
        float32 images (B, C, H, W) and int64 labels (B,).

    Raises:
        UserError: `batch_size` is below 1, `generator` is not on the CPU, or the images are not uint8.
    """
    check_pixels(split, "a split")
    if generator is None:
        index: Iterable[torch.Tensor | slice] = (
            slice(batch * batch_size, (batch + 1) * batch_size)
            for batch in range(count_batches(split, batch_size, drop_last=drop_last))
        )
    else:
        index = epoch_indices(split, batch_size, generator=generator, drop_last=drop_last)
    for chosen in itertools.islice(index, first_batch, None):
        images, labels = split.images[chosen], split.labels[chosen]
        if augmentation is None:
            yield images.float().div_(255), labels
        elif augmentation_generator is None:
            yield augmentation.normalise(images), labels
        else:
            yield augmentation(images, augmentation_generator), labels


def epoch_indices(
    split: Split, batch_size: int, *, generator: torch.Generator, drop_last: bool = False, balanced: bool = False
) -> Iterator[torch.Tensor]:
    """Yield the indices of the images of each batch of an epoch in random order; see `iterate_batches`.

    Args:
        balanced: Draw every image with replacement, with a probability of 1 / (K n) where its class, one of K that
            occur, has n images.

    Yields:
        int64 (B,), on the split's device.
    """
    num_batches = count_batches(split, batch_size, drop_last=drop_last)
    if generator.device.type != "cpu":
        raise UserError(f"The order's generator is on {generator.device}.", "Give a torch.Generator on the CPU.")
    if balanced:
        weights = class_weights(split.labels.cpu())[split.labels.cpu()]
        order = torch.multinomial(weights, len(split), replacement=True, generator=generator)
    else:
        order = torch.randperm(len(split), generator=generator)
    order = order.to(split.labels.device)
    yield from order.split(batch_size)[:num_batches]


def class_weights(labels: torch.Tensor) -> torch.Tensor:
    """Return weights of classes, N / (K n) for a class with n of N labels (N,) where K classes occur; else 0.

    Their mean over the labels is 1 (scikit-learn's "balanced").
    """
    counts = torch.bincount(labels)
    weights = len(labels) / (counts.count_nonzero() * counts.clamp_min(1))
    return torch.where(counts > 0, weights, 0.0)


def count_batches(split: Split, batch_size: int, *, drop_last: bool = False) -> int:
    """How many batches `iterate_batches` gives in an epoch; 0 only for an empty split."""
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}.", "Give --batch-size a number of images from 1 up.")
    full, rest = divmod(len(split), batch_size)
    return full + (1 if rest and (full == 0 or not drop_last) else 0)
