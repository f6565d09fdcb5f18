"""What methods are given and give: budgets, trained networks, searches, and the rows of the comparison.

Legend: M members of the searched ensemble, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from frontier import Option

from dnas_ens.space.genotype import Genotype

if TYPE_CHECKING:
    from dnas_ens.evaluate.predictions import Predictions
    from dnas_ens.metrics.cross_fitting import CrossFit


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much the methods may train.

    Args:
        pool_size: Random cells of the pool, of which M are chosen (NES-RS) and the best is taken for a deep
            ensemble; networks an evolution trains (NES-RE).
        population: Networks alive in the evolution.
        parents: Candidates for its next parent.
        epochs: Other epoch counts at which the methods that split between members and epochs are trained.
        members: Larger sizes of ours, whose total cost the methods that can grow are grown to.
    """

    pool_size: int = 10
    population: int = 5
    parents: int = 2
    epochs: tuple[int, ...] = ()
    members: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the comparison.

    Args:
        name: What it is; the same with every seed.
        predictions: On val and test.
        networks: Networks trained for it, discarded ones included.
        cpu_seconds: All training it needs, the search included where its cells come from it.
        search_seconds: What searching took of that; training networks that are discarded is no part of it.
        label: Its name in the figure; none where it is no method of its own.
        options: The ways it can be had, for the frontier; none where it is no method of its own.
        detail: What differs between seeds, such as a width.
        cross_fit: Weights and temperature from different halves of val, where weights were fitted on val too.
    """

    name: str
    predictions: Predictions
    networks: int
    cpu_seconds: float
    search_seconds: float = 0.0
    label: str = ""
    options: Sequence[Option] = ()
    detail: str = ""
    cross_fit: CrossFit | None = None

    def losses(self) -> np.ndarray:
        """Return the calibrated NLL on every test image, (N,), nats."""
        from dnas_ens.metrics.calibration import per_image_calibrated_nll

        if self.cross_fit is not None:
            return self.cross_fit.per_image_calibrated_nll
        val, test = self.predictions.averaged()
        return per_image_calibrated_nll(val, self.predictions.val_labels, test, self.predictions.test_labels)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Networks trained for a method.

    Args:
        predictions: On val and test, equal weights.
        seconds: CPU seconds of each.
        epochs: Epochs of each.
    """

    predictions: Predictions
    seconds: list[float]
    epochs: int

    def joined(self, more: Trained) -> Trained:
        """Return these networks and others that were trained as long."""
        predictions = self.predictions.with_members_of(more.predictions)
        return replace(self, predictions=predictions, seconds=[*self.seconds, *more.seconds])


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A further search and what it found.

    Args:
        base: Its base cell.
        genotypes: The members it chose.
        seconds: CPU seconds of the search.
        file: Its genotypes.json.
    """

    base: Genotype
    genotypes: list[Genotype]
    seconds: float
    file: Path
