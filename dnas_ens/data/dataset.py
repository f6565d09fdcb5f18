"""What a data set is here: three splits of uint8 images, with what was measured on them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnas_ens.data.checks import check_image_data, check_pixels, check_split
from dnas_ens.data.normalisation import measure_normalisation
from dnas_ens.data.splits import draw_limited, halve
from dnas_ens.errors import UserError

SPLIT_NAMES = ("train", "val", "test")
_CLASSES_NAMED = 10


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images that are used for one purpose.

    Args:
        images: uint8 (N, C, H, W), 0 to 255; or floating, which are taken as normalised: networks of one's own can be
            evaluated on them, but nothing is searched or trained on them.
        labels: int64 (N,), class indices from 0.

    Raises:
        UserError: If a tensor has another type or shape, or the two disagree in length or device.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        check_split(self.images, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        channels, height, width = self.images.shape[1:]
        return f"Split({len(self)} images, {channels}x{height}x{width}, on {self.labels.device})"

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Split:
        """The images at `indices`, in that order.

        Args:
            indices: Whole numbers (n,) into this split; not a mask.

        Raises:
            UserError: If `indices` is a mask.
        """
        wanted = torch.as_tensor(indices)
        if wanted.dtype == torch.bool:
            raise UserError(
                "A subset was asked for by a mask.", "Give indices, such as mask.nonzero()[:, 0]."
            )
        wanted = wanted.to(device=self.labels.device, dtype=torch.int64)
        return Split(self.images[wanted], self.labels[wanted])

    def drawn(self, num_images: int | None = None) -> Split:
        """Random images in random order, the same ones at every call, so that batches of them hold all classes.

        A folder's images come class by class; statistics of batches that hold one class each are those of no data.

        Args:
            num_images: How many at most; None for all of them.
        """
        generator = torch.Generator().manual_seed(0)
        return self.subset(torch.randperm(len(self), generator=generator)[:num_images])

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over the shape, the pixels and the labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().cpu().numpy().data)
        digest.update(self.labels.cpu().numpy().astype("<i8").data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageData:
    """A data set ready for search, training and evaluation; `from_splits` measures and builds one.

    Args:
        name: Name of the data set or folder.
        classes: K class names; a label is an index into them.
        train: Training images, halved by `search_halves` during the search.
        val: Images for selection, combining weights and temperature.
        test: Images read by the evaluation alone.
        mean: C means of the training pixels, in [0, 1].
        std: C standard deviations of the training pixels, in units of [0, 1] pixels, above 0.
        flip: Whether an image means the same after a horizontal flip.
        fingerprint: SHA-256 over pixels, labels and split indices.
        splits: For "train", "val" and "test" each image's index in the source: the source's training
            images in file order, then its own validation and test images, where it has any.
        skipped: Files left out because they could not be read; they have no index.
        deep_bits: Bits, 8 to 16, of the greys of more than 8 bits that were scaled to 8; None where there were none.

    Raises:
        UserError: If the parts contradict each other.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    fingerprint: str
    splits: dict[str, list[int]]
    skipped: tuple[str, ...] = ()
    deep_bits: int | None = None

    def __post_init__(self) -> None:
        check_image_data(self)

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:_CLASSES_NAMED]) + (
            ", ..." if self.num_classes > _CLASSES_NAMED else ""
        )
        sizes = ", ".join(f"{len(split)} {name}" for name, split in self.named_splits().items())
        return (
            f"ImageData({self.name!r}: {sizes} images, {self.num_channels}x{self.image_size}x{self.image_size}; "
            f"{self.num_classes} classes: {names}; flip={self.flip}; fingerprint {self.fingerprint[:12]})"
        )

    @classmethod
    def from_splits(
        cls,
        name: str,
        classes: Sequence[str],
        *,
        train: Split,
        val: Split,
        test: Split,
        flip: bool,
        splits: Mapping[str, Sequence[int]] | None = None,
        skipped: Sequence[str] = (),
        deep_bits: int | None = None,
    ) -> ImageData:
        """Measure normalisation on the training images, take the fingerprint, and build.

        Args:
            name: Name of the data set.
            classes: K class names.
            train: Training images.
            val: Validation images.
            test: Test images.
            flip: Whether an image means the same after a horizontal flip.
            splits: Source indices of each split; counted through train, val and test if not given.
            skipped: Files left out because they could not be read.
            deep_bits: Bits of the greys that were scaled to 8; None where there were none.

        Raises:
            UserError: If the parts contradict each other.
        """
        parts = {"train": train, "val": val, "test": test}
        for key, part in parts.items():
            check_pixels(part, key)
        if splits is None:
            ends = np.cumsum([len(part) for part in parts.values()])
            splits = {
                key: range(int(end) - len(part), int(end))
                for (key, part), end in zip(parts.items(), ends, strict=True)
            }
        indices = {key: [int(index) for index in splits[key]] for key in SPLIT_NAMES}
        mean, std = measure_normalisation(train.images)
        digest = hashlib.sha256()
        for key, part in parts.items():
            digest.update(f"{key} {part.fingerprint()} ".encode())
            digest.update(np.asarray(indices[key], dtype="<i8").data)
        return cls(
            name=name,
            classes=tuple(classes),
            **parts,
            mean=mean,
            std=std,
            flip=flip,
            fingerprint=digest.hexdigest(),
            splits=indices,
            skipped=tuple(skipped),
            deep_bits=deep_bits,
        )

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.train.images.shape[-1]

    @property
    def num_channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.train.images.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with all images and labels on `device`."""
        return dataclasses.replace(
            self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device)
        )

    def search_halves(self, *, seed: int) -> tuple[Split, Split]:
        """Stratified halves of the training images: for the weights, for the architecture.

        Args:
            seed: At least 0; the same seed gives the same halves.

        Returns:
            The weight split, with the extra image of an odd number, and the architecture split. Disjoint,
            together all of `train`; per class their counts are within one image of its half.
        """
        weight, architecture = halve(self.train.labels.cpu().numpy(), seed=seed)
        return self.train.subset(weight), self.train.subset(architecture)

    def limited(self, num_train: int, *, seed: int) -> ImageData:
        """The same data with a stratified subset of the training images; val and test unchanged.

        Args:
            num_train: Training images to keep, from the number of classes to the number there are.
            seed: At least 0.

        Returns:
            New data, normalisation and fingerprint measured again.

        Raises:
            UserError: If `num_train` is out of range.
        """
        kept = draw_limited(self.train.labels.cpu().numpy(), num_train, classes=self.classes, seed=seed)
        return ImageData.from_splits(
            self.name,
            self.classes,
            train=self.train.subset(kept),
            val=self.val,
            test=self.test,
            flip=self.flip,
            splits={**self.splits, "train": [self.splits["train"][index] for index in kept]},
            skipped=self.skipped,
            deep_bits=self.deep_bits,
        )

    def describe(self) -> dict[str, Any]:
        """What env.json records: names, sizes, normalisation, counts and fingerprints; only JSON types."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "num_channels": self.num_channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "flip": self.flip,
            "fingerprint": self.fingerprint,
            "skipped": list(self.skipped),
            "deep_bits": self.deep_bits,
            "splits": {
                key: {
                    "num_images": len(split),
                    "class_counts": torch.bincount(split.labels, minlength=self.num_classes).tolist(),
                    "fingerprint": split.fingerprint(),
                }
                for key, split in self.named_splits().items()
            },
        }

    def named_splits(self) -> dict[str, Split]:
        """The splits by name: "train", "val", "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}
