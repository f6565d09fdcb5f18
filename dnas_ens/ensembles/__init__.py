"""Ensembles of members: averaged predictions and weights, snapshots, and choosing and weighing who belongs to one.

Names are imported on first use, so that importing this package alone does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnas_ens.lazy import lazy_names

if TYPE_CHECKING:
    from dnas_ens.ensembles.averaging import (
        ExponentialMovingAverage,
        PolyakAverage,
        StochasticWeightAverage,
        average_states,
        averaged_model,
        coefficients,
        recompute_batch_norm,
    )
    from dnas_ens.ensembles.ensemble import Ensemble, load
    from dnas_ens.ensembles.evolution import evolve_interpolation, evolve_simplex
    from dnas_ens.ensembles.exporting import export
    from dnas_ens.ensembles.preprocessing import Preprocessing
    from dnas_ens.ensembles.selection import exhaustive_selection, greedy_selection
    from dnas_ens.ensembles.snapshot import BaseThenCycles, CosineCycles, SnapshotRecorder, TriangularCycles
    from dnas_ens.ensembles.soups import averaging_curve, greedy_soup, uniform_soup
    from dnas_ens.ensembles.weighting import caruana_weights, evolve_weights, fit_weights

__getattr__, __dir__, __all__ = lazy_names(__name__)
