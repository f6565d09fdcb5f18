"""Evaluating a run folder under shift: its options, shift.npz, and from it shift.json and shift.md.

Importing it does not import torch, so that a command line can list the options at once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.config import require
from dnas_ens.data.names import CORRUPTION_NAMES, SEVERITIES, check_corruption, check_severity
from dnas_ens.errors import UserError
from dnas_ens.evaluate.array_file import load_arrays, save_arrays
from dnas_ens.evaluate.predictions import source_of

if TYPE_CHECKING:
    import torch

    from dnas_ens.data.dataset import ImageData
    from dnas_ens.ensembles.ensemble import Ensemble
    from dnas_ens.run.folder import RunFolder

#: Stands for the data sets of `dnas_ens.data.names.OUT_OF_DISTRIBUTION` that are on the disk.
USUAL = "auto"
#: Seed of the corruptions: the same for every run, so that runs are compared on the same images.
CORRUPTION_SEED = 0
#: Prefix of a corruption that comes from the public files.
CIFAR10_C = "cifar10-c/"
#: Members' probabilities under shift, from which the other files can be recomputed.
FILE = "shift.npz"


@dataclass(frozen=True, kw_only=True)
class ShiftOptions:
    """What is measured under shift.

    Raises:
        UserError: An unknown corruption or severity, or an option without ``--shift``.
    """

    shift: bool = False
    """Measure corrupted test images and images of other data sets as well."""
    corruptions: tuple[str, ...] = CORRUPTION_NAMES
    """Corruptions of the test images; the flag alone means none."""
    severities: tuple[int, ...] = SEVERITIES
    """How strong, from 1 to 5."""
    ood: tuple[str, ...] = (USUAL,)
    """Other data sets or folders to tell from the run's own images; auto: the usual ones that are on the disk."""
    cifar10_c: Path | None = None
    """Folder of the public CIFAR-10-C .npy files, here or below the data root; for runs on cifar10."""

    def __post_init__(self) -> None:
        for name in self.corruptions:
            check_corruption(name)
        for severity in self.severities:
            check_severity(severity)
        if not self.severities:
            raise UserError("--severities is empty.", "Give whole numbers from 1 to 5.")
        # Duplicates count once, and a table reads best in order.
        object.__setattr__(self, "corruptions", tuple(dict.fromkeys(self.corruptions)))
        object.__setattr__(self, "severities", tuple(sorted(set(self.severities))))
        object.__setattr__(self, "ood", tuple(dict.fromkeys(self.ood)))
        changed = [f.name for f in fields(self) if f.name != "shift" and getattr(self, f.name) != f.default]
        if changed and not self.shift:
            flag = "--" + changed[0].replace("_", "-")
            raise UserError(f"{flag} is an option of --shift, which is not given.", "Add --shift.")


@dataclass(frozen=True, kw_only=True)
class ShiftPredictions:
    """The members' class probabilities on corrupted test images and on images of other data sets.

    Together with predictions.npz (val and clean test images) all that the tables are computed from.

    Args:
        corruptions: R names, those of the public files after "cifar10-c/".
        severities: R severities, 1 to 5.
        probs: (R, M, N, K) float32, in [0, 1].
        labels: (N,) int64.
        foreign: Name of a data set -> (M, N_foreign, K) float32, in [0, 1].
        seed: Of the corruptions.
        source: What they are of, as `Predictions` notes it.
    """

    corruptions: Sequence[str]
    severities: Sequence[int]
    probs: np.ndarray
    labels: np.ndarray
    foreign: Mapping[str, np.ndarray]
    seed: int = CORRUPTION_SEED
    source: str = ""

    def save(self, path: Path) -> None:
        """Write the arrays to one compressed .npz file, atomically."""
        arrays: dict[str, Any] = {
            "corruptions": np.array(list(self.corruptions), dtype=np.str_),
            "severities": np.array(list(self.severities), dtype=np.int64),
            "probs": self.probs.astype(np.float32),
            "labels": self.labels,
            "foreign_names": np.array(list(self.foreign), dtype=np.str_),
            "seed": np.array(self.seed),
            "source": np.array(self.source),
            # Numbered, because a name may be a path, which an archive's index cannot hold.
            **{f"foreign_{i}": probs.astype(np.float32) for i, probs in enumerate(self.foreign.values())},
        }
        save_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path) -> ShiftPredictions:
        """Read what ``save`` wrote.

        Raises:
            UserError: If the file is missing or damaged.
        """

        def made(stored: dict[str, np.ndarray]) -> ShiftPredictions:
            return cls(
                corruptions=stored["corruptions"].tolist(),
                severities=stored["severities"].tolist(),
                probs=stored["probs"],
                labels=stored["labels"],
                foreign={name: stored[f"foreign_{i}"] for i, name in enumerate(stored["foreign_names"].tolist())},
                seed=int(stored["seed"]),
                source=str(stored.get("source", "")),
            )

        return load_arrays(path, made)


def predict_shift(
    ensemble: Ensemble,
    data: ImageData,
    options: ShiftOptions,
    *,
    usual: Sequence[str] = (),
    data_root: Path | None = None,
    device: torch.device | str = "cpu",
) -> ShiftPredictions:
    """Predict corrupted test images and foreign images with every member, with a progress bar.

    Args:
        data: The run's data; nothing but its test split is corrupted.
        usual: What "auto" in `options.ood` stands for; a data set among them that is not on the disk is left out
            with a line that says so.

    Raises:
        UserError: A data set or the CIFAR-10-C files cannot be read or do not fit the run.
    """
    from dnas_ens.data.cifar10_c import Cifar10C
    from dnas_ens.data.corruptions import corrupt
    from dnas_ens.run.progress import Progress

    if data.trunk is not None:
        raise UserError(
            "The run's data are maps of a trunk, and shifts are those of pictures.",
            "Evaluate it without --shift.",
        )
    public = None if options.cifar10_c is None else Cifar10C(options.cifar10_c, data, data_root=data_root)
    foreign = dict(_foreign_images(data, options, usual=usual, data_root=data_root))
    names = [*options.corruptions, *(CIFAR10_C + name for name in (public.names if public else ()))]
    ensemble.to(device)
    probs: list[np.ndarray] = []
    with Progress(len(names) + len(foreign), description="shift", steps_per_epoch=len(options.severities)) as progress:
        images = data.test.images.to(device)
        for done, name in enumerate(names, start=1):
            for severity in options.severities:
                if public is not None and name.startswith(CIFAR10_C):
                    corrupted = public.images(name.removeprefix(CIFAR10_C), severity)
                else:
                    corrupted = corrupt(images, name, severity, seed=CORRUPTION_SEED)
                probs.append(ensemble.predict_probs(corrupted))
                progress.step(corruption=name, severity=severity)
                progress.count_images(len(corrupted))
            progress.epoch(done, corruption=name)
        predicted = {}
        for done, (name, pixels) in enumerate(foreign.items(), start=len(names) + 1):
            predicted[name] = ensemble.predict_probs(pixels)
            progress.count_images(len(pixels))
            progress.epoch(done, foreign=name)
    labels = data.test.labels.cpu().numpy()
    empty = (0, ensemble.num_members, len(labels), data.num_classes)
    return ShiftPredictions(
        corruptions=[name for name in names for _ in options.severities],
        severities=[severity for _ in names for severity in options.severities],
        probs=np.stack(probs) if probs else np.empty(empty, dtype=np.float32),
        labels=labels,
        foreign=predicted,
    )


def _foreign_images(
    data: ImageData, options: ShiftOptions, *, usual: Sequence[str], data_root: Path | None
) -> Iterator[tuple[str, torch.Tensor]]:
    from dnas_ens.data.out_of_distribution import load_out_of_distribution

    for name in options.ood:
        if name != USUAL:
            yield name, load_out_of_distribution(name, data, data_root=data_root)
            continue
        for candidate in usual:
            if candidate in options.ood:
                continue
            try:
                # No download without being asked.
                images = load_out_of_distribution(candidate, data, data_root=data_root, download=False)
            except UserError as error:
                print(f"without images of {candidate}: {error.cause}", file=sys.stderr, flush=True)
                print(f"`--shift --ood {candidate}` downloads them", file=sys.stderr, flush=True)
            else:
                yield candidate, images


def predict_run_shift(
    run: RunFolder, data: ImageData, options: ShiftOptions, *, device: torch.device | str = "cpu"
) -> ShiftPredictions:
    """Predict the run's images under shift with its ensemble, and write shift.npz; see `predict_shift`."""
    from dnas_ens.config import DataConfig
    from dnas_ens.config.fields import override
    from dnas_ens.data.names import OUT_OF_DISTRIBUTION
    from dnas_ens.ensembles.ensemble import Ensemble

    config = override(DataConfig(), run.config["search"]["data"])
    shift = predict_shift(
        Ensemble.load(run.path),
        data,
        options,
        usual=OUT_OF_DISTRIBUTION.get(config.data, ()),
        data_root=config.data_root,
        device=device,
    )
    shift = replace(shift, source=source_of(run.path, data.fingerprint))
    shift.save(run.path / FILE)
    return shift


def stored_shift(folder: Path, *, source: str) -> ShiftPredictions:
    """Return the predictions under shift that a folder keeps.

    Args:
        source: What the folder's `Predictions` are of.

    Raises:
        UserError: There are none, the file is damaged, or they are of another ensemble.
    """
    evaluate = f"Run python -m dnas_ens.evaluate {shlex.quote(str(folder))} --shift without --from-predictions first."
    require((folder / FILE).exists(), f"{folder} holds no predictions under shift.", evaluate)
    found = ShiftPredictions.load(folder / FILE)
    require(found.source == source, f"The predictions under shift in {folder} are of an earlier ensemble.", evaluate)
    return found
