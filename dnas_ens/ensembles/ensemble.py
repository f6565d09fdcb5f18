"""An ensemble as one module: averaged probabilities, predictions for images, saving and loading.

Legend: B batch, M members, N images, K classes, C channels, H x W.
"""

from __future__ import annotations

import functools
import html
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dnas_ens.data.dataset import Split
from dnas_ens.data.images import in_threads
from dnas_ens.ensembles.cascade import Cascade, cascaded
from dnas_ens.ensembles.preprocessing import GIVE_PREPROCESSING, Preprocessing, as_pixels, check_images
from dnas_ens.ensembles.storage import StoredEnsemble, read_ensemble, write_ensemble
from dnas_ens.ensembles.weighting import fit_weights
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import fit_temperature, tempered
from dnas_ens.metrics.conformal import prediction_sets
from dnas_ens.metrics.diversity import entropy, evaluate_members, mutual_information, normalise_weights
from dnas_ens.metrics.scores import PROB_FLOOR, nll
from dnas_ens.nn.network import Network, num_parameters
from dnas_ens.nn.reference_models import ReferenceModel
from dnas_ens.run.machine import resolve_device
from dnas_ens.training.prediction import (
    EVALUATION_BATCH,
    Batches,
    Outputs,
    check_outputs,
    class_indices,
    class_probs,
    evaluation_mode,
    no_batches,
    not_finite,
    one_pass,
)
from dnas_ens.types import FloatArray, IntArray

#: Classes and weights that are shown.
_SHOWN = 10


class Ensemble(nn.Module):
    """Members whose class probabilities are averaged, p = sum_m w_m softmax(f_m(x)), then tempered.

    The temperature T comes after the average (Ashukha et al., arXiv 2002.06470): p^(1/T) / sum_k p_k^(1/T).
    Members may be any modules (B, C, H, W) -> (B, K) logits, of different kinds, on different devices and in different
    precisions: each is given the images on its own device and in its own dtype. An ensemble may be a member too.
    A member that ends in a softmax gets no second one: unless ``outputs`` says so, this is found out on its first
    images, with a warning.

    Args:
        members: M modules, at least one.
        weights: M combining weights, non-negative, not all 0; they are normalised. None for equal ones.
        temperature: T above 0, fitted on validation data; 1 for none.
        classes: K class names, where they are known.
        preprocessing: What turns image files and uint8 images into the members' input, where it is known.
        outputs: What the members return, "logits" (or log-probabilities) or "probs", for all of them or one for
            each; None to find out on the first images, see `dnas_ens.training.prediction.class_probs`.

    Raises:
        UserError: No members, or weights, a temperature or outputs that are not possible.
    """

    weights: Tensor
    temperature: Tensor
    #: What each member returns; None until it is known.
    outputs: list[Outputs | None]
    #: Tells an ensemble from a classifier, which needs a softmax over its logits.
    returns_probabilities = True

    def __init__(
        self,
        members: Iterable[nn.Module],
        *,
        weights: Sequence[float] | npt.NDArray[np.floating] | Tensor | None = None,
        temperature: float = 1.0,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        outputs: Outputs | Sequence[Outputs | None] | None = None,
    ) -> None:
        super().__init__()
        modules = _as_members(members)
        self.outputs = _as_outputs(outputs, modules)
        self.members = nn.ModuleList(modules)
        self.classes = _as_classes(classes)
        self.preprocessing = preprocessing
        shares = _as_weights(weights, len(modules))
        if not (math.isfinite(temperature) and temperature > 0.0):
            raise UserError(f"The temperature is {temperature}.", "Give a finite number above 0; 1 for none.")
        device, dtype = _home_of(modules)
        self.register_buffer("weights", torch.tensor(shares, dtype=dtype, device=device))
        self.register_buffer("temperature", torch.tensor(float(temperature), dtype=dtype, device=device))

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.members)

    def __repr__(self) -> str:
        # Not nn.Module's, which lists the modules of all members over pages.
        kinds = Counter(type(member).__name__ for member in self.members)
        weights = ", ".join(f"{weight:.3g}" for weight in self.weights.tolist()[:_SHOWN])
        return (
            f"Ensemble({self.num_members} members: {', '.join(f'{kinds[kind]} {kind}' for kind in kinds)})\n"
            f"  {num_parameters(self):,} parameters on {self.weights.device}\n"
            f"  {self._named_classes()}\n"
            f"  weights {weights}{', ...' if self.num_members > _SHOWN else ''}; "
            f"temperature {float(self.temperature):.3g}"
        )

    def _repr_html_(self) -> str:
        """A notebook's view: a table of the members and their weights."""
        rows = "".join(
            f"<tr><td>{index}</td><td>{html.escape(type(member).__name__)}</td><td>{num_parameters(member):,}</td>"
            f"<td>{weight:.3f}</td></tr>"
            for index, (member, weight) in enumerate(zip(self.members, self.weights.tolist(), strict=True))
        )
        return (
            f"<b>Ensemble</b> of {self.num_members} members, temperature {float(self.temperature):.3g}"
            f"<table><tr><th>member</th><th>kind</th><th>parameters</th><th>weight</th></tr>{rows}</table>"
            f"<p>{html.escape(self._named_classes())}</p>"
        )

    def _named_classes(self) -> str:
        if self.classes is None:
            return "classes without names"
        more = ", ..." if len(self.classes) > _SHOWN else ""
        return f"{len(self.classes)} classes: {', '.join(self.classes[:_SHOWN])}{more}"

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to averaged, tempered probabilities (B, K); see `member_probs`."""
        return self.combine(self.member_probs(images))

    def member_probs(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to the members' class probabilities (M, B, K) in [0, 1].

        Raises:
            UserError: A member does not take the images, does not return (B, K), or not as many classes as the others.
        """
        probs: list[Tensor] = []
        for index, member in enumerate(self.members):
            found, self.outputs[index] = class_probs(
                member, images, name=f"Member {index}", outputs=self.outputs[index]
            )
            num_classes = len(self.classes) if self.classes is not None else found.shape[1]
            wanted = probs[0].shape[1] if probs else num_classes
            if found.shape[1] != wanted:
                raise UserError(
                    f"Member {index} has {found.shape[1]} classes, but the ensemble has {wanted}.",
                    "Combine members that were trained on the same classes.",
                )
            probs.append(found.to(self.weights.device))
        dtype = functools.reduce(torch.promote_types, [each.dtype for each in probs])
        return torch.stack([each.to(dtype) for each in probs])

    def combine(self, member_probs: Tensor) -> Tensor:
        """Average the members' probabilities (M, B, K) and apply the temperature: (B, K) in [0, 1]."""
        dtype = torch.promote_types(member_probs.dtype, torch.float32)
        shares, temperature = self.weights.to(dtype), self.temperature.to(dtype)
        averaged = (shares[:, None, None] * member_probs).sum(dim=0)
        # Without a branch on T, so that the module exports as one graph.
        return torch.softmax(averaged.clamp_min(PROB_FLOOR).log() / temperature, dim=1)

    def calibrate(
        self,
        data: Split | Batches,
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
    ) -> float:
        """Fit the temperature on validation images, by the NLL of the average there, and set it.

        No member may have been trained on these images. Arguments and errors as for `evaluate`; returns T, see
        `dnas_ens.metrics.calibration.fit_temperature`.
        """
        probs, labels = self._labelled_probs(data, batch_size=batch_size, device=device)
        temperature = fit_temperature.of(self.averaged(probs)[0], labels)
        self.temperature.fill_(temperature)
        return temperature

    def fit_weights(
        self,
        data: Split | Batches,
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
    ) -> FloatArray:
        """Fit the combining weights on validation images, by the NLL of the average there, and set them.

        `calibrate` again afterwards, on other images if there are any (see `dnas_ens.metrics.calibration`).
        Arguments and errors as for `evaluate`; returns the weights (M,) of `dnas_ens.ensembles.weighting.fit_weights`.
        """
        probs, labels = self._labelled_probs(data, batch_size=batch_size, device=device)
        weights = fit_weights(probs.astype(np.float64), labels).weights
        self.weights.copy_(torch.from_numpy(weights))
        return weights

    def predict_probs(
        self,
        images: Split | Tensor | npt.NDArray[Any],
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Compute the members' probabilities of many images, in evaluation mode, batch by batch.

        Args:
            images: A split; uint8 images (N, C, H, W), which the preprocessing normalises; or float images of that
                shape, which are taken as normalised.
            batch_size: Images that go through a member at once, at least 1.
            device: Where to compute; the ensemble is moved there. None leaves it where it is.

        Returns:
            Class probabilities, shape (M, N, K), range [0, 1].

        Raises:
            UserError: No images, images of another kind, uint8 images without preprocessing, a wrong batch
                size or device, or a member whose probabilities are not finite.
        """
        pixels = as_pixels(images)
        check_images(pixels, self.preprocessing)
        _check_batch_size(batch_size)
        return self._batch_probs(pixels.split(batch_size), device)

    def _batch_probs(self, batches: Iterable[Tensor], device: torch.device | str | None) -> npt.NDArray[np.float32]:
        """Return the members' probabilities (M, N, K) of batches of images (B, C, H, W); see `predict_probs`."""
        self._move(device)
        with evaluation_mode(self), torch.inference_mode():
            parts = [self.member_probs(self._inputs(batch)).float().cpu() for batch in batches]
        if not parts:
            raise no_batches("evaluation")
        probs: npt.NDArray[np.float32] = torch.cat(parts, dim=1).numpy()
        broken = np.flatnonzero(~np.isfinite(probs).all(axis=(1, 2)))
        if len(broken):
            raise not_finite(int(broken[0]))
        return probs

    def _move(self, device: torch.device | str | None) -> None:
        if device is not None:
            self.to(resolve_device(device) if isinstance(device, str) else device)

    def _inputs(self, batch: Tensor) -> Tensor:
        """Return a batch as the members take it: normalised, on their device."""
        # Faster for our convolutions; a module that flattens its input with a view would fail.
        only_networks = all(isinstance(member, Network) for member in self.members)
        inputs = batch.to(self.weights.device)
        if self.preprocessing is not None and inputs.dtype == torch.uint8:
            inputs = self.preprocessing.inputs(inputs)
        return inputs.contiguous(memory_format=torch.channels_last if only_networks else torch.contiguous_format)

    def cascade_probs(
        self,
        images: Split | Tensor | npt.NDArray[Any],
        cascade: Cascade,
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
    ) -> tuple[npt.NDArray[np.float32], IntArray]:
        """Ask the members in turn until the cascade is sure; other arguments and errors as for `predict_probs`.

        Returns:
            The members' probabilities (M, N, K), NaN where a member was not asked, and how many were asked for each
            image, (N,).
        """
        pixels = as_pixels(images)
        check_images(pixels, self.preprocessing)
        _check_batch_size(batch_size)
        self._move(device)
        parts, counts = [], []
        with evaluation_mode(self), torch.inference_mode():
            for batch in pixels.split(batch_size):
                probs, asked = self._cascaded(self._inputs(batch), cascade.threshold)
                parts.append(probs)
                counts.append(asked)
        return np.concatenate(parts, axis=1), np.concatenate(counts)

    def _cascaded(self, inputs: Tensor, threshold: float) -> tuple[npt.NDArray[np.float32], IntArray]:
        """Do what `cascade_probs` does for one batch of inputs."""
        shares = self._shares()
        unsure = np.arange(len(inputs))
        asked: IntArray = np.full(len(inputs), self.num_members)
        probs: npt.NDArray[np.float32] | None = None
        for index, member in enumerate(self.members):
            some = inputs if index == 0 else inputs[torch.from_numpy(unsure).to(inputs.device)]
            found, self.outputs[index] = class_probs(member, some, name=f"Member {index}", outputs=self.outputs[index])
            if probs is None:
                probs = np.full((self.num_members, len(inputs), found.shape[1]), np.nan, dtype=np.float32)
            if not bool(found.isfinite().all()):
                raise not_finite(index)
            probs[index, unsure] = found.float().cpu().numpy()
            averaged = np.tensordot(shares[: index + 1], probs[: index + 1, unsure].astype(np.float64), axes=1)
            # Without a weight so far nobody is sure, as in `dnas_ens.ensembles.cascade`.
            sure = averaged.max(axis=1) >= threshold * max(shares[: index + 1].sum(), 1e-12)
            asked[unsure[sure]] = index + 1
            unsure = unsure[~sure]
            if not len(unsure):
                break
        assert probs is not None
        return probs, asked

    def evaluate(
        self,
        data: Split | Batches,
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
    ) -> dict[str, float]:
        """Measure the ensemble on labelled images.

        Args:
            data: Images, as `predict_probs` takes them, and labels: a split, or a DataLoader or anything starting
                a pass over batches, see `dnas_ens.training.prediction.Batches`. A loader's order does not matter.
            batch_size: For a split only; see `predict_probs`, as for the device.

        Returns:
            What `dnas_ens.metrics.diversity.evaluate_members` returns, for the average **before** the
            temperature, and ``calibrated_nll``, the NLL after it in nats (equal to ``nll`` where T = 1).

        Raises:
            UserError: See `predict_probs`; no batches or batches of another form, or a label that is not one of the
                ensemble's classes.
        """
        probs, labels = self._labelled_probs(data, batch_size=batch_size, device=device)
        return {
            **evaluate_members(probs, labels, self._shares()),
            "calibrated_nll": nll.of(tempered(self.averaged(probs)[0], float(self.temperature)), labels),
        }

    def predict(
        self,
        paths: Iterable[str | Path],
        *,
        batch_size: int = EVALUATION_BATCH,
        device: torch.device | str | None = None,
        top_k: int = 1,
        threshold: float | None = None,
        cascade: Cascade | None = None,
    ) -> list[dict[str, Any]]:
        """Classify image files.

        Args:
            batch_size: Images in memory at once; see `predict_probs`, as for the device.
            top_k: How many of the most probable classes to name.
            threshold: Probability from which on a class is in an image's set, of
                `dnas_ens.metrics.conformal.conformal_threshold`; None for no sets.
            cascade: When to ask no further members, of `dnas_ens.ensembles.cascade.fit_cascade`; None to ask all.

        Returns:
            One dict a path, in order: ``path``; ``label``, the class name (the index as text where names are
            unknown); its ``probability`` in [0, 1]; ``entropy`` of the prediction and ``mutual_information``
            between it and the member, in nats; ``votes``, how many members find this class most probable. With
            ``top_k`` above 1 ``top``, pairs of class and probability; with a threshold ``set``, the classes in it;
            with a cascade ``asked``, how many members were asked, which entropy, information and votes are of.

        Raises:
            UserError: A path instead of a list, a file that is not an image, or no preprocessing.
        """
        if isinstance(paths, str | Path):
            raise UserError(f"predict was given the single path {paths}.", f"Give a list: [{str(paths)!r}].")
        if self.preprocessing is None:
            raise UserError("The ensemble does not know how its members want images.", GIVE_PREPROCESSING)
        _check_batch_size(batch_size)
        rows: list[dict[str, Any]] = []
        files = list(paths)
        for start in range(0, len(files), batch_size):
            chunk = files[start : start + batch_size]
            images = torch.stack(list(in_threads(self.preprocessing.read, chunk)))
            if cascade is None:
                probs = self.predict_probs(images, batch_size=batch_size, device=device)
                asked = np.full(len(chunk), self.num_members)
            else:
                probs, asked = self.cascade_probs(images, cascade, batch_size=batch_size, device=device)
            found: dict[int, dict[str, Any]] = {}
            for count in np.unique(asked):
                images_of = np.flatnonzero(asked == count)
                labelled = self._labelled(probs[:count, images_of], top_k=top_k, threshold=threshold)
                found |= zip(images_of, labelled, strict=True)
            for index, path in enumerate(chunk):
                more = {} if cascade is None else {"asked": int(asked[index])}
                rows.append({"path": str(path), **found[index], **more})
        return rows

    def _labelled(
        self, probs: npt.NDArray[np.float32], *, top_k: int, threshold: float | None
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of `predict` for the probabilities (m, N, K) of the first m members."""
        shares = normalise_weights(self._shares()[: len(probs)], len(probs))
        averaged = tempered(np.tensordot(shares, probs.astype(np.float64), axes=1), float(self.temperature))
        names = self.classes or [str(index) for index in range(averaged.shape[1])]
        best = np.argsort(-averaged, axis=1, kind="stable")[:, : max(1, top_k)]
        sets = None if threshold is None else prediction_sets(averaged, threshold)
        uncertainty, information = entropy(averaged), mutual_information(probs, shares)
        votes = (probs.argmax(axis=2) == best[:, 0]).sum(axis=0)
        for image, classes in enumerate(best):
            row = {
                "label": names[classes[0]],
                "probability": float(averaged[image, classes[0]]),
                "entropy": float(uncertainty[image]),
                "mutual_information": float(information[image]),
                "votes": int(votes[image]),
            }
            if top_k > 1:
                row["top"] = [(names[index], float(averaged[image, index])) for index in classes]
            if sets is not None:
                row["set"] = [names[index] for index in np.flatnonzero(sets[image])]
            yield row

    def _labelled_probs(
        self, data: Split | Batches, *, batch_size: int, device: torch.device | str | None
    ) -> tuple[npt.NDArray[np.float32], IntArray]:
        """Return the members' probabilities (M, N, K) and the labels (N,), both checked."""
        if isinstance(data, Split):
            probs = self.predict_probs(data, batch_size=batch_size, device=device)
            labels = [data.labels]
        else:
            labels = []

            def images() -> Iterator[Tensor]:
                for inputs, classes in one_pass(data):
                    check_images(inputs, self.preprocessing)
                    labels.append(class_indices(classes, len(inputs)))
                    yield inputs

            probs = self._batch_probs(images(), device)
        found: IntArray = torch.cat(labels).long().cpu().numpy()
        if found.min() < 0 or found.max() >= probs.shape[2]:
            raise UserError(
                f"Labels reach from {found.min()} to {found.max()}, but the ensemble has {probs.shape[2]} classes.",
                "Evaluate on data with the classes that the members were trained on.",
            )
        return probs, found

    def _shares(self) -> npt.NDArray[np.float64]:
        """Return the combining weights (M,) in double precision, with sum 1."""
        return normalise_weights(self.weights.cpu().double().numpy(), self.num_members)

    def averaged(
        self, member_probs: npt.NDArray[np.floating], cascade: Cascade | None = None
    ) -> tuple[FloatArray, IntArray]:
        """Average stored probabilities of the members, before the temperature.

        Args:
            member_probs: (M, N, K).
            cascade: Whose members are averaged; None for all of them.

        Returns:
            Class probabilities (N, K), and how many members they are of (N,).
        """
        if cascade is not None:
            return cascaded(member_probs, self._shares(), cascade.threshold)
        averaged: FloatArray = np.tensordot(self._shares(), member_probs.astype(np.float64), axes=1)
        return averaged, np.full(member_probs.shape[1], self.num_members)

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        numbers: Sequence[int] | None = None,
        num_trained: int | None = None,
        notes: str | None = None,
    ) -> None:
        """Write ensemble.json, one safetensors file a member and MODEL_CARD.md; every file is replaced as a whole.

        ensemble.json comes last: a folder without it was interrupted and does not load.

        Args:
            folder: Made where it is absent.
            overwrite: Whether an ensemble in it may be replaced.
            numbers: Names of the members' folders under members/; default: 0 to M - 1.
            num_trained: Networks trained for the ensemble, in folders from 0 on, of which the members were chosen;
                what the others cost counts. Default: the members alone.
            notes: Markdown for the model card: where the images are from, what was measured, what it is not for.

        Raises:
            UserError: The folder holds an ensemble already, or the disk is full or cannot be written.
        """
        stored = StoredEnsemble(
            members=list(self.members),
            weights=self.weights.cpu().double().tolist(),
            temperature=float(self.temperature),
            classes=self.classes,
            preprocessing=self.preprocessing,
            outputs=self.outputs,
        )
        write_ensemble(Path(folder), stored, overwrite=overwrite, numbers=numbers, num_trained=num_trained, notes=notes)

    @classmethod
    def load(cls, folder: str | Path, *, members: Sequence[nn.Module] | None = None) -> Ensemble:
        """Rebuild a saved ensemble, or the one of a run folder, on the CPU and in evaluation mode.

        Args:
            folder: What `save` wrote, a run folder, or where there is no such folder the name of an ensemble that comes
                with the package: "fashion-mnist".
            members: Fresh modules to fill, in order: one for every member, or one for every member of the
                kind "external", which only its owner can build.

        Raises:
            UserError: ensemble.json is missing or malformed; a member's file is outside the folder, is missing or
                damaged, or does not fit its member; or modules are missing.
        """
        return cls(**vars(read_ensemble(folder, members=members))).eval()


def load(folder: str | Path, *, members: Sequence[nn.Module] | None = None) -> Ensemble:
    """Load the ensemble of a run folder, one that `Ensemble.save` wrote, or "fashion-mnist"; see `Ensemble.load`."""
    return Ensemble.load(folder, members=members)


def _as_members(members: Iterable[nn.Module] | nn.Module) -> list[nn.Module]:
    """Return members as a list; UserError for none, or for one module, whose layers would be taken for members."""
    if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList):
        raise UserError(
            f"One {type(members).__name__} was given where a list of members is wanted.",
            "Put it into a list: Ensemble([network]).",
        )
    found = list(members)
    if not found:
        raise UserError("The ensemble has no members.", "Give at least one network.")
    for member in found:
        if not isinstance(member, nn.Module):
            raise UserError(f"A member is a {type(member).__name__}.", "Give torch modules that map images to logits.")
    return found


def _as_weights(weights: Sequence[float] | npt.NDArray[np.floating] | Tensor | None, num_members: int) -> list[float]:
    """Return combining weights that sum to 1, equal ones for None."""
    remedy = "Give one non-negative number a member, not all 0."
    values = None
    try:
        if weights is not None:
            given = weights.detach().cpu() if isinstance(weights, Tensor) else weights
            values = np.asarray(given, dtype=np.float64)
            if values.ndim != 1:
                raise UserError(f"The combining weights have shape {values.shape}.", remedy)
        shares = normalise_weights(values, num_members)
    except (TypeError, ValueError) as error:
        raise UserError(f"The combining weights do not fit: {error}.", remedy) from error
    # Weights that were rounded to single precision and saved must come back bit-equal.
    exact = shares if values is None or abs(values.sum() - 1.0) >= 1e-6 else values
    return [float(value) for value in exact]


def _as_outputs(outputs: object, members: Sequence[nn.Module]) -> list[Outputs | None]:
    """Return what each member returns, None where that is not known; networks of ours return logits."""
    given = [outputs] * len(members) if outputs is None or isinstance(outputs, str) else outputs
    if not isinstance(given, list | tuple) or len(given) != len(members):
        raise UserError(
            f"The outputs of {len(members)} members are {outputs!r}.",
            'Give "logits" or "probs" for all of them, or a list with one of these for each.',
        )
    for each in given:
        check_outputs(each)
    return [
        "logits" if each is None and isinstance(member, Network | ReferenceModel) else each
        for each, member in zip(given, members, strict=True)
    ]


def _as_classes(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return class names, which must be text, as an ensemble's file holds them."""
    if classes is None:
        return None
    names = tuple(classes)
    if isinstance(classes, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"The classes are {classes!r}.", "Give a list of names as text, one a class.")
    return tuple(str(name) for name in names)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}.", "Give a number of images from 1 up.")


def _home_of(members: Iterable[nn.Module]) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of an ensemble's own numbers: the first member's device, float64 if any member has that.

    Never less than float32: an average over members in half precision would be rounded as they are.
    """
    parameters = [parameter for member in members for parameter in member.parameters() if parameter.is_floating_point()]
    wide = any(parameter.dtype == torch.float64 for parameter in parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    return device, torch.float64 if wide else torch.float32
