"""Finished trainings, and what those of one model say together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.errors import UserError
from dnas_ens.run.files import with_ending
from studies.comparisons import compare_pairs
from studies.predictors import losses
from studies.records import other_settings, read_lines
from studies.weight_averaging.methods import ACROSS, LAST, PAIRS, SCHEDULES
from studies.weight_averaging.options import Study, Task

if TYPE_CHECKING:
    from dnas_ens.metrics.significance import PairedDifference

#: A method under a schedule.
Entry = tuple[str, str]
Pair = tuple[Entry, Entry]


def finished_records(study: Study, fingerprint: str) -> dict[Task, dict[str, Any]]:
    """Return the records of the run folder, by training.

    Raises:
        UserError: Run folder or OUTPUT.jsonl holds other settings, or the latter more than the former.
    """
    from dnas_ens.run.files import as_json, read_json

    def check(task: Task, settings: Mapping[str, Any], place: Path, option: str) -> None:
        if settings != as_json(study.settings(task, fingerprint)):
            raise other_settings(place, task, option)

    records: dict[Task, dict[str, Any]] = {}
    for file in sorted(study.folder.glob("*/training.json")):
        task = Task.of(file.parent.name)
        check(task, read_json(file)["settings"], study.folder, "run-dir")
        if (done := file.with_name("record.json")).exists():
            records[task] = read_json(done)
    results = with_ending(study.results, ".jsonl")
    for stored in read_lines(results):
        task = Task(*(stored[name] for name in Task._fields))
        check(task, stored["settings"], results, "output")
        if task not in records and task not in study.tasks():
            raise UserError(
                f"{results} holds {task}, which is not in {study.folder}.",
                "Give the --run-dir it was trained in, or another --output.",
            )
    return records


class Group:
    """The finished seeds of one model under both schedules.

    Args:
        records: All records.
        model: The model.
        folder: The run folder, for the predictions.
    """

    def __init__(self, records: Mapping[Task, dict[str, Any]], model: str, folder: Path) -> None:
        self.model = model
        self.seeds = [
            task.seed
            for task in sorted(records)
            if task.model == model
            and task.schedule == SCHEDULES[0]
            and all(task._replace(schedule=schedule) in records for schedule in SCHEDULES)
        ]
        self.records = {
            schedule: [records[Task(model, schedule, seed)] for seed in self.seeds] for schedule in SCHEDULES
        }
        self.methods = list(self.records[SCHEDULES[0]][0]["rows"]) if self.seeds else []
        self.differences: dict[Pair, PairedDifference] = {}
        if self.seeds:
            self.differences = compare_pairs(self._losses(folder), self._pairs())

    def _losses(self, folder: Path) -> dict[Entry, np.ndarray]:
        """Return the calibrated NLL of every method on each test input, (S, N)."""
        return {
            (schedule, method): np.stack([of_seed[method] for of_seed in of_seeds])
            for schedule in SCHEDULES
            for of_seeds in [
                [losses(folder / str(Task(self.model, schedule, seed)), self.methods) for seed in self.seeds]
            ]
            for method in self.methods
        }

    def _pairs(self) -> Iterator[Pair]:
        """Yield what is compared: every method with the last model, `PAIRS`, and `ACROSS` schedules."""
        constant, cosine = SCHEDULES
        for schedule in SCHEDULES:
            yield from (((schedule, method), (schedule, LAST)) for method in self.methods if method != LAST)
            yield from (((schedule, first), (schedule, second)) for first, second in PAIRS)
        yield from (((constant, method), (cosine, LAST)) for method in ACROSS)

    def rows(self, schedule: str, method: str) -> list[dict[str, Any]]:
        """Return a method's rows, a seed each."""
        return [record["rows"][method] for record in self.records[schedule]]

    def to_last(self, schedule: str, method: str) -> PairedDifference:
        """Return what a method is worth beside the last model of its schedule."""
        return self.differences[(schedule, method), (schedule, LAST)]
