"""Ensembles of members: averaged predictions and weights, snapshots, and choosing and weighing who belongs to one.

Names are imported on first use, so that importing this package alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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
    from dnas_ens.ensembles.preprocessing import Preprocessing
    from dnas_ens.ensembles.selection import exhaustive_selection, greedy_selection
    from dnas_ens.ensembles.snapshot import CosineCycles, SnapshotRecorder, TriangularCycles
    from dnas_ens.ensembles.soups import averaging_curve, greedy_soup, uniform_soup
    from dnas_ens.ensembles.weighting import caruana_weights, evolve_weights, fit_weights

__all__ = [
    "CosineCycles",
    "Ensemble",
    "ExponentialMovingAverage",
    "PolyakAverage",
    "Preprocessing",
    "SnapshotRecorder",
    "StochasticWeightAverage",
    "TriangularCycles",
    "average_states",
    "averaged_model",
    "averaging_curve",
    "caruana_weights",
    "coefficients",
    "evolve_interpolation",
    "evolve_simplex",
    "evolve_weights",
    "exhaustive_selection",
    "fit_weights",
    "greedy_selection",
    "greedy_soup",
    "load",
    "recompute_batch_norm",
    "uniform_soup",
]

_HOME = {
    "CosineCycles": "snapshot",
    "Ensemble": "ensemble",
    "ExponentialMovingAverage": "averaging",
    "PolyakAverage": "averaging",
    "Preprocessing": "preprocessing",
    "SnapshotRecorder": "snapshot",
    "StochasticWeightAverage": "averaging",
    "TriangularCycles": "snapshot",
    "average_states": "averaging",
    "averaged_model": "averaging",
    "averaging_curve": "soups",
    "caruana_weights": "weighting",
    "coefficients": "averaging",
    "evolve_interpolation": "evolution",
    "evolve_simplex": "evolution",
    "evolve_weights": "weighting",
    "exhaustive_selection": "selection",
    "fit_weights": "weighting",
    "greedy_selection": "selection",
    "greedy_soup": "soups",
    "load": "ensemble",
    "recompute_batch_norm": "averaging",
    "uniform_soup": "soups",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
