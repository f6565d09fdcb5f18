"""predictions.npz: what every figure is computed from, so that it can be redone without a GPU or the images."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dnas_ens.data.dataset import ImageData
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.files import unreadable, write_atomic


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The members' class probabilities on val and test.

    Args:
        val_probs: (M, N_val, K), in [0, 1].
        val_labels: (N_val,) int64.
        test_probs: (M, N_test, K), in [0, 1].
        test_labels: (N_test,) int64.
        classes: K class names.
        weights: M combining weights, summing to 1.
        parameters: Number of parameters of each member; empty where unknown.
    """

    val_probs: np.ndarray
    val_labels: np.ndarray
    test_probs: np.ndarray
    test_labels: np.ndarray
    classes: Sequence[str]
    weights: Sequence[float]
    parameters: Sequence[int] = field(default=())

    def save(self, path: Path) -> None:
        """Write the arrays to one compressed .npz file, atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            val_probs=self.val_probs.astype(np.float32),
            val_labels=self.val_labels,
            test_probs=self.test_probs.astype(np.float32),
            test_labels=self.test_labels,
            classes=np.array(list(self.classes)),
            weights=np.array(list(self.weights)),
            parameters=np.array(list(self.parameters), dtype=np.int64),
        )
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what ``save`` wrote.

        Raises:
            UserError: If the file is missing or damaged.
        """
        try:
            # Opened here, for numpy leaves a damaged file open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                stored = {name: arrays[name] for name in arrays.files}
            return cls(
                **{
                    **stored,
                    "classes": stored["classes"].tolist(),
                    "weights": stored["weights"].tolist(),
                    "parameters": stored["parameters"].tolist(),
                }
            )
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise unreadable(path, error) from error


def predict_splits(ensemble: Ensemble, data: ImageData, *, device: torch.device | str = "cpu") -> Predictions:
    """Predict the validation and the test images with every member."""
    ensemble.to(device)
    counts = f"{len(data.val):,} val and {len(data.test):,} test images"
    print(f"predicting {counts} with {ensemble.num_members} members", file=sys.stderr, flush=True)
    return Predictions(
        val_probs=ensemble.predict_probs(data.val),
        val_labels=data.val.labels.cpu().numpy(),
        test_probs=ensemble.predict_probs(data.test),
        test_labels=data.test.labels.cpu().numpy(),
        classes=data.classes,
        weights=ensemble.weights.double().tolist(),
        parameters=[sum(p.numel() for p in member.parameters()) for member in ensemble.members],
    )
