"""What a data set is here: three splits of uint8 images, with what was measured on them."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from dnas_ens.data.large import gathered
from dnas_ens.data.splits import draw_limited, halve
from dnas_ens.errors import UserError

if TYPE_CHECKING:
    from dnas_ens.data.trunk import Trunk

SPLIT_NAMES = ("train", "val", "test")
# Classes that are shown, and the side in pixels of the picture shown of each.
_CLASSES_SHOWN, _SHOWN_SIDE = 10, 48


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images that are used for one purpose.

    Args:
        images: uint8 (N, C, H, W), 0 to 255; or floating, taken as normalised: your own networks can be evaluated
            on them, but nothing is searched or trained on them.
        labels: int64 (N,), class indices from 0, on the same device.

    Raises:
        UserError: A tensor has another type or shape, or the two disagree in length or device.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        for name, given in (("images", images), ("labels", labels)):
            if not isinstance(given, torch.Tensor):
                raise UserError(
                    f"A split's {name} are a {type(given).__name__}.",
                    f"Give a torch tensor; of a NumPy array it is torch.from_numpy({name}).",
                )
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
            raise UserError(f"A split has {len(images)} images but {len(labels)} labels.", "Give one label an image.")
        if images.device != labels.device:
            raise UserError(
                f"A split's images are on {images.device}, its labels on {labels.device}.",
                "Move both to one device.",
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        """Copy, but for images that lie in a file: nothing writes to them, and memory may not hold them."""
        in_file = self.images.device.type == "cpu" and self.images.is_shared()
        return Split(self.images if in_file else self.images.clone(), self.labels.clone())

    def __repr__(self) -> str:
        channels, height, width = self.images.shape[1:]
        return f"Split({len(self)} images, {channels}x{height}x{width}, on {self.labels.device})"

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Split:
        """The images at whole-number `indices` (n,), in that order; UserError for a mask."""
        wanted = torch.as_tensor(indices)
        if wanted.dtype == torch.bool:
            raise UserError("A subset was asked for by a mask.", "Give indices, such as mask.nonzero()[:, 0].")
        wanted = wanted.to(device=self.labels.device, dtype=torch.int64)
        return Split(gathered(self.images, wanted), self.labels[wanted])

    def drawn(self, num_images: int | None = None) -> Split:
        """At most `num_images` images (None: all) in random order, the same ones at every call.

        A folder's images come class by class, and batches of one class give meaningless BatchNorm statistics.
        """
        generator = torch.Generator().manual_seed(0)
        return self.subset(torch.randperm(len(self), generator=generator)[:num_images])

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over the shape, the pixels and the labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().cpu().numpy().data)
        digest.update(self.labels.cpu().numpy().astype("<i8").data)
        return digest.hexdigest()


def check_pixels(split: Split, name: str) -> None:
    """Raise UserError where images that will be normalised are not uint8."""
    if split.images.dtype != torch.uint8:
        raise UserError(
            f"The images of {name} are {split.images.dtype}, but they are to be normalised here.",
            "Give a torch.uint8 tensor of shape (N, C, H, W) with values 0 to 255.",
        )


def measure_normalisation(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of every channel, exactly, from integer sums.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        C means and C standard deviations in units of [0, 1] pixels. The deviation of a constant channel is given as
        1, so that dividing by it is safe.

    Raises:
        UserError: There are no images.
    """
    if images.numel() == 0:
        raise UserError("There are no training images to measure.", "Give the train split some images.")
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    total_of_squares = torch.zeros_like(total)
    # A value takes twenty bytes on the way.
    for chunk in images.split(max(1, 2**18 // images[0].numel())):
        values = chunk.to(torch.int32)
        total += values.sum(dim=(0, 2, 3)).cpu()
        total_of_squares += values.square().sum(dim=(0, 2, 3)).cpu()
    count = images.numel() // images.shape[1]
    mean = [int(value) / count for value in total]
    # Whole numbers up to the last division: the textbook E[x^2] - E[x]^2 loses no digit this way.
    spread = [int(square) * count - int(value) ** 2 for value, square in zip(total, total_of_squares, strict=True)]
    std = [value**0.5 / count / 255 if value else 1.0 for value in spread]
    return tuple(value / 255 for value in mean), tuple(std)


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
        splits: For "train", "val" and "test" each image's index in the source: its training images in file order,
            then its own validation and test images, where it has any.
        skipped: Files left out because they could not be read; they have no index.
        deep_bits: Bits, 8 to 16, of the greys of more than 8 bits that were scaled to 8; None where there were none.
        deep_colour: Whether there were colours of 16 bits.
        trunk: What has made maps of the pictures, which then stand in their place; see `dnas_ens.data.trunk`.
        pictures: Some pictures of val, uint8 (N, 1 or 3, S, S), where there is a trunk.

    Raises:
        UserError: The parts contradict each other.
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
    deep_colour: bool = False
    trunk: Trunk | None = None
    pictures: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.classes):
            raise UserError(
                f"The classes are {self.classes!r}, not a text for each.",
                "Name every class, or build with ImageData.from_splits, which makes texts of numbers.",
            )
        if self.num_classes < 2:
            raise UserError(f"The data have {self.num_classes} class.", "Give at least two classes.")
        shape = tuple(self.train.images.shape[1:])
        if shape[1] != shape[2]:
            raise UserError(f"The images are {shape[1]}x{shape[2]}.", "Crop or resize them to squares.")
        if shape[0] not in (1, 3) and self.trunk is None:
            raise UserError(f"The images have {shape[0]} channels.", "Give images of one or three channels.")
        if len(self.mean) != shape[0] or len(self.std) != shape[0] or min(self.std) <= 0:
            raise UserError(
                f"Mean {self.mean} and standard deviation {self.std} do not fit {shape[0]} channels.",
                "Give one of each a channel, deviations above 0, or build with ImageData.from_splits.",
            )
        for name, split in self.named_splits().items():
            check_pixels(split, name)
            if len(split) == 0:
                raise UserError(f"The {name} split is empty.", "Give every split some images.")
            if tuple(split.images.shape[1:]) != shape:
                raise UserError(
                    f"Images of {name} are {tuple(split.images.shape[1:])}, of train {shape}.",
                    "Give all the images one number of channels and one size.",
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise UserError(
                    f"Labels of {name} reach from {low} to {high}, but there are {self.num_classes} classes.",
                    "Give labels from 0 to the number of classes less one.",
                )
            if len(self.splits.get(name, ())) != len(split):
                raise UserError(
                    f"The split indices of {name} do not number {len(split)}.",
                    "Give one source index an image in splits['train'], splits['val'] and splits['test'].",
                )

    @classmethod
    def from_splits(
        cls,
        name: str,
        classes: Sequence[str | int],
        *,
        train: Split,
        val: Split,
        test: Split,
        flip: bool,
        splits: Mapping[str, Sequence[int]] | None = None,
        skipped: Sequence[str] = (),
        deep_bits: int | None = None,
        deep_colour: bool = False,
        trunk: Trunk | None = None,
        pictures: torch.Tensor | None = None,
    ) -> ImageData:
        """Measure normalisation on the training images, take the fingerprint, and build.

        Arguments as for `ImageData`; `splits` counts through train, val and test where it is not given, and classes
        that are numbers become texts.

        Raises:
            UserError: The parts contradict each other.
        """
        if not isinstance(classes, Iterable):
            raise UserError(f"The classes are {classes!r}.", "Give a sequence of names, one a class.")
        parts = {"train": train, "val": val, "test": test}
        for key, part in parts.items():
            check_pixels(part, key)
        if splits is None:
            ends = np.cumsum([len(part) for part in parts.values()])
            splits = {
                key: range(int(end) - len(part), int(end)) for (key, part), end in zip(parts.items(), ends, strict=True)
            }
        indices = {key: [int(index) for index in splits[key]] for key in SPLIT_NAMES}
        mean, std = measure_normalisation(train.images)
        digest = hashlib.sha256()
        for key, part in parts.items():
            digest.update(f"{key} {part.fingerprint()} ".encode())
            digest.update(np.asarray(indices[key], dtype="<i8").data)
        return cls(
            name=name,
            classes=tuple(map(str, classes)),
            **parts,
            mean=mean,
            std=std,
            flip=flip,
            fingerprint=digest.hexdigest(),
            splits=indices,
            skipped=tuple(skipped),
            deep_bits=deep_bits,
            deep_colour=deep_colour,
            trunk=trunk,
            pictures=pictures,
        )

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels, or of a trunk's maps."""
        return self.train.images.shape[-1]

    @property
    def num_channels(self) -> int:
        """1 (grey) or 3 (RGB), or those of a trunk's maps."""
        return self.train.images.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.classes)

    def named_splits(self) -> dict[str, Split]:
        """The splits by name: "train", "val", "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}

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
            together all of `train`; each class within one image of its half.
        """
        weight, architecture = halve(self.train.labels.cpu().numpy(), seed=seed)
        return self.train.subset(weight), self.train.subset(architecture)

    def limited(self, num_train: int, *, seed: int) -> ImageData:
        """The same data with a stratified subset of the training images; val and test unchanged.

        Normalisation and fingerprint are measured again.

        Args:
            num_train: Training images to keep, from the number of classes to the number there are.
            seed: At least 0.

        Raises:
            UserError: `num_train` is out of range.
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
            deep_colour=self.deep_colour,
            trunk=self.trunk,
            pictures=self.pictures,
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
            "deep_colour": self.deep_colour,
            "trunk": None if self.trunk is None else self.trunk.describe(),
            "splits": {
                key: {
                    "num_images": len(split),
                    "class_counts": torch.bincount(split.labels, minlength=self.num_classes).tolist(),
                    "fingerprint": split.fingerprint(),
                }
                for key, split in self.named_splits().items()
            },
        }

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(split)} {name}" for name, split in self.named_splits().items())
        return (
            f"ImageData({self.name!r})\n"
            f"  images: {sizes}; {self._shape()} on {self.train.labels.device}\n"
            f"  {self._named_classes()}\n"
            f"  mirrored in training: {'yes' if self.flip else 'no'}; fingerprint {self.fingerprint[:12]}"
        )

    def _repr_html_(self) -> str:
        """A notebook's view: a table of the splits and a training image of each of the first ten classes."""
        rows = "".join(
            f"<tr><td>{name}</td><td>{len(split):,}</td></tr>" for name, split in self.named_splits().items()
        )
        # Maps of a trunk cannot be shown.
        png = "" if self.trunk is not None else base64.b64encode(self._strip()).decode()
        shown = f'<img alt="training images" src="data:image/png;base64,{png}"/>' if png else ""
        return (
            f"<b>{html.escape(self.name)}</b>: images of {self._shape()}"
            f"<table><tr><th>split</th><th>images</th></tr>{rows}</table>"
            f"<p>{html.escape(self._named_classes())}</p>{shown}"
        )

    def _shape(self) -> str:
        shape = f"{self.num_channels}x{self.image_size}x{self.image_size}"
        return shape if self.trunk is None else f"{shape} by {self.trunk.name} of {self.trunk.image_size} pixels"

    def _named_classes(self) -> str:
        names = ", ".join(self.classes[:_CLASSES_SHOWN])
        more = ", ..." if self.num_classes > _CLASSES_SHOWN else ""
        return f"{self.num_classes} classes: {names}{more}"

    def _strip(self) -> bytes:
        """A PNG of the first training image of each of the first classes, side by side."""
        labels = self.train.labels
        firsts = [(labels == label).nonzero()[0, 0] for label in labels.unique()[:_CLASSES_SHOWN]]
        pictures = self.train.images[torch.stack(firsts)].cpu()
        # (n, C, H, W) to (H, n W, 3)
        pixels = pictures.expand(-1, 3, -1, -1).permute(2, 0, 3, 1).flatten(1, 2).contiguous().numpy()
        shown = Image.fromarray(pixels).resize((_SHOWN_SIDE * len(pictures), _SHOWN_SIDE), Image.Resampling.BOX)
        buffer = io.BytesIO()
        shown.save(buffer, format="PNG")
        return buffer.getvalue()
