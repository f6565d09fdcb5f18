"""A folder of images as a data set: ROOT/<class>/* or ROOT/{train,val?,test?}/<class>/*."""

from __future__ import annotations

import logging
import os
import re
import shlex
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from dnas_ens.data.decoded import DecodedPictures
from dnas_ens.data.images import (
    FOREIGN_EXTENSIONS,
    LabelledImages,
    Picture,
    common_side,
    decode_or_error,
    in_threads,
    open_image,
    reason,
    remedy_for,
    stack,
    tell_sizes,
    with_one_scale,
)
from dnas_ens.errors import UserError

IMAGE_EXTENSIONS = (
    *(".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg"),
    *(".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
# Formats recognised by their first bytes, in files whose name has no ending.
_FORMATS_BY_CONTENT = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000")
# What file managers, network drives, archives and file systems leave behind, in lower case.
_CLUTTER = {
    *("thumbs.db", "desktop.ini", "@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot"),
    *("$recycle.bin", "system volume information", "__macosx", "lost+found"),
}

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "entrenamiento", "entraînement", "entrainement"), "train"),
    **dict.fromkeys(("apprentissage", "addestramento", "treino", "treinamento", "обучение", "训练", "訓練"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation", "validierung", "validación"), "val"),
    **dict.fromkeys(("validacion", "validação", "validacao", "validazione", "валидация", "验证", "検証"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "prueba", "pruebas", "teste", "тест"), "test"),
    **dict.fromkeys(("测试", "テスト"), "test"),
}
# Words that mean a split beside train/ alone, and may be classes elsewhere.
_AMBIGUOUS = {"dev", "eval", "evaluation", "holdout", "tst", "teste"}
# Words that may stand beside one of a split, or be joined to it: test set, testset, Testdaten.
_WORDS_BESIDE = {
    *("set", "data", "dataset", "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "split"),
    *("folder", "daten", "bilder", "datos", "集", "数据", "数据集", "データ"),
}
# In German an s joins the two: Trainingsdaten.
_JOINED = re.compile(f"({'|'.join(_SPLIT_WORDS)})s?({'|'.join(_WORDS_BESIDE)})")
_FILES_AT_A_TIME = 64

_logger = logging.getLogger(__name__)


def load_folder(
    root: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    skip_bad_images: bool = False,
    cache: Path | None = None,
) -> LabelledImages:
    """Read every image below `root`.

    Classes are the folders' names, sorted. Files are taken in sorted order of their path inside the class, at any
    depth. Hidden files, and folders such as @eaDir, are ignored; other kinds of files, and images beside the class
    folders, are left out with a warning. The data are grey if every image is (modes 1, L, LA, 16-bit), otherwise RGB,
    with transparency laid on white. Greys of more than 8 bits have one scale in the whole set, see
    `images.with_one_scale`.

    Args:
        root: Folder with one folder a class, or with `train` and perhaps `val` and `test` that each hold one
            folder a class; `training`, `valid`, `dev`, `TestData`, `Trainingsdaten` and the like mean the same.
        image_size: Side in pixels: the short side is resized and the centre cropped. None takes the
            median of the images' short sides, but 64 at most, and says what becomes of the images.
        skip_bad_images: Leave unreadable images out with a warning, instead of refusing the folder.
        cache: Folder for decoded images, where reading takes long; None to keep none.

    Returns:
        The images in the order train, val, test; in a split by class and path.

    Raises:
        UserError: The folder is missing or not laid out so, holds no image, has an empty class or one class only,
            classes that differ between its parts, or an image or folder that cannot be read.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise UserError(f"There is no folder {root}.", "Check the path given as --data.")
    if not root.is_dir():
        raise UserError(f"{root} is a file.", "Give --data the folder that holds one folder of images a class.")
    parts = _find_parts(root)
    classes = _shared_classes(parts)
    _tell_names_alike(classes)
    paths: list[str] = []
    others: list[str] = []
    labels: list[int] = []
    part_of: list[int] = []
    for index, folder in enumerate(parts.values()):
        for label, name in enumerate(classes):
            found, of_other_kinds = list_images(folder / name)
            paths += found
            others += of_other_kinds
            labels += [label] * len(found)
            part_of += [index] * len(found)
    _tell_left_out(others, {root, *parts.values()})
    if not paths:
        raise UserError(f"{root} holds no images.", f"Put images ({', '.join(IMAGE_EXTENSIONS)}) in its folders.")
    sizes = list(in_threads(size_of, paths))
    side = image_size
    if side is None:
        side = common_side([size for size in sizes if size is not None] or [(1, 1)])
    with DecodedPictures(cache, root, paths, image_size=side) as decoded:
        pictures, skipped = _decode_all(paths, image_size=side, skip_bad_images=skip_bad_images, decoded=decoded)
        decoded.keep(pictures)
    readable = list(pictures)
    kept_labels = np.asarray(labels, dtype=np.int64)[readable]
    kept_parts = np.asarray(part_of)[readable]
    counts = {}
    for index, (part, folder) in enumerate(parts.items()):
        of_part = kept_labels[kept_parts == index]
        counts[f"num_{part}"] = len(of_part)
        _refuse_empty_classes(folder, classes, np.bincount(of_part, minlength=len(classes)))
    if image_size is None:
        tell_sizes([size for index in readable if (size := sizes[index]) is not None], side)
    read = tuple(paths[index] for index in readable)
    arrays, deep_bits = with_one_scale(list(pictures.values()), read)
    return LabelledImages(
        name=_legible(root.resolve().name),
        classes=tuple(map(_legible, classes)),
        images=stack(arrays, image_size=side),
        labels=kept_labels,
        flip=True,
        **counts,
        skipped=tuple(skipped),
        deep_bits=deep_bits,
        deep_colour=any(picture.is_deep_colour for picture in pictures.values()),
        paths=read,
        named=True,
    )


def _find_parts(root: Path) -> dict[str, Path]:
    """The folders that hold one folder a class: train, val and test where there are such, or `root`."""
    names = _list_folders(root)
    if not names:
        raise UserError(
            f"{root} has no class folders.", "Put the images of each class in a folder named after the class."
        )
    inner = {name: _list_folders(root / name) for name in names}
    by_part: dict[str, Path] = {}
    others = []
    for name in names:
        part = _part_named(name)
        if part is None or not inner[name]:
            others.append(name)
        elif part in by_part:
            raise UserError(
                f"{root} has both {by_part[part].name}/ and {name}/ for one split.",
                "Leave only one of them there.",
            )
        else:
            by_part[part] = root / name
    if "train" not in by_part and all(_AMBIGUOUS.intersection(words_of(folder.name)) for folder in by_part.values()):
        by_part = {}
    if not by_part:
        _refuse_wrong_level(root, inner)
        return {"train": root}
    if "train" not in by_part:
        name = next(iter(by_part.values())).name
        raise UserError(
            f"{root} has {name}/ with class folders, but no train/.",
            "Add train/ with the same class folders, or give the folders other names if they are classes.",
        )
    if others:
        raise UserError(
            f"{root} has {others[0]}/ beside {by_part['train'].name}/, which holds class folders.",
            f"Leave only train/, val/ and test/ there, each with one folder a class; move {others[0]}/ away.",
        )
    return {part: by_part[part] for part in ("train", "val", "test") if part in by_part}


def _part_named(name: str) -> str | None:
    """The split that a folder's name means: train for Training, test for test_set or TestData; None for none."""
    words = [word for word in words_of(name) if word not in _WORDS_BESIDE]
    if len(words) != 1:
        return None
    joined = _JOINED.fullmatch(words[0])
    return _SPLIT_WORDS.get(joined[1] if joined else words[0])


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: turnLeft, turn_left and Turn-Left 2 all give turn and left."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", name))
    return re.findall(r"[^\W\d_]+|[←→]", apart.lower())


def _refuse_wrong_level(root: Path, inner: dict[str, list[str]]) -> None:
    """Refuse splits where classes should be, or warn of it; `inner` lists the folders of each folder of `root`."""
    if len(inner) == 1:  # one folder too many; `_shared_classes` reports it
        return
    folders = _name_some(list(inner))
    if all(map(_part_named, inner)):
        raise UserError(
            f"The folders of {root}, {folders}, are splits that hold no class folders.",
            f"Put one folder a class into each, such as {root / next(iter(inner))}/cat.",
        )
    for name, below in inner.items():
        if len({part for part in map(_part_named, below) if part}) > 1:
            raise UserError(
                f"{root / name} holds the splits {_name_some(below)}, inside a class.",
                f"Put the splits outside and the classes inside, such as {root / below[0] / name}.",
            )
    shared = sorted(set.intersection(*map(set, inner.values())))
    if len(shared) > 1:
        words = [words_of(name) for name in inner]
        begun = all(any(word.startswith(("train", "test", "valid")) for word in own) for own in words)
        if begun or _SPLIT_WORDS.keys() & set().union(*words):
            raise UserError(
                f"The folders of {root}, {folders}, look like splits, for each holds {_name_some(shared)}.",
                "Name them train, val and test.",
            )
        _logger.warning(
            "The classes of %s are taken to be %s, though each holds folders named %s. Where those are the classes, "
            "name the outer folders train, val and test, or give --data one of them.",
            root,
            folders,
            _name_some(shared),
        )


def _shared_classes(parts: dict[str, Path]) -> list[str]:
    """Class names, refusing one class only and names that differ between the parts."""
    train = parts["train"]
    classes = _list_folders(train)
    for folder in parts.values():
        names = _list_folders(folder)
        for wrong, where, lacks in (
            (sorted(set(names) - set(classes)), folder, train),
            (sorted(set(classes) - set(names)), train, folder),
        ):
            if wrong:
                raise UserError(
                    f"Class {_name_some(wrong)} of {where} is not in {lacks}.",
                    f"Give {', '.join(path.name for path in parts.values())} the same class folders.",
                )
    if len(classes) > 1:
        return classes
    only = train / classes[0]
    below = _list_folders(only)
    if len(below) < 2:
        raise UserError(f"{train} has the one class {classes[0]!r}.", "Give at least two classes, a folder each.")
    remedy = f"Give --data {shlex.quote(str(only))}."
    if len(parts) > 1:
        remedy = f"Move the folders in {only} up into {train}, and so in the other splits."
    raise UserError(
        f"{train} holds the single folder {classes[0]}, whose folders {_name_some(below)} seem to be "
        f"the {'splits' if all(map(_part_named, below)) else 'classes'}.",
        remedy,
    )


def _tell_names_alike(classes: list[str]) -> None:
    """Say which class names look the same: one class may have been made twice, on systems that tell them apart."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), []).append(name)
    if several := [name for names in alike.values() if len(names) > 1 for name in names]:
        _logger.warning(
            "The classes %s differ by capitals, spaces or the encoding of accents alone, and are kept apart.",
            ", ".join(map(ascii, several)),
        )


def _refuse_empty_classes(folder: Path, classes: list[str], counts: np.ndarray) -> None:
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"Class {_name_some(empty)} of {folder} has no readable images.",
            f"Put images ({', '.join(IMAGE_EXTENSIONS)}) there, or remove the folder.",
        )


def _list_folders(folder: Path) -> list[str]:
    above = _real_ancestors(folder)
    try:
        return sorted(
            entry.name
            for entry in folder.iterdir()
            if not _is_clutter(entry.name) and entry.is_dir() and not _leads_up(entry, above)
        )
    except OSError as error:
        _refuse_to_pass_over(error)


def _real_ancestors(folder: Path) -> set[str]:
    """The real paths of a folder and of those it lies in, as it was reached and without links."""
    reached, real = Path(os.path.abspath(folder)), Path(os.path.realpath(folder))
    return {os.path.realpath(path) for path in (reached, *reached.parents, *real.parents)}


def _leads_up(path: str | os.PathLike[str], above: set[str]) -> bool:
    """Whether a link leads back to a folder that holds it: what lies there belongs to other classes as well."""
    return os.path.islink(path) and os.path.realpath(path) in above


def _refuse_to_pass_over(error: OSError) -> NoReturn:
    """Raise the UserError of a folder that cannot be listed; without it, pictures would be missing without a word."""
    raise UserError(
        f"{error.filename} cannot be listed ({error.strerror}).", "Make it readable, or move it away."
    ) from error


def list_images(folder: Path) -> tuple[list[str], list[str]]:
    """Find the files below a folder; linked folders are followed, each only once, except those it lies in itself.

    Hidden files and folders, and those that systems and network drives leave behind, are passed over.

    Returns:
        The paths of the images, sorted, those among them that Pillow cannot read included; and those of all other
        files. A file without an ending is recognised by its content.

    Raises:
        UserError: A folder cannot be listed.
    """
    images: list[str] = []
    others: list[str] = []
    seen: set[str] = set()
    above = _real_ancestors(folder)
    for where, folders, files in os.walk(folder, onerror=_refuse_to_pass_over, followlinks=True):
        seen.add(os.path.realpath(where))
        folders[:] = [
            name
            for name in folders
            if not _is_clutter(name)
            and os.path.realpath(os.path.join(where, name)) not in seen
            and not _leads_up(os.path.join(where, name), above)
        ]
        for name in files:
            if not _is_clutter(name):
                path = os.path.join(where, name)
                (images if _is_picture(path) else others).append(path)
    return sorted(images), sorted(others)


def _is_clutter(name: str) -> bool:
    """Whether a file or folder of a name is passed over without a word."""
    return name.startswith(".") or name.lower() in _CLUTTER


def _is_picture(path: str) -> bool:
    ending = os.path.splitext(path)[1].lower()
    if ending:
        return ending in IMAGE_EXTENSIONS or ending in FOREIGN_EXTENSIONS
    try:
        with open_image(path, formats=_FORMATS_BY_CONTENT):
            return True
    except Exception:  # Pillow may raise anything on a file that is not an image
        return False


def _tell_left_out(others: list[str], outside: set[Path]) -> None:
    """Say how many files are left out: of other kinds, and images in folders that should hold folders alone."""
    if others:
        kinds = Counter(os.path.splitext(path)[1].lower() or "without an ending" for path in others)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        _logger.warning(
            "%d files are left out because they are not images: %s%s (such as %s).",
            len(others),
            named,
            " and others" if len(kinds) > 5 else "",
            others[0],
        )
    for folder in sorted(outside):
        loose = [
            entry.name
            for entry in folder.iterdir()
            if not _is_clutter(entry.name) and entry.is_file() and _is_picture(str(entry))
        ]
        if loose:
            _logger.warning(
                "%d images in %s itself, outside the class folders, are left out (such as %s).",
                len(loose),
                folder,
                min(loose),
            )


def size_of(path: str) -> tuple[int, int] | None:
    """Width and height in the file, in pixels; None where it cannot be read, which `_decode_all` tells."""
    try:
        with open_image(path) as image:
            return image.size
    except MemoryError:
        raise
    except Exception:  # Pillow may raise anything on a damaged file
        return None


def _decode_all(
    paths: list[str], *, image_size: int, skip_bad_images: bool, decoded: DecodedPictures
) -> tuple[dict[int, Picture], list[str]]:
    """Decode in threads; the pictures by the indices of their paths, and the paths left out."""

    def picture_of(number: int) -> Picture | Exception:
        known = decoded.find(number)
        found = known or decode_or_error(paths[number], image_size=image_size)
        return decoded.hold(number, found) if known is None and isinstance(found, Picture) else found

    def decode_some(numbers: range) -> list[Picture | Exception]:
        return [picture_of(number) for number in numbers]

    chunks = [range(len(paths))[start : start + _FILES_AT_A_TIME] for start in range(0, len(paths), _FILES_AT_A_TIME)]
    results: list[Picture | Exception] = []
    with tqdm(total=len(paths), desc="reading images", unit="image", disable=None, leave=False) as bar:
        for some in in_threads(decode_some, chunks):
            results += some
            bar.update(len(some))
    good = {index: result for index, result in enumerate(results) if not isinstance(result, Exception)}
    bad = {paths[index]: result for index, result in enumerate(results) if isinstance(result, Exception)}
    if bad:
        listed = ", ".join(f"{path} ({reason(error)})" for path, error in list(bad.items())[:3])
        more = f" and {len(bad) - 3} more." if len(bad) > 3 else "."
        message = f"{len(bad)} of {len(paths)} images cannot be read: {listed}{more}"
        if not skip_bad_images:
            remedy = remedy_for(bad, otherwise="Repair or delete them.")
            raise UserError(message, f"{remedy[:-1]}, or leave such files out with --skip-bad-images.")
        _logger.warning("%s They are left out.", message)
    return good, list(bad)


def _legible(name: str) -> str:
    """The name of a folder as text that can be written anywhere: bytes that are not UTF-8 are spelt out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _name_some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
