"""The values that change over a search: weights of the objective's terms, temperature, learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dnas_ens.config import SearchConfig


@dataclass(frozen=True)
class Schedules:
    """Values of one epoch; weights and temperature go linearly from the first architecture epoch to the last.

    Args:
        epoch: Epochs done; for the star alone, which has no epochs, steps done.
    """

    config: SearchConfig
    epoch: int

    @property
    def progress(self) -> float:
        """Where the schedules stand, in [0, 1]: 0 in the first architecture epoch, 1 in the last and after it."""
        bilevel = self.config.bilevel
        if self.config.reads_images:
            first, count = bilevel.warmup_epochs, bilevel.epochs
        else:
            first, count = 0, bilevel.star_steps
        if count - first < 2:
            # One alone is the last.
            return float(self.epoch >= first)
        return min(1.0, max(0.0, (self.epoch - first) / (count - first - 1)))

    @property
    def temperature(self) -> float:
        """Temperature of the relaxation."""
        return self._between(self.config.objective.temperature)

    @property
    def penalty_weight(self) -> float:
        """c, weight of the penalty on similarity."""
        return self._between(self.config.objective.penalty_weight)

    @property
    def commitment(self) -> float:
        """Weight of the distance between members and their discretisations."""
        return self._between(self.config.objective.commitment)

    @property
    def operation_balance(self) -> float:
        """Weight of how unevenly an architecture uses its operations."""
        return self._between(self.config.objective.operation_balance)

    @property
    def auxiliary_skip(self) -> float:
        """Weight of the extra skip on every edge (DARTS-, arXiv 2009.01027)."""
        return self.config.bilevel.auxiliary_skip * (1 - self.progress)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the weights: half a cosine over all epochs."""
        bilevel = self.config.bilevel
        cosine = 0.5 * (1 + math.cos(math.pi * self.epoch / bilevel.epochs))
        return bilevel.min_learning_rate + (bilevel.learning_rate - bilevel.min_learning_rate) * cosine

    def _between(self, ends: tuple[float, float]) -> float:
        return ends[0] + (ends[1] - ends[0]) * self.progress
