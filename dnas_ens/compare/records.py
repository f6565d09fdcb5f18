"""The store of a study: a line of JSON for every finished unit, its arrays beside it, and no settings mixed."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dnas_ens.errors import UserError
from dnas_ens.run.files import as_json, first_difference, unreadable, writing

#: What is kept of a unit: whatever JSON holds.
Record = dict[str, Any]


def read_lines(file: Path) -> list[Any]:
    """Return the records of a .jsonl file; none where there is no file.

    A last line without an end was being written when its process was killed; it is cut off.

    Raises:
        UserError: A line is not JSON.
    """
    if not file.exists():
        return []
    written = file.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if len(whole) < len(written):
        print(f"{file}: the last line is unfinished and cut off", file=sys.stderr, flush=True)
        os.truncate(file, len(whole))
    try:
        return [json.loads(line) for line in whole.decode().splitlines()]
    except ValueError as error:
        raise unreadable(file, error) from error


def append_line(file: Path, record: object) -> None:
    """Append a record to a .jsonl file, on the disk before this returns; its folder is made if need be.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    line = json.dumps(record) + "\n"
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())


class Records:
    """Finished units of a study by key; of two lines with one key the later counts.

    Args:
        file: A line a unit, written when the unit is finished.
        key: Names a unit: the values of these fields, or what a function makes of a record.
        settings: Returns the fields that a record of this study has; None where its folder sees to that.
        arrays: Returns where the arrays of a record are (.npz). A record without its file is run again.
        option: The option that names another place, for the error.

    Raises:
        UserError: The file holds something else, or records of other settings; the first field that differs is named.
    """

    def __init__(
        self,
        file: Path,
        *,
        key: tuple[str, ...] | Callable[[Record], Hashable],
        settings: Callable[[Record], Mapping[str, Any]] | None = None,
        arrays: Callable[[Record], Path] | None = None,
        option: str = "output",
    ) -> None:
        self.file, self._key, self._settings, self._arrays = file, key, settings, arrays
        self._option = option
        self.units: dict[Hashable, Record] = {}
        for number, record in enumerate(read_lines(file), start=1):
            try:
                if arrays is None or arrays(record).exists():
                    self._keep(record)
            except (TypeError, KeyError, AttributeError) as error:
                raise unreadable(file, f"line {number} is no record of this study") from error

    def add(self, record: Record, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Keep a finished unit, on the disk first: its arrays, then its line."""
        from dnas_ens.evaluate.array_file import save_arrays

        if arrays is not None:
            assert self._arrays is not None, "this store has no place for arrays"
            save_arrays(self._arrays(record), arrays)
        append_line(self.file, record)
        self._keep(json.loads(json.dumps(record)))

    @contextmanager
    def writing_alone(self) -> Iterator[None]:
        """Keep other processes from running the same study meanwhile.

        Raises:
            UserError: One does.
        """
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            stream = self.file.open("a")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.file} is being written by another process.",
                    f"Wait for it to end, or give another --{self._option}.",
                ) from error
            yield

    def arrays(self, key: Hashable) -> dict[str, np.ndarray]:
        """Read the arrays of a unit."""
        from dnas_ens.evaluate.array_file import load_arrays

        assert self._arrays is not None, "this store has no arrays"
        return load_arrays(self._arrays(self.units[key]), lambda arrays: arrays)

    def _keep(self, record: Record) -> None:
        key = self.key_of(record)
        wanted = as_json({} if self._settings is None else dict(self._settings(record)))
        for name, value in wanted.items():
            if difference := first_difference(record.get(name), value, name):
                field, there, here = difference
                unit = ", ".join(map(str, key)) if isinstance(key, tuple) else key
                raise UserError(
                    f"{self.file} holds {unit} with other settings: {field} is {there} there and {here} here.",
                    f"Give another --{self._option}, or remove it to start afresh.",
                )
        self.units[key] = record

    def key_of(self, record: Record) -> Hashable:
        """Return the key of a record; of a single field its value."""
        if callable(self._key):
            return self._key(record)
        values = tuple(record[name] for name in self._key)
        return values if len(values) > 1 else values[0]

    def __contains__(self, key: Hashable) -> bool:
        return key in self.units

    def __getitem__(self, key: Hashable) -> Record:
        return self.units[key]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.units.values())

    def __len__(self) -> int:
        return len(self.units)
