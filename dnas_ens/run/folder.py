"""The run folder: what was asked, on which machine, what came of it, and who may write to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dnas_ens.errors import UserError
from dnas_ens.run.files import (
    ABSENT,
    as_json,
    first_difference,
    read_checked,
    read_json,
    remove_leftovers,
    unreadable,
    unwritable,
    write_json,
    writing,
)
from dnas_ens.run.machine import environment
from dnas_ens.run.metrics_log import MetricsLog

_OTHER_FOLDER = "Name another folder with --run-dir"


class RunFolder:
    """One run's folder, held by one process at a time. Made by `create` or `open`; a context manager.

    Args:
        path: The folder, which exists.
        command: The command line, for env.json.

    Attributes:
        config: What config.json holds: a section a command, such as `{"search": {...}, "retrain": {...}}`.
        metrics: The run's own metrics.jsonl and TensorBoard folder.
    """

    def __init__(self, path: Path, *, command: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = {}
        self.metrics = MetricsLog(self.path)
        self._command = list(sys.argv if command is None else command)
        self._lock: tuple[int, ...] = _lock(self.path)
        remove_leftovers(self.path)

    @classmethod
    def create(
        cls,
        run_dir: Path | None,
        *,
        config: Mapping[str, Any],
        section: str = "search",
        command: Sequence[str] | None = None,
        resume: bool = False,
        name: str = "run",
        root: Path = Path("runs"),
    ) -> RunFolder:
        """Make a run folder, or continue the one of the same configuration.

        Args:
            run_dir: The folder; None makes a fresh `<root>/<NNN>-<name>`.
            config: The configuration, which config.json holds under `section`.
            command: The command line; this process's own by default.
            resume: Go on with a folder that holds the same configuration.

        Raises:
            UserError: The folder holds something else, belongs to another configuration (the first field that
                differs is named), would be continued without `resume`, or is in use by another process.
        """
        if run_dir is None:
            if resume:
                newest = next((path for _, path in sorted(_numbered(root), reverse=True)), root / "001-run")
                raise UserError(
                    "--resume does not say which run.",
                    f"Name it, such as --run-dir {shlex.quote(str(newest))}.",
                )
            run_dir = _fresh_folder(root, name)
        elif _is_foreign(run_dir):
            raise UserError(f"{run_dir} exists and is not a run folder.", f"{_OTHER_FOLDER}.")
        run = cls(_made(run_dir), command=command)
        try:
            if run.file("config.json").exists():
                run.config = _read_config(run.path)
                run._compare(section, config, resume=resume, otherwise=_OTHER_FOLDER)
            else:
                run.replace_config(section, config)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, run_dir: Path, *, command: Sequence[str] | None = None) -> RunFolder:
        """Open the folder of an earlier command.

        Raises:
            UserError: It is not a run folder, or it is in use by another process.
        """
        _read_config(Path(run_dir))
        run = cls(run_dir, command=command)
        # Read again: the process that held the lock until now may have added a section.
        run.config = _read_config(run.path)
        return run

    def record_recipe(self, recipe: Mapping[str, Any], *, resume: bool = False) -> None:
        """Add what members are trained with to config.json; once one has a state `create`'s rules of refusal hold."""
        states = ("members/*/member.json", "checkpoints/member-*.json", "budget.json")
        if any(True for pattern in states for _ in self.path.glob(pattern)):
            # A later command has no folder of its own to name.
            self._compare("retrain", recipe, resume=resume, otherwise="Search into another folder")
        else:
            # A recipe before may be what kept any from being trained.
            self.replace_config("retrain", recipe)

    def section(self, name: str) -> dict[str, Any]:
        """The configuration of one command.

        Raises:
            UserError: config.json has none, or not an object.
        """
        section = self.config.get(name)
        if not isinstance(section, dict):
            raise unreadable(self.file("config.json"), f"it has no object {name!r}")
        return section

    def replace_config(self, section: str, config: Mapping[str, Any]) -> None:
        """Write a section of config.json: a new one, or one that means the same, as with data that have moved."""
        self.config = {**self.config, section: as_json(config)}
        self.write_json("config.json", self.config)

    @property
    def has_a_network_a_genotype(self) -> bool:
        """Whether its networks are one of each member's genotype: no budget has been spent in it, and no cycles."""
        return not self.file("budget.json").exists() and not self.config.get("retrain", {}).get("cycles")

    def file(self, name: str) -> Path:
        """The path of a file in the folder.

        Raises:
            UserError: The name leads out of the folder.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"The file name {name!r} leads out of {self.path}.", "Correct the file that names it.")
        return self.path / name

    def write_json(self, name: str, obj: Any) -> None:
        """Write a JSON file of the folder; see `dnas_ens.run.files.write_json`."""
        write_json(self.file(name), obj)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the folder; see `dnas_ens.run.files.read_json`."""
        return read_json(self.file(name))

    def write_env(self, extra: Mapping[str, Any] | None = None) -> None:
        """Append this command's versions, device, command line and git revision to env.json, and more to note."""
        path = self.file("env.json")
        entries = self._env(path) if path.exists() else []
        write_json(path, [*entries, {**environment(self._command), **(extra or {})}])

    def _env(self, path: Path) -> list[Any]:
        """Return the entries of env.json; a damaged file is set aside, because no result depends on it."""
        try:
            read_json(path)
        except UserError as error:
            aside = path.with_name("env.damaged.json")
            path.replace(aside)
            print(
                f"{error.cause} It is kept as {aside.name}, and a new one is begun.",
                file=sys.stderr,
                flush=True,
            )
            return []
        entries: list[Any] = read_checked(path, [dict])
        return entries

    def close(self) -> None:
        """Close the files and let other processes write."""
        self.metrics.close()
        _unlock(self._lock)
        self._lock = ()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compare(self, section: str, config: Mapping[str, Any], *, resume: bool, otherwise: str) -> None:
        stored = self.config.get(section, ABSENT)
        difference = first_difference(without_places(stored), without_places(as_json(config)), section)
        if difference is not None:
            field, there, asked = difference
            raise UserError(
                f"{self.path} belongs to another configuration: {field} is {there} there and {asked} here.",
                f"{otherwise}, or give {field} the value it has there.",
            )
        if not resume:
            raise UserError(
                f"{self.path} already holds a {section} of this configuration.",
                f"Continue it with --resume. {otherwise} to start afresh.",
            )


def without_places(section: Any) -> Any:
    """Return a section of config.json without where its images and its base lie, which may have moved.

    What they are is compared elsewhere: images by their fingerprint, a base by its genotype.
    """
    if not isinstance(section, dict):
        return section
    found = dict(section)
    data, hypernetwork = section.get("data"), section.get("hypernetwork")
    if isinstance(data, dict):
        found["data"] = {name: value for name, value in data.items() if name not in ("data", "data_root")}
        # A name, and perhaps the file of its weights.
        if isinstance(trunk := data.get("trunk"), str):
            found["data"]["trunk"] = trunk.partition(":")[0]
    if isinstance(hypernetwork, dict):
        found["hypernetwork"] = {**hypernetwork, "base": hypernetwork.get("base") is not None}
    return found


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder that is no run's, and keep other processes from writing to it for the block.

    Raises:
        UserError: It is in use by another process, or cannot be written.
    """
    lock = _lock(_made(folder))
    try:
        remove_leftovers(folder)
        yield
    finally:
        _unlock(lock)


def _unlock(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        # Unlocked and not only closed: forked data workers hold the same open file.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(folder: Path) -> tuple[int, ...]:
    """Take the folder's lock; the kernel releases it when the process ends, however it ends.

    The folder itself is locked, because a locked file can be removed, and run.lock in it, because NFS knows locks of
    other machines on files alone. It also says who holds it.
    """
    path = folder / "run.lock"
    descriptors: list[int] = []
    try:
        for place, flags in ((folder, os.O_RDONLY), (path, os.O_RDWR | os.O_CREAT)):
            descriptors.append(os.open(place, flags, 0o666))
            try:
                fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Some file systems have no locks of files; the folder is held already.
                if place != path or error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
        # By the locked descriptor: on NFS closing another one would release the lock.
        os.ftruncate(descriptors[-1], 0)
        os.pwrite(descriptors[-1], f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        _unlock(descriptors)
        holder = ""
        with contextlib.suppress(OSError):
            holder = path.read_bytes()[:32].decode(errors="replace").strip()
        raise UserError(
            f"{folder} is in use by process {holder or 'that has just started'}.",
            f"Wait for it to end, or stop it. {_OTHER_FOLDER} otherwise.",
        ) from error
    except OSError as error:
        _unlock(descriptors)
        raise unwritable(path, error) from error
    return tuple(descriptors)


def _made(folder: Path) -> Path:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_foreign(folder: Path) -> bool:
    """Whether a path holds something other than a run; what a killed start leaves behind does not count."""
    if not folder.is_dir():
        return folder.exists()
    names = os.listdir(folder)
    ours = re.compile(r"run\.lock|\.config\.json\.[0-9a-f]{8}\.tmp")
    return "config.json" not in names and not all(ours.fullmatch(name) for name in names)


def _numbered(root: Path) -> list[tuple[int, Path]]:
    names = os.listdir(root) if root.is_dir() else []
    return [(int(match[1]), root / name) for name in names if (match := re.match(r"(\d{3,})-", name))]


def _fresh_folder(root: Path, name: str) -> Path:
    _made(root)
    number = max((number for number, _ in _numbered(root)), default=0) + 1
    while True:
        folder = root / f"{number:03d}-{name}"
        with writing(root), contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no config.json.", "Name a folder that a search has made."
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise unreadable(path, "it does not hold an object")
    return config
