"""What a study keeps of its seeds, and that nothing of other settings is mixed with it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnas_ens.errors import UserError
from studies.options import FREE, StudyOptions

if TYPE_CHECKING:
    from dnas_ens.run.folder import RunFolder
    from studies.bench import Bench
    from studies.predictors import Row


def open_run(study: str, options: StudyOptions, bench: Bench, command: Sequence[str]) -> RunFolder:
    """Make or go on with the run folder of a study, which holds trainings of these options alone."""
    from dnas_ens.run.folder import RunFolder

    name = f"{study}-{Path(options.data).name}-{options.model}"
    settings = {key: value for key, value in asdict(options).items() if key not in FREE}
    settings["data"] = bench.data.fingerprint
    del settings["data_root"]
    run = RunFolder.create(
        options.run_dir or Path("runs") / name,
        config=settings,
        section=study,
        command=list(command),
        resume=True,
    )
    run.write_env({"device": str(bench.device), "data": bench.data.describe()})
    return run


def run_seeds(
    run: RunFolder, options: StudyOptions, measure: Callable[[Path, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the record of every seed, measuring those that are not finished."""
    from dnas_ens.run.files import read_json

    records = []
    for seed in range(options.seeds):
        folder = run.file(f"seed-{seed}")
        finished = (folder / "rows.json").exists()
        records.append(read_json(folder / "rows.json") if finished else measure(folder, seed))
        if not finished:
            print(f"seed {seed} is finished", flush=True)
    return records


def finish_seed(bench: Bench, folder: Path, seed: int, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Evaluate the rows of a seed on test, and keep predictions and metrics; called once a seed.

    Args:
        bench: For the labels.
        folder: The seed's folder.
        seed: The study's seed.
        rows: R rows.
        **more: What else the seed's record holds, such as curves on val.
    """
    from dnas_ens.run.files import as_json, write_json
    from studies.predictors import measured_rows

    found = measured_rows(
        folder,
        rows,
        val_labels=bench.data.val.labels.cpu().numpy(),
        test_labels=bench.data.test.labels.cpu().numpy(),
    )
    record: dict[str, Any] = as_json({"seed": seed, "rows": found, **more})
    write_json(folder / "rows.json", record)
    return record


def read_lines(file: Path) -> list[Any]:
    """Return the records of a .jsonl file; none where there is no file.

    A last line without an end was being written when its process was killed; it is cut off.
    """
    if not file.exists():
        return []
    written = file.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if len(whole) < len(written):
        print(f"{file}: the last line is unfinished and cut off", file=sys.stderr, flush=True)
        os.truncate(file, len(whole))
    return [json.loads(line) for line in whole.decode().splitlines()]


def append_line(file: Path, record: object) -> None:
    """Append a record to a .jsonl file; its folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def other_settings(place: Path, what: object, option: str) -> UserError:
    """Return the error for results that are not of the settings that are asked for.

    Args:
        place: Where they are.
        what: Which they are.
        option: What names another place.
    """
    return UserError(
        f"{place} holds {what} with other settings.",
        f"Give another --{option}, or remove it to start afresh.",
    )
