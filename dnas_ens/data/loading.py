"""The one way in: a data set by name, by folder, or from a torch Dataset."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.data.folder import load_folder
from dnas_ens.data.images import LabelledImages
from dnas_ens.data.names import SOURCE_NAMES
from dnas_ens.data.sources import load_source
from dnas_ens.data.splits import choose_splits, draw_limited
from dnas_ens.data.torch_dataset import load_torch_dataset
from dnas_ens.errors import UserError


def load_data(
    data: str | os.PathLike[str] | Dataset[Any] | ImageData = "digits",
    *,
    data_root: str | os.PathLike[str] | None = None,
    limit_train: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    download: bool = True,
    skip_bad_images: bool = False,
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
        return data if limit_train is None else data.limited(limit_train, seed=seed)
    if isinstance(data, Dataset):
        source = load_torch_dataset(data, image_size=image_size)
    else:
        root = default_data_root() if data_root is None else Path(data_root).expanduser()
        if isinstance(data, str) and data in SOURCE_NAMES:
            source = load_source(data, root, image_size=image_size, download=download)
        else:
            folder = _find_folder(data, data_root=root)
            source = load_folder(folder, image_size=image_size, skip_bad_images=skip_bad_images)
    return _split(source, limit_train=limit_train, seed=seed)


def default_data_root() -> Path:
    """$DNAS_ENS_DATA if it is set and not empty, otherwise ~/.cache/dnas_ens/data."""
    given = os.environ.get("DNAS_ENS_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "dnas_ens" / "data"


def _find_folder(data: str | os.PathLike[str], *, data_root: Path) -> Path:
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


def _split(source: LabelledImages, *, limit_train: int | None, seed: int) -> ImageData:
    chosen = choose_splits(
        source.labels,
        classes=source.classes,
        num_train=source.num_train,
        num_val=source.num_val,
        num_test=source.num_test,
        max_val=source.max_val,
        seed=seed,
    )
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
