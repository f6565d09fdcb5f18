"""Tables of results, from predictions alone."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dnas_ens.analysis.calibration import calibrated_nll, fit_temperature
from dnas_ens.analysis.diversity import evaluate_members
from dnas_ens.analysis.metrics import evaluate_probs, nll
from dnas_ens.evaluate.predictions import Predictions

#: Columns of every row; diversity concerns rows of several members.
METRICS = ("accuracy", "nll", "calibrated_nll", "brier", "ece15")
DIVERSITY = ("disagreement", "predictive_js", "shared_error_fraction")
#: In the files, but not in the table a person reads.
DETAILS = ("mutual_information", "average_member_nll", "oracle_nll")
SHOWN = ("name", *METRICS, *DIVERSITY, "temperature", "parameters")
COLUMNS = (*SHOWN, *DETAILS)
_HEADINGS = {
    "name": "",
    "accuracy": "accuracy %",
    "nll": "NLL",
    "calibrated_nll": "calibrated NLL",
    "brier": "Brier",
    "ece15": "ece15",
    "disagreement": "disagreement %",
    "predictive_js": "predictive JS",
    "shared_error_fraction": "shared errors",
    "temperature": "T",
    "parameters": "parameters",
}
_PERCENT = ("accuracy", "disagreement")


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
        name: Row name.
        val_probs: (N_val, K), in [0, 1].
        val_labels: (N_val,).
        test_probs: (N_test, K), in [0, 1].
        test_labels: (N_test,).
    """
    temperature = fit_temperature(val_probs, val_labels)
    return {
        "name": name,
        **evaluate_probs(test_probs, test_labels),
        "calibrated_nll": calibrated_nll(test_probs, test_labels, temperature),
        "temperature": temperature,
    }


def ensemble_row(name: str, predictions: Predictions) -> dict[str, Any]:
    """Return the metrics and the diversity of the averaged probabilities on test."""
    weights = np.asarray(predictions.weights)
    row = single_row(
        name,
        val_probs=np.tensordot(weights, predictions.val_probs.astype(np.float64), axes=1),
        val_labels=predictions.val_labels,
        test_probs=np.tensordot(weights, predictions.test_probs.astype(np.float64), axes=1),
        test_labels=predictions.test_labels,
    )
    members = evaluate_members(predictions.test_probs, predictions.test_labels, weights)
    row |= {key: members[key] for key in (*DIVERSITY, *DETAILS)}
    return {**row, "parameters": sum(predictions.parameters)}


def result_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """Return a row for every member, the best single one, the average of the members, and the ensemble.

    The best single member is the one with the lowest NLL on val.
    """
    rows = []
    for index, (val_probs, test_probs) in enumerate(
        zip(predictions.val_probs, predictions.test_probs, strict=True)
    ):
        row = single_row(
            f"member {index}",
            val_probs=val_probs.astype(np.float64),
            val_labels=predictions.val_labels,
            test_probs=test_probs.astype(np.float64),
            test_labels=predictions.test_labels,
        )
        rows.append({**row, "parameters": predictions.parameters[index] if predictions.parameters else None})
    best = best_single(predictions)
    average = {
        "name": "average member",
        **{key: float(np.mean([row[key] for row in rows])) for key in METRICS},
    }
    return [
        *rows,
        {**rows[best], "name": f"best single (member {best}, chosen on val)"},
        average,
        ensemble_row("ensemble", predictions),
    ]


def best_single(predictions: Predictions) -> int:
    """Return the member with the lowest NLL on val."""
    scores = [nll(probs.astype(np.float64), predictions.val_labels) for probs in predictions.val_probs]
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
    cells = [[_HEADINGS.get(column, column.replace("_", " ")) for column in shown]]
    cells += [[_cell(column, row.get(column)) for column in shown] for row in rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(shown))]
    lines = [
        "| "
        + " | ".join(
            _aligned(text, width, left=index == 0)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = (
        "|"
        + "|".join(
            (":" + "-" * (width + 1)) if index == 0 else ("-" * (width + 1) + ":")
            for index, width in enumerate(widths)
        )
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _aligned(text: str, width: int, *, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        return f"{100 * value:.2f}" if column in _PERCENT else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
