"""Ensembles of members: averaging, saving, loading, and choosing who belongs to one.

Names are imported on first use, so that importing this package alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dnas_ens.ensembles.ensemble import Ensemble, load
    from dnas_ens.ensembles.preprocessing import Preprocessing
    from dnas_ens.ensembles.selection import exhaustive_selection, greedy_selection

__all__ = ["Ensemble", "Preprocessing", "exhaustive_selection", "greedy_selection", "load"]

_HOME = {
    "Ensemble": "ensemble",
    "Preprocessing": "preprocessing",
    "exhaustive_selection": "selection",
    "greedy_selection": "selection",
    "load": "ensemble",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
