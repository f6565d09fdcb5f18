"""Data and a reference model on a device, and what trains and predicts with them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from studies.batches import plain_passes, training_passes
from studies.options import StudyOptions
from studies.training import Training

if TYPE_CHECKING:
    import torch

    from dnas_ens.data.dataset import ImageData, Split
    from dnas_ens.nn.reference_models import ReferenceModel
    from dnas_ens.training.prediction import Batches


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """Data on a device, and what trains reference models on them.

    Args:
        options: How to train.
        data: Images; ``test`` is predicted when everything is chosen.
        device: Where to train.
    """

    options: StudyOptions
    data: ImageData
    device: torch.device

    @classmethod
    def of(cls, options: StudyOptions) -> Bench:
        """Load the data of a study onto its device."""
        from dnas_ens.data import load_data
        from dnas_ens.run.machine import resolve_device

        device = resolve_device(options.device)
        data = load_data(options.data, data_root=options.data_root, limit_train=options.limit_train)
        return cls(options=options, data=data.to(device), device=device)

    def model(self) -> ReferenceModel:
        """Return the model with fresh weights from torch's global generator."""
        import torch

        from dnas_ens.nn.reference_models import reference_model

        data = self.data
        model = reference_model(self.options.model, data.num_channels, data.num_classes, data.image_size)
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def batches(self, split: Split) -> Batches:
        """Return passes over a split in its order, without augmentation."""
        return plain_passes(self.data, split)

    @functools.cached_property
    def statistics_batches(self) -> Batches:
        """Passes over the training images in a random order, for BatchNorm statistics."""
        return self.batches(self.data.train.drawn())

    def predict(self, states: Sequence[Mapping[str, torch.Tensor]], split: Split) -> np.ndarray:
        """Return the probabilities (M, N, K) of states of the model."""
        from dnas_ens.training.prediction import predict_members

        model = self.model()

        def members() -> Iterator[ReferenceModel]:
            for state in states:
                model.load_state_dict(state)
                yield model

        return predict_members(members(), self.batches(split))[0]

    def training(self, *, root: int, member: int, name: str) -> Training:
        """Return a training of the model; `root` and `member` decide its seeds."""
        from dnas_ens.training.step import MemberSeeds

        recipe = self.options.recipe
        return Training(
            self.model,
            training_passes(self.data, recipe),
            recipe,
            MemberSeeds.derive(root, member),
            name=name,
            device=self.device,
        )
