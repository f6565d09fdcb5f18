"""Arrays in one compressed .npz file: written atomically, read without pickle, damage reported as a UserError."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dnas_ens.run.files import unreadable, write_atomic

T = TypeVar("T")
#: Largest expansion of a byte by deflate.
_MOST_PACKED = 1100
#: Errors that numpy, zipfile and zlib raise for a damaged archive.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, atomically."""
    buffer = io.BytesIO()
    # As a mapping: an array may have the name of one of numpy's own keyword parameters.
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(buffer, **named)
    write_atomic(path, buffer.getvalue())


def load_arrays(path: Path, make: Callable[[dict[str, np.ndarray]], T]) -> T:
    """Read arrays by name and make something of them.

    Args:
        make: Called with all arrays; if it raises ValueError, KeyError or TypeError, the file counts as damaged.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        # Opened here, because numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for entry in arrays.zip.infolist():
                _require_size(arrays.zip, entry)
            return make({name: arrays[name] for name in arrays.files})
    except _DAMAGE as error:
        raise unreadable(path, error) from error


def _require_size(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Check that an array is as large as its header claims, before memory is allocated for it."""
    if entry.file_size > _MOST_PACKED * max(entry.compress_size, 1):
        raise ValueError(f"{entry.filename} claims {entry.file_size:,} bytes in {entry.compress_size:,}")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"{entry.filename} has a header of version {version}")
        shape, _, kind = read_header(file)
        claimed = math.prod(shape) * kind.itemsize
        if kind.hasobject or file.tell() + claimed != entry.file_size:
            raise ValueError(f"{entry.filename} claims the shape {shape}, which it does not hold")
