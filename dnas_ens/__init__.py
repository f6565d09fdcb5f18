"""dnas_ens: ensembles of neural networks, found by differentiable architecture search.

    import dnas_ens as de

    data = de.load_data("digits")
    found = de.search(data, members=5)
    ensemble = de.retrain(found, data)
    print(ensemble.evaluate(data.test))

Importing the package does not import torch; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# Bound before any submodule of the same name is looked up, so that de.search is the function.
from dnas_ens.budget import spend
from dnas_ens.evaluate import evaluate
from dnas_ens.lazy import lazy_names
from dnas_ens.retrain import retrain
from dnas_ens.search import search

if TYPE_CHECKING:
    from dnas_ens.data import ImageData, Split, load_data
    from dnas_ens.ensembles import Ensemble, load
    from dnas_ens.errors import UserError
    from dnas_ens.estimator import EnsembleSearchClassifier
    from dnas_ens.space.genotype import Genotype

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_names(__name__, "evaluate", "retrain", "search", "spend")
