"""Images that take more than memory should hold: they lie in files, of which the system reads what is asked for.

The files are mapped and shared, so worker processes are sent no copy, and under pressure their pages are given up.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dnas_ens.errors import UserError

#: Images of more bytes than this lie in a file.
MOST_IN_MEMORY = 2**30


def default_data_root() -> Path:
    """$DNAS_ENS_DATA if it is set and not empty, otherwise ~/.cache/dnas_ens/data."""
    given = os.environ.get("DNAS_ENS_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "dnas_ens" / "data"


def room_for(*shape: int) -> Tensor:
    """Return an uninitialised uint8 tensor of a shape: in memory, or in a file without a name below the data root.

    That is the default one: splits are made of splits long after `load_data`, whose ``data_root`` is not known here.

    Raises:
        UserError: There is no room on that disk.
    """
    size = math.prod(shape)
    if size <= MOST_IN_MEMORY:
        return torch.empty(shape, dtype=torch.uint8)
    folder = default_data_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # Writing into a hole of a mapped file that a full disk cannot fill would end the process without a word.
            (os.posix_fallocate if hasattr(os, "posix_fallocate") else _lengthen)(file.fileno(), 0, size)
            return _mapped(file.fileno(), shape)
    except OSError as error:
        raise UserError(
            f"Images of {size / 2**30:.1f} GiB find no room in {folder} ({error.strerror}).",
            "Make room there, set DNAS_ENS_DATA to a folder on a larger disk, or give a smaller --image-size.",
        ) from error


def gathered(images: Tensor, indices: Tensor) -> Tensor:
    """Return images[indices], in a file where that is larger than memory should hold."""
    size = len(indices) * math.prod(images.shape[1:])
    if images.dtype != torch.uint8 or images.device.type != "cpu" or size <= MOST_IN_MEMORY:
        return images[indices]
    return torch.index_select(images, 0, indices, out=room_for(len(indices), *images.shape[1:]))


def read_mapped(path: Path, *shape: int) -> Tensor:
    """Return the bytes of a file as a uint8 tensor of a shape that they fill; never write to it."""
    try:
        with path.open("r+b") as file:
            return _mapped(file.fileno(), shape)
    except PermissionError:
        return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=torch.uint8).view(shape)


def _mapped(file: int, shape: tuple[int, ...]) -> Tensor:
    """Map an open file as torch's own shared tensors are, which other processes are sent by descriptor."""
    storage = torch.UntypedStorage._new_shared_fd_cpu(file, math.prod(shape))  # type: ignore[attr-defined]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _lengthen(file: int, start: int, size: int) -> None:
    os.ftruncate(file, start + size)
