"""Pictures that were decoded before, so that large photos are read once and not at every command."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dnas_ens.data.images import Picture
from dnas_ens.errors import UserError
from dnas_ens.run.files import load_tensors_and_text, save_tensors

#: Kept where reading took longer than this, in seconds, and takes no more than this many bytes.
LEAST_SECONDS, MOST_BYTES = 2.0, 2**31
#: Shapes and types of pixels: greys, colours, deep greys, which a file holds as int32.
_KINDS = ("grey", "colour", "deep")

_logger = logging.getLogger(__name__)


class DecodedPictures:
    """The decoded pictures of a folder at one side, in one file.

    A picture counts as the same as long as its file has the same inode, size and times of change. A damaged or missing
    file of them means that all are decoded again.

    Args:
        folder: Where such files are; None to keep nothing.
        root: The folder of the pictures.
        image_size: Side in pixels.
    """

    def __init__(self, folder: Path | None, root: Path, *, image_size: int) -> None:
        name = hashlib.sha256(f"{os.path.abspath(root)} {image_size}".encode()).hexdigest()[:32]
        self.file = None if folder is None else folder / f"{name}.safetensors"
        self._began = time.monotonic()
        self._known: dict[str, tuple[list[int], Picture]] = {}
        if self.file is not None and self.file.exists():
            self._read(self.file)

    def find(self, path: str) -> Picture | None:
        """Return a picture if its file is as it was; None otherwise."""
        known = self._known.get(os.path.abspath(path))
        return known[1] if known is not None and known[0] == _state_of(path) else None

    def keep(self, paths: Sequence[str], pictures: Sequence[Picture]) -> None:
        """Write the pictures of a folder, if reading them took long and some of them are new."""
        known = {id(picture) for _, picture in self._known.values()}
        if self.file is None or all(id(picture) in known for picture in pictures):
            return
        size = sum(picture.pixels.nbytes for picture in pictures)
        if time.monotonic() - self._began < LEAST_SECONDS or size > MOST_BYTES:
            return
        stacks: dict[str, list[np.ndarray]] = {kind: [] for kind in _KINDS}
        entries = {}
        for path, picture in zip(paths, pictures, strict=True):
            kind = "deep" if picture.is_deep_grey else "grey" if picture.pixels.ndim == 2 else "colour"
            entries[os.path.abspath(path)] = [_state_of(path), kind, len(stacks[kind]), picture.peak]
            stacks[kind].append(picture.pixels.astype(np.int32) if kind == "deep" else picture.pixels)
        tensors = {kind: torch.from_numpy(np.stack(found)) for kind, found in stacks.items() if found}
        try:
            save_tensors(self.file, tensors, metadata={"pictures": json.dumps(entries)})
        except UserError as error:
            # They will be decoded again.
            _logger.info("%s", error.cause)

    def _read(self, file: Path) -> None:
        try:
            tensors, text = load_tensors_and_text(file)
            for path, (state, kind, index, peak) in json.loads(text["pictures"]).items():
                pixels = tensors[kind][index].numpy()
                self._known[path] = state, Picture(pixels.astype(np.uint16) if kind == "deep" else pixels, peak=peak)
        except (UserError, ValueError, KeyError, TypeError, IndexError) as error:
            _logger.info("%s is not used: %s", file, error)
            self._known = {}


def _state_of(path: str) -> list[int]:
    """Return what changes when a file does."""
    found = os.stat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
