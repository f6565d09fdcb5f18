"""Evaluating a run folder: predictions.npz and results.{csv,md,json}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dnas_ens.data.dataset import ImageData
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.evaluate.predictions import Predictions, predict_splits
from dnas_ens.evaluate.tables import result_rows, to_csv, to_markdown
from dnas_ens.files import write_atomic, write_json


def predict_folder(folder: Path, data: ImageData, *, device: torch.device | str = "cpu") -> Predictions:
    """Predict val and test with the ensemble of a folder and keep the result as its predictions.npz.

    Raises:
        UserError: If the folder holds no finished ensemble.
    """
    predictions = predict_splits(Ensemble.load(folder), data, device=device)
    predictions.save(folder / "predictions.npz")
    return predictions


def evaluate_folder(
    folder: Path, data: ImageData, *, device: torch.device | str = "cpu"
) -> list[dict[str, Any]]:
    """Evaluate the ensemble of a folder and write its tables.

    Returns:
        The rows; see ``result_rows``.
    """
    rows = result_rows(predict_folder(folder, data, device=device))
    write_tables(folder, rows)
    return rows


def write_tables(folder: Path, rows: list[dict[str, Any]], *, name: str = "results") -> None:
    """Write rows as ``<name>.csv``, ``<name>.md`` and ``<name>.json``."""
    write_atomic(folder / f"{name}.csv", to_csv(rows).encode())
    write_atomic(folder / f"{name}.md", to_markdown(rows).encode())
    write_json(folder / f"{name}.json", rows)
