"""Ensembles a searched one is compared with: random search and regularised evolution in the same space."""

from dnas_ens.baselines.evaluations import Evaluations, FoundEnsemble, TrainFunction
from dnas_ens.baselines.random_search import deviations_sharing, nes_random_search, random_pool
from dnas_ens.baselines.regularised_evolution import (
    EvolutionConfig,
    RegularisedEvolution,
    mutate,
    nes_regularised_evolution,
)

__all__ = [
    "Evaluations",
    "EvolutionConfig",
    "FoundEnsemble",
    "RegularisedEvolution",
    "TrainFunction",
    "deviations_sharing",
    "mutate",
    "nes_random_search",
    "nes_regularised_evolution",
    "random_pool",
]
