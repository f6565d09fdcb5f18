"""Reading and writing files: atomically, JSON as standard JSON, tensors as safetensors, each with its own SHA-256.

The save protocol is that of torch.distributed.checkpoint and Lightning: write a temporary file in the same folder,
flush, fsync, rename over the target, fsync the folder. Nothing is pickled, so loading a file runs no code. The hash of
a file's content is in the file, so that no crash can part the two, and every reader verifies it; a file without one,
such as one written by hand, is taken as it is. torch is imported where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnas_ens.errors import UserError

if TYPE_CHECKING:
    import torch

#: Stands for a field that is not there.
ABSENT = object()
#: Field of a JSON object, and of the metadata of tensors, that holds the SHA-256 of the rest.
DIGEST = "content_sha256"
_HASH = re.compile("[0-9a-f]{64}")
#: Names of temporary files: `.<name>.<eight hexadecimal digits>.tmp`.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def unwritable(path: Path, error: OSError) -> UserError:
    """The error of a write that the disk refuses."""
    return UserError(
        f"Cannot write {path}: {error.strerror or error}.",
        "Free some space or make the folder writable, then run the command again.",
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into the UserError of this path."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unreadable(path: Path, reason: object) -> UserError:
    """The error of a missing or damaged file."""
    if isinstance(reason, OSError):
        reason = reason.strerror or reason
    return UserError(f"Cannot read {path}: {reason}.", "Check the path, or restore the file from a copy.")


def with_ending(path: Path, ending: str) -> Path:
    """Return a path with an ending added to its name; ``with_suffix`` would replace what follows a dot in it."""
    return path.with_name(path.name + ending)


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace a file as a whole: a reader sees the old content or the new one, also after a crash.

    Its folder is made where it is absent. The data may come in parts, one after the other.

    Raises:
        UserError: The disk is full or the folder cannot be written; the old content is untouched.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring what was renamed in a folder to the disk, where it only is once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, obj: Any) -> None:
    """Write a JSON file atomically, indented; tuples become lists, paths strings, and NumPy scalars numbers.

    An object gets a last field `DIGEST`, the SHA-256 of the rest in its shortest form with sorted keys.

    Raises:
        ValueError: NaN or an infinity is in it, which JSON cannot express.
    """
    try:
        plain = as_json(obj)
        if obj and isinstance(plain, dict):
            plain = {**plain, DIGEST: _json_digest(plain)}
        text = json_text(plain, indent=2)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    write_atomic(path, (text + "\n").encode())


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return plain values as JSON, letters as they are; all escaped where a file's name among them is not UTF-8."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def read_json(path: Path, *, by_hand: bool = False) -> Any:
    """Read a JSON file, without its `DIGEST`, which a file that may have been edited ``by_hand`` need not match.

    Raises:
        UserError: It is missing, is no valid JSON, or was changed since it was written.
    """
    try:
        value = json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    return verified(value, path, by_hand=by_hand)


def verified(value: Any, path: Path, *, by_hand: bool = False) -> Any:
    """Return what JSON of a file holds, checked by its `DIGEST` and without it; see `read_json`."""
    if not (isinstance(value, dict) and value):
        return value
    name, last = list(value.items())[-1]
    try:
        if DIGEST not in value and isinstance(last, str) and _HASH.fullmatch(last):
            # A damage may have made another name of it.
            rest = {key: part for key, part in value.items() if key != name}
            return rest if _json_digest(rest) == last else value
        stored = value.pop(DIGEST, None)
        unharmed = stored is None or by_hand or stored == _json_digest(value)
    except RecursionError as error:
        raise unreadable(path, error) from error
    if not unharmed:
        raise UserError(
            f"{path} is not as it was written: its SHA-256 differs.",
            f"It was damaged or edited. Restore it from a copy; if you edited it, take its field {DIGEST} out.",
        )
    return value


def _json_digest(value: dict[str, Any]) -> str:
    """Return the hash of an object whatever its layout."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_checked(path: Path, form: object) -> Any:
    """Read a JSON file that must have a form.

    Args:
        form: A type; [form] for a list of such; {key: form} for an object that has these keys and perhaps others,
            where a key that ends in "?" may be absent; or a tuple of forms, one of which it must have. A bool is no
            number here.

    Raises:
        UserError: The file is missing, is not valid JSON, or has another form; the place is named.
    """
    value = read_json(path)
    if misfit := _misfit(value, form, "it"):
        raise unreadable(path, misfit)
    return value


def _misfit(value: object, form: object, name: str) -> str:
    """Return how a value fails to have a form; empty if it has it."""
    if isinstance(form, tuple):
        misfits = [_misfit(value, part, name) for part in form]
        return "" if "" in misfits else misfits[0]
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{name} is not an object"
        for key, part in form.items():
            plain = key.removesuffix("?")
            if plain not in value:
                misfit = f"{name} has no {key!r}" if plain == key else ""
            else:
                misfit = _misfit(value[plain], part, plain if name == "it" else f"{name}.{plain}")
            if misfit:
                return misfit
        return ""
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        entries = (_misfit(entry, form[0], f"{name}[{index}]") for index, entry in enumerate(value))
        return next(filter(None, entries), "")
    return "" if type(value) is form else f"{name} is a {type(value).__name__}"


def as_json(obj: Any) -> Any:
    """Return what `read_json` gives for an object that `write_json` has written."""
    return json.loads(json.dumps(obj, allow_nan=False, default=_plain))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that `write_atomic` left anywhere below a folder in a process that was killed."""
    for path in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> bytes:
    """Return tensors of any shape and device as the content of a .safetensors file, with text beside them.

    Those that share memory or are not contiguous are copied first.

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


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors, such as a module's state_dict, atomically to one .safetensors file, with their SHA-256."""
    digest = _digest_of(tensors, metadata)
    write_atomic(path, tensors_to_bytes(tensors, metadata={**(metadata or {}), DIGEST: digest}))


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read the tensors of one .safetensors file; UserError if it is missing, damaged or is none."""
    tensors, _ = load_tensors_and_text(path)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def load_tensors_and_text(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors of one .safetensors file and the text beside them; see `load_tensors`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = Path(path).read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    metadata = safetensors_metadata(content)
    stored = metadata.pop(DIGEST, None)
    if stored is not None and stored != _digest_of(tensors, metadata):
        raise unreadable(path, "it is not as it was written: its SHA-256 differs")
    return tensors, metadata


def _digest_of(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None) -> str:
    return hashlib.sha256(tensors_to_bytes(tensors, metadata=metadata or None)).hexdigest()


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """Return the text beside the tensors of a .safetensors file that was found valid."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found: dict[str, str] = header.get("__metadata__") or {}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be written as JSON")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def first_difference(stored: Any, asked: Any, field: str) -> tuple[str, str, str] | None:
    """Return the dotted name of the first field in which two configurations differ, with both values as JSON.

    Args:
        stored: One of them, as `as_json` gives it.
        asked: The other one.
        field: Name of the whole, put in front.

    Returns:
        Field, first and second value; None where they agree (1 and 1.0 do).
    """
    if isinstance(stored, dict) and isinstance(asked, dict):
        pairs = ((key, stored.get(key, ABSENT), asked.get(key, ABSENT)) for key in {**stored, **asked})
        found = (first_difference(one, other, f"{field}.{key}") for key, one, other in pairs)
        return next(filter(None, found), None)
    # A field of a later version that is None did not exist before.
    if (stored is ABSENT and asked is None) or _same(stored, asked):
        return None
    return field, _shown(stored), _shown(asked)


def _same(one: Any, other: Any) -> bool:
    """Whether JSON values are equal; 1 and 1.0 are, 1 and true are not."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    return "given" if isinstance(value, dict) else json.dumps(value)
