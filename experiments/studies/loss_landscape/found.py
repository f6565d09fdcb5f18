"""All that the study found, from predictions and landscape; what report and pictures show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.metrics.diversity import pairwise_disagreement
from studies.loss_landscape.measures import (
    Landscape,
    contrasts,
    ensemble_sizes,
    subsets_of_groups,
    subsets_of_seeds,
)
from studies.loss_landscape.member_groups import PairContrast
from studies.loss_landscape.solutions import Bench, Solution

SEEDS, KINDS, TRAJECTORY = (
    "seeds of one architecture",
    "different architectures, one seed each",
    "last checkpoints of one training",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Found:
    """Everything the report and the pictures show.

    Args:
        bench: What was trained how.
        solutions: M solutions.
        landscape: Of val.
        predictions: Of the solutions.
        comparisons: For each kind of architectures (cells, reference models) with several: its contrasts.
        sizes: For each kind and way of building an ensemble: metrics on test against size.
    """

    bench: Bench
    solutions: Sequence[Solution]
    landscape: Landscape
    predictions: Predictions
    comparisons: dict[str, dict[str, tuple[PairContrast, float]]]
    sizes: dict[str, list[dict[str, float]]]

    @classmethod
    def of(
        cls,
        bench: Bench,
        solutions: Sequence[Solution],
        landscape: Landscape,
        predictions: Predictions,
        late: Predictions,
    ) -> Found:
        """Compute the comparisons and the curves."""
        groups = [one.architecture for one in solutions]
        kinds: dict[str, list[int]] = {"genotypes": [], "reference models": []}
        for index, group in enumerate(groups):
            cells = bench.architectures[group].genotype is not None
            kinds["genotypes" if cells else "reference models"].append(index)
        comparisons, sizes = {}, {}
        for kind, members in kinds.items():
            if members:
                mark = f"{kind}: " if all(kinds.values()) else ""
                sizes[f"{mark}{SEEDS}"] = ensemble_sizes(predictions, subsets_of_seeds(groups, members))
            if len({groups[index] for index in members}) > 1:
                comparisons[kind] = contrasts(predictions, groups, members)
                sizes[f"{mark}{KINDS}"] = ensemble_sizes(predictions, subsets_of_groups(groups, members))
        last = len(late.val_probs)
        newest = [[tuple(range(last - size, last))] for size in range(1, last + 1)]
        sizes[TRAJECTORY] = ensemble_sizes(late, newest)
        return cls(
            bench=bench,
            solutions=solutions,
            landscape=landscape,
            predictions=predictions,
            comparisons=comparisons,
            sizes=sizes,
        )

    @property
    def groups(self) -> list[int]:
        """The architecture of every solution."""
        return [one.architecture for one in self.solutions]


def records(found: Found) -> list[dict[str, Any]]:
    """Return what the tables and pictures show, one record a line; matrices to four digits."""

    def rounded(array: np.ndarray) -> list[Any]:
        # JSON has no NaN.
        return [None if value != value else value for value in np.round(array, 4).tolist()]

    landscape, plane = found.landscape, found.landscape.plane
    return [
        *({"kind": "solution", "index": one.index, **one.record} for one in found.solutions),
        *(
            {"kind": "contrast", "of": kind, "measure": name, **asdict(contrast), "holm": p_value}
            for kind, rows in found.comparisons.items()
            for name, (contrast, p_value) in rows.items()
        ),
        *({"kind": "size", "of": name, **row} for name, rows in found.sizes.items() for row in rows),
        *(
            {"kind": "line", "of": name, "nll": rounded(line.nll), "barrier": line.barrier}
            for name, line in landscape.lines.items()
        ),
        {"kind": "weight cosines", "matrix": np.round(landscape.cosines, 4).tolist()},
        {"kind": "disagreement of checkpoints", "matrix": np.round(landscape.disagreement, 4).tolist()},
        {
            "kind": "disagreement of solutions",
            "matrix": np.round(pairwise_disagreement(found.predictions.test_probs), 4).tolist(),
        },
        {
            "kind": "plane",
            "base_accuracy": plane.base_accuracy,
            "accuracy": rounded(plane.accuracy),
            "diversity": rounded(plane.diversity),
        },
    ]
