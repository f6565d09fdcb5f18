"""The rows of a seed: what predicts, its stored predictions, its metrics, and its loss on every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PREDICTIONS = "predictions.npz"


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One predictor of one seed.

    Args:
        name: The row's name.
        val_probs: (N_val, K), on val, as far as may be on images that did not choose it, for the temperature.
        test_probs: (N_test, K).
        details: What else its record holds: what was chosen, such as weights, and what it cost.
    """

    name: str
    val_probs: np.ndarray
    test_probs: np.ndarray
    details: dict[str, Any]


def measured_rows(
    folder: Path, rows: Sequence[Row], *, val_labels: np.ndarray, test_labels: np.ndarray
) -> list[dict[str, Any]]:
    """Store the predictions of a seed's rows, and evaluate them on test; called once a seed.

    Args:
        folder: The seed's folder.
        rows: R rows.
        val_labels: (N_val,).
        test_labels: (N_test,).

    Returns:
        A record a row: its metrics, with the temperature fitted on val, and its details.
    """
    from dnas_ens.evaluate.tables import single_row

    # The figures are of what is stored, so that they can be recomputed from it.
    val_probs, test_probs = (
        np.stack(probs).astype(np.float32)
        for probs in ([row.val_probs for row in rows], [row.test_probs for row in rows])
    )
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / PREDICTIONS,
        methods=np.array([row.name for row in rows]),
        val_probs=val_probs,
        val_labels=val_labels,
        test_probs=test_probs,
        test_labels=test_labels,
    )
    return [
        {
            **single_row(
                row.name,
                val_probs=val_probs[index],
                val_labels=val_labels,
                test_probs=test_probs[index],
                test_labels=test_labels,
            ),
            **row.details,
        }
        for index, row in enumerate(rows)
    ]


def losses(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the calibrated NLL of every row on each test image of a seed, (N,) in nats.

    Args:
        folder: The seed's folder.
        names: Of the rows, in the order they were stored in.
    """
    from dnas_ens.metrics.calibration import per_image_calibrated_nll

    with np.load(folder / PREDICTIONS) as stored:
        arrays = {name: stored[name] for name in ("val_probs", "val_labels", "test_probs", "test_labels")}
    return {
        name: per_image_calibrated_nll(val_probs, arrays["val_labels"], test_probs, arrays["test_labels"])
        for name, val_probs, test_probs in zip(names, arrays["val_probs"], arrays["test_probs"], strict=True)
    }
