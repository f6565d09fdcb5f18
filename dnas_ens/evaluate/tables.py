"""Tables of results, from predictions alone."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.metrics.calibration import fit_temperature, tempered
from dnas_ens.metrics.diversity import evaluate_members
from dnas_ens.metrics.scores import balanced_accuracy, check_predictions, evaluate_probs, nll
from dnas_ens.metrics.selective import RiskCoverage
from dnas_ens.types import FloatArray, IntArray

#: Columns of every row; diversity concerns rows of several members.
METRICS = (
    *(
        "accuracy",
        "balanced_accuracy",
        "majority_accuracy",
        "nll",
        "calibrated_nll",
        "brier",
        "ece15",
        "aurc",
    ),
    "selective_accuracy_90",
)
DIVERSITY = ("disagreement", "predictive_js", "shared_error_fraction")
COST = ("parameters", "flops", "inference_seconds", "train_seconds")
#: In the files, but not in the table for a reader.
DETAILS = ("mutual_information", "average_member_nll", "oracle_nll")
#: Few enough for a terminal; the files hold all columns.
SHOWN = (
    *("name", "accuracy", "nll", "calibrated_nll", "brier", "ece15", "aurc", "disagreement"),
    *("parameters", "flops", "train_seconds"),
)
COLUMNS = ("name", *METRICS, *DIVERSITY, "temperature", *COST, *DETAILS)
#: Heading, factor and decimals of a column; others keep their name, and fractions have four decimals.
_FORMATS = {
    "name": ("", 1.0, 4),
    "accuracy": ("accuracy %", 100.0, 2),
    "balanced_accuracy": ("balanced accuracy %", 100.0, 2),
    "majority_accuracy": ("majority class %", 100.0, 2),
    "nll": ("NLL", 1.0, 4),
    "calibrated_nll": ("calibrated NLL", 1.0, 4),
    "brier": ("Brier", 1.0, 4),
    "aurc": ("AURC", 1.0, 4),
    "dee": ("DEE", 1.0, 1),
    "selective_accuracy_90": ("accuracy % at 90 % coverage", 100.0, 2),
    "disagreement": ("disagreement %", 100.0, 2),
    "predictive_js": ("predictive JS", 1.0, 4),
    "shared_error_fraction": ("shared errors", 1.0, 4),
    "temperature": ("T", 1.0, 4),
    "flops": ("MFLOPs", 1e-6, 1),
    "inference_seconds": ("ms an image", 1e3, 3),
    "train_seconds": ("train s", 1.0, 0),
}


def single_row(
    name: str,
    *,
    val_probs: np.ndarray,
    val_labels: np.ndarray,
    test_probs: np.ndarray,
    test_labels: np.ndarray,
) -> dict[str, Any]:
    """Return the metrics of one predictor on test, its temperature fitted on val.

    Args:
        val_probs: (N_val, K), in [0, 1].
        val_labels: (N_val,).
        test_probs: (N_test, K), in [0, 1].
        test_labels: (N_test,).

    Raises:
        ValueError: See `dnas_ens.metrics.scores.check_predictions`.
    """
    return _single_row(name, check_predictions(val_probs, val_labels), check_predictions(test_probs, test_labels))


def _single_row(name: str, val: tuple[FloatArray, IntArray], test: tuple[FloatArray, IntArray]) -> dict[str, Any]:
    """Return a row from checked probabilities and labels of both splits."""
    probs, labels = test
    temperature = fit_temperature.of(*val)
    selective = RiskCoverage.of(probs.max(axis=1), probs.argmax(axis=1) != labels)
    return {
        "name": name,
        **evaluate_probs.of(probs, labels),
        "balanced_accuracy": balanced_accuracy.of(probs, labels),
        # What always answering the most frequent class gets: the same in every row, for comparison.
        "majority_accuracy": float(np.bincount(labels).max() / len(labels)),
        "calibrated_nll": nll.of(tempered(probs, temperature), labels),
        "aurc": selective.aurc,
        "selective_accuracy_90": selective.accuracy_at(0.9),
        "temperature": temperature,
    }


def _row(
    name: str,
    predictions: Predictions,
    *,
    search: bool,
    diversity: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return a row of the averaged probabilities with the costs of all members; `train_seconds` says what counts."""
    val_probs, test_probs = predictions.averaged()
    costs = {cost: getattr(predictions, cost) for cost in ("parameters", "flops", "inference_seconds")}
    return {
        **_single_row(name, (val_probs, predictions.val_labels), (test_probs, predictions.test_labels)),
        **diversity,
        **{cost: sum(values) if len(values) else None for cost, values in costs.items()},
        "train_seconds": train_seconds(predictions, search=search),
    }


def ensemble_row(name: str, predictions: Predictions) -> dict[str, Any]:
    """Return metrics, diversity and cost of the averaged probabilities on test.

    ``parameters``, ``flops`` and ``inference_seconds`` are sums over members, as on one device, one after another;
    ``train_seconds`` is that of all members and of the search where its cost is known (see `train_seconds`). What
    is unknown is None.
    """
    members = evaluate_members(predictions.test_probs, predictions.test_labels, predictions.weights)
    diversity = {key: members[key] for key in (*DIVERSITY, *DETAILS)}
    return _row(name, predictions, search=True, diversity=diversity)


def train_seconds(predictions: Predictions, *, search: bool) -> float | None:
    """Return the seconds of all members' training: GPU seconds where a GPU did all of it, CPU seconds where none did.

    Args:
        search: Whether the search that found them counts too, with its discarded candidates.

    Returns:
        Seconds of the device that did the work; None where unknown, or where CPU and GPU seconds would be added up.
    """
    if not len(predictions.train_cpu_seconds):
        return None
    # predictions.npz of another program may hold CPU seconds alone.
    of_gpu = predictions.train_gpu_seconds or [0.0] * len(predictions.train_cpu_seconds)
    parts = list(zip(predictions.train_cpu_seconds, of_gpu, strict=True))
    if search:
        parts.append((predictions.search_cpu_seconds or 0.0, predictions.search_gpu_seconds or 0.0))
    # What took no time, such as the search for random cells, was done by neither.
    worked = [(cpu, gpu) for cpu, gpu in parts if cpu or gpu]
    on_gpu = {gpu > 0.0 for _, gpu in worked}
    if len(on_gpu) > 1:
        return None
    return float(sum(gpu if True in on_gpu else cpu for cpu, gpu in worked))


def result_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """Return a row for every member, the best single one, the average of the members, and the ensemble.

    The best single member is the one with the lowest NLL on val; finding it out takes the training of all members and
    the search, which its ``train_seconds`` hold. A member's own row holds its own training alone.
    """
    rows = [
        _row(f"member {index}", predictions.of_members([index]), search=False)
        for index in range(predictions.num_members)
    ]
    best = best_single(predictions)
    average = {
        "name": "average member",
        **{key: float(np.mean([row[key] for row in rows])) for key in METRICS},
    }
    return [
        *rows,
        {
            **rows[best],
            "name": f"best single (member {best}, by val)",
            "train_seconds": train_seconds(predictions, search=True),
        },
        average,
        ensemble_row("ensemble", predictions),
    ]


def best_single(predictions: Predictions) -> int:
    """Return the member with the lowest NLL on val."""
    scores = [nll.of(probs.astype(np.float64), predictions.val_labels) for probs in predictions.val_probs]
    return int(np.argmin(scores))


def to_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Return the rows as CSV with full precision; what a row lacks is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str] = SHOWN) -> str:
    """Return the rows as a Markdown table whose columns line up; columns no row fills are left out."""
    shown = [column for column in columns if any(row.get(column) is not None for row in rows)]
    padded = []
    for index, column in enumerate(shown):
        heading = _FORMATS.get(column, (column.replace("_", " "),))[0]
        cells = [heading, *(_cell(column, row.get(column)) for row in rows)]
        width = max(map(len, cells))
        aligned = [f" {cell.rjust(width) if index else cell.ljust(width)} " for cell in cells]
        rule = "-" * (width + 1)
        padded.append([aligned[0], f"{rule}:" if index else f":{rule}", *aligned[1:]])
    return "".join(f"|{'|'.join(line)}|\n" for line in zip(*padded, strict=True))


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    _, factor, decimals = _FORMATS.get(column, ("", 1.0, 4))
    if isinstance(value, float) or (isinstance(value, int) and factor != 1.0):
        return f"{factor * value:,.{decimals}f}" if math.isfinite(value) else "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
