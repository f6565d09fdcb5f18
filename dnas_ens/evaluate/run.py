"""Evaluating a run folder: predictions.npz, results.{csv,md,json} and ensemble_size.json."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnas_ens.config import require
from dnas_ens.errors import UserError
from dnas_ens.evaluate.classes import ClassFigures
from dnas_ens.evaluate.decisions import decisions, decisions_markdown
from dnas_ens.evaluate.predictions import Predictions, predict_splits, source_of, with_training_costs
from dnas_ens.evaluate.tables import ensemble_row, result_rows, to_csv, to_markdown
from dnas_ens.metrics.ensemble_size import ensemble_size_curve
from dnas_ens.run.files import read_checked, sha256, write_atomic, write_json

if TYPE_CHECKING:
    import torch

    from dnas_ens.data.dataset import ImageData


def predict_folder(
    folder: Path, data: ImageData, *, device: torch.device | str = "cpu", reuse: bool = False
) -> Predictions:
    """Predict val and test with the ensemble of a folder and keep the result as its predictions.npz.

    Args:
        reuse: Whether to take the predictions that are kept, if they are of the same members, images and device.

    Raises:
        UserError: If the folder holds no finished ensemble.
    """
    from dnas_ens.ensembles.ensemble import Ensemble
    from dnas_ens.run.machine import describe_device

    # Loaded in any case, so that a member's file that has changed since is refused.
    ensemble = Ensemble.load(folder)
    path = folder / "predictions.npz"
    source = source_of(folder, data.fingerprint)
    if reuse and path.exists():
        kept = Predictions.load(path)
        if (kept.source, kept.device) == (source, describe_device(device)):
            return kept
    predictions = with_training_costs(predict_splits(ensemble, data, device=device), folder)
    predictions = dataclasses.replace(predictions, source=source)
    predictions.save(path)
    return predictions


def evaluate_folder(folder: Path, data: ImageData, *, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """Evaluate the ensemble of a folder, and what was distilled from it, and write its tables; see `write_results`."""
    if _is_distilled_from_it(folder):
        predict_folder(folder / "distilled", data, device=device)
    return write_results(folder, predict_folder(folder, data, device=device))


def stored_predictions(folder: Path) -> Predictions:
    """Read the predictions of an earlier evaluation of a folder.

    Raises:
        UserError: If there are none, the file is damaged, or the ensemble has changed since.
    """
    from dnas_ens.ensembles.storage import MANIFEST

    path, splits = folder / "predictions.npz", folder / "splits.json"
    evaluate = f"Run python -m dnas_ens.evaluate {shlex.quote(str(folder))} without --from-predictions first."
    if not path.exists():
        raise UserError(f"{folder} holds no predictions.", evaluate)
    found = Predictions.load(path)
    if found.source and (folder / MANIFEST).exists() and splits.exists():
        fingerprint = read_checked(splits, {"fingerprint": str})["fingerprint"]
        require(
            found.source == source_of(folder, fingerprint),
            f"The ensemble in {folder} has changed since it was evaluated.",
            evaluate,
        )
    return found


def write_results(folder: Path, predictions: Predictions) -> list[dict[str, Any]]:
    """Compute everything that follows from predictions and write it to the folder.

    That is results.csv, .md and .json, the last two with figures of each class, and ensemble_size.json: metrics of
    the equally weighted average of k members against k, see `dnas_ens.metrics.ensemble_size.ensemble_size_curve`.

    Returns:
        The rows; see ``result_rows``. That of the ensemble, the last, has ``recall_per_class`` too, by class name, None
        for a class without test images, and what `decisions` returns.
    """
    rows = result_rows(predictions)
    figures = ClassFigures.of(predictions)
    rows[-1]["recall_per_class"] = {row.name: row.recall if row.num_images else None for row in figures.rows}
    distilled = folder / "distilled" / "predictions.npz"
    of_this_ensemble = _is_distilled_from_it(folder)
    if of_this_ensemble and distilled.exists():
        rows.insert(-1, ensemble_row("distilled", _with_its_teacher(Predictions.load(distilled), predictions)))
    elif of_this_ensemble is False:
        told = f"without {distilled.parent}, distilled from an earlier ensemble: remove it and run distil again"
        print(told, file=sys.stderr)
    found = decisions(predictions)
    sentences = decisions_markdown(found, num_members=len(predictions.weights), accuracy=rows[-1]["accuracy"])
    rows[-1] |= found
    write_tables(folder, rows, below=f"\n{sentences}\n{figures.to_markdown()}")
    sizes = ensemble_size_curve(
        predictions.val_probs, predictions.val_labels, predictions.test_probs, predictions.test_labels
    )
    write_json(folder / "ensemble_size.json", sizes)
    return rows


def _is_distilled_from_it(folder: Path) -> bool | None:
    """Whether the network in R/distilled imitates the ensemble in R as it is now; None where there is no network."""
    from dnas_ens.ensembles.storage import MANIFEST, trained_folders

    place = folder / "distilled"
    if not ((place / MANIFEST).exists() and (folder / MANIFEST).exists()):
        return None
    note = trained_folders(place)[0][0] / "member.json"
    if not note.exists():
        return False
    return bool(read_checked(note, {"teacher?": str}).get("teacher") == sha256(folder / MANIFEST))


def _with_its_teacher(student: Predictions, teacher: Predictions) -> Predictions:
    """Return a student's predictions with its teacher's cost as that of its search: there is none without it."""
    if not len(teacher.train_cpu_seconds):
        return dataclasses.replace(student, train_cpu_seconds=(), train_gpu_seconds=())
    return dataclasses.replace(
        student,
        search_cpu_seconds=sum(teacher.train_cpu_seconds) + (teacher.search_cpu_seconds or 0.0),
        search_gpu_seconds=sum(teacher.train_gpu_seconds) + (teacher.search_gpu_seconds or 0.0),
    )


def write_tables(folder: Path, rows: list[dict[str, Any]], *, below: str = "") -> None:
    """Write rows as results.csv, results.md, with what comes below the table, and results.json."""
    write_atomic(folder / "results.csv", to_csv(rows).encode())
    write_atomic(folder / "results.md", (to_markdown(rows) + below).encode())
    write_json(folder / "results.json", rows)
