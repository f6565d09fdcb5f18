"""One network trained on what an ensemble says of its images, instead of on their labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dnas_ens.config import RetrainConfig
from dnas_ens.data.dataset import ImageData
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.space.genotype import Genotype
from dnas_ens.training.trainer import MemberTraining


class StudentTraining(MemberTraining):
    """The training of a network that imitates an ensemble (Hinton et al., arXiv 1503.02531, at temperature 1).

    The targets of a step are the ensemble's averaged, tempered probabilities (B, K) of the same augmented images; the
    loss is the cross-entropy with them, whose gradient is that of the KL divergence from the ensemble. Arguments but
    these as in ``MemberTraining``.

    Args:
        teacher: The ensemble; its members want images as the student does.
        teacher_is: Names the teacher in the student's identity, such as the SHA-256 of its manifest.
    """

    def __init__(
        self,
        genotype: Genotype,
        data: ImageData,
        recipe: RetrainConfig,
        *,
        teacher: Ensemble,
        teacher_is: str,
        index: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.teacher, self._teacher_is = teacher.to(device).eval(), teacher_is
        # What other modules compute in a step may not be recorded.
        super().__init__(genotype, data, replace(recipe, cuda_graph="off"), index=index, device=device)

    @torch.no_grad()
    def targets(self, images: Tensor, index: Tensor) -> Tensor:
        """Return the ensemble's probabilities (B, K) of augmented, normalised images (B, C, H, W)."""
        probs: Tensor = self.teacher(images)
        return probs

    def identity(self) -> dict[str, Any]:
        """Return what a state of this training depends on, with the teacher."""
        return {**super().identity(), "teacher": self._teacher_is}
