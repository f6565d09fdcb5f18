"""The one way in: a data set by name, by folder, or from a torch Dataset.

Warnings about a user's own images come from here: classes that a mirror image would change, copies in different
splits, and classes of unequal size.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dnas_ens.data.copies import first_alike, first_equal
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.data.folder import load_folder, words_of
from dnas_ens.data.images import LabelledImages
from dnas_ens.data.large import default_data_root
from dnas_ens.data.names import SOURCE_NAMES
from dnas_ens.data.sources import load_source
from dnas_ens.data.splits import choose_splits, draw_limited
from dnas_ens.data.torch_dataset import load_torch_dataset
from dnas_ens.errors import UserError
from dnas_ens.types import IntArray

# The largest class is reported where it is this many times as large as the smallest.
_UNEQUAL = 4

# Words of a side in the languages that folders are often named in.
_SIDES = {
    *("left", "right", "lefts", "rights", "lefthand", "righthand", "leftward", "rightward", "leftwards"),
    *("rightwards", "lefthanded", "righthanded", "leftarrow", "rightarrow", "leftturn", "rightturn"),
    *("leftside", "rightside", "links", "rechts", "linke", "rechte", "linker", "rechter", "gauche", "droite"),
    *("droit", "izquierda", "derecha", "izquierdo", "derecho", "esquerda", "direita", "esquerdo", "direito"),
    *("sinistra", "destra", "sinistro", "destro", "lewo", "prawo", "lewa", "prawa", "vlevo", "vpravo"),
    *("vänster", "höger", "venstre", "høyre", "højre", "vasen", "oikea", "sol", "sağ", "влево", "вправо"),
    *("лево", "право", "левый", "правый", "левая", "правая", "левое", "правое", "слева", "справа", "налево"),
    *("направо", "лівий", "правий", "ліва", "права", "ліворуч", "праворуч", "levá", "pravá", "levý", "pravý"),
    *("levé", "pravé", "ľavá", "ľavý", "doleva", "doprava", "lewy", "prawy", "lewe", "prawe", "kiri", "kanan"),
    *("esquerra", "dreta", "stânga", "dreapta", "αριστερά", "δεξιά", "يسار", "يمين", "שמאל", "ימין"),
    *("←", "→", "east", "west", "northeast", "northwest", "southeast", "southwest", "clockwise", "anticlockwise"),
    *("counterclockwise", "cw", "ccw", "starboard", "sinister", "dexter"),
}
# Sides within words as well: 左转 is a turn to the left.
_SIDES_INSIDE = ("左", "右", "왼", "오른쪽", "오른손", "오른발")
# Sides only where both are there.
_SIDE_PAIRS = (
    *(("l", "r"), ("lh", "rh"), ("lt", "rt"), ("lhs", "rhs")),
    *(("os", "od"), ("e", "w"), ("esq", "dir"), ("ne", "nw"), ("se", "sw"), ("ne", "sw"), ("nw", "se")),
    *(("좌", "우"), ("trái", "phải"), ("bal", "jobb")),
)
# Sides where both begin words that end alike, as in lefteye and righteye.
_SIDE_BEGINNINGS = (("left", "right"), ("links", "rechts"), ("linker", "rechter"), ("linke", "rechte"))
_WRITING = {
    *("arrow", "arrows", "letter", "letters", "digit", "digits", "text", "texts", "character", "characters"),
    *("alphabet", "word", "words", "handwriting", "font", "fonts", "glyph", "glyphs", "numeral", "numerals"),
}
_NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}

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
    trunk: str | None = None,
    trunk_stride: int = 16,
    fine_tune_trunk: int | None = None,
) -> ImageData:
    """Load images and split them: disjoint, stratified, seeded, fingerprinted.

    Sizes train/val/test: fashion-mnist and mnist 50k/10k/10k, cifar10 and cifar100 40k/10k/10k, svhn
    63,257/10k/26,032; digits, torch Datasets and folders without splits 60/20/20 %; a folder that has
    train and test gives a fifth of every class of train to val.

    Args:
        data: One of `SOURCE_NAMES`; the path of a folder ROOT/<class>/* or ROOT/{train,val?,test?}/<class>/*,
            or its name below `data_root`; a map-style torch Dataset of (image, label); or `ImageData`,
            which is returned as it is, except for `limit_train` and `flip`.
        data_root: Where named data sets are kept, and decoded images of folders that take long to read; default
            $DNAS_ENS_DATA, else ~/.cache/dnas_ens/data.
        limit_train: Keep a stratified subset of so many training images; val and test are unchanged.
        image_size: Side in pixels: the short side is resized and the centre cropped. None keeps a named
            data set's own; for folders and Datasets it takes the median of the images' short sides, but 64
            at most, and says what becomes of the images.
        seed: At least 0; decides the splits and the subset, each from its own stream.
        download: Whether a named data set may be downloaded if its files are absent.
        skip_bad_images: Leave unreadable images of a folder out with a warning, instead of refusing it.
        flip: Whether training mirrors images left to right at random. None does so where that is known to keep the
            meaning, and for folders and Datasets unless a class name says otherwise.
        trunk: Put the maps of a pretrained network's first stages in the place of the pictures, which have 224 pixels
            a side unless `image_size` says otherwise: a name of torchvision, or NAME:FILE; see
            `dnas_ens.data.trunk.Trunk.pretrained`.
        trunk_stride: What the stages divide the sides of the pictures by, at most.
        fine_tune_trunk: Epochs for which the whole network is first trained on the training pictures, with a new head.

    Returns:
        The data on the CPU.

    Raises:
        UserError: The data cannot be found, read or split as asked.
    """
    if fine_tune_trunk is not None and (fine_tune_trunk < 1 or trunk is None):
        raise UserError(
            f"--fine-tune-trunk is {fine_tune_trunk}" + (", and there is no trunk." if trunk is None else "."),
            "Give it 1 epoch or more, and --trunk a network such as resnet18.",
        )
    stages = None
    if trunk is not None:
        from dnas_ens.data.trunk import PICTURE_SIZE, Trunk, stand_on

        # Before the pictures are read, which may take long.
        stages = Trunk.pretrained(trunk, stride=trunk_stride, image_size=image_size or PICTURE_SIZE)
        image_size = stages.image_size
    if image_size is not None and image_size < 1:
        raise UserError(f"The image size is {image_size}.", "Give --image-size a side in pixels, such as 32.")
    if isinstance(data, ImageData):
        if image_size is not None and image_size != data.image_size:
            raise UserError(
                f"The data are loaded at {data.image_size} pixels, but {image_size} were asked for.",
                "Load them with that image_size.",
            )
        loaded = data if flip is None or flip == data.flip else dataclasses.replace(data, flip=flip)
        loaded = loaded if limit_train is None else loaded.limited(limit_train, seed=seed)
    else:
        own = True
        if not isinstance(data, str | os.PathLike | Dataset):
            raise UserError(
                f"A {type(data).__name__} was given as data.",
                "Give a name, a folder, or torch.utils.data.TensorDataset(images, labels): uint8 images (N, C, H, W), "
                "int64 labels (N,).",
            )
        if isinstance(data, Dataset):
            source = load_torch_dataset(data, image_size=image_size)
        elif isinstance(data, str) and data in SOURCE_NAMES:
            if Path(data).is_dir():
                _logger.warning("%s is the data set of that name; the folder here is ./%s.", data, data)
            source, own = load_source(data, _root(data_root), image_size=image_size, download=download), False
        else:
            folder, cache = find_folder(data, data_root=_root(data_root)), _root(data_root) / "decoded"
            source = load_folder(folder, image_size=image_size, skip_bad_images=skip_bad_images, cache=cache)
        loaded = _split(source, _decide_flip(source, flip, own=own), limit_train=limit_train, seed=seed, own=own)
    if trunk is None or stages is None:
        return loaded
    cache = _root(data_root) / "maps"
    if fine_tune_trunk is not None:
        from dnas_ens.data.fine_tuning import fine_tuned

        stages = fine_tuned(
            trunk, loaded, epochs=fine_tune_trunk, stride=trunk_stride, image_size=stages.image_size, cache=cache
        )
    return stand_on(loaded, stages, cache=cache)


def _root(given: str | os.PathLike[str] | None) -> Path:
    return default_data_root() if given is None else Path(given).expanduser()


def find_folder(data: str | os.PathLike[str], *, data_root: Path) -> Path:
    """Find a folder of images by its path, or by its name below the data root; UserError if there is none."""
    if str(data) in ("", "."):
        raise UserError(f"--data is {str(data)!r}.", f"Give a name ({', '.join(SOURCE_NAMES)}) or a path to a folder.")
    folder = Path(data).expanduser()
    if folder.exists():
        return folder
    if (data_root / folder).exists():
        return data_root / folder
    if not isinstance(data, str) or len(folder.parts) > 1:
        raise UserError(f"There is no folder {folder}, nor {data_root / folder}.", "Check the path given as --data.")
    near = difflib.get_close_matches(data.lower(), SOURCE_NAMES, n=len(SOURCE_NAMES), cutoff=0.0)
    raise UserError(
        f"There is no data set {data!r}, nor a folder of that name here or in {data_root}.",
        f"Give one of {', '.join(near)}, or a path to a folder of images.",
    )


def _split(source: LabelledImages, flip: bool, *, limit_train: int | None, seed: int, own: bool) -> ImageData:
    # The splits of data sets known by name are what others compare with, so equal images stay where they are.
    equal = first = first_equal(source.images) if own else None
    if equal is not None and source.paths:
        first = first_alike(source.images, source.labels, equal)
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
    if equal is not None and first is not None:
        _tell_copies(source, equal, first, chosen)
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
        flip=flip,
        splits={key: indices.tolist() for key, indices in chosen.items()},
        skipped=source.skipped,
        deep_bits=source.deep_bits,
        deep_colour=source.deep_colour,
    )


def _decide_flip(source: LabelledImages, asked: bool | None, *, own: bool) -> bool:
    """Whether training mirrors a source's images, and say so where class names decide it."""
    if asked is not None:
        return asked
    hint = mirror_hint(source.classes) if own and source.flip and source.named else None
    if hint is not None:
        _logger.warning(
            "Training does not mirror the images left to right, for the classes %s; --flip (flip=True) does.",
            hint,
        )
    return source.flip and hint is None


def mirror_hint(classes: Sequence[str]) -> str | None:
    """Say what in the names of the K classes suggests that a mirror changes the meaning; None where nothing does."""
    words = {name: set(words_of(name)) for name in classes}
    if of_sides := [name for name, own in words.items() if any(map(_is_side, own))]:
        return f"{_quoted(of_sides)} tell sides apart"
    every = set().union(*words.values())
    alike = (
        (word, right + word.removeprefix(left))
        for left, right in _SIDE_BEGINNINGS
        for word in sorted(every)
        if word.startswith(left)
    )
    for pair in (*_SIDE_PAIRS, *alike):
        if every >= {*pair}:
            return f"{_quoted([name for name, own in words.items() if own & {*pair}])} tell sides apart"
    if written := [name for name, own in words.items() if own & _WRITING]:
        return f"{_quoted(written)} name writing or arrows"
    signs = [name for name in classes if _is_sign(name)]
    return f"{_quoted(signs)} are letters or digits" if 2 * len(signs) > len(classes) else None


def _is_sign(name: str) -> bool:
    """Whether a name is a digit or a letter, also as MNIST has it in "0 - zero"; an age of 0-2 is none."""
    *before, word = re.split(r"[\s_]*-[\s_]*", name.lower())
    if before:
        return len(before) == 1 and before[0].isdigit() and word in _NUMBERS
    return len(word) == 1 or word.isdigit() or word in _NUMBERS


def _is_side(word: str) -> bool:
    # As in turnleft and keepright, but not in cleft, bright, upright or copyright.
    within = any(side in word for side in _SIDES_INSIDE)
    return word in _SIDES or within or bool(re.search(r"[^c]left$|[^bfpwy]right$", word))


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (" and others" if len(names) > 4 else "")


def _tell_copies(source: LabelledImages, equal: IntArray, first: IntArray, splits: Mapping[str, IntArray]) -> None:
    """Say how many images are copies of others, and where that spoils what is measured.

    For each image `equal` is the index of the first that is equal to it, `first` of the first it is any copy of.
    """
    copies = np.flatnonzero(equal != np.arange(len(equal)))
    alike = np.flatnonzero((equal == np.arange(len(equal))) & (first != equal))
    for found, of, what in (
        (copies, equal, "are equal to others, pixel for pixel"),
        (alike, first, "look like others of their class that were saved again in another quality or size"),
    ):
        if not len(found):
            continue
        example = f" (such as {source.paths[found[0]]} of {source.paths[of[found[0]]]})" if source.paths else ""
        _logger.warning(
            "%d of %d images %s%s; random splits keep such ones together.", len(found), len(first), what, example
        )
    contradictory = int((source.labels[copies] != source.labels[equal[copies]]).sum())
    if contradictory:
        _logger.warning("%d of them are in another class than the image they are equal to.", contradictory)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = int(np.isin(first[splits[other]], first[splits[one]]).sum())
        if shared:
            _logger.warning(
                "%d of %d %s images are in %s too: what is measured on them says little.",
                shared,
                len(splits[other]),
                other,
                one,
            )


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
