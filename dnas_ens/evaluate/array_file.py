"""Arrays in one compressed .npz file: written atomically, read without pickle, damage told in a line."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dnas_ens.files import unreadable, write_atomic

T = TypeVar("T")


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, atomically."""
    buffer = io.BytesIO()
    # As a mapping: numpy's own parameters are keywords, too, which an array's name may not be.
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(buffer, **named)
    write_atomic(path, buffer.getvalue())


def load_arrays(path: Path, make: Callable[[dict[str, np.ndarray]], T]) -> T:
    """Read arrays by name and make something of them.

    Args:
        path: A .npz file.
        make: Is given all arrays; a ValueError, KeyError or TypeError of it means that the file is damaged.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        # Opened here, for numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return make({name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from error
