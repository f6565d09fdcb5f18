"""Solutions of several architectures, trained from seeds of their own, with checkpoints along the way.

A study's run folder holds one folder a solution: its checkpoints, and ``solution.json``, written last. A finished
solution is not trained again; one that was interrupted restarts. Legend: S seeds an architecture, M solutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dnas_ens.config import RetrainConfig
from dnas_ens.data.batches import Augmentation
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.ensembles.averaging import copied_to_cpu
from dnas_ens.nn.reference_models import reference_model
from dnas_ens.run.files import load_tensors, read_json, save_tensors, write_json
from dnas_ens.run.progress import CostMeter
from dnas_ens.space.genotype import Genotype
from dnas_ens.training.prediction import predict_log_probs
from dnas_ens.training.trainer import MemberTraining, NetworkTraining

State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The architecture of a solution.

    Args:
        name: How tables and pictures call it.
        genotype: Its cells; None for the reference model of that name.
    """

    name: str
    genotype: Genotype | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution:
    """A finished training.

    Args:
        architecture: Position of its architecture.
        index: Position among all solutions.
        states: Checkpoints, the first before training, the last the solution.
        record: What solution.json holds.
    """

    architecture: int
    index: int
    states: list[State]
    record: dict[str, Any]

    @property
    def epochs(self) -> list[int]:
        """Epochs of the checkpoints."""
        return list(self.record["epochs"])


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """Data, recipe and architectures on a device.

    Args:
        data: Images; ``test`` is read through `dnas_ens.evaluate` alone.
        recipe: How every solution is trained.
        architectures: In the order of tables and pictures.
        seeds: S.
        checkpoints: Checkpoints along a trajectory after the one before training.
        device: Where to train.
    """

    data: ImageData
    recipe: RetrainConfig
    architectures: Sequence[Architecture]
    seeds: int
    checkpoints: int
    device: torch.device

    def training(self, architecture: int, index: int) -> NetworkTraining[Any]:
        """Return a training at its beginning; every index has seeds of its own."""
        name, genotype = self.architectures[architecture].name, self.architectures[architecture].genotype
        if genotype is not None:
            return MemberTraining(genotype, self.data, self.recipe, index=index, device=self.device)

        def build() -> nn.Module:
            return reference_model(name, self.data.num_channels, self.data.num_classes, self.data.image_size)

        return NetworkTraining(build, self.data, self.recipe, index=index, device=self.device)

    def network(self, architecture: int, state: State) -> nn.Module:
        """Return a network of an architecture with the weights of a checkpoint, in evaluation mode."""
        network: nn.Module = self.training(architecture, 0).network
        network.load_state_dict(state)
        return network.eval()

    def checkpoint_epochs(self) -> list[int]:
        """Epochs after which a checkpoint is taken, evenly spread, 0 and the last included."""
        return sorted({int(epoch) for epoch in np.linspace(0, self.recipe.epochs, self.checkpoints + 1).round()})

    def solve(self, folder: Path) -> list[Solution]:
        """Train S solutions of every architecture, or load what was trained in the folder."""
        return [
            self._solution(folder / f"solution-{index}", index // self.seeds, index)
            for index in range(len(self.architectures) * self.seeds)
        ]

    def _solution(self, folder: Path, architecture: int, index: int) -> Solution:
        if not (folder / "solution.json").exists():
            training, cost = self.training(architecture, index), CostMeter()
            epochs = self.checkpoint_epochs()
            save_tensors(folder / "checkpoint-0.safetensors", training.network.state_dict())
            while training.epoch < self.recipe.epochs:
                scalars = training.run_epoch()
                if training.epoch in epochs:
                    name = f"checkpoint-{training.epoch}.safetensors"
                    save_tensors(folder / name, copied_to_cpu(training.network.state_dict()))
            record = {
                "architecture": self.architectures[architecture].name,
                "seeds": vars(training.seeds),
                "epochs": epochs,
                "parameters": training.num_parameters,
                "train_loss": scalars["train_loss"],
                **cost.seconds(),
            }
            write_json(folder / "solution.json", record)
            seconds = record["cpu_seconds"]
            print(f"trained {folder.name}, {record['architecture']}: {seconds:.1f} CPU s", flush=True)
        record = read_json(folder / "solution.json")
        states = [load_tensors(folder / f"checkpoint-{epoch}.safetensors") for epoch in record["epochs"]]
        return Solution(architecture=architecture, index=index, states=states, record=record)

    def predict(self, architecture: int, states: Sequence[State], split: Split) -> np.ndarray:
        """Return probabilities of checkpoints of one architecture, (number, N, K)."""
        augmentation = Augmentation.for_data(self.data, augment=False)
        images = split.to(self.device)

        def probs() -> Iterator[np.ndarray]:
            network = self.training(architecture, 0).network
            for state in states:
                network.load_state_dict(state)
                log_probs = predict_log_probs(network, images, augmentation=augmentation)
                yield log_probs.double().softmax(-1).cpu().numpy()

        return np.stack(list(probs()))
