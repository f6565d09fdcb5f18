"""dnas_ens: ensembles of neural networks, found by differentiable architecture search.

    import dnas_ens as de

    data = de.load_data("digits")
    found = de.search(data, members=5)
    ensemble = de.retrain(found, data)
    print(ensemble.evaluate(data.test))

Importing the package does not import torch; the first use of a name does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# Bound before any submodule of the same name is looked up, so that de.search is the function.
from dnas_ens.evaluate import evaluate
from dnas_ens.lazy import lazy_names
from dnas_ens.retrain import retrain
from dnas_ens.search import search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from dnas_ens.data import ImageData, Split, load_data
    from dnas_ens.ensembles import Ensemble
    from dnas_ens.errors import UserError
    from dnas_ens.space.genotype import Genotype

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_names(__name__, "evaluate", "load", "retrain", "search")


def load(folder: str | Path, *, members: Sequence[nn.Module] | None = None) -> Ensemble:
    """Load the ensemble of a run folder, or one that ``Ensemble.save`` wrote.

    Args:
        folder: The folder.
        members: Fresh modules to fill, where members are of architectures of your own.

    Raises:
        UserError: If the folder holds no finished ensemble.
    """
    from dnas_ens.ensembles import Ensemble

    return Ensemble.load(folder, members=members)
