"""The methods a searched ensemble is set beside, a module a family.

Each yields rows for a `Comparison`: it trains what it needs, or takes what is finished, and predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dnas_ens.compare.methods.averaged_weights import averaged_weights, evolved_network
from dnas_ens.compare.methods.comparison import Budget, Comparison, Result
from dnas_ens.compare.methods.copies import base_cell, best_cell, wider
from dnas_ens.compare.methods.long_training import snapshots
from dnas_ens.compare.methods.random_cells import best_random_cell, deviations, nes_re, random_cells
from dnas_ens.compare.methods.searched import darts_ens, ours

__all__ = ["METHODS", "Budget", "Comparison", "Method", "Result"]

Method = Callable[[Comparison], Iterator[Result]]
#: By the name on the command line, in the order of the table.
METHODS: dict[str, Method] = {
    "ours": ours,
    "base-cell": base_cell,
    "best-cell": best_cell,
    "random-cells": random_cells,
    "best-random-cell": best_random_cell,
    "deviations": deviations,
    "darts-ens": darts_ens,
    "nes-re": nes_re,
    "snapshots": snapshots,
    "averaged-weights": averaged_weights,
    "evolved-network": evolved_network,
    "wider": wider,
}
