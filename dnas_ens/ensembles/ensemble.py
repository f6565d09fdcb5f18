"""An ensemble as one module: averaged probabilities, predictions for images, saving and loading.

Legend: B batch, M members, N images, K classes, C channels, H x W.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from dnas_ens.errors import UserError
from dnas_ens.inference import EVALUATION_BATCH
from dnas_ens.nn.network import Network
from dnas_ens.runs import load_tensors, read_json, save_tensors, write_json

MANIFEST = "ensemble.json"
_GIVE_PREPROCESSING = "Build the ensemble with preprocessing=Preprocessing(...)."
#: The kind of a member that only its owner can build, such as a torchvision network.
EXTERNAL = {"kind": "external"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What turns an image file into a member's input.

    Args:
        image_size: H = W in pixels: the short side is resized to it and the centre cropped.
        num_channels: C, 1 or 3.
        mean: C means of the training pixels, in [0, 1].
        std: C standard deviations of the training pixels, in the same unit, above 0.

    Raises:
        UserError: If a number is out of range, or there are not C means and deviations.
    """

    image_size: int
    num_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        statistics = (*self.mean, *self.std)
        if not (
            type(self.image_size) is int
            and self.image_size > 0
            and self.num_channels in (1, 3)
            and len(self.mean) == len(self.std) == self.num_channels
            and all(type(value) in (int, float) and math.isfinite(value) for value in statistics)
            and min(self.std) > 0
        ):
            raise UserError(
                f"The preprocessing {self} is not possible.",
                "Give a size above 0, 1 or 3 channels, and a finite mean and a deviation above 0 for each.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as ensemble.json holds them: image_size, channels, mean, std."""
        return {
            "image_size": self.image_size,
            "channels": self.num_channels,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Build from what `to_dict` returned; other keys are ignored.

        Raises:
            UserError: If a field is missing or out of range.
        """
        try:
            return cls(
                image_size=fields["image_size"],
                num_channels=fields["channels"],
                mean=tuple(fields["mean"]),
                std=tuple(fields["std"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"The preprocessing lacks or misspells a field ({error!r}).",
                "Give image_size, channels, mean and std as an ensemble's save writes them.",
            ) from error


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
        _check_images(pixels, self.preprocessing)
        _check_batch_size(batch_size)
        if device is not None:
            self.to(resolve_device(device) if isinstance(device, str) else device)
        # Our convolutions are faster so; a module that flattens its input with a view would fail on it.
        only_networks = all(isinstance(member, Network) for member in self.members)
        layout = torch.channels_last if only_networks else torch.contiguous_format
        parts = []
        with _evaluation_mode(self), torch.inference_mode():
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
            raise UserError("The ensemble does not know how its members want images.", _GIVE_PREPROCESSING)
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
        folder = Path(folder)
        manifest = folder / MANIFEST
        if manifest.exists() and not overwrite:
            raise UserError(
                f"{folder} holds an ensemble already.", "Choose another folder, or save with overwrite=True."
            )
        entries = []
        for index, member in enumerate(self.members):
            file = f"members/{index}/model.safetensors"
            save_tensors(folder / file, member.state_dict())
            spec = member.spec() if isinstance(member, Network) else EXTERNAL
            entries.append({"file": file, "sha256": _sha256(folder / file), "spec": spec})
        write_json(
            manifest,
            {
                "classes": None if self.classes is None else list(self.classes),
                **({} if self.preprocessing is None else self.preprocessing.to_dict()),
                "members": entries,
                "weights": self.weights.double().tolist(),
                "temperature": float(self.temperature),
            },
        )

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
        folder = Path(folder)
        manifest = _read_manifest(folder)
        paths = [_member_file(folder, entry) for entry in manifest["members"]]
        modules = _build_members(folder, [entry["spec"] for entry in manifest["members"]], members)
        for path, module in zip(paths, modules, strict=True):
            try:
                module.load_state_dict(load_tensors(path))
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{path} does not fit its member: {reason[:300]}.",
                    "Give modules of the architecture that was saved, in the order it was saved in.",
                ) from error
        return cls(
            modules,
            weights=manifest["weights"],
            temperature=manifest["temperature"],
            classes=manifest["classes"],
            preprocessing=Preprocessing.from_dict(manifest) if "image_size" in manifest else None,
        ).eval()


def load(folder: str | Path, *, members: Sequence[nn.Module] | None = None) -> Ensemble:
    """Rebuild a saved ensemble; see `Ensemble.load`."""
    return Ensemble.load(folder, members=members)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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


def _check_images(images: Tensor, preprocessing: Preprocessing | None) -> None:
    """Refuse images (N, C, H, W) that the members can not have been trained on."""
    shape = tuple(images.shape)
    if images.ndim != 4 or images.numel() == 0:
        raise UserError(f"The images have shape {shape}.", "Give at least one image, as (N, C, H, W).")
    if images.dtype == torch.uint8:
        if preprocessing is None:
            raise UserError("uint8 images must be normalised, but it is not known how.", _GIVE_PREPROCESSING)
        if shape[2:] != (preprocessing.image_size,) * 2:
            raise UserError(
                f"The images are {shape[2]}x{shape[3]}, the ensemble's {preprocessing.image_size} squared.",
                "Load the data with the image size that the members were trained on.",
            )
    elif not images.is_floating_point():
        raise UserError(f"The images are {images.dtype}.", "Give uint8 images, or normalised float images.")
    elif not images.isfinite().all():
        raise UserError("The images hold values that are not finite.", "Look for NaN in what made them.")
    if preprocessing is not None and shape[1] != preprocessing.num_channels:
        raise UserError(
            f"The images have {shape[1]} channels, the ensemble's have {preprocessing.num_channels}.",
            "Convert the images, or use an ensemble that was trained on such images.",
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check ensemble.json."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} holds no ensemble: there is no {MANIFEST}.",
            "Name a folder that an ensemble was saved in, or a run folder whose members are trained.",
        )
    manifest = read_json(path)
    fields = manifest if isinstance(manifest, dict) else {}
    members, weights, classes = (fields.get(key) for key in ("members", "weights", "classes"))
    temperature = fields.get("temperature", 1.0)
    valid = {
        "members": isinstance(members, list)
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("file"), str)
            and isinstance(entry.get("spec"), dict)
            for entry in members
        ),
        "weights": weights is None or _is_list_of(weights, int, float),
        "temperature": _is_list_of([temperature], int, float),
        "classes": classes is None or _is_list_of(classes, str),
    }
    wrong = [key for key, good in valid.items() if not good]
    if wrong:
        raise UserError(
            f"{path} is malformed: {wrong[0]} is missing or of another kind.", "Save the ensemble again."
        )
    return {**fields, "weights": weights, "classes": classes, "temperature": temperature}


def _is_list_of(values: object, *kinds: type) -> bool:
    return isinstance(values, list) and all(type(value) in kinds for value in values)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _member_file(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Return a member's file, which must lie in the folder and have the SHA-256 that is noted, if one is."""
    file = str(entry["file"])
    path = folder / file
    if "\0" in file or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder / MANIFEST} names the file {file!r}, which lies outside the folder.",
            "Do not use this folder unless you trust where it is from; name files inside it.",
        )
    if not path.is_file():
        raise UserError(f"The member file {path} is missing.", "Restore it from a copy, or train it again.")
    if entry.get("sha256") not in (None, _sha256(path)):
        raise UserError(
            f"{path} is not the file that {MANIFEST} was written for: its SHA-256 differs.",
            "It is damaged or was replaced: restore it from a copy, or save the ensemble again.",
        )
    return path


def _build_members(
    folder: Path, specs: Sequence[Mapping[str, Any]], members: Sequence[nn.Module] | None
) -> list[nn.Module]:
    """Return a module for every spec: given ones, and networks built for those of our kind."""
    given = list(members or [])
    if len(given) == len(specs):
        return given
    num_external = sum(spec == EXTERNAL for spec in specs)
    if len(given) != num_external:
        raise UserError(
            f"{folder} holds {len(specs)} members, {num_external} of them external; {len(given)} were given.",
            f"Load it with members=[...] that holds {num_external} fresh modules, in the order of saving.",
        )
    fresh = iter(given)
    try:
        return [next(fresh) if spec == EXTERNAL else Network.from_spec(dict(spec)) for spec in specs]
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder / MANIFEST} describes a network that can not be built ({error}).",
            "Save the ensemble again.",
        ) from error
