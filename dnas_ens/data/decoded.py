"""Pictures that were decoded before, so that large photos are read once and not at every command."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import mmap
import os
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from dnas_ens.data.images import Picture
from dnas_ens.errors import UserError
from dnas_ens.run.files import read_json, remove_leftovers, write_json

#: Kept where reading took longer than this, in seconds.
LEAST_SECONDS = 2.0
#: One more whenever files are decoded to other pixels than before; what an earlier version kept is then not used.
DECODING = 2

_logger = logging.getLogger(__name__)


class DecodedPictures(ExitStack):
    """The decoded pictures of a folder at one side, in a mapped file, so that they take no memory.

    NAME.pixels has a place for every picture, NAME.json tells which picture lies where, and its checksum. A picture
    counts as the same as long as its file has the same inode, size and times of change, as they were before it was
    decoded, and is decoded as before; a damaged one is decoded again.
    A context manager: what is not kept is removed at the end of the block; pictures last as long as they are used.

    Args:
        folder: Where such files are; None to keep nothing.
        root: The folder of the pictures.
        paths: N files, known by their number.
    """

    def __init__(self, folder: Path | None, root: Path, paths: Sequence[str], *, image_size: int) -> None:
        super().__init__()
        self._folder, self._paths, self._side = folder, [os.path.abspath(path) for path in paths], image_size
        named = f"{os.path.abspath(root)} {image_size}".encode(errors="surrogateescape")
        self._name = hashlib.sha256(named).hexdigest()[:32]
        self._began = time.monotonic()
        self._known: dict[str, Any] = {}
        self._old: _Places | None = None
        self._new: _Places | None = None
        self._temporary = Path()
        #: Whether the file could not be written.
        self._refused = False
        self._held: set[int] = set()
        self._states: dict[int, list[int]] = {}
        self._lock = threading.Lock()
        if folder is None:
            return
        try:
            known = read_json(folder / f"{self._name}.json")
            with (folder / f"{self._name}.pixels").open("rb") as file:
                self._old = _Places(file, image_size)
            self._known = known if isinstance(known, dict) else {}
        except FileNotFoundError:
            pass
        except (UserError, OSError, ValueError) as error:
            _logger.info("%s in %s is not used: %s", self._name, folder, error)

    def find(self, number: int) -> Picture | None:
        """Return the picture of a path if its file is as it was; None otherwise. To be called before it is decoded."""
        path = self._paths[number]
        try:
            self._states[number] = now = _state_of(path)
            state, place, kind, peak, checksum = self._known[path]
            picture = self._old.picture(place, kind, peak) if self._old is not None else None
        except (OSError, KeyError, ValueError, TypeError, OverflowError):
            return None
        same = picture is not None and state == now and checksum == _checksum(picture)
        return picture if same else None

    def hold(self, number: int, picture: Picture) -> Picture:
        """Return a picture from its place in the file; as it is where there can be no file."""
        try:
            with self._lock:
                if self._new is None and self._folder is not None and not self._refused:
                    self._new = self._begin(self._folder)
            if self._new is None or self._refused:
                return picture
            held = self._new.put(number, picture)
        except OSError as error:
            _logger.info("%s", error)
            self._refused = True
            return picture
        self._held.add(number)
        return held

    def keep(self, pictures: dict[int, Picture]) -> None:
        """Keep the pictures, by number, if reading them took long and some of them are new."""
        if self._new is None or self._folder is None or time.monotonic() - self._began < LEAST_SECONDS:
            return
        entries = {}
        for number, picture in pictures.items():
            held = picture if number in self._held else self.hold(number, picture)
            if state := self._states.get(number):
                entries[self._paths[number]] = [state, number, _kind_of(held), held.peak, _checksum(held)]
        if self._refused:
            return
        try:
            # If a crash comes between the two, checksums differ.
            os.replace(self._temporary, self._folder / f"{self._name}.pixels")
            write_json(self._folder / f"{self._name}.json", entries)
        except (OSError, UserError) as error:
            # They will be decoded again.
            _logger.info("%s", error)

    def _begin(self, folder: Path) -> _Places | None:
        """Make the file, sparse; None where the disk has not twice the room."""
        size = len(self._paths) * _Places.size(self._side)
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 2 * size:
            return None
        remove_leftovers(folder)
        self._temporary = folder / f".{self._name}.{secrets.token_hex(4)}.tmp"
        self.callback(self._temporary.unlink, missing_ok=True)
        file = self.enter_context(self._temporary.open("x+b"))
        os.ftruncate(file.fileno(), size)
        return _Places(file, self._side)


class _Places:
    """An open file with a place of one size for every picture, mapped for reading."""

    #: Type and channels of a picture's pixels by its kind; deep greys have more than 8 bits.
    KINDS: ClassVar[dict[str, tuple[type[np.generic], tuple[int, ...]]]] = {
        "grey": (np.uint8, ()),
        "colour": (np.uint8, (3,)),
        "deep": (np.uint16, ()),
    }

    def __init__(self, file: BinaryIO, side: int) -> None:
        self._file, self._side = file, side
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @staticmethod
    def size(side: int) -> int:
        """Return the bytes of a place; even, for deep greys."""
        return 2 * ((3 * side**2 + 1) // 2)

    def picture(self, place: int, kind: str, peak: int | None) -> Picture:
        """Return what lies in a place, without a copy."""
        dtype, channels = self.KINDS[kind]
        shape = (self._side, self._side, *channels)
        start = place * self.size(self._side)
        return Picture(np.frombuffer(self._bytes, dtype, math.prod(shape), start).reshape(shape), peak=peak)

    def put(self, place: int, picture: Picture) -> Picture:
        """Write a picture, and return it from its place."""
        written = os.pwrite(self._file.fileno(), picture.pixels.tobytes(), place * self.size(self._side))
        if written < picture.pixels.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.picture(place, _kind_of(picture), picture.peak)


def _kind_of(picture: Picture) -> str:
    return "deep" if picture.is_deep_grey else "grey" if picture.pixels.ndim == 2 else "colour"


def _checksum(picture: Picture) -> int:
    return zlib.crc32(picture.pixels.data)


def _state_of(path: str) -> list[int]:
    """Return what changes when a file does, or how files are decoded."""
    found = os.stat(path)
    return [DECODING, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
