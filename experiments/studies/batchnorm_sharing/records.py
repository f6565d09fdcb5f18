"""Finished searches and trainings, and what is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dnas_ens.config.fields import to_dict
from dnas_ens.run.files import with_ending
from dnas_ens.space.genotype import Genotype
from studies.batchnorm_sharing.options import SETTINGS, Study
from studies.batchnorm_sharing.worker import run_search, run_training
from studies.records import append_line, other_settings, read_lines


class Records:
    """Finished searches and trainings, and the file they are kept in.

    Args:
        study: What is to be run.

    Raises:
        UserError: If the file holds results of other settings.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.file = with_ending(study.path, ".jsonl")
        self.searches: dict[tuple[str, int], dict[str, Any]] = {}
        self.trainings: dict[tuple[str, int], dict[str, Any]] = {}
        for record in read_lines(self.file):
            self._keep(record)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, in the file first."""
        append_line(self.file, record)
        self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        seed = record["seed"]
        if record["kind"] == "search":
            expected = {
                "config": to_dict(self.study.configuration(record["setting"], seed)),
                "pool": self.study.pool,
                "random_genotypes": self.study.num_random,
            }
            self.searches[record["setting"], seed] = record
        else:
            expected = {
                "recipe": to_dict(self.study.recipe(seed)),
                "data": to_dict(self.study.configuration(SETTINGS[0], seed).data),
            }
            self.trainings[record["cells"], seed] = record
        if any(record[name] != value for name, value in expected.items()):
            raise other_settings(self.file, f"a {record['kind']} of seed {seed}", "output")

    def missing_searches(self, seed: int) -> Iterator[Callable[[], dict[str, Any]]]:
        """Yield the searches of a seed that were not run, the longer one first."""
        for setting in reversed(SETTINGS):
            if (setting, seed) not in self.searches:
                yield functools.partial(run_search, self.study, setting, seed)

    def missing_trainings(
        self, genotypes: Sequence[Genotype], seed: int
    ) -> Iterator[Callable[[], dict[str, Any]]]:
        """Yield the trainings that were not run, each isomorphism class once."""
        by_cells = {genotype.canonical_hash(): genotype for genotype in genotypes}
        for cells, genotype in by_cells.items():
            if (cells, seed) not in self.trainings:
                yield functools.partial(run_training, self.study, cells, genotype, seed)

    def found(self, seed: int) -> list[Genotype]:
        """Return the genotypes of both searches' pools."""
        return [
            Genotype.from_dict(candidate["genotype"])
            for setting in SETTINGS
            for candidate in self.searches[setting, seed]["candidates"]
        ]

    def complete_seeds(self) -> list[int]:
        """Return the seeds of which everything was run."""
        return [
            seed
            for seed in sorted({seed for _, seed in self.searches})
            if all((setting, seed) in self.searches for setting in SETTINGS)
            and not list(self.missing_trainings(self.found(seed), seed))
        ]
