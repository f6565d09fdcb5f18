"""Accuracy and calibration under shift, and telling foreign images apart, from members' probabilities alone.

Weights, temperatures and the best single member are decided on clean validation images, once; no corrupted or
foreign image takes part. Legend: M members, N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from dnas_ens.metrics.calibration import calibrated_nll, fit_temperature
from dnas_ens.metrics.diversity import entropy, mutual_information, normalise_weights
from dnas_ens.metrics.scores import check_probs, evaluate_probs
from dnas_ens.types import FloatArray

ENSEMBLE, AVERAGE_MEMBER, BEST_SINGLE = "ensemble", "average member", "best single"
#: What a row of a corruption holds.
METRICS = ("accuracy", "nll", "calibrated_nll", "ece15")


@dataclass(frozen=True, kw_only=True)
class CleanFit:
    """What clean validation images decide.

    Args:
        weights: M combining weights, summing to 1.
        best: Index of the best single member.
        temperature: T of the weighted average, above 0.
        member_temperatures: M temperatures, one for each member alone.
    """

    weights: FloatArray
    best: int
    temperature: float
    member_temperatures: Sequence[float]

    @classmethod
    def on(
        cls, val_probs: npt.ArrayLike, val_labels: npt.ArrayLike, *, weights: npt.ArrayLike | None, best: int
    ) -> CleanFit:
        """Fit the temperatures.

        Args:
            val_probs: Members' class probabilities on clean val, shape (M, N, K), range [0, 1].
            val_labels: Class indices, shape (N,).
            weights: Combining weights, shape (M,); None for equal ones.
            best: Index of the member that was best on val.

        Raises:
            ValueError: See `dnas_ens.metrics.scores.check_probs` and `normalise_weights`.
        """
        members = check_probs(val_probs, num_dims=3)
        shares = normalise_weights(weights, len(members))
        return cls(
            weights=shares,
            best=best,
            temperature=fit_temperature(np.tensordot(shares, members, axes=1), val_labels),
            member_temperatures=[fit_temperature(probs, val_labels) for probs in members],
        )


def corruption_rows(
    member_probs: npt.ArrayLike, labels: npt.ArrayLike, fit: CleanFit, *, corruption: str, severity: int
) -> list[dict[str, Any]]:
    """Measure ensemble, average member and best single member under one corruption.

    Args:
        member_probs: Members' class probabilities on the corrupted images, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,).
        fit: What clean validation images decided.
        corruption: Name of the corruption.
        severity: 1 to 5.

    Returns:
        Three dictionaries: ``corruption``, ``severity``, ``row`` ("ensemble", "average member", "best single"),
        ``accuracy`` and ``ece15`` in [0, 1], ``nll`` and ``calibrated_nll`` in nats. Those of the average member
        are the means of the members' own.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `check_labels`.
    """
    members = check_probs(member_probs, num_dims=3)
    single = [
        _metrics(probs, labels, temperature)
        for probs, temperature in zip(members, fit.member_temperatures, strict=True)
    ]
    averaged = np.tensordot(fit.weights, members, axes=1)
    measured = {
        ENSEMBLE: _metrics(averaged, labels, fit.temperature),
        AVERAGE_MEMBER: {key: float(np.mean([row[key] for row in single])) for key in METRICS},
        BEST_SINGLE: single[fit.best],
    }
    return [
        {"corruption": corruption, "severity": severity, "row": row, **values}
        for row, values in measured.items()
    ]


def _metrics(probs: FloatArray, labels: npt.ArrayLike, temperature: float) -> dict[str, float]:
    measured = evaluate_probs(probs, labels)
    measured["calibrated_nll"] = calibrated_nll(probs, labels, temperature)
    return {key: measured[key] for key in METRICS}


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average rows of `corruption_rows` over corruptions.

    The mean corruption error is 1/(C S) sum_c sum_s E_cs with E = 1 - accuracy, over all corruptions c and
    severities s. Unlike the mCE of arXiv 1903.12261 for ImageNet it is not divided by the error of AlexNet, as is
    usual for CIFAR-10-C.

    Args:
        rows: Every corruption at the same severities.

    Returns:
        A dictionary for each kind of row, in the order met: ``row``; ``severities``, which maps each severity to
        the means of accuracy, nll, calibrated_nll and ece15 over corruptions; the means of these over
        severities as well; and ``mean_corruption_error`` in [0, 1].
    """
    summary = []
    for kind in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == kind]
        severities = sorted({row["severity"] for row in own})
        means = {
            severity: {
                key: float(np.mean([row[key] for row in own if row["severity"] == severity]))
                for key in METRICS
            }
            for severity in severities
        }
        overall = {key: float(np.mean([means[severity][key] for severity in severities])) for key in METRICS}
        summary.append(
            {
                "row": kind,
                "severities": means,
                **overall,
                "mean_corruption_error": 1.0 - overall["accuracy"],
            }
        )
    return summary


def detection_auroc(own_scores: npt.ArrayLike, foreign_scores: npt.ArrayLike) -> float:
    """Area under the ROC curve of telling foreign images from own ones by a score.

    The probability that a foreign image scores higher than an own one, ties counted half (Hanley and McNeil,
    Radiology 143, 1982); it does not depend on how many there are of each.

    Args:
        own_scores: Scores of in-distribution images, shape (N_own,).
        foreign_scores: Scores of out-of-distribution images, shape (N_foreign,).

    Returns:
        In [0, 1]; 0.5 for a score that says nothing.
    """
    own, foreign = np.asarray(own_scores), np.asarray(foreign_scores)
    is_foreign = np.repeat([0, 1], [len(own), len(foreign)])
    return float(roc_auc_score(is_foreign, np.concatenate([own, foreign])))


def detection_rows(
    own_probs: npt.ArrayLike, foreign_probs: npt.ArrayLike, weights: npt.ArrayLike | None, *, name: str
) -> list[dict[str, Any]]:
    """Measure how well uncertainty tells foreign images from the test images they are mixed with.

    By the entropy of the weighted average of the probabilities, before any temperature, and by the mutual
    information between prediction and member. The average member is the mean of the members' own AUROC by their
    entropy; one member alone has no mutual information.

    Args:
        own_probs: Members' class probabilities on the test images, shape (M, N_own, K), range [0, 1].
        foreign_probs: The same on images of other classes, shape (M, N_foreign, K).
        weights: Combining weights, shape (M,); None for equal ones.
        name: Name of the foreign images.

    Returns:
        Two dictionaries: ``name``, ``row`` ("ensemble", "average member"), ``num_images`` (the foreign ones),
        ``auroc_entropy`` and ``auroc_mutual_information`` in [0, 1], the latter None for the average member
        and for an ensemble of one.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_probs` and `normalise_weights`.
    """
    own, foreign = (check_probs(probs, num_dims=3) for probs in (own_probs, foreign_probs))
    shares = normalise_weights(weights, len(own))
    of_average = [entropy(np.tensordot(shares, probs, axes=1)) for probs in (own, foreign)]
    of_members = [detection_auroc(*pair) for pair in zip(entropy(own), entropy(foreign), strict=True)]
    informative = len(own) > 1
    return [
        {
            "name": name,
            "row": ENSEMBLE,
            "num_images": foreign.shape[1],
            "auroc_entropy": detection_auroc(*of_average),
            "auroc_mutual_information": detection_auroc(
                mutual_information(own, shares), mutual_information(foreign, shares)
            )
            if informative
            else None,
        },
        {
            "name": name,
            "row": AVERAGE_MEMBER,
            "num_images": foreign.shape[1],
            "auroc_entropy": float(np.mean(of_members)),
            "auroc_mutual_information": None,
        },
    ]
