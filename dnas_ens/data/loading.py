"""The one way in: a data set by name, by folder, or from a torch Dataset."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dnas_ens.data.copies import first_equal, tell_copies
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.data.folder import load_folder
from dnas_ens.data.images import LabelledImages
from dnas_ens.data.mirrors import mirror_hint
from dnas_ens.data.names import SOURCE_NAMES
from dnas_ens.data.sources import load_source
from dnas_ens.data.splits import choose_splits, draw_limited
from dnas_ens.data.torch_dataset import load_torch_dataset
from dnas_ens.errors import UserError

# How many times as large as the smallest class the largest is where that is said.
_UNEQUAL = 4

_logger = logging.getLogger(__name__)


def load_data(
    data: str | os.PathLike[str] | Dataset[Any] | ImageData = "digits",
    *,
    data_root: str | os.PathLike[str] | None = None,
    limit_train: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    download: bool = True,
    skip_bad_images: bool = False,
    flip: bool | None = None,
) -> ImageData:
    """Load images and split them: disjoint, stratified, seeded, fingerprinted.

    Sizes train/val/test: fashion-mnist and mnist 50k/10k/10k, cifar10 and cifar100 40k/10k/10k, svhn
    63,257/10k/26,032; digits, torch Datasets and folders without splits 60/20/20 %; a folder that has
    train and test gives a fifth of every class of train to val.

    Args:
        data: One of `SOURCE_NAMES`; the path of a folder ROOT/<class>/* or ROOT/{train,val?,test?}/<class>/*,
            or its name below `data_root`; a map-style torch Dataset of (image, label); or `ImageData`,
            which comes back as it is but for `limit_train`.
        data_root: Where named data sets are kept; default $DNAS_ENS_DATA, else ~/.cache/dnas_ens/data.
        limit_train: Keep a stratified subset of so many training images; val and test are unchanged.
        image_size: Side in pixels: the short side is resized and the centre cropped. None keeps a named
            data set's own; for folders and Datasets it takes the median of the images' short sides, but 64
            at most, and says what becomes of the images.
        seed: At least 0; decides the splits and the subset, each from its own stream.
        download: Whether a named data set may be downloaded if its files are absent.
        skip_bad_images: Leave unreadable images of a folder out with a warning, instead of refusing it.
        flip: Whether training mirrors images left to right at random. None does where that is known to keep the
            meaning, and for folders and Datasets where no class name tells otherwise.

    Returns:
        The data on the CPU.

    Raises:
        UserError: If the data cannot be found, read or split as asked.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"The image size is {image_size}.", "Give --image-size a side in pixels, such as 32.")
    if isinstance(data, ImageData):
        if image_size is not None and image_size != data.image_size:
            raise UserError(
                f"The data are loaded at {data.image_size} pixels, but {image_size} were asked for.",
                "Load them with that image_size.",
            )
        if flip is not None and flip != data.flip:
            data = dataclasses.replace(data, flip=flip)
        return data if limit_train is None else data.limited(limit_train, seed=seed)
    own = True
    if isinstance(data, Dataset):
        source = load_torch_dataset(data, image_size=image_size)
    else:
        root = default_data_root() if data_root is None else Path(data_root).expanduser()
        if isinstance(data, str) and data in SOURCE_NAMES:
            source, own = load_source(data, root, image_size=image_size, download=download), False
        else:
            folder = find_folder(data, data_root=root)
            source = load_folder(folder, image_size=image_size, skip_bad_images=skip_bad_images)
    source = dataclasses.replace(source, flip=_decide_flip(source, flip, own=own))
    return _split(source, limit_train=limit_train, seed=seed, own=own)


def default_data_root() -> Path:
    """$DNAS_ENS_DATA if it is set and not empty, otherwise ~/.cache/dnas_ens/data."""
    given = os.environ.get("DNAS_ENS_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "dnas_ens" / "data"


def find_folder(data: str | os.PathLike[str], *, data_root: Path) -> Path:
    """Find a folder of images by its path, or by its name below the data root.

    Raises:
        UserError: If there is none.
    """
    if str(data) in ("", "."):
        raise UserError(
            f"--data is {str(data)!r}.", f"Give a name ({', '.join(SOURCE_NAMES)}) or a path to a folder."
        )
    folder = Path(data).expanduser()
    if folder.exists():
        return folder
    if (data_root / folder).exists():
        return data_root / folder
    if not isinstance(data, str) or len(folder.parts) > 1:
        raise UserError(
            f"There is no folder {folder}, nor {data_root / folder}.", "Check the path given as --data."
        )
    near = difflib.get_close_matches(data.lower(), SOURCE_NAMES, n=len(SOURCE_NAMES), cutoff=0.0)
    raise UserError(
        f"There is no data set {data!r}, nor a folder of that name here or in {data_root}.",
        f"Give one of {', '.join(near)}, or a path to a folder of images.",
    )


def _decide_flip(source: LabelledImages, asked: bool | None, *, own: bool) -> bool:
    """Whether training mirrors a source's images, and say so where class names decide it."""
    if asked is not None:
        return asked
    # A Dataset without names numbers its classes.
    numbered = source.classes == tuple(map(str, range(len(source.classes)))) and not source.paths
    hint = None if numbered or not (own and source.flip) else mirror_hint(source.classes)
    if hint is not None:
        _logger.warning(
            "Training does not mirror the images left to right, for the classes %s; --flip (flip=True) does.",
            hint,
        )
    return source.flip and hint is None


def _tell_imbalance(source: LabelledImages) -> None:
    counts = np.bincount(source.labels, minlength=len(source.classes))
    most, least = int(counts.argmax()), int(counts.argmin())
    if counts[most] >= _UNEQUAL * counts[least]:
        _logger.warning(
            "The classes are unequal: %d of %d images are of class %r, %d of class %r. Always answering %r would be "
            "right for %.1f %%, so look at the balanced accuracy too.",
            counts[most],
            len(source.labels),
            source.classes[most],
            counts[least],
            source.classes[least],
            source.classes[most],
            100 * counts[most] / len(source.labels),
        )


def _split(source: LabelledImages, *, limit_train: int | None, seed: int, own: bool) -> ImageData:
    # The splits of data sets known by name are what others compare with.
    first = first_equal(source.images) if own else None
    chosen = choose_splits(
        source.labels,
        classes=source.classes,
        num_train=source.num_train,
        num_val=source.num_val,
        num_test=source.num_test,
        max_val=source.max_val,
        first_equal=first,
        seed=seed,
    )
    if first is not None:
        tell_copies(source, first, chosen)
        _tell_imbalance(source)
    if limit_train is not None:
        train = chosen["train"]
        kept = draw_limited(source.labels[train], limit_train, classes=source.classes, seed=seed)
        chosen["train"] = train[kept]
    everything = Split(torch.from_numpy(source.images), torch.from_numpy(source.labels))
    return ImageData.from_splits(
        source.name,
        source.classes,
        train=everything.subset(chosen["train"]),
        val=everything.subset(chosen["val"]),
        test=everything.subset(chosen["test"]),
        flip=source.flip,
        splits={key: indices.tolist() for key, indices in chosen.items()},
        skipped=source.skipped,
        deep_bits=source.deep_bits,
    )
