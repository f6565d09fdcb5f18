"""Any map-style torch Dataset of (image, label) pairs as a data set."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dnas_ens.data.folder import size_of
from dnas_ens.data.images import (
    LabelledImages,
    Picture,
    common_side,
    decode_or_error,
    in_threads,
    plain,
    reason,
    remedy_for,
    stack,
    tell_sizes,
    upright,
    with_one_scale,
)
from dnas_ens.errors import UserError

# torchvision's data sets whose meaning a mirror changes: characters, text, and signs that say left or right. A class
# of one's own counts as the first of these that it is derived from; torchvision derives FashionMNIST from MNIST.
_FLIPPED = {
    **dict.fromkeys(("EMNIST", "GTSRB", "KMNIST", "MNIST", "Omniglot", "QMNIST", "RenderedSST2"), False),
    **dict.fromkeys(("SEMEION", "SVHN", "USPS"), False),
    "FashionMNIST": True,
}


def load_torch_dataset(dataset: Dataset[Any], *, image_size: int | None = None) -> LabelledImages:
    """Read every item of a Dataset once.

    Args:
        dataset: A Dataset with a length, whose items are (image, label): a PIL image, or a tensor (H, W) or (C, H, W)
            of C = 1 or 3 channels, uint8 or float in [0, 1]; and a whole number from 0. Class names come from its
            `classes`, or from the data sets inside its Subsets and ConcatDatasets, where these agree. Files of an
            ImageFolder with torchvision's own loader and no transform are read as those of a folder are.
        image_size: As for `folder.load_folder`.

    Returns:
        The images in the Dataset's order, all of them for training, so that val and test are cut off it.

    Raises:
        UserError: There is no length, no item, another kind of item, or a class without items.
    """
    if not hasattr(dataset, "__len__"):
        raise UserError(
            f"A {type(dataset).__name__} has no length.",
            "Give a map-style Dataset, with __len__ and __getitem__.",
        )
    num_images = len(dataset)
    if num_images == 0:
        raise UserError(f"The {type(dataset).__name__} is empty.", "Give a Dataset with items.")
    files = [_plain_file(dataset, index) for index in range(num_images)]
    paths = [file[0] for file in files if file is not None]
    side = image_size
    if side is None and len(paths) == num_images:
        # Before they are decoded, which large photos then are at less than their size, as in a folder.
        sizes = [size for size in in_threads(size_of, paths) if size is not None] or [(1, 1)]
        side = common_side(sizes)
        tell_sizes(sizes, side)
    pictures: list[Picture] = []
    labels = np.empty(num_images, dtype=np.int64)
    for index in range(num_images):
        if (file := files[index]) is not None:
            path, labels[index] = file
            picture = decode_or_error(path, image_size=side)
            if isinstance(picture, Exception):
                raise UserError(
                    f"{path} cannot be read as an image ({reason(picture)}).",
                    remedy_for({path: picture}, otherwise="Repair or delete it."),
                ) from picture
            pictures.append(picture)
            continue
        item = dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise UserError(
                f"Item {index} of the {type(dataset).__name__} is a {type(item).__name__}, not a pair.",
                "Give a Dataset whose items are (image, label).",
            )
        pictures.append(_to_picture(item[0], index=index))
        labels[index] = _to_label(item[1], index=index)
    sources = _innermost(dataset)
    kinds = {type(source).__name__ for source in sources}
    inside = {_named_classes(source) for source in sources}
    named = _named_classes(dataset) or (inside.pop() if len(inside) == 1 else ())
    classes = _class_names(named, labels)
    arrays, deep_bits = with_one_scale(pictures, [f"item {index}" for index in range(num_images)])
    if side is None:
        sizes = [(array.shape[1], array.shape[0]) for array in arrays]
        side = common_side(sizes)
        tell_sizes(sizes, side)
    return LabelledImages(
        name=type(sources[0] if len(kinds) == 1 else dataset).__name__,
        classes=classes,
        images=stack(arrays, image_size=side),
        labels=labels,
        flip=all(map(_may_be_flipped, sources)),
        num_train=num_images,
        deep_bits=deep_bits,
        deep_colour=any(picture.is_deep_colour for picture in pictures),
        named=bool(named),
        paths=tuple(paths) if len(paths) == num_images else (),
    )


def _may_be_flipped(dataset: Any) -> bool:
    """Whether a mirror image means the same, as far as torchvision's class, or the one that is wrapped, tells."""
    known = [_FLIPPED[kind.__name__] for kind in type(dataset).__mro__ if kind.__name__ in _FLIPPED]
    wrapped = getattr(dataset, "dataset", None)
    if known or not isinstance(wrapped, Dataset):
        return known[0] if known else True
    return all(map(_may_be_flipped, _innermost(wrapped)))


def _plain_file(dataset: Any, index: int) -> tuple[str, int] | None:
    """The path and label of an item that is a file, which torchvision would read without transparency or 16 bits."""
    if type(dataset) is torch.utils.data.Subset:
        return _plain_file(dataset.dataset, dataset.indices[index])
    if type(dataset) is torch.utils.data.ConcatDataset:
        part = bisect.bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[part - 1] if part else 0
        return _plain_file(dataset.datasets[part], index - before)
    from torchvision.datasets import folder

    if type(dataset) not in (folder.DatasetFolder, folder.ImageFolder) or dataset.loader is not folder.default_loader:
        return None
    plainly = dataset.transform is None and dataset.target_transform is None
    return dataset.samples[index] if plainly else None


def _to_picture(image: Any, *, index: int) -> Picture:
    """(H, W) or (H, W, 3) of uint8, or deep greys (H, W)."""
    if isinstance(image, Image.Image):
        try:
            values = np.asarray(plain(upright(image)))
            return Picture(values, peak=int(values.max()) if values.dtype == np.uint16 else None)
        except ValueError as error:
            raise UserError(f"Image {index} is unsuitable: {error}.", "Convert the images to 8 or 16 bits.") from error
    if not isinstance(image, torch.Tensor):
        raise UserError(
            f"Image {index} is a {type(image).__name__}.", "Give PIL images, or tensors of shape (C, H, W)."
        )
    planes = image.detach().cpu()
    if planes.ndim == 2:
        planes = planes[None]
    if planes.ndim != 3 or planes.shape[0] not in (1, 3):
        raise UserError(
            f"Image {index} is a tensor of shape {tuple(image.shape)}.",
            "Give tensors of shape (C, H, W) with one or three channels.",
        )
    if planes.is_floating_point():
        low, high = float(planes.min()), float(planes.max())
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"Image {index} has values from {low:g} to {high:g}.",
                "Give floats in [0, 1], or uint8: leave out Normalize, which is done later.",
            )
        planes = (planes.double() * 255).round().to(torch.uint8)
    if planes.dtype != torch.uint8:
        raise UserError(f"Image {index} is a tensor of {planes.dtype}.", "Give uint8, or floats in [0, 1].")
    pixels = planes.numpy()
    return Picture(pixels[0].copy() if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _to_label(label: Any, *, index: int) -> int:
    try:
        number = label.__index__()
    except (AttributeError, TypeError) as error:
        raise UserError(f"Label {index} is {label!r}.", "Give whole numbers from 0 as labels, one an image.") from error
    if number < 0:
        raise UserError(f"Label {index} is {number}.", "Give whole numbers from 0 as labels.")
    return int(number)


def _named_classes(dataset: Any) -> tuple[str, ...]:
    """What a data set calls its classes, in a list, an array or the like; empty where it does not."""
    named = getattr(dataset, "classes", None)
    return () if named is None else tuple(map(str, named))


def _class_names(named: tuple[str, ...], labels: np.ndarray) -> tuple[str, ...]:
    classes = named or tuple(map(str, range(int(labels.max()) + 1)))
    if labels.max() >= len(classes):
        raise UserError(
            f"Label {labels.max()} has no name: `classes` lists {len(classes)}.",
            "Give one class name a label.",
        )
    if len(classes) == 1:
        raise UserError(f"The Dataset has the one class {classes[0]!r}.", "Give at least two classes.")
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise UserError(
            f"Class {', '.join(map(repr, empty[:5]))} has no images.",
            "Number the labels from 0 without gaps.",
        )
    return classes


def _innermost(dataset: Any) -> list[Any]:
    """The data sets inside any number of Subsets and ConcatDatasets."""
    if isinstance(dataset, torch.utils.data.Subset):
        return _innermost(dataset.dataset)
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return [source for part in dataset.datasets for source in _innermost(part)]
    return [dataset]
