"""Options of the EdgeNES studies, and the configurations that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dnas_ens.config import RetrainConfig, SearchConfig, require
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from studies.options import PRESETS, RESULTS

#: Gives hypernet its base, the first of EdgeNES's two stages; plain DARTS.
BASE_SETTING = "optimal"
#: The two ways of steering, of which everything is measured.
STEERED = ("star", "hypernet")
#: Coefficients and temperature at their last value throughout.
CONSTANT = "constant schedules"
#: The hypernetwork is trained from the first epoch on.
COLD = "no warm-up epochs"
SETTINGS = tuple(name for way in STEERED for name in (way, f"{way}, {CONSTANT}", f"{way}, {COLD}"))
#: What is compared in ensembles and in search curves.
PAIRS = (
    *((way, f"{way}, {change}") for way in STEERED for change in (CONSTANT, COLD)),
    STEERED,
)
SCHEDULES = ("penalty_weight", "commitment", "temperature")
#: Limits as shares of the largest lambda; of the last ones ensembles are retrained.
LIMITS = (0.25, 0.5, 0.75, 1.0)
RETRAINED_LIMITS = (0.5, 1.0)
#: Points of the path of direction 0 that are retrained, as shares of the largest lambda.
RETRAINED_POINTS = (0.0, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    data: Literal["digits", "fashion-mnist"] = "digits"
    """digits with preset smoke, or fashion-mnist with preset micro."""
    seeds: int = 5
    """Seeds, each with seven searches."""
    cells: int = 1
    """Cells of searches and trainings; EdgeNES's Fashion-MNIST figures are of one."""
    edges_per_node: int = 1
    """Edges a node keeps; 1 as in EdgeNES, so that its lambda of 0 to 4 counts all edges of one cell."""
    members: int = 3
    """M, members of an ensemble."""
    lambdas: int = 21
    """L, values of lambda on each direction; 4 must divide L - 1."""
    evaluations: int = 5
    """At how many epochs of a search its ensemble is measured."""
    samples: int = 2
    """Samples of a search, and random deviations, for each number of edges shared with the base."""
    epochs: int | None = None
    """Epochs a search; default: the preset's."""
    limit_train: int | None = None
    """Training images of searches and trainings; default: the preset's."""
    candidate_recipe_epochs: int | None = None
    """Epochs of every training from scratch; default: the preset's."""
    workers: int = 1
    """Searches and trainings side by side, each on one CPU core."""
    run_dir: Path | None = None
    """Where predictions are kept; default: runs/diversity-sweep-DATA."""
    output: Path | None = None
    """Where results go: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl; default: runs/results/diversity-sweep-DATA."""

    def __post_init__(self) -> None:
        for name in ("seeds", "workers", "members", "samples", "evaluations"):
            require(
                getattr(self, name) > 0, f"--{name} is {getattr(self, name)}.", f"Give --{name} 1 or more."
            )
        require(
            self.lambdas > 1 and (self.lambdas - 1) % 4 == 0,
            f"--lambdas is {self.lambdas}, which leaves out quarters of the range.",
            "Give --lambdas 5, 9, 13, 17, 21 or another multiple of 4 plus 1.",
        )

    @property
    def path(self) -> Path:
        """Output without suffix."""
        return RESULTS / f"diversity-sweep-{self.data}" if self.output is None else self.output

    @property
    def predictions(self) -> Path:
        """Folder of the predictions."""
        return self.run_dir or Path("runs") / f"diversity-sweep-{self.data}"

    @property
    def measured(self) -> dict[str, int]:
        """What decides the figures of a search beside its configuration."""
        return {name: getattr(self, name) for name in ("members", "lambdas", "evaluations", "samples")}

    def configuration(self, setting: str, seed: int) -> SearchConfig:
        """Return the search of a setting and a seed."""
        regime, _, change = setting.partition(", ")
        # The base comes from memory; its name says where it is from.
        base = Path(f"{BASE_SETTING}-{seed}") if regime == "hypernet" else None
        given = {"epochs": self.epochs, "limit_train": self.limit_train}
        config = with_fields(
            search_preset(PRESETS[self.data], regime, base=base),
            seed=seed,
            num_cells=self.cells,
            edges_per_node=self.edges_per_node,
            **{name: value for name, value in given.items() if value is not None},
        )
        if change == CONSTANT:
            ends = {name: getattr(config.objective, name)[1] for name in SCHEDULES}
            return with_fields(config, **{name: (end, end) for name, end in ends.items()})
        return with_fields(config, warmup_epochs=0) if change == COLD else config

    def evaluated_epochs(self, config: SearchConfig) -> list[int]:
        """Return the epochs after which the ensemble of a search is measured, the last one included."""
        epochs = config.bilevel.epochs
        return sorted({max(1, round(epochs * (i + 1) / self.evaluations)) for i in range(self.evaluations)})

    def recipe(self, seed: int) -> RetrainConfig:
        """Return the recipe of a seed's trainings from scratch."""
        recipe = retrain_preset(PRESETS[self.data])
        return replace(
            recipe,
            seed=seed,
            num_cells=self.cells,
            epochs=self.candidate_recipe_epochs or recipe.epochs,
        )
