"""Ensembles a searched one is compared with: random search and regularised evolution in the same space.

Names are imported on first use, so that importing this package alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dnas_ens.baselines.evaluations import Evaluations, FoundEnsemble, TrainFunction
    from dnas_ens.baselines.evolution_state import EvolutionConfig
    from dnas_ens.baselines.mutation import mutate
    from dnas_ens.baselines.random_search import (
        deviations_at_distance,
        deviations_sharing,
        discrete_distance,
        nes_random_search,
        random_pool,
    )
    from dnas_ens.baselines.regularised_evolution import (
        RegularisedEvolution,
        nes_regularised_evolution,
    )

__all__ = [
    "Evaluations",
    "EvolutionConfig",
    "FoundEnsemble",
    "RegularisedEvolution",
    "TrainFunction",
    "deviations_at_distance",
    "deviations_sharing",
    "discrete_distance",
    "mutate",
    "nes_random_search",
    "nes_regularised_evolution",
    "random_pool",
]

_HOME = {
    "Evaluations": "evaluations",
    "EvolutionConfig": "evolution_state",
    "FoundEnsemble": "evaluations",
    "RegularisedEvolution": "regularised_evolution",
    "TrainFunction": "evaluations",
    "deviations_at_distance": "random_search",
    "deviations_sharing": "random_search",
    "discrete_distance": "random_search",
    "mutate": "mutation",
    "nes_random_search": "random_search",
    "nes_regularised_evolution": "regularised_evolution",
    "random_pool": "random_search",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
