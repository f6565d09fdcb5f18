"""The methods a searched ensemble is set beside, a module a family; importing this does not import torch.

Each is a function of a `Comparison` that yields rows: it trains what it needs, or takes what is finished, and predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dnas_ens.config import require

#: Name on the command line, in the order of the table: the module with the function of that name.
METHODS = {
    "ours": "searched",
    "base-cell": "copies",
    "best-cell": "copies",
    "random-cells": "random_cells",
    "best-random-cell": "random_cells",
    "deviations": "random_cells",
    "darts-ens": "searched",
    "nes-re": "random_cells",
    "snapshots": "long_training",
    "averaged-weights": "averaged_weights",
    "evolved-network": "averaged_weights",
    "wider": "copies",
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much the methods may train."""

    epochs_grid: tuple[int, ...] = ()
    """Other epoch counts at which ours, the base cell's deep ensemble and the random cells are trained as well."""
    members_grid: tuple[int, ...] = ()
    """Larger sizes of ours. Members are added in the order of the search's ranking; deep ensembles of the base and of
    the best found cell and random cells grow to the same total cost; all are compared at each of these costs."""
    pool_size: int = 10
    """Networks that NES-RS and NES-RE train and choose M from; with M there is no NES-RS."""
    population: int = 5
    """Networks alive in NES-RE's evolution."""
    parents: int = 2
    """Candidates for the next parent in it."""

    def __post_init__(self) -> None:
        for epochs in self.epochs_grid:
            require(epochs > 0, f"--epochs-grid holds {epochs}.", "Give epoch counts of 1 or more.")
        require(
            list(self.members_grid) == sorted(set(self.members_grid)),
            f"--members-grid {' '.join(map(str, self.members_grid))} does not rise.",
            "Give each size once, the smallest first.",
        )

    def require_room_for(self, num_members: int, methods: Sequence[str] = ()) -> None:
        """Refuse what does not fit an ensemble of so many members, and an evolution that is none."""
        require(
            num_members <= self.pool_size,
            f"A pool of {self.pool_size} is too small for {num_members} members.",
            f"Give --pool-size {num_members} or more.",
        )
        require(
            not self.members_grid or num_members < self.members_grid[0],
            f"--members-grid begins with {min(self.members_grid, default=0)}, but ours has {num_members} members as "
            "it is.",
            "Give larger sizes.",
        )
        require(
            "nes-re" not in methods or 1 <= self.parents <= self.population < self.pool_size,
            f"NES-RE with a population of {self.population}, {self.parents} parents and {self.pool_size} networks in "
            "all would evolve nothing.",
            "Give --parents at most --population, and --pool-size more, or leave nes-re out of --methods.",
        )
