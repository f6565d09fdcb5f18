"""The study engine: conditions × seeds × run_one, each unit run once and kept.

A study is declared by its script: options, conditions, what is run for one of them with one seed, the columns of its
table and the measures that only it needs. What is the same for all is here and beside here: `Records` keeps finished
units and resumes, `report` makes tables, sentences on differences, provenance and files.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from dnas_ens.commands.parse import run_main
from dnas_ens.compare.records import Record, Records
from dnas_ens.config import require

if TYPE_CHECKING:
    from dnas_ens.training.workers import Pool

C = TypeVar("C", bound=Hashable)
#: What a task returns: a record, with arrays where the store keeps some.
Unit = Record | tuple[Record, Mapping[str, np.ndarray]]
Task = Callable[[], Unit]
#: Where studies write unless told otherwise. What is published, experiments/results, is written by ``--output`` alone.
RESULTS = Path("runs/results")


def run_script(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a study's script and end the process with its exit code."""
    sys.exit(run_main(main, go_on="run the same command again to go on"))


def require_positive(options: object, *names: str) -> None:
    """Refuse options below 1; the error names the flag."""
    for name in names:
        flag = name.replace("_", "-")
        require(getattr(options, name) > 0, f"--{flag} is {getattr(options, name)}.", f"Give --{flag} 1 or more.")


def tasks_of(run_one: Callable[[C, int], Unit], conditions: Iterable[C], seeds: Iterable[int]) -> dict[Hashable, Task]:
    """Return conditions × seeds as tasks by (condition, seed), seed by seed: an interrupted study has all conditions.

    Where workers run them, what runs one must be importable.
    """
    conditions = list(conditions)
    return {
        (condition, seed): functools.partial(run_one, condition, seed) for seed in seeds for condition in conditions
    }


def run_missing(
    records: Records,
    tasks: Mapping[Hashable, Task],
    *,
    pool: Pool | None = None,
    said: Callable[[Record], str] | None = None,
) -> None:
    """Run the tasks whose units are not in the store, and keep each as it comes.

    Args:
        tasks: By the key of the unit they make.
        pool: Runs them side by side (`dnas_ens.training.workers.worker_pool`); None for one after another, here.
        said: What is printed of a unit that has just been finished.
    """
    from dnas_ens.training.workers import completed

    missing = {key: task for key, task in tasks.items() if key not in records}
    with records.writing_alone():
        for unit in (task() for task in missing.values()) if pool is None else completed(pool, missing):
            record, arrays = unit if isinstance(unit, tuple) else (unit, None)
            records.add(record, arrays)
            if said is not None:
                print(said(record), flush=True)


def write_study(
    output: Path,
    text: str,
    *,
    figure: Callable[[Path], None],
    records: Iterable[Mapping[str, Any]] | None = None,
    shown: str | None = None,
) -> None:
    """Write OUTPUT.md, OUTPUT.png and, where the store is elsewhere, OUTPUT.jsonl, and say so.

    Args:
        figure: Draws to a path.
        records: The lines of OUTPUT.jsonl; None where that is the store itself.
        shown: What is printed of the text; None for all.
    """
    from dnas_ens.compare.report import write_results
    from dnas_ens.run.files import with_ending

    write_results(output, text, records=records)
    figure(with_ending(output, ".png"))
    print(text if shown is None else shown)
    print(f"wrote {output}.md, .png and .jsonl")
