"""Sets of classes that hold the right one with a stated probability: split conformal prediction."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import check_predictions, check_probs


def conformal_threshold(val_probs: npt.ArrayLike, val_labels: npt.ArrayLike, coverage: float) -> float:
    """Return the probability from which on a class belongs to the set (LAC; Sadinle et al., arXiv 1609.00451).

    With n images that no member was trained on, it is the ceil((n + 1) coverage)-th largest probability of a right
    class there. If new images are exchangeable with them, sets hold the right class with a probability of at least
    ``coverage``, on average over images; for single classes it may be less.

    Args:
        val_probs: Class probabilities (n, K), in [0, 1].
        val_labels: Class indices (n,).
        coverage: In (0, 1).

    Returns:
        In [0, 1]; 0 where n is too small for the coverage, so that sets hold all classes.

    Raises:
        UserError: A coverage that is not between 0 and 1.
        ValueError: See `dnas_ens.metrics.scores.check_predictions`.
    """
    if not 0.0 < coverage < 1.0:
        raise UserError(f"The coverage is {coverage}.", "Give a share between 0 and 1, such as 0.9.")
    probs, labels = check_predictions(val_probs, val_labels)
    of_right = np.sort(probs[np.arange(len(labels)), labels])[::-1]
    # Without the rounding of a product such as 0.9 * 10, which is a little more than 9.
    rank = math.ceil(round((len(labels) + 1) * coverage, 9))
    return float(of_right[rank - 1]) if rank <= len(labels) else 0.0


def prediction_sets(probs: npt.ArrayLike, threshold: float) -> npt.NDArray[np.bool_]:
    """Return which classes of probabilities (N, K) are in the set of each image, (N, K), by a `conformal_threshold`.

    The most probable one always is.
    """
    checked = check_probs(probs)
    sets: npt.NDArray[np.bool_] = checked >= threshold
    sets[np.arange(len(checked)), checked.argmax(axis=1)] = True
    return sets
