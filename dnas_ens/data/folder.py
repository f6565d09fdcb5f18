"""A folder of images as a data set: ROOT/<class>/* or ROOT/{train,val?,test?}/<class>/*."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dnas_ens.data.images import LabelledImages, PixelArray, decode_or_error, in_threads, reason, stack
from dnas_ens.errors import UserError

IMAGE_EXTENSIONS = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_FILES_AT_A_TIME = 64

_logger = logging.getLogger(__name__)


def load_folder(
    root: str | os.PathLike[str], *, image_size: int | None = None, skip_bad_images: bool = False
) -> LabelledImages:
    """Read every image below `root`.

    Classes are the folders' names, sorted. Files are taken in sorted order of their path inside the class,
    at any depth; hidden files and other file types are ignored. The data are grey if every image is (modes
    1, L, LA, 16-bit), otherwise RGB, with transparency laid on white.

    Args:
        root: Folder with one folder a class, or with `train` and perhaps `val` and `test` (any case;
            `valid` and `validation` also mean val) that each hold one folder a class.
        image_size: Side in pixels: the short side is resized and the centre cropped. None keeps a square
            size of at most 64 that all images share, and otherwise means 64.
        skip_bad_images: Leave unreadable images out with a warning, instead of refusing the folder.

    Returns:
        The images in the order train, val, test; in a split by class and path.

    Raises:
        UserError: If the folder is missing or not laid out so, holds no image, has an empty class or one
            class only, classes that differ between its parts, or an image that cannot be read.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise UserError(f"There is no folder {root}.", "Check the path given as --data.")
    if not root.is_dir():
        raise UserError(
            f"{root} is a file.", "Give --data the folder that holds one folder of images a class."
        )
    parts = _find_parts(root)
    classes = _shared_classes(root, parts)
    paths: list[str] = []
    labels: list[int] = []
    ends = {}
    for part, folder in parts.items():
        for label, name in enumerate(classes):
            found = list_images(folder / name)
            paths += found
            labels += [label] * len(found)
        ends[part] = len(paths)
    if not paths:
        raise UserError(
            f"{root} holds no images.", f"Put images ({', '.join(IMAGE_EXTENSIONS)}) in its folders."
        )
    part_of = np.searchsorted(list(ends.values()), np.arange(len(paths)), side="right")
    arrays, readable, skipped = _decode_all(paths, image_size=image_size, skip_bad_images=skip_bad_images)
    kept_labels = np.asarray(labels, dtype=np.int64)[readable]
    kept_parts = part_of[readable]
    counts = {}
    for index, (part, folder) in enumerate(parts.items()):
        of_part = kept_labels[kept_parts == index]
        counts[part] = len(of_part)
        _refuse_empty_classes(folder, classes, np.bincount(of_part, minlength=len(classes)))
    return LabelledImages(
        name=root.resolve().name,
        classes=tuple(classes),
        images=stack(arrays, image_size=image_size),
        labels=kept_labels,
        flip=True,
        num_train=counts["train"],
        num_val=counts.get("val", 0),
        num_test=counts.get("test", 0),
        skipped=tuple(skipped),
    )


def _find_parts(root: Path) -> dict[str, Path]:
    """The folders that hold one folder a class: train, val and test where there are such, or `root`."""
    names = _list_folders(root)
    if not names:
        raise UserError(
            f"{root} has no class folders.", "Put the images of each class in a folder named after the class."
        )
    by_part: dict[str, Path] = {}
    others = []
    for name in names:
        part = _SPLIT_FOLDERS.get(name.lower())
        if part is None or not _list_folders(root / name):
            others.append(name)
        elif part in by_part:
            raise UserError(
                f"{root} has both {by_part[part].name}/ and {name}/ for one split.",
                "Leave only one of them there.",
            )
        else:
            by_part[part] = root / name
    if "train" not in by_part:
        return {"train": root}
    if others:
        raise UserError(
            f"{root} has {others[0]}/ beside train/, which holds class folders.",
            f"Leave only train/, val/ and test/ there, each with one folder a class; move {others[0]}/ away.",
        )
    return {part: by_part[part] for part in ("train", "val", "test") if part in by_part}


def _shared_classes(root: Path, parts: dict[str, Path]) -> list[str]:
    """Class names, refusing one class only and names that differ between the parts."""
    classes = _list_folders(parts["train"])
    for part, folder in parts.items():
        names = _list_folders(folder)
        for wrong, where, lacks in (
            (sorted(set(names) - set(classes)), part, "train"),
            (sorted(set(classes) - set(names)), "train", part),
        ):
            if wrong:
                raise UserError(
                    f"Class {_name_some(wrong)} of {root / where} is not in {root / lacks}.",
                    "Give train, val and test the same class folders.",
                )
    if len(classes) == 1:
        raise UserError(
            f"{parts['train']} has the one class {classes[0]!r}.", "Give at least two classes, a folder each."
        )
    return classes


def _refuse_empty_classes(folder: Path, classes: list[str], counts: np.ndarray) -> None:
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"Class {_name_some(empty)} of {folder} has no readable images.",
            f"Put images ({', '.join(IMAGE_EXTENSIONS)}) there, or remove the folder.",
        )


def _list_folders(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir()
    )


def list_images(folder: Path) -> list[str]:
    """Return the paths of the images below a folder, sorted; linked folders are followed, each only once."""
    found: list[str] = []
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(where))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(where, name)) not in seen
        ]
        found += [
            os.path.join(where, name)
            for name in files
            if not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)
        ]
    return sorted(found)


def _decode_all(
    paths: list[str], *, image_size: int | None, skip_bad_images: bool
) -> tuple[list[PixelArray], list[int], list[str]]:
    """Decode in threads; the arrays, the indices of their paths, and the paths left out."""

    def decode_some(some: list[str]) -> list[PixelArray | Exception]:
        return [decode_or_error(path, image_size=image_size) for path in some]

    chunks = [paths[start : start + _FILES_AT_A_TIME] for start in range(0, len(paths), _FILES_AT_A_TIME)]
    results: list[PixelArray | Exception] = []
    with tqdm(total=len(paths), desc="reading images", unit="image", disable=None, leave=False) as bar:
        for decoded in in_threads(decode_some, chunks):
            results += decoded
            bar.update(len(decoded))
    bad = [
        (path, result) for path, result in zip(paths, results, strict=True) if isinstance(result, Exception)
    ]
    if bad:
        count = f"{len(bad)} of {len(paths)} images cannot be read: "
        listed = ", ".join(f"{path} ({reason(error)})" for path, error in bad[:3])
        message = count + listed + (f" and {len(bad) - 3} more." if len(bad) > 3 else ".")
        if not skip_bad_images:
            raise UserError(message, "Repair or delete them, or leave them out with --skip-bad-images.")
        _logger.warning("%s They are left out.", message)
    readable = [index for index, result in enumerate(results) if not isinstance(result, Exception)]
    arrays = [result for result in results if not isinstance(result, Exception)]
    return arrays, readable, [path for path, _ in bad]


def _name_some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
