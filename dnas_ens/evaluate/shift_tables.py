"""Tables of an evaluation under shift: accuracy and calibration on corrupted images, and telling foreign images apart.

From members' probabilities alone. Weights, temperatures and the best single member are decided on clean validation
images, once; no corrupted or foreign image takes part. Legend: M members, N images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.shift import CIFAR10_C, ShiftPredictions
from dnas_ens.evaluate.tables import best_single, to_markdown
from dnas_ens.metrics.calibration import fit_temperature, tempered
from dnas_ens.metrics.diversity import entropy, mutual_information, normalise_weights
from dnas_ens.metrics.scores import check_predictions, check_probs, evaluate_probs, nll
from dnas_ens.run.files import write_atomic, write_json
from dnas_ens.types import FloatArray, IntArray

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


def fit_on_clean(predictions: Predictions) -> CleanFit:
    """Fit temperatures and choose weights and the best single member on clean val."""
    members, labels = predictions.val_probs.astype(np.float64), predictions.val_labels
    shares = normalise_weights(predictions.weights, len(members))
    return CleanFit(
        weights=shares,
        best=best_single(predictions),
        temperature=fit_temperature.of(np.tensordot(shares, members, axes=1), labels),
        member_temperatures=[fit_temperature.of(probs, labels) for probs in members],
    )


def corruption_rows(
    member_probs: npt.ArrayLike, labels: npt.ArrayLike, fit: CleanFit, *, corruption: str, severity: int
) -> list[dict[str, Any]]:
    """Measure ensemble, average member and best single member under one corruption.

    Args:
        member_probs: Members' class probabilities on the corrupted images, shape (M, N, K), range [0, 1].
        labels: Class indices, shape (N,).
        severity: 1 to 5.

    Returns:
        Three dictionaries: ``corruption``, ``severity``, ``row`` ("ensemble", "average member", "best single"),
        ``accuracy`` and ``ece15`` in [0, 1], ``nll`` and ``calibrated_nll`` in nats. Those of the average member
        are the means of the members' own.

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_predictions`.
    """
    members, classes = check_predictions(member_probs, labels, num_dims=3)
    single = [
        _metrics(probs, classes, temperature)
        for probs, temperature in zip(members, fit.member_temperatures, strict=True)
    ]
    averaged = np.tensordot(fit.weights, members, axes=1)
    measured = {
        ENSEMBLE: _metrics(averaged, classes, fit.temperature),
        AVERAGE_MEMBER: {key: float(np.mean([row[key] for row in single])) for key in METRICS},
        BEST_SINGLE: single[fit.best],
    }
    return [{"corruption": corruption, "severity": severity, "row": row, **values} for row, values in measured.items()]


def _metrics(probs: FloatArray, labels: IntArray, temperature: float) -> dict[str, float]:
    measured = evaluate_probs.of(probs, labels)
    measured["calibrated_nll"] = nll.of(tempered(probs, temperature), labels)
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
            severity: {key: float(np.mean([row[key] for row in own if row["severity"] == severity])) for key in METRICS}
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
    """Area under the ROC curve of telling foreign images from own ones by scores (N_own,) and (N_foreign,).

    The probability that a foreign image scores higher than an own one, ties counted half (Hanley and McNeil,
    Radiology 143, 1982), in [0, 1]; it does not depend on how many there are of each.
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
    information = None
    if len(own) > 1:
        information = detection_auroc(*(mutual_information(probs, shares) for probs in (own, foreign)))
    return [
        {
            "name": name,
            "row": row,
            "num_images": foreign.shape[1],
            "auroc_entropy": by_entropy,
            "auroc_mutual_information": by_information,
        }
        for row, by_entropy, by_information in (
            (ENSEMBLE, detection_auroc(*of_average), information),
            (AVERAGE_MEMBER, float(np.mean(of_members)), None),
        )
    ]


def write_shift(folder: Path, shift: ShiftPredictions) -> str:
    """Write shift.json and shift.md from predictions alone; return what shift.md holds.

    Raises:
        UserError: The folder has no predictions.npz.
    """
    predictions = Predictions.load(folder / "predictions.npz")
    tables = shift_tables(predictions, shift)
    write_json(folder / "shift.json", {**tables, "source": shift.source})
    text = shift_markdown(predictions, shift, tables)
    write_atomic(folder / "shift.md", text.encode())
    return text


def shift_tables(predictions: Predictions, shift: ShiftPredictions) -> dict[str, list[dict[str, Any]]]:
    """Compute what shift.json holds, from the two files of predictions alone.

    ``corruptions`` are the rows of `corruption_rows`, and ``out_of_distribution`` those of `detection_rows`, whose own
    images are the whole clean test split.
    """
    fit = fit_on_clean(predictions)
    return {
        "corruptions": [
            row
            for name, severity, probs in zip(shift.corruptions, shift.severities, shift.probs, strict=True)
            for row in corruption_rows(probs, shift.labels, fit, corruption=name, severity=severity)
        ],
        "out_of_distribution": [
            row
            for name, probs in shift.foreign.items()
            for row in detection_rows(predictions.test_probs, probs, fit.weights, name=name)
        ],
    }


def shift_markdown(
    predictions: Predictions, shift: ShiftPredictions, tables: Mapping[str, list[dict[str, Any]]]
) -> str:
    """Return `shift_tables` as a person reads them: means over corruptions, every corruption, foreign images."""
    clean = corruption_rows(
        predictions.test_probs, predictions.test_labels, fit_on_clean(predictions), corruption="", severity=0
    )
    own = [row for row in tables["corruptions"] if not row["corruption"].startswith(CIFAR10_C)]
    public = [row for row in tables["corruptions"] if row["corruption"].startswith(CIFAR10_C)]
    parts = [
        "# Under shift\n",
        f"{len(shift.labels):,} test images. Weights, temperatures and the best single member are those of clean "
        "val; nothing is fitted to shifted images.\n",
    ]
    if own:
        parts.append(f"## Corruptions, CIFAR-10-C-style (made here, seed {shift.seed})\n")
        parts += _corruption_parts(clean, own)
    if public:
        parts.append("## CIFAR-10-C, the public files\n")
        parts += _corruption_parts(clean, public)
    if tables["out_of_distribution"]:
        parts.append("## Telling foreign images from the test images\n")
        parts.append(_detection_part(tables["out_of_distribution"]))
    return "\n".join(parts)


def _corruption_parts(clean: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[str]:
    num_corruptions = len({row["corruption"] for row in rows})
    means = []
    for unshifted, mean in zip(clean, summarise(rows), strict=True):
        accuracies = {severity: of["accuracy"] for severity, of in mean["severities"].items()}
        means.append(
            {
                "accuracy % of": mean["row"],
                "clean": _percent(unshifted["accuracy"]),
                **_by_severity(accuracies),
                "mean corruption error %": _percent(mean["mean_corruption_error"]),
                "NLL": mean["nll"],
                "calibrated NLL": mean["calibrated_nll"],
                "ece15": mean["ece15"],
            }
        )
    each = []
    for name in dict.fromkeys(row["corruption"] for row in rows):
        of_name = [row for row in rows if row["corruption"] == name]
        accuracies = {row["severity"]: row["accuracy"] for row in of_name if row["row"] == ENSEMBLE}
        each.append(
            {
                "accuracy % of the ensemble": name,
                **_by_severity(accuracies),
                **{f"calibrated NLL, {mean['row']}": mean["calibrated_nll"] for mean in summarise(of_name)},
            }
        )
    return [
        f"Means over {num_corruptions} corruption{'s' if num_corruptions > 1 else ''}; the last four columns are "
        "means over severities as well.\n",
        to_markdown(means, tuple(means[0])),
        to_markdown(each, tuple(each[0])),
    ]


def _by_severity(accuracies: Mapping[int, float]) -> dict[str, str]:
    return {f"severity {severity}": _percent(accuracy) for severity, accuracy in accuracies.items()}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _detection_part(rows: Sequence[dict[str, Any]]) -> str:
    shown = [
        {
            "images of": f"{row['name']}, {row['row']}",
            "foreign images": row["num_images"],
            "AUROC by entropy": row["auroc_entropy"],
            "AUROC by mutual information": row["auroc_mutual_information"],
        }
        for row in rows
    ]
    return to_markdown(shown, tuple(shown[0]))
