"""Finished searches and trainings, their predictions, and what is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dnas_ens.config.fields import to_dict
from dnas_ens.run.files import with_ending
from dnas_ens.space.genotype import Genotype
from studies.diversity_sweep.choosing import to_retrain
from studies.diversity_sweep.options import BASE_SETTING, SETTINGS, STEERED, Study
from studies.diversity_sweep.searching import Unit, run_search, run_training
from studies.records import append_line, other_settings, read_lines

Task = Callable[[], Unit]


class Records:
    """Finished searches and trainings: a line each in OUTPUT.jsonl, their predictions in the run folder.

    Args:
        study: What is to be run.

    Raises:
        UserError: If the file holds results of other settings.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.file = with_ending(study.path, ".jsonl")
        self.units: dict[tuple[str, str, int], dict[str, Any]] = {}
        for record in read_lines(self.file):
            # Without its predictions a unit is run again.
            if self.predictions(record).exists():
                self._keep(record)

    def add(self, record: dict[str, Any], predictions: dict[str, np.ndarray]) -> None:
        """Keep a unit, its predictions first."""
        place = self.predictions(record)
        place.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(place, **predictions)  # type: ignore[arg-type]
        append_line(self.file, record)
        self._keep(record)

    def predictions(self, record: dict[str, Any]) -> Path:
        """Return where the predictions of a unit lie."""
        kind, name, seed = self._key(record)
        return (
            self.study.predictions
            / f"seed-{seed}"
            / f"{kind}-{name.replace(', ', '-').replace(' ', '-')}.npz"
        )

    @staticmethod
    def _key(record: dict[str, Any]) -> tuple[str, str, int]:
        return record["kind"], record["setting" if record["kind"] == "search" else "cells"], record["seed"]

    def _keep(self, record: dict[str, Any]) -> None:
        kind, name, seed = self._key(record)
        expected: dict[str, Any]
        if kind == "search":
            config = self.study.configuration(name, seed)
            expected = {"config": to_dict(config), "measured": self.study.measured}
        else:
            data = self.study.configuration(STEERED[0], seed).data
            expected = {"recipe": to_dict(self.study.recipe(seed)), "data": to_dict(data)}
        if any(record[name] != value for name, value in expected.items()):
            raise other_settings(self.file, f"a {kind} of seed {seed}", "output")
        self.units[kind, name, seed] = record

    def search(self, setting: str, seed: int) -> dict[str, Any]:
        """Return the record of a finished search."""
        return self.units["search", setting, seed]

    def missing_base(self, seed: int) -> Iterator[Task]:
        """Yield the search of the given base, if it was not run."""
        if ("search", BASE_SETTING, seed) not in self.units:
            yield functools.partial(run_search, self.study, BASE_SETTING, seed, None)

    def missing_searches(self, seed: int) -> Iterator[Task]:
        """Yield the searches of a seed that were not run; the base's must have been."""
        given = Genotype.from_dict(self.search(BASE_SETTING, seed)["base"]["genotype"])
        for setting in SETTINGS:
            if ("search", setting, seed) not in self.units:
                base = given if setting.startswith("hypernet") else None
                yield functools.partial(run_search, self.study, setting, seed, base)

    def missing_trainings(self, seed: int) -> Iterator[Task]:
        """Yield the trainings that were not run, each isomorphism class once; all searches must have been."""
        wanted: dict[str, Genotype] = {}
        for setting in SETTINGS:
            wanted |= to_retrain(self.search(setting, seed))
        for cells, genotype in wanted.items():
            if ("training", cells, seed) not in self.units:
                yield functools.partial(run_training, self.study, genotype, seed)
