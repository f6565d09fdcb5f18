"""Trained genotypes and their validation probabilities, each kept in a folder, and the ensemble chosen from them.

Legend: P genotypes in the pool, M members, N validation images, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dnas_ens.ensembles.selection import greedy_selection
from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import check_labels, check_probs, labels_digest, nll
from dnas_ens.run.files import load_tensors, read_json, save_tensors, write_json
from dnas_ens.space.genotype import Genotype
from dnas_ens.types import FloatArray

#: Trains a genotype; the index decides its seeds. Returns its class probabilities (N, K) on the validation images.
TrainFunction = Callable[[Genotype, int], npt.ArrayLike]

VAL_PROBS = "val_probs.safetensors"


@dataclass(frozen=True, kw_only=True)
class FoundEnsemble:
    """A pool and the members that greedy selection chose from it.

    Args:
        pool: P genotypes, in the order they were trained in.
        picked: M positions in the pool, best first.
        val_probs: The members' probabilities on the validation images, (M, N, K), in [0, 1].
        val_nll: NLL of their average there, nats. The members were chosen by it, so it is optimistic.
        parents: The parent of each of the pool, a position or None; empty for a random search.
    """

    pool: tuple[Genotype, ...]
    picked: tuple[int, ...]
    val_probs: npt.NDArray[np.float32]
    val_nll: float
    parents: tuple[int | None, ...] = ()

    @property
    def members(self) -> tuple[Genotype, ...]:
        """The M genotypes of the ensemble, best first."""
        return tuple(self.pool[position] for position in self.picked)


class Evaluations:
    """Trains genotypes and keeps what they predict, so that none is trained twice.

    Each evaluation has the folder ``<index>-<hash of the genotype>`` with genotype.json and val_probs.safetensors.
    Searches that share a folder share the evaluations of equal genotypes at equal indices; the training recipe must be
    the same, which only the caller can know.

    Args:
        train: Trains a genotype and returns its validation probabilities (N, K).
        folder: Where evaluations are kept; None keeps them in memory.
    """

    def __init__(self, train: TrainFunction, val_labels: npt.ArrayLike, *, folder: Path | None = None) -> None:
        self.train, self.val_labels = train, np.asarray(val_labels)
        self.folder = None if folder is None else Path(folder)
        self._in_memory: dict[str, npt.NDArray[np.float32]] = {}

    def name_of(self, genotype: Genotype, index: int) -> str:
        """Return the name of an evaluation's folder."""
        # Not canonical: weights trained under one numbering of the nodes do not fit another.
        text = json.dumps(genotype.to_dict(), sort_keys=True, separators=(",", ":"))
        return f"{index:04d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def folder_of(self, genotype: Genotype, index: int) -> Path | None:
        """Return an evaluation's folder, where ``train`` may put the weights; None without a folder."""
        return None if self.folder is None else self.folder / self.name_of(genotype, index)

    def val_probs(self, genotype: Genotype, index: int) -> npt.NDArray[np.float32]:
        """Return the probabilities (N, K) of a genotype on the validation images, trained only if need be.

        Raises:
            UserError: The training returned, or the folder holds, something other than probabilities for these labels.
        """
        name, folder = self.name_of(genotype, index), self.folder_of(genotype, index)
        if name in self._in_memory:
            return self._in_memory[name]
        # Written last, so this file says that the evaluation is finished.
        if folder is not None and (folder / "genotype.json").is_file():
            self._require_same_labels(folder)
            return self._checked(load_tensors(folder / VAL_PROBS)["val_probs"].numpy(), str(folder))
        probs = self._checked(self.train(genotype, index), f"The training of genotype {index}")
        if folder is None:
            self._in_memory[name] = probs
        else:
            save_tensors(folder / VAL_PROBS, {"val_probs": torch.from_numpy(probs)})
            notes = {
                "index": index,
                "genotype": genotype.to_dict(),
                "val_labels": labels_digest(self.val_labels),
            }
            write_json(folder / "genotype.json", notes)
        return probs

    def label_probs(self, genotype: Genotype, index: int) -> FloatArray:
        """Return the probability of the right class on each validation image, (N,); see `val_probs`."""
        probs = self.val_probs(genotype, index)
        right: FloatArray = probs[np.arange(len(probs)), self.val_labels].astype(np.float64)
        return right

    def found(
        self, pool: Sequence[Genotype], picked: Sequence[int], parents: Sequence[int | None] = ()
    ) -> FoundEnsemble:
        """Return the ensemble of the picked positions of a pool, each trained at its position as index."""
        probs = np.stack([self.val_probs(pool[index], index) for index in picked])
        return FoundEnsemble(
            pool=tuple(pool),
            picked=tuple(picked),
            val_probs=probs,
            val_nll=nll(probs.astype(np.float64).mean(axis=0), self.val_labels),
            parents=tuple(parents),
        )

    def _require_same_labels(self, folder: Path) -> None:
        if read_json(folder / "genotype.json").get("val_labels") != labels_digest(self.val_labels):
            raise UserError(
                f"{folder} holds predictions for other validation images.",
                "Name another folder, or search on the data that it was made with.",
            )

    def _checked(self, probs: npt.ArrayLike, where: str) -> npt.NDArray[np.float32]:
        try:
            checked = check_probs(probs)
            check_labels(self.val_labels, num_images=checked.shape[0], num_classes=checked.shape[1])
        except ValueError as error:
            raise UserError(
                f"{where} gave no validation probabilities: {error}.",
                "Return the class probabilities (N, K) of the images that the labels belong to.",
            ) from error
        return checked.astype(np.float32)


def forward_select(label_probs: npt.ArrayLike, num_members: int) -> list[int]:
    """ForwardSelect of arXiv 2006.08573 by the probabilities of the right class alone, (P, N), in [0, 1].

    Returns M positions, best first; see `dnas_ens.ensembles.selection.greedy_selection`.
    """
    # Rounded probabilities may exceed 1 in the last place.
    right = np.clip(np.asarray(label_probs, dtype=np.float64), 0.0, 1.0)
    # NLL needs no other class, so K = 2 does: a pool of hundreds with K = 100 would not fit into memory.
    binary = np.stack([right, 1.0 - right], axis=-1)
    return greedy_selection(binary, np.zeros(right.shape[1], dtype=np.int64), num_members=num_members)
