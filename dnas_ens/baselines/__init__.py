"""Ensembles a searched one is compared with: random search and regularised evolution in the same space.

Names are imported on first use, so that importing this package alone does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnas_ens.lazy import lazy_names

if TYPE_CHECKING:
    from dnas_ens.baselines.evaluations import Evaluations, FoundEnsemble, TrainFunction
    from dnas_ens.baselines.random_search import deviations_sharing, nes_random_search, random_pool
    from dnas_ens.baselines.regularised_evolution import (
        EvolutionConfig,
        RegularisedEvolution,
        mutate,
        nes_regularised_evolution,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
