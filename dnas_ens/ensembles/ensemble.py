"""An ensemble as one module: averaged probabilities, predictions for images, saving and loading.

Legend: B batch, M members, N images, K classes, C channels, H x W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dnas_ens.analysis.calibration import apply_temperature, calibrated_nll
from dnas_ens.analysis.diversity import entropy, evaluate_members, mutual_information, normalise_weights
from dnas_ens.analysis.metrics import PROB_FLOOR
from dnas_ens.data.dataset import Split
from dnas_ens.data.images import in_threads, read_image
from dnas_ens.data.normalisation import normalise
from dnas_ens.device import resolve_device
from dnas_ens.ensembles.preprocessing import GIVE_PREPROCESSING, Preprocessing, check_images
from dnas_ens.ensembles.storage import StoredEnsemble, read_ensemble, write_ensemble
from dnas_ens.errors import UserError
from dnas_ens.inference import EVALUATION_BATCH, evaluation_mode
from dnas_ens.nn.network import Network


class Ensemble(nn.Module):
    """Members whose class probabilities are averaged, p = sum_m w_m softmax(f_m(x)), then tempered.

    The temperature T comes after the average (Ashukha et al., arXiv 2002.06470): p^(1/T) / sum_k p_k^(1/T).
    Members may be any modules (B, C, H, W) -> (B, K) logits, of different kinds.

    Args:
        members: M modules, at least one.
        weights: M combining weights, non-negative, not all 0; they are normalised. None for equal ones.
        temperature: T above 0, fitted on validation data; 1 for none.
        classes: K class names, where they are known.
        preprocessing: What turns image files and uint8 images into the members' input, where it is known.

    Raises:
        UserError: No members, or weights or a temperature that are not possible.
    """

    weights: Tensor
    temperature: Tensor

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        weights: Sequence[float] | npt.NDArray[np.floating] | Tensor | None = None,
        temperature: float = 1.0,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        if len(members) == 0:
            raise UserError("The ensemble has no members.", "Give at least one network.")
        if not (math.isfinite(temperature) and temperature > 0.0):
            raise UserError(f"The temperature is {temperature}.", "Give a finite number above 0; 1 for none.")
        self.members = nn.ModuleList(members)
        self.classes = None if classes is None else tuple(classes)
        self.preprocessing = preprocessing
        shares = _check_weights(weights, len(members))
        self.register_buffer("weights", torch.tensor(shares, dtype=torch.get_default_dtype()))
        self.register_buffer("temperature", torch.tensor(float(temperature), dtype=torch.get_default_dtype()))

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.members)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to averaged, tempered probabilities (B, K) in [0, 1].

        Raises:
            UserError: See `member_probs`.
        """
        return self.combine(self.member_probs(images))

    def member_probs(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to the members' class probabilities (M, B, K) in [0, 1].

        Raises:
            UserError: A member does not return (B, K), or not as many classes as the others.
        """
        probs: list[Tensor] = []
        for index, member in enumerate(self.members):
            logits = member(images)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                form = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise UserError(
                    f"Member {index} returns {form} instead of logits of shape (B, K).",
                    "Wrap it in a module that returns the logits alone.",
                )
            num_classes = len(self.classes) if self.classes is not None else logits.shape[1]
            wanted = probs[0].shape[1] if probs else num_classes
            if logits.shape[1] != wanted:
                raise UserError(
                    f"Member {index} has {logits.shape[1]} classes, but the ensemble has {wanted}.",
                    "Combine members that were trained on the same classes.",
                )
            probs.append(torch.softmax(logits, dim=1))
        return torch.stack(probs)

    def combine(self, member_probs: Tensor) -> Tensor:
        """Average the members' probabilities (M, B, K) and apply the temperature: (B, K) in [0, 1]."""
        averaged = (self.weights[:, None, None] * member_probs).sum(dim=0)
        # Without a branch on T, so that the module exports as one graph.
        return torch.softmax(averaged.clamp_min(PROB_FLOOR).log() / self.temperature, dim=1)

    def predict_probs(
        self,
        images: Split | Tensor | npt.NDArray[Any],
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Compute the members' probabilities of many images, in evaluation mode, batch by batch.

        Args:
            images: A split, uint8 images (N, C, H, W), which the preprocessing normalises, or float images
                of that shape, which are taken as normalised already.
            batch_size: Images that go through a member at once, at least 1.
            device: Where to compute; the ensemble is moved there. None leaves it where it is.

        Returns:
            Class probabilities, shape (M, N, K), range [0, 1].

        Raises:
            UserError: No images, images of another kind, uint8 images without preprocessing, a wrong batch
                size or device, or a member whose probabilities are not finite.
        """
        if isinstance(images, Split):
            images = images.images
        pixels = images if isinstance(images, Tensor) else torch.tensor(images)
        check_images(pixels, self.preprocessing)
        _check_batch_size(batch_size)
        if device is not None:
            self.to(resolve_device(device) if isinstance(device, str) else device)
        # Our convolutions are faster so; a module that flattens its input with a view would fail on it.
        only_networks = all(isinstance(member, Network) for member in self.members)
        layout = torch.channels_last if only_networks else torch.contiguous_format
        parts = []
        with evaluation_mode(self), torch.inference_mode():
            for batch in pixels.split(batch_size):
                inputs = batch.to(self.weights.device)
                if self.preprocessing is not None and inputs.dtype == torch.uint8:
                    inputs = normalise(inputs, mean=self.preprocessing.mean, std=self.preprocessing.std)
                inputs = inputs.to(self.weights.dtype).contiguous(memory_format=layout)
                parts.append(self.member_probs(inputs).float().cpu())
        probs: npt.NDArray[np.float32] = torch.cat(parts, dim=1).numpy()
        broken = np.flatnonzero(~np.isfinite(probs).all(axis=(1, 2)))
        if len(broken):
            raise UserError(
                f"Member {broken[0]} predicts probabilities that are not finite.",
                "Train it again, with a lower learning rate if it diverged, or leave it out.",
            )
        return probs

    def evaluate(
        self,
        split: Split,
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
    ) -> dict[str, float]:
        """Measure the ensemble on labelled images.

        Args:
            split: Images and labels.
            batch_size: See `predict_probs`.
            device: See `predict_probs`.

        Returns:
            What `dnas_ens.analysis.diversity.evaluate_members` returns, for the average **before** the
            temperature, and ``calibrated_nll``, the NLL after it in nats (equal to ``nll`` where T = 1).

        Raises:
            UserError: See `predict_probs`; or a label that is not one of the ensemble's classes.
        """
        probs = self.predict_probs(split, batch_size=batch_size, device=device)
        labels = split.labels.cpu().numpy()
        if labels.min() < 0 or labels.max() >= probs.shape[2]:
            raise UserError(
                f"Labels reach from {labels.min()} to {labels.max()}, but the ensemble has {probs.shape[2]} "
                "classes.",
                "Evaluate on data with the classes that the members were trained on.",
            )
        shares = self._shares()
        averaged = np.tensordot(shares, probs.astype(np.float64), axes=1)
        return {
            **evaluate_members(probs, labels, shares),
            "calibrated_nll": calibrated_nll(averaged, labels, float(self.temperature)),
        }

    def predict(
        self,
        paths: Sequence[str | Path],
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
    ) -> list[dict[str, Any]]:
        """Classify image files.

        Args:
            paths: Image files.
            batch_size: Images in memory at once; see `predict_probs`.
            device: See `predict_probs`.

        Returns:
            One dict a path, in order: ``path``; ``label``, the class name (the index as text where names are
            unknown); its ``probability`` in [0, 1]; ``entropy`` of the prediction and ``mutual_information``
            between it and the member, in nats; ``votes``, how many members find this class most probable.

        Raises:
            UserError: A path instead of a list, a file that is no image, or no preprocessing.
        """
        if isinstance(paths, str | Path):
            raise UserError(f"predict was given the single path {paths}.", f"Give a list: [{str(paths)!r}].")
        if self.preprocessing is None:
            raise UserError("The ensemble does not know how its members want images.", GIVE_PREPROCESSING)
        _check_batch_size(batch_size)
        read = partial(
            read_image,
            num_channels=self.preprocessing.num_channels,
            image_size=self.preprocessing.image_size,
        )
        shares = self._shares()
        rows: list[dict[str, Any]] = []
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            images = torch.stack(list(in_threads(read, chunk)))
            probs = self.predict_probs(images, batch_size=batch_size, device=device)
            averaged = np.tensordot(shares, probs.astype(np.float64), axes=1)
            tempered = apply_temperature(averaged, float(self.temperature))
            labels = tempered.argmax(axis=1)
            columns = zip(
                chunk,
                labels,
                tempered.max(axis=1),
                entropy(tempered),
                mutual_information(probs, shares),
                (probs.argmax(axis=2) == labels).sum(axis=0),
                strict=True,
            )
            for path, label, probability, uncertainty, information, votes in columns:
                rows.append(
                    {
                        "path": str(path),
                        "label": str(label) if self.classes is None else self.classes[label],
                        "probability": float(probability),
                        "entropy": float(uncertainty),
                        "mutual_information": float(information),
                        "votes": int(votes),
                    }
                )
        return rows

    def _shares(self) -> npt.NDArray[np.float64]:
        """Return the combining weights (M,) in double precision, with sum 1."""
        return normalise_weights(self.weights.double().cpu().numpy(), self.num_members)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ensemble.json and one safetensors file a member; every file is replaced as a whole.

        ensemble.json comes last: a folder without it was interrupted and does not load.

        Args:
            folder: Where to; it is made where it is absent.
            overwrite: Whether an ensemble that lies there may be replaced.

        Raises:
            UserError: An ensemble lies there already, or the disk is full or can not be written.
        """
        stored = StoredEnsemble(
            members=list(self.members),
            weights=self.weights.double().tolist(),
            temperature=float(self.temperature),
            classes=self.classes,
            preprocessing=self.preprocessing,
        )
        write_ensemble(Path(folder), stored, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path, *, members: Sequence[nn.Module] | None = None) -> Ensemble:
        """Rebuild a saved ensemble, or that of a run folder, on the CPU and in evaluation mode.

        Args:
            folder: What `save` wrote, or a run folder.
            members: Fresh modules to fill, in order: one for every member, or one for every member of the
                kind "external", which only its owner can build.

        Returns:
            The ensemble.

        Raises:
            UserError: ensemble.json is missing or malformed, a file lies outside the folder, is missing or
                damaged, or does not fit its member, or modules are missing.
        """
        stored = read_ensemble(Path(folder), members=members)
        return cls(
            stored.members,
            weights=stored.weights,
            temperature=stored.temperature,
            classes=stored.classes,
            preprocessing=stored.preprocessing,
        ).eval()


def load(folder: str | Path, *, members: Sequence[nn.Module] | None = None) -> Ensemble:
    """Rebuild a saved ensemble; see `Ensemble.load`."""
    return Ensemble.load(folder, members=members)


def _check_weights(weights: Sequence[float] | np.ndarray | Tensor | None, num_members: int) -> list[float]:
    """Return combining weights that sum to 1."""
    values = None if weights is None else [float(weight) for weight in weights]
    try:
        shares = normalise_weights(values, num_members)
    except ValueError as error:
        raise UserError(
            f"The combining weights do not fit: {error}.", "Give one non-negative number a member, not all 0."
        ) from error
    # Weights that were rounded to single precision and saved must come back bit-equal.
    if values is not None and abs(sum(values) - 1.0) < 1e-6:
        return values
    return [float(share) for share in shares]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}.", "Give a number of images from 1 up.")
