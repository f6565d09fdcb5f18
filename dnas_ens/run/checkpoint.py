"""Whole training states that survive a crash: tensors as safetensors, everything else as JSON in the same file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnas_ens.errors import DivergedError, UserError
from dnas_ens.run.files import safetensors_metadata, tensors_to_bytes, write_atomic

if TYPE_CHECKING:
    import torch

_FORMAT = "dnas_ens-state-1"
#: Seconds of an epoch that a crash may cost: a state between two steps is saved when the last one is older.
SECONDS_BETWEEN_STATES = 60.0


class CheckpointStore:
    """The newest two resumable states of one part of a run: `<name>-<step>.safetensors`, a manifest beside each.

    A state is nested at will: dicts (keys int or str), lists and tuples of tensors, numbers, strings, booleans, None,
    as `state_dict()` of a module, an optimiser or a schedule returns it. Dtypes, shapes and values come back bit-equal;
    tensors that shared memory are separate afterwards, and all are on the CPU.

    The manifest `<name>-<step>.json` holds the SHA-256 and is written after the state, so a state without one
    was interrupted and does not count. Saving at a step drops later ones: their course was abandoned.

    Args:
        folder: Where they are, usually `checkpoints/` of a run folder.
        name: What they are states of: letters, digits, `_`, `.` and `-`.
    """

    def __init__(self, folder: Path, *, name: str = "state") -> None:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"name must be letters, digits, '_', '.' and '-', not {name!r}")
        self.folder = Path(folder)
        self.name = name

    def save(self, step: int, state: Any) -> None:
        """Save a state under its step, >= 0, and drop all but it and the one before.

        Raises:
            DivergedError: A tensor holds NaN or infinity; nothing is written.
            TypeError: Something in the state cannot be held; the message names where.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, not {step}")
        data = state_to_bytes(state)
        _require_finite(state, f"the state of '{self.name}' at step {step}")
        path = self._file(step, "safetensors")
        write_atomic(path, data)
        manifest = {"step": step, "file": path.name, "sha256": hashlib.sha256(data).hexdigest()}
        write_atomic(self._file(step, "json"), json.dumps(manifest, indent=2).encode())
        self._drop_all_but({*[other for other in self.steps() if other < step][-1:], step})

    def steps(self) -> list[int]:
        """The steps of complete saves, ascending."""
        return self._steps("json")

    def load_newest(self) -> tuple[int, Any] | None:
        """Load the newest state that matches its manifest and is finite; others are passed over with a warning.

        Returns:
            Its step and the state, or None if nothing was ever saved.

        Raises:
            UserError: States were saved, but every one of them is damaged.
        """
        steps = self.steps()
        for orphan in set(self._steps("safetensors")) - set(steps):
            self._warn(orphan, "its manifest is missing, so saving it was interrupted")
        for step in reversed(steps):
            try:
                return step, self._load(step)
            except (OSError, ValueError, KeyError, TypeError, UserError) as error:
                self._warn(step, error.cause if isinstance(error, UserError) else str(error))
        if steps:
            raise UserError(
                f"None of the {len(steps)} saved states of '{self.name}' in {self.folder} is valid.",
                "Restore the folder from a copy, or start again with another --run-dir.",
            )
        return None

    def _load(self, step: int) -> Any:
        expected = json.loads(self._file(step, "json").read_bytes())["sha256"]
        data = self._file(step, "safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError("its SHA-256 is not the one in its manifest")
        state = state_from_bytes(data)
        _require_finite(state, "it")
        return state

    def _file(self, step: int, suffix: str) -> Path:
        return self.folder / f"{self.name}-{step:08d}.{suffix}"

    def _steps(self, suffix: str) -> list[int]:
        pattern = re.compile(rf"{re.escape(self.name)}-(\d{{8,}})\.{suffix}")
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))

    def _warn(self, step: int, reason: str) -> None:
        path = self._file(step, "safetensors")
        warnings.warn(f"Checkpoint {path} is passed over: {reason}.", RuntimeWarning, stacklevel=3)

    def _drop_all_but(self, kept: set[int]) -> None:
        # The manifest goes first: a state without one does not count, a manifest without a state is damage.
        for suffix in ("json", "safetensors"):
            for step in set(self._steps(suffix)) - kept:
                self._file(step, suffix).unlink(missing_ok=True)
        left_over = re.compile(rf"\.{re.escape(self.name)}-\d{{8,}}\.(json|safetensors)\.[0-9a-f]{{8}}\.tmp")
        for name in os.listdir(self.folder):
            if left_over.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)


class RegularStates:
    """Saves states at the ends of epochs, and between two steps where the last one is `SECONDS_BETWEEN_STATES` old."""

    def __init__(self, save: Callable[[], object]) -> None:
        self._save, self._last = save, time.monotonic()

    def after_epoch(self) -> None:
        """Save."""
        self._save()
        self._last = time.monotonic()

    def after_step(self, *, done: int, of: int) -> None:
        """Save if it is time, after so many steps of an epoch of so many; the state after the last the epoch saves."""
        if done < of and time.monotonic() - self._last >= SECONDS_BETWEEN_STATES:
            # What is not finite is told at the end of the epoch, with the step that it began at.
            with contextlib.suppress(DivergedError):
                self.after_epoch()


def first_not_finite(state: Any, name: str = "") -> str:
    """Return the dotted name of the first tensor of a nested state that holds NaN or infinity; empty if none does."""
    import torch

    if isinstance(state, torch.Tensor):
        return "" if not state.is_floating_point() or bool(state.isfinite().all()) else name
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(state, Mapping):
        parts = state.items()
    elif isinstance(state, list | tuple):
        parts = enumerate(state)
    found = (first_not_finite(part, f"{name}.{key}".lstrip(".")) for key, part in parts)
    return next(filter(None, found), "")


def _require_finite(state: Any, what: str) -> None:
    if tensor := first_not_finite(state):
        raise DivergedError(f"{tensor} of {what} is not finite.")


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON form of a state; its tensors go into `tensors` under the names that the form refers to."""
    import torch

    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, torch.Tensor):
        name = place.encode("ascii", "backslashreplace").decode()
        while name in tensors:
            name += "#"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (int, str):
                raise TypeError(f"{place} has the key {key!r}; keys must be int or str")
        return {"dict": [[key, _encode(item, f"{place}.{key}", tensors)] for key, item in value.items()]}
    raise TypeError(f"{place} is a {type(value).__name__}, which a saved state cannot hold")


def _decode(form: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(form, list):
        return [_decode(item, tensors) for item in form]
    if not isinstance(form, dict):
        return form
    ((kind, content),) = form.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown part {kind!r}")


def state_to_bytes(state: Any) -> bytes:
    """Return a nested state as the content of a file; see `CheckpointStore` for what it may hold."""
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_encode(state, "state", tensors), allow_nan=False)
    return tensors_to_bytes(tensors, metadata={"format": _FORMAT, "structure": structure})


def state_from_bytes(data: bytes) -> Any:
    """Return the state that `state_to_bytes` was given, its tensors on the CPU.

    Raises:
        ValueError: The content is something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    metadata = safetensors_metadata(data)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"it is not a saved state of the format {_FORMAT}")
    return _decode(json.loads(metadata["structure"]), tensors)
