"""Evaluating a run folder under shift: shift.npz, shift.json and shift.md."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnas_ens.config import DataConfig
from dnas_ens.config.fields import override
from dnas_ens.data.dataset import ImageData
from dnas_ens.data.names import OUT_OF_DISTRIBUTION
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.errors import UserError
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.shift_options import ShiftOptions
from dnas_ens.evaluate.shift_predictions import CIFAR10_C, ShiftPredictions, predict_shift
from dnas_ens.evaluate.tables import best_single, to_markdown
from dnas_ens.metrics.shift import ENSEMBLE, CleanFit, corruption_rows, detection_rows, summarise
from dnas_ens.run.files import write_atomic, write_json
from dnas_ens.run.folder import RunFolder

#: Members' probabilities under shift, from which the other files can be recomputed.
FILE = "shift.npz"


def evaluate_shift(
    run: RunFolder, data: ImageData, options: ShiftOptions, *, device: torch.device | str = "cpu"
) -> str:
    """Measure the ensemble of a run folder, which is evaluated already, under shift, and write its files.

    Args:
        run: Holds the ensemble and predictions.npz.
        data: The run's data.
        options: What to measure.
        device: Where to corrupt and to predict.

    Returns:
        What shift.md holds.

    Raises:
        UserError: See `predict_shift`; or the run has no predictions.npz.
    """
    config = override(DataConfig(), run.config["search"]["data"])
    shift = predict_shift(
        Ensemble.load(run.path),
        data,
        options,
        usual=OUT_OF_DISTRIBUTION.get(config.data, ()),
        data_root=config.data_root,
        device=device,
    )
    shift.save(run.path / FILE)
    return write_shift(run.path, shift)


def write_shift(folder: Path, shift: ShiftPredictions) -> str:
    """Write shift.json and shift.md from predictions alone; return what shift.md holds.

    Args:
        folder: The run folder, with predictions.npz.
        shift: Its predictions under shift.

    Raises:
        UserError: The folder has no predictions.npz.
    """
    predictions = Predictions.load(folder / "predictions.npz")
    write_json(folder / "shift.json", shift_tables(predictions, shift))
    text = shift_markdown(predictions, shift)
    write_atomic(folder / "shift.md", text.encode())
    return text


def stored_shift(folder: Path) -> ShiftPredictions:
    """Return the predictions under shift that a folder keeps.

    Raises:
        UserError: There are none, or the file is damaged.
    """
    if not (folder / FILE).exists():
        raise UserError(
            f"{folder} holds no predictions under shift.",
            f"Run python -m dnas_ens.evaluate {shlex.quote(str(folder))} --shift without --from-predictions first.",
        )
    return ShiftPredictions.load(folder / FILE)


def shift_tables(predictions: Predictions, shift: ShiftPredictions) -> dict[str, list[dict[str, Any]]]:
    """Compute what shift.json holds, from the two files of predictions alone.

    Returns:
        ``corruptions``, the rows of `dnas_ens.metrics.shift.corruption_rows`, and ``out_of_distribution``, those
        of `detection_rows`, whose in-distribution images are the whole clean test split.
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


def fit_on_clean(predictions: Predictions) -> CleanFit:
    """Fit temperatures, and take weights and best single member, from what clean val says."""
    return CleanFit.on(
        predictions.val_probs,
        predictions.val_labels,
        weights=predictions.weights,
        best=best_single(predictions),
    )


def shift_markdown(predictions: Predictions, shift: ShiftPredictions) -> str:
    """Return the tables a person reads: means over corruptions, every corruption, foreign images."""
    tables = shift_tables(predictions, shift)
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
        means.append(
            {
                "accuracy % of": mean["row"],
                "clean": _percent(unshifted["accuracy"]),
                **_by_severity((severity, m["accuracy"]) for severity, m in mean["severities"].items()),
                "mean corruption error %": _percent(mean["mean_corruption_error"]),
                "NLL": mean["nll"],
                "calibrated NLL": mean["calibrated_nll"],
                "ece15": mean["ece15"],
            }
        )
    each = []
    for name in dict.fromkeys(row["corruption"] for row in rows):
        of_name = [row for row in rows if row["corruption"] == name]
        of_ensemble = [row for row in of_name if row["row"] == ENSEMBLE]
        each.append(
            {
                "accuracy % of the ensemble": name,
                **_by_severity((row["severity"], row["accuracy"]) for row in of_ensemble),
                **{f"calibrated NLL, {mean['row']}": mean["calibrated_nll"] for mean in summarise(of_name)},
            }
        )
    return [
        f"Means over {num_corruptions} corruption{'s' if num_corruptions > 1 else ''}; the last four columns are "
        "means over severities as well.\n",
        to_markdown(means, tuple(means[0])),
        to_markdown(each, tuple(each[0])),
    ]


def _by_severity(pairs: Any) -> dict[str, str]:
    return {f"severity {severity}": _percent(accuracy) for severity, accuracy in pairs}


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
