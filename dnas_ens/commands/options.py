"""What the commands share: common options, presets and configuration files, the run folder and its data."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dnas_ens.commands.parse import peek
from dnas_ens.config import DataConfig, RetrainConfig, SearchConfig, require
from dnas_ens.config.fields import override, to_dict, with_fields
from dnas_ens.config.presets import PRESET_COSTS, retrain_preset, search_preset
from dnas_ens.errors import UserError
from dnas_ens.run.ranks import Ranks, is_first, joined, may_restart, restarted
from dnas_ens.space.spaces import SpaceName

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from dnas_ens.budget.amount import Amount
    from dnas_ens.data.dataset import ImageData
    from dnas_ens.run.folder import RunFolder

#: The options of a command.
T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class EarlyOptions:
    """Options that are read first, because they decide the defaults of the others."""

    preset: str | None = None
    regime: str | None = None
    space: SpaceName | None = None
    base: Path | None = None
    data: str | None = None
    config: Path | None = None


def configured(argv: Sequence[str], *, prog: str, section: str | None = None) -> tuple[SearchConfig, RetrainConfig]:
    """Return search and recipe as preset, regime and configuration file set them; a flag beats the file.

    Args:
        section: The one the file's fields belong to where it has no sections; None if it has both.
    """
    early = peek(EarlyOptions, argv, prog=prog)
    values = file_sections(early.config, only=section)
    stored = values.get("search", {})
    if not isinstance(stored, dict):
        raise UserError(f"The part search of {early.config} is not an object.", "Write it as {...}.")
    # A file may name preset, regime, base and space, as a run's own config.json does.
    hypernetwork, supernet = stored.get("hypernetwork", {}), stored.get("supernet", {})
    stored_base = hypernetwork.get("base") if isinstance(hypernetwork, dict) else None
    stored_space = supernet.get("space") if isinstance(supernet, dict) else None
    named = {
        "preset": stored.get("preset", ""),
        "regime": stored.get("regime", ""),
        "base": "" if stored_base is None else stored_base,
        "space": "" if stored_space is None else stored_space,
    }
    for name, value in named.items():
        require(isinstance(value, str), f"{name} in {early.config} is no text.", "Make it a text.")
    whole = {field.name for field in dataclasses.fields(SearchConfig)} <= stored.keys()
    for name, typed in (("preset", early.preset), ("regime", early.regime)):
        # Of a run's own file all settings would be those of the file all the same.
        require(
            not (typed and whole) or named[name] == typed,
            f"--{name} is {typed}, but {early.config} is of the {name} {named[name]}.",
            f"Leave --{name} out, or take {name} out of the file.",
        )
    base, space = early.base or stored_base, early.space or stored_space
    search = search_preset(
        early.preset or stored.get("preset", "smoke"),
        early.regime or stored.get("regime", "star"),
        base=None if base is None else Path(base),
        space=space,
    )
    stored_data = stored.get("data", {})
    named_data = early.data or (stored_data.get("data") if isinstance(stored_data, dict) else None)
    if named_data not in (None, search.data.data):
        # A preset limits the training images of its own data set alone.
        search = with_fields(search, limit_train=None)
    search = override(search, {name: value for name, value in stored.items() if name not in ("preset", "regime")})
    if early.base is not None:
        search = with_fields(search, base=early.base)
    if early.space is not None:
        search = with_fields(search, space=early.space)
    return search, override(retrain_preset(search.preset, search.supernet.space), values.get("retrain", {}))


def file_sections(path: Path | None, *, only: str | None = None) -> dict[str, Any]:
    """Return the parts search and retrain of a configuration file.

    Args:
        path: The file; None for no parts.
        only: The part that the file's fields belong to where it has no parts; None if it must have them.

    Raises:
        UserError: The file cannot be read or has other parts.
    """
    from dnas_ens.run.files import read_json

    parts = {"search", "retrain"}
    values = {} if path is None else read_json(path, by_hand=True)
    if only is not None and not (isinstance(values, dict) and values.keys() & parts):
        return {only: values}
    if not isinstance(values, dict) or values.keys() - parts:
        raise UserError(
            f"{path} has parts other than search and retrain.",
            'Write it as {"search": {...}, "retrain": {...}}, like the config.json of a run.',
        )
    return values


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the commands that begin a run."""

    config: Path | None = None
    """JSON file of settings, such as a run's config.json; flags beat it."""
    run_dir: Path | None = None
    """Run folder; default: a fresh numbered one under runs/."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    sync_batch_norm: bool = False
    """Of several processes under torchrun: take BatchNorm's statistics over the images of all of them."""
    resume: bool = False
    """Go on with an interrupted run in --run-dir."""
    dry_run: bool = False
    """Print the resolved configuration and what it will take, then stop."""
    price_per_hour: float | None = None
    """What an hour of all machines costs, for the price that --dry-run prints."""

    @property
    def amount(self) -> Amount | None:
        """A budget, where the command has one."""
        return None


def begin_run(
    options: RunOptions, config: SearchConfig, data: ImageData, *, ranks: Ranks, command: list[str]
) -> AbstractContextManager[RunFolder | None]:
    """Make the run folder of a search, or open it again, and note environment, data and splits in it.

    Its configuration names the data by their full path, so that it is continued from any directory. Of several ranks
    the first has the folder; the others get None.
    """
    from dnas_ens.run.folder import RunFolder

    require(
        options.run_dir is not None or not may_restart(),
        "Processes that torchrun starts again would not find the run folder.",
        "Name it with --run-dir, or leave out --max-restarts.",
    )
    if not ranks.first:
        return nullcontext()
    print(f"preset {config.preset}: {PRESET_COSTS[config.preset]}")
    run = RunFolder.create(
        options.run_dir,
        config=to_dict(with_full_paths(config)),
        command=command,
        resume=options.resume,
        name=Path(config.data.data).name,
    )
    try:
        require(
            options.amount is not None or not run.file("budget.json").exists(),
            f"The networks of {run.path} are those of a budget.",
            "Go on with python -m dnas_ens --budget or --budget-epochs, or leave out --run-dir and --resume.",
        )
        if run.file("splits.json").exists():
            _require_same_data(run, data, config.data.data)
        # The images may have moved.
        run.replace_config("search", to_dict(with_full_paths(config)))
        run.write_env(noted(ranks, data))
        run.write_json("splits.json", {**data.describe(), "indices": data.splits})
    except BaseException:
        run.close()
        raise
    return run


def on_every_rank(work: Callable[[T, Ranks, list[str]], None], command: T, typed: list[str]) -> None:
    """Do the work of a command, which was typed so, on every rank that torchrun has started; a dry run on the first.

    Processes that torchrun has started again go on with their run.
    """
    options: Any = dataclasses.replace(command, resume=True) if restarted() else command
    if not options.dry_run or is_first():
        with joined(options.device, sync_batch_norm=options.sync_batch_norm, alone=options.dry_run) as ranks:
            work(options, ranks, typed)


def noted(ranks: Ranks, data: ImageData) -> dict[str, Any]:
    """Return what env.json notes of a command besides the machine."""
    together = {"processes": ranks.size, "sync_batch_norm": ranks.sync_batch_norm} if ranks.size > 1 else {}
    return {"device": str(ranks.device), **together, "data": data.describe()}


def require_same_on_all(ranks: Ranks, data: ImageData, **sections: SearchConfig | RetrainConfig) -> None:
    """Check that all ranks have the same configuration and data, which may be in different places.

    Raises:
        UserError: Naming the first field that differs.
    """
    settings: dict[str, Any] = {name: to_dict(section) for name, section in sections.items()}
    settings.get("search", {}).pop("data", None)
    ranks.require_same({**settings, "data": {"fingerprint": data.fingerprint, "flip": data.flip}})


def read_splits(run: RunFolder) -> dict[str, Any]:
    """Return the splits.json of a run: name and fingerprint of its data, and which image is in which split."""
    from dnas_ens.run.files import read_checked

    found: dict[str, Any] = read_checked(run.file("splits.json"), {"name": str, "fingerprint": str})
    return found


def _require_same_data(run: RunFolder, data: ImageData, named: str) -> None:
    stored = read_splits(run)
    if stored["fingerprint"] != data.fingerprint:
        raise UserError(
            f"The data {named} are not those {run.path} was made with: their fingerprint is "
            f"{data.fingerprint[:12]}, not {stored['fingerprint'][:12]}.",
            "Bring the images back as they were, with --fine-tune-trunk also maps/ of the data root, or search again "
            "with another --run-dir.",
        )


@contextmanager
def resumable(run: RunFolder | None, command: Sequence[str]) -> Iterator[None]:
    """On an interruption, add a note with the command that continues the run: what was typed, the folder, --resume."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if run is None:
            raise
        names_it = any(word.startswith(("--run-dir", "--run_dir")) or Path(word) == run.path for word in command)
        more = [] if names_it else ["--run-dir", str(run.path)]
        more += [] if "--resume" in command else ["--resume"]
        interrupt.add_note(f"continue with: {shlex.join([*command, *more])}")
        raise


def load_configured_data(config: DataConfig, *, dry_run: bool = False) -> ImageData:
    """Load the data a configuration names; in a dry run no network is trained for it."""
    from dnas_ens.data import load_data

    options = config.how_to_load()
    if not (dry_run and config.trunk and config.fine_tune_trunk):
        return load_data(config.data, **options)
    from dnas_ens.data.trunk import PICTURE_SIZE, Trunk, stand_on

    print(f"not in the estimate: {config.fine_tune_trunk} epochs of {config.trunk} on the pictures", file=sys.stderr)
    side = config.image_size or PICTURE_SIZE
    trunk = Trunk.pretrained(config.trunk, stride=config.trunk_stride, image_size=side)
    pictures = load_data(config.data, **{**options, "image_size": side, "trunk": None, "fine_tune_trunk": None})
    # The maps of this trunk, which the run does not stand on, would be of no use.
    return stand_on(pictures, trunk, cache=None)


def with_full_paths(config: SearchConfig) -> SearchConfig:
    """Name data and base so that they are found from any directory; names of data sets and known cells stay."""
    from dnas_ens.data.large import default_data_root
    from dnas_ens.data.loading import find_folder
    from dnas_ens.data.names import SOURCE_NAMES

    data, root = config.data.data, config.data.data_root
    if data not in SOURCE_NAMES:
        data = os.path.abspath(find_folder(data, data_root=root or default_data_root()))
    name, colon, file = (config.data.trunk or "").partition(":")
    trunk = name + colon + os.path.abspath(file) if file else config.data.trunk
    root = None if root is None else Path(os.path.abspath(root.expanduser()))
    base = config.hypernetwork.base
    # Else it is the name of a known cell.
    base = Path(os.path.abspath(base)) if base is not None and base.exists() else base
    return with_fields(config, data=data, data_root=root, trunk=trunk, base=base)


def data_of_run(run: RunFolder | None, *, moved_to: str | None = None, ranks: Ranks | None = None) -> ImageData:
    """Load the data of a run folder and check that they are the ones it was made with.

    Args:
        run: Its folder; of several ranks the first has it.
        moved_to: Where the images are now, if they have moved; noted in the run if they are the same.
        ranks: All of which load the data; None for this process alone.

    Raises:
        UserError: If the images are not where they were, or images, labels or splits have changed since.
    """
    ranks = ranks or Ranks()
    if run is None:
        return load_configured_data(override(DataConfig(), ranks.shared({})))
    config = _data_config(run, moved_to=moved_to)
    data = load_configured_data(config)
    # Only now, so that the others find what was downloaded.
    ranks.shared(to_dict(config))
    _require_same_data(run, data, config.data)
    if moved_to is not None:
        searched = override(SearchConfig(), run.section("search"))
        run.replace_config("search", to_dict(with_full_paths(with_fields(searched, data=moved_to))))
    return data


def _data_config(run: RunFolder, *, moved_to: str | None) -> DataConfig:
    """Return where the data of a run are and how they are read."""
    from dnas_ens.data.large import default_data_root
    from dnas_ens.data.loading import find_folder
    from dnas_ens.data.names import SOURCE_NAMES

    config = override(DataConfig(), run.section("search").get("data", {}))
    # Before the images are read, which may take long.
    stored = read_splits(run)
    if moved_to is not None:
        config = dataclasses.replace(config, data=moved_to)
    elif config.data not in SOURCE_NAMES:
        try:
            find_folder(config.data, data_root=config.data_root or default_data_root())
        except UserError as error:
            raise UserError(
                f"The images that {run.path} was made with are not at {config.data} any more.",
                "Say where they are with --data FOLDER.",
            ) from error
    # Mirrored as in the search, even if the class names would decide otherwise today.
    return dataclasses.replace(config, flip=stored.get("flip", config.flip))


def preset_help() -> str:
    """Return the lines on presets for the help of a command."""
    return "Presets: " + "; ".join(f"{name} = {cost}" for name, cost in PRESET_COSTS.items()) + "."


def print_resolved(config: SearchConfig | RetrainConfig, facts: dict[str, Any]) -> None:
    """Print what a dry run shows: the resolved configuration and what it will take."""
    print(json.dumps(to_dict(config), indent=2))
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {value:,.0f}" if isinstance(value, int | float) else f"{name}: {value}")


def print_next(run_dir: Path, module: str) -> None:
    """Print the run folder and the next command, a module of this package, so that it runs from any folder."""
    print(f"run folder: {run_dir}")
    print(f"next: {shlex.join(['python', '-m', module, os.path.abspath(run_dir)])}")
