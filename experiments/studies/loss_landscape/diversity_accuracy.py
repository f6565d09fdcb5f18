"""The diversity-accuracy plane of Fort, Hu and Lakshminarayanan (arXiv 1912.02757), and what limits it.

Diversity is the disagreement with a base solution over 1 - accuracy. The curves are derived here: the paper's figure
has a lower one, of predictions perturbed at random, and an upper one, of independent errors; the bounds that no
classifier can leave lie outside of both. Legend: M solutions, N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dnas_ens.metrics.scores import check_labels, check_probs
from dnas_ens.types import FloatArray


@dataclass(frozen=True, kw_only=True)
class DiversityAccuracy:
    """Solutions in the diversity-accuracy plane, beside a base.

    Args:
        accuracy: Of every solution, shape (M,), range [0, 1].
        diversity: Disagreement with the base over 1 - accuracy of the solution, shape (M,), 0 or more; NaN for a
            solution without errors.
        base_accuracy: Of the base, range [0, 1].
    """

    accuracy: FloatArray
    diversity: FloatArray
    base_accuracy: float


def diversity_accuracy_plane(
    base_probs: npt.ArrayLike, member_probs: npt.ArrayLike, labels: npt.ArrayLike
) -> DiversityAccuracy:
    """Place solutions in the plane of accuracy and normalised disagreement with a base solution.

    Args:
        base_probs: The base's class probabilities, shape (N, K), range [0, 1].
        member_probs: Class probabilities, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,), integers in 0..K-1.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    members = check_probs(member_probs, num_dims=3)
    base = check_probs(base_probs)
    disagreement = (members.argmax(axis=2) != base.argmax(axis=1)).mean(axis=1)
    accuracies = accuracies_of(members, labels)
    return DiversityAccuracy(
        accuracy=accuracies,
        diversity=_over_error(disagreement, accuracies),
        base_accuracy=float(accuracies_of(base[None], labels)[0]),
    )


def independent_disagreement(
    accuracy: npt.ArrayLike, base_accuracy: npt.ArrayLike, num_classes: int
) -> FloatArray:
    """Disagreement of two classifiers whose errors are independent, the upper curve of the plane.

    Given the label, each is right with its own probability and otherwise gives one of the K - 1 wrong classes at
    random, so they agree with probability a a' + (1 - a) (1 - a') / (K - 1).

    Args:
        accuracy: a' of the solution, range [0, 1], any shape.
        base_accuracy: a of the base, range [0, 1], a shape that fits.
        num_classes: K, 2 or more.

    Returns:
        Disagreement in [0, 1], not normalised.
    """
    ours, base = np.asarray(accuracy, dtype=np.float64), np.asarray(base_accuracy, dtype=np.float64)
    disagreement: FloatArray = 1.0 - (ours * base + (1.0 - ours) * (1.0 - base) / (num_classes - 1))
    return np.clip(disagreement, 0.0, 1.0)


def perturbed_disagreement(accuracy: npt.ArrayLike, base_accuracy: float, num_classes: int) -> FloatArray:
    """Disagreement of a base with itself after random changes of its predictions, the lower curve of the plane.

    A share p of predictions is replaced by another class at random. Accuracy falls from a to
    a' = a - p (a K - 1) / (K - 1) while the disagreement is p, so p = (a - a') (K - 1) / (a K - 1). A solution on
    this curve differs from the base by noise and adds nothing to it.

    Args:
        accuracy: a' of the solution, any shape.
        base_accuracy: a of the base, above 1 / K.
        num_classes: K, 2 or more.

    Returns:
        Disagreement in [0, 1], not normalised; NaN where no p gives that accuracy.

    Raises:
        ValueError: The base is no better than chance.
    """
    if base_accuracy * num_classes <= 1.0:
        raise ValueError(f"a base of accuracy {base_accuracy:g} is no better than chance")
    ours = np.asarray(accuracy, dtype=np.float64)
    share = (base_accuracy - ours) * (num_classes - 1) / (base_accuracy * num_classes - 1.0)
    return np.where((share >= 0.0) & (share <= 1.0), share, np.nan)


def disagreement_bounds(
    accuracy: npt.ArrayLike, base_accuracy: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Least and largest disagreement that two accuracies allow, of more than two classes.

    The best case changes wrong answers only: |a - a'|. At most 2 - a - a', where no image is wrong for both (or
    every one where that exceeds 1).

    Args:
        accuracy: a' of the solution, range [0, 1], any shape.
        base_accuracy: a of the base, range [0, 1], a shape that fits.

    Returns:
        Both bounds in [0, 1], not normalised.
    """
    ours, base = np.asarray(accuracy, dtype=np.float64), np.asarray(base_accuracy, dtype=np.float64)
    return np.abs(ours - base), np.minimum(1.0, 2.0 - ours - base)


def accuracies_of(members: FloatArray, labels: npt.ArrayLike) -> FloatArray:
    """Share of images on which each solution's most probable class is the label.

    Args:
        members: Checked class probabilities, shape (M, N, K).
        labels: Class indices, shape (N,), integers in 0..K-1.

    Returns:
        Shape (M,), range [0, 1].

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_labels`.
    """
    classes = check_labels(labels, num_images=members.shape[1], num_classes=members.shape[2])
    accuracies: FloatArray = (members.argmax(axis=2) == classes).mean(axis=1)
    return accuracies


def _over_error(disagreement: FloatArray, accuracies: FloatArray) -> FloatArray:
    errors = 1.0 - accuracies
    return np.divide(disagreement, errors, out=np.full_like(disagreement, np.nan), where=errors > 0.0)
