"""predictions.npz: what every figure is computed from, so that it can be redone without a GPU or the images.

Reading and computing with it does not import torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.errors import UserError
from dnas_ens.evaluate.array_file import load_arrays, save_arrays
from dnas_ens.metrics.diversity import normalise_weights
from dnas_ens.run.files import read_json
from dnas_ens.types import FloatArray

if TYPE_CHECKING:
    import torch

    from dnas_ens.data.dataset import ImageData
    from dnas_ens.ensembles.ensemble import Ensemble

#: Lists with an entry a member; empty where unknown, as in files that were written before they were kept.
_PER_MEMBER = {
    "parameters": np.int64,
    "flops": np.int64,
    "inference_seconds": np.float64,
    "train_cpu_seconds": np.float64,
    "train_gpu_seconds": np.float64,
}
_GIVE_THEIR_CLASSES = "Give data with the classes that the members were trained on, in the same order."


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The members' class probabilities on val and test, and what the members cost.

    Args:
        val_probs: (M, N_val, K), in [0, 1].
        val_labels: (N_val,) int64.
        test_probs: (M, N_test, K), in [0, 1].
        test_labels: (N_test,) int64.
        classes: K class names.
        weights: M combining weights, summing to 1.
        parameters: Number of parameters of each member; empty where unknown, as are the four below.
        flops: Floating-point operations of one image of each member, a multiply-add counted as 2.
        inference_seconds: Seconds an image of each member, at a batch of 256.
        train_cpu_seconds: CPU seconds of each member's training.
        train_gpu_seconds: GPU seconds of each member's training, 0 for one without a GPU.
        search_cpu_seconds: CPU seconds of the search that found the members, a given base's own not included; None
            where unknown or there was none.
        search_gpu_seconds: Its GPU seconds.
        device: Where inference was timed, in words.
        source: What they are of, see `source_of`; empty where unknown, and for other members.

    Raises:
        ValueError: Arrays that do not fit each other, rows that are no probabilities, or labels that are no classes.
            Checked here alone: what computes with predictions trusts them.
    """

    val_probs: np.ndarray
    val_labels: np.ndarray
    test_probs: np.ndarray
    test_labels: np.ndarray
    classes: Sequence[str]
    weights: Sequence[float]
    parameters: Sequence[int] = ()
    flops: Sequence[int] = ()
    inference_seconds: Sequence[float] = ()
    train_cpu_seconds: Sequence[float] = ()
    train_gpu_seconds: Sequence[float] = ()
    search_cpu_seconds: float | None = None
    search_gpu_seconds: float | None = None
    device: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        num_members, num_classes = len(self.val_probs), len(self.classes)
        for split in ("val", "test"):
            probs, labels = getattr(self, f"{split}_probs"), getattr(self, f"{split}_labels")
            if probs.shape != (num_members, len(labels), num_classes) or labels.ndim != 1 or not len(labels):
                raise ValueError(f"{split}_probs has shape {probs.shape} for {len(labels)} labels")
            if probs.dtype.kind != "f" or labels.dtype.kind not in "iu":
                raise ValueError(f"{split}_probs is of {probs.dtype}, {split}_labels of {labels.dtype}")
            # Not negative and summing to 1, up to the rounding of single precision; NaN is neither.
            if not (probs.min() >= 0 and np.abs(probs.sum(-1, dtype=np.float64) - 1).max() < 1e-3):
                raise ValueError(f"{split}_probs holds rows that are no probabilities")
            if labels.min() < 0 or labels.max() >= num_classes:
                raise ValueError(f"{split}_labels names class {labels.max()} of {num_classes}")
        if len(self.weights) != num_members or not np.isfinite(self.weights).all():
            raise ValueError(f"weights are {self.weights} for {num_members} members")
        for name in _PER_MEMBER:
            if len(getattr(self, name)) not in (0, num_members):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {num_members} members")
        for name in ("val_labels", "test_labels"):
            object.__setattr__(self, name, getattr(self, name).astype(np.int64))

    def __repr__(self) -> str:
        return (
            f"Predictions({self.num_members} members, {len(self.val_labels)} val and {len(self.test_labels)} test "
            f"images, {len(self.classes)} classes)"
        )

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.val_probs)

    def averaged(self) -> tuple[FloatArray, FloatArray]:
        """Return the weighted averages on val (N_val, K) and test (N_test, K), in double precision."""
        shares = np.asarray(self.weights, dtype=np.float64)
        return (
            np.tensordot(shares, self.val_probs.astype(np.float64), axes=1),
            np.tensordot(shares, self.test_probs.astype(np.float64), axes=1),
        )

    def of_members(self, members: Sequence[int], weights: Sequence[float] | None = None) -> Predictions:
        """Return the predictions and costs of some members.

        Args:
            members: Positions, each in 0..M-1.
            weights: Their combining weights; None for equal ones.
        """
        chosen = list(members)
        of_each = {name: getattr(self, name) for name in _PER_MEMBER}
        fields: dict[str, Any] = {
            name: [values[index] for index in chosen] if len(values) else () for name, values in of_each.items()
        }
        return dataclasses.replace(
            self,
            val_probs=self.val_probs[chosen],
            test_probs=self.test_probs[chosen],
            weights=normalise_weights(weights, len(chosen)).tolist(),
            source="",
            **fields,
        )

    def with_members_of(self, other: Predictions) -> Predictions:
        """Return the members of both, equally weighted; costs that one of the two lacks are left out.

        The search's cost is this one's.

        Raises:
            ValueError: Other images or classes.
        """
        for name in ("val_labels", "test_labels", "classes"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"the predictions to be joined differ in their {name}")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _PER_MEMBER}
        fields: dict[str, Any] = {
            name: [*ours, *theirs] if len(ours) and len(theirs) else () for name, (ours, theirs) in pairs.items()
        }
        num_members = self.num_members + other.num_members
        return dataclasses.replace(
            self,
            val_probs=np.concatenate([self.val_probs, other.val_probs]),
            test_probs=np.concatenate([self.test_probs, other.test_probs]),
            weights=normalise_weights(None, num_members).tolist(),
            source="",
            **fields,
        )

    def save(self, path: Path) -> None:
        """Write the arrays to one compressed .npz file, atomically."""
        arrays: dict[str, Any] = {
            "val_probs": self.val_probs.astype(np.float32),
            "val_labels": self.val_labels,
            "test_probs": self.test_probs.astype(np.float32),
            "test_labels": self.test_labels,
            "classes": np.array(list(self.classes)),
            "weights": np.array(list(self.weights)),
            "device": np.array(self.device),
            "source": np.array(self.source),
        }
        for name, kind in _PER_MEMBER.items():
            arrays[name] = np.array(list(getattr(self, name)), dtype=kind)
        for name in ("search_cpu_seconds", "search_gpu_seconds"):
            if getattr(self, name) is not None:
                arrays[name] = np.array(float(getattr(self, name)))
        save_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what ``save`` wrote, or an earlier version did.

        Raises:
            UserError: If the file is missing, damaged, or holds other things than probabilities and labels.
        """
        kept = ("val_probs", "val_labels", "test_probs", "test_labels")

        def made(stored: dict[str, np.ndarray]) -> Predictions:
            plain = {name: values.tolist() for name, values in stored.items() if name not in kept}
            fields: dict[str, Any] = {**stored, **plain}
            return cls(**fields)

        return load_arrays(path, made)


def predict_splits(ensemble: Ensemble, data: ImageData, *, device: torch.device | str = "cpu") -> Predictions:
    """Predict the validation and the test images with every member, and measure what a member costs to use.

    Raises:
        UserError: The data have other classes than the ensemble, or the same in another order.
    """
    from dnas_ens.evaluate.compute_cost import count_flops, inference_seconds
    from dnas_ens.nn.network import Network, num_parameters
    from dnas_ens.run.machine import describe_device

    if ensemble.classes is not None:
        # Before the members predict, which may take long.
        _require_same_classes(ensemble.classes, data.classes)
    ensemble.to(device)
    counts = f"{len(data.val):,} val and {len(data.test):,} test images"
    print(f"predicting {counts} with {ensemble.num_members} members", file=sys.stderr, flush=True)
    members = list(ensemble.members)
    shape = (data.num_channels, data.image_size, data.image_size)
    channels_last = all(isinstance(member, Network) for member in members)
    val_probs = ensemble.predict_probs(data.val)
    if ensemble.classes is None:
        _require_same_number(val_probs.shape[2], data.classes)
    return Predictions(
        val_probs=val_probs,
        val_labels=data.val.labels.cpu().numpy(),
        test_probs=ensemble.predict_probs(data.test),
        test_labels=data.test.labels.cpu().numpy(),
        classes=data.classes,
        weights=ensemble.weights.cpu().double().tolist(),
        parameters=[num_parameters(member) for member in members],
        flops=[count_flops(member, shape) for member in members],
        inference_seconds=[inference_seconds(member, shape, channels_last=channels_last) for member in members],
        device=describe_device(device),
    )


def _require_same_classes(ours: Sequence[str], theirs: Sequence[str]) -> None:
    """Raise UserError unless the names of an ensemble's classes are those of the data, in the same order."""
    _require_same_number(len(ours), theirs)
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            raise UserError(
                f"Class {index} of the ensemble is {our!r}, that of the data is {their!r}.", _GIVE_THEIR_CLASSES
            )


def _require_same_number(number: int, theirs: Sequence[str]) -> None:
    if number != len(theirs):
        raise UserError(f"The ensemble has {number} classes, the data have {len(theirs)}.", _GIVE_THEIR_CLASSES)


def source_of(folder: Path, fingerprint: str) -> str:
    """Return what predictions are of: members and images; ensemble.json holds the weights' hashes."""
    from dnas_ens.ensembles.storage import MANIFEST

    return hashlib.sha256((folder / MANIFEST).read_bytes() + fingerprint.encode()).hexdigest()


def with_training_costs(predictions: Predictions, folder: Path) -> Predictions:
    """Add what the members of a folder and their search cost, as far as member.json and genotypes.json tell."""
    from dnas_ens.ensembles.storage import trained_folders

    members, discarded = trained_folders(folder)
    notes = [
        [read_json(place / "member.json") for place in places if (place / "member.json").exists()]
        for places in (members, discarded)
    ]
    costs: dict[str, Any] = {}
    if len(notes[0]) == len(members) and all("cpu_seconds" in note for note in notes[0]):
        costs["train_cpu_seconds"] = [float(note["cpu_seconds"]) for note in notes[0]]
        costs["train_gpu_seconds"] = [float(note.get("gpu_seconds", 0.0)) for note in notes[0]]
    searched = folder / "genotypes.json"
    if searched.exists() or notes[1]:
        # Random deviations of a given base are drawn, not searched: their report is empty.
        report = (read_json(searched).get("report") or {}) if searched.exists() else {}
        # Networks that were trained and not chosen belong to the search for the members.
        for kind in ("cpu_seconds", "gpu_seconds"):
            costs[f"search_{kind}"] = sum(float(each.get(kind, 0.0)) for each in (report, *notes[1]))
    return dataclasses.replace(predictions, **costs)
