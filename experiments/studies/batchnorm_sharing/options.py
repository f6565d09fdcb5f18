"""Options of the study of shared BatchNorm statistics, and the configurations that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dnas_ens.config import RetrainConfig, SearchConfig, require
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.space.genotype import Genotype, random_genotype
from dnas_ens.space.search_space import SearchSpace
from studies.options import PRESETS, RESULTS

SETTINGS = ("slices", "separate")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    data: Literal["digits", "fashion-mnist"] = "digits"
    """digits with preset smoke, or fashion-mnist with preset micro."""
    seeds: int = 3
    """Seeds, each with one search a setting."""
    epochs: int | None = None
    """Epochs a search; default: the preset's."""
    limit_train: int | None = None
    """Training images of searches and trainings; default: the preset's."""
    pool: int = 16
    """P, genotypes that are ranked in each search: random ones and candidates of the search."""
    random_genotypes: int | None = None
    """How many of them are random, the same in both settings; default: half."""
    candidate_recipe_epochs: int | None = None
    """Epochs of every training from scratch; default: the preset's."""
    workers: int = 1
    """Searches and trainings side by side, each on one CPU core."""
    output: Path | None = None
    """Where results go: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl; default: runs/results/batchnorm-sharing-DATA."""

    def __post_init__(self) -> None:
        for name in ("seeds", "workers"):
            require(
                getattr(self, name) > 0, f"--{name} is {getattr(self, name)}.", f"Give --{name} 1 or more."
            )
        require(
            2 <= self.num_random < self.pool,
            f"{self.num_random} random genotypes of a pool of {self.pool} leave nothing to rank or to compare with.",
            "Give --random-genotypes 2 or more and a larger --pool.",
        )

    @property
    def num_random(self) -> int:
        """Random genotypes of the pool."""
        return self.pool // 2 if self.random_genotypes is None else self.random_genotypes

    @property
    def path(self) -> Path:
        """Output without suffix."""
        return RESULTS / f"batchnorm-sharing-{self.data}" if self.output is None else self.output

    def configuration(self, setting: str, seed: int) -> SearchConfig:
        """Return the search of a setting and a seed."""
        given = {"epochs": self.epochs, "limit_train": self.limit_train}
        fields = {name: value for name, value in given.items() if value is not None}
        return with_fields(search_preset(PRESETS[self.data]), seed=seed, passes=setting, **fields)

    def recipe(self, seed: int) -> RetrainConfig:
        """Return the recipe of a seed's trainings from scratch."""
        recipe = retrain_preset(PRESETS[self.data])
        return replace(recipe, seed=seed, epochs=self.candidate_recipe_epochs or recipe.epochs)

    def random_pool(self, seed: int) -> list[Genotype]:
        """Return the random genotypes of a seed, no two isomorphic; they do not depend on the setting."""
        config = self.configuration(SETTINGS[0], seed)
        space = SearchSpace.for_stack(
            config.supernet.num_cells,
            operations=config.supernet.operations,
            num_nodes=config.supernet.num_nodes,
        )
        generator = np.random.default_rng(seed)
        drawn: dict[str, Genotype] = {}
        while len(drawn) < self.num_random:
            genotype = random_genotype(
                generator,
                operations=space.operations,
                num_nodes=space.num_nodes,
                edges_per_node=config.candidates.edges_per_node,
                cell_types=space.cell_types,
            )
            drawn.setdefault(genotype.canonical_hash(), genotype)
        return list(drawn.values())
