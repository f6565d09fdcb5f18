"""Reading and writing files: whole or not at all, JSON as standard JSON, tensors as safetensors.

The save protocol is the one of torch.distributed.checkpoint and Lightning: write a temporary file in the
same folder, flush, fsync, rename over the target, fsync the folder. Nothing is ever pickled, so loading a
file cannot run code. torch is imported where it is used, so that the JSON half stays free of it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnas_ens.errors import UserError

if TYPE_CHECKING:
    import torch


def unwritable(path: Path, error: OSError) -> UserError:
    """What to tell a user whose disk refuses a write."""
    return UserError(
        f"Cannot write {path}: {error.strerror or error}.",
        "Free some space or make the folder writable, then run the command again.",
    )


def unreadable(path: Path, reason: object) -> UserError:
    """What to tell a user whose file is missing or damaged."""
    if isinstance(reason, OSError):
        reason = reason.strerror or reason
    return UserError(f"Cannot read {path}: {reason}.", "Check the path, or restore the file from a copy.")


def with_ending(path: Path, ending: str) -> Path:
    """Return a path with an ending behind its whole name; ``with_suffix`` would cut off what follows a dot in it."""
    return path.with_name(path.name + ending)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a reader sees the old content or the new one, also after a crash.

    Args:
        path: The file; its folder is made where it is absent.
        data: The whole content.

    Raises:
        UserError: The disk is full or the folder cannot be written; the old content is untouched.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        # The rename itself is only on the disk once its folder is.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise unwritable(path, error) from error


def write_json(path: Path, obj: Any) -> None:
    """Write a JSON file atomically, indented and in the order given.

    Args:
        path: The file.
        obj: What JSON can hold; tuples become lists, paths strings, and NumPy scalars numbers.

    Raises:
        ValueError: NaN or an infinity is in it, which JSON has no word for.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file is missing or is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error


def as_json(obj: Any) -> Any:
    """Return what `read_json` gives for an object that `write_json` has written.

    Raises:
        ValueError: NaN or an infinity is in it, which JSON has no word for.
    """
    return json.loads(json.dumps(obj, allow_nan=False, default=_plain))


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> bytes:
    """Serialise tensors as safetensors; those that share memory or are not contiguous are copied first.

    Args:
        tensors: Tensors of any shape, on any device, by name.
        metadata: Text stored beside them.

    Returns:
        The content of a .safetensors file.

    Raises:
        TypeError: A tensor is sparse, has no data, or is of a type that safetensors does not know.
    """
    import torch
    from safetensors.torch import save

    plain: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise TypeError(f"{name} is sparse or without data, which a file cannot hold")
        value = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in storages else value
        storages.add(storage)
    try:
        return save(plain, metadata=metadata)
    except KeyError as error:
        raise TypeError(f"a tensor is of the type {error}, which a file cannot hold") from error


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors, such as a module's state_dict, atomically to one .safetensors file."""
    write_atomic(path, tensors_to_bytes(tensors, metadata=metadata))


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read the tensors of one .safetensors file.

    Raises:
        UserError: The file is missing or is not a valid safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be written as JSON")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
