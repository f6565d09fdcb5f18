"""The methods ``compare_ensembles.py`` sets beside a searched ensemble, a module a family.

Each yields rows for a `Comparison`: it trains what it needs, or takes what is finished, and predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from methods.averaged_weights import averaged_weights, evolved_network
from methods.comparison import Comparison
from methods.deep_ensembles import base_cell, best_cell, deep_ensemble_curve, wider
from methods.evolution import nes_re
from methods.further_searches import darts_ens
from methods.random_cells import best_random_cell, deviations, random_cells
from methods.results import Budget, Result
from methods.searched import ours
from methods.snapshots import snapshots

__all__ = ["METHODS", "Budget", "Comparison", "Method", "Result", "deep_ensemble_curve"]

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
