"""What is measured on the solutions: the landscape on val, then ensembles and pairs on test; all of it is `Found`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnas_ens.data.batches import Augmentation, iterate_batches
from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.ensembles.soups import BarrierCheck, LossBarrier, loss_barrier
from dnas_ens.evaluate.predictions import Predictions, predict_splits
from dnas_ens.metrics.calibration import calibrated_nll, fit_temperature
from dnas_ens.metrics.diversity import pairwise_disagreement, pairwise_shared_errors, predictive_js
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.metrics.significance import holm
from dnas_ens.training.prediction import EVALUATION_BATCH
from studies.loss_landscape.landscape import (
    DiversityAccuracy,
    PairContrast,
    contrast_pairs,
    diversity_accuracy_plane,
    embed_predictions,
    normalised_disagreement,
    share_of_independent,
    weight_cosines,
)
from studies.loss_landscape.solutions import Bench, Solution

#: Val images of the landscape; the whole split would tell no more and cost more.
LANDSCAPE_IMAGES = 2000
#: Seeds of each architecture in the t-SNE, which more would only crowd.
EMBEDDED_SEEDS = 3
#: Training images that give BatchNorm its statistics along a line.
BATCH_NORM_IMAGES = 2048
#: Ensembles of each size that are averaged over; with 50 the mean still depends on which were drawn.
MAX_SUBSETS = 500
#: Measures of pairs; the first one decides the answer and was chosen beforehand.
PAIR_MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "normalised disagreement": normalised_disagreement,
    "disagreement": lambda probs, _: pairwise_disagreement(probs),
    "disagreement over that of independent errors": share_of_independent,
    "predictive JS": lambda probs, _: predictive_js(probs),
    "shared errors": pairwise_shared_errors,
}
SEEDS, KINDS, TRAJECTORY = (
    "seeds of one architecture",
    "different architectures, one seed each",
    "last checkpoints of one training",
)
#: How good a pair is as an ensemble, beside the measures of its distance.
PAIR_NLL = "calibrated NLL of both averaged"


@dataclass(frozen=True, eq=False, kw_only=True)
class Landscape:
    """Checkpoints on val images; the first architecture is the one of the matrices, the plane's base and the lines.

    Args:
        cosines: Of the weights of its checkpoints, trajectory by trajectory, (S C, S C).
        disagreement: Of their predictions, the same order.
        normalised: The same over the mean error rate of both.
        of_independent: The same over that of independent errors.
        embedded: The solutions that are embedded.
        points: t-SNE of their checkpoints but for those before training, which are all alike, (number, C - 1, 2).
        plane: The checkpoints of all solutions beside the first solution as base, in the same order.
        lines: Losses between two of its solutions, and along the first one's last half.
    """

    cosines: np.ndarray
    disagreement: np.ndarray
    normalised: np.ndarray
    of_independent: np.ndarray
    embedded: list[int]
    points: np.ndarray
    plane: DiversityAccuracy
    lines: dict[str, LossBarrier]


def measure_landscape(bench: Bench, solutions: Sequence[Solution]) -> Landscape:
    """Measure weights, predictions and losses of all checkpoints on val."""
    view = bench.data.val.drawn(LANDSCAPE_IMAGES)
    labels = view.labels.cpu().numpy()
    probs = np.concatenate([bench.predict(one.architecture, one.states, view) for one in solutions])
    focus = [one for one in solutions if one.architecture == 0]
    states = [state for one in focus for state in one.states]
    own, last = probs[: len(states)], len(solutions[0].states) - 1
    embedded = [one.index for one in solutions if one.index % bench.seeds < EMBEDDED_SEEDS]
    trained = probs.reshape(len(solutions), last + 1, *probs.shape[1:])[embedded, 1:]
    return Landscape(
        cosines=weight_cosines(bench.training(0, 0).network, states),
        disagreement=pairwise_disagreement(own),
        normalised=normalised_disagreement(own, labels),
        of_independent=share_of_independent(own, labels),
        embedded=embedded,
        points=embed_predictions(trained.reshape(-1, *probs.shape[1:])).reshape(*trained.shape[:2], 2),
        plane=diversity_accuracy_plane(probs[last], probs, labels),
        lines=_lines(bench, focus, view),
    )


def _lines(bench: Bench, focus: Sequence[Solution], view: Split) -> dict[str, LossBarrier]:
    """Measure the NLL between solutions, and between a middle checkpoint and the end of its trajectory."""
    augmentation = Augmentation.for_data(bench.data, augment=False)
    splits = (bench.data.train.drawn(BATCH_NORM_IMAGES), view)
    train, val = (
        functools.partial(iterate_batches, split.to(bench.device), EVALUATION_BATCH, augmentation=augmentation)
        for split in splits
    )
    middle = len(focus[0].states) // 2
    ends = {"along one trajectory, from its middle": (focus[0].states[middle], focus[0].states[-1])}
    if len(focus) > 1:
        ends["between two seeds"] = (focus[0].states[-1], focus[1].states[-1])
    check = BarrierCheck(num_points=11, threshold=float("inf"))
    model = bench.network(0, focus[0].states[-1])
    return {name: loss_barrier(model, *pair, train, val, check=check) for name, pair in ends.items()}


def evaluate(bench: Bench, solutions: Sequence[Solution], folder: Path) -> tuple[Predictions, Predictions]:
    """Predict val and test with all solutions, and with the last S checkpoints of the first, once; then load."""
    first = solutions[0]
    late = [(0, state) for state in first.states[1:][-bench.seeds :]]
    ends = [(one.architecture, one.states[-1]) for one in solutions]
    data, found = bench.data, []
    for name, members in (("predictions.npz", ends), ("trajectory-predictions.npz", late)):
        if not (folder / name).exists():
            ensemble = Ensemble(
                [bench.network(*member) for member in members],
                preprocessing=Preprocessing.of(data),
            )
            predict_splits(ensemble, data, device=bench.device).save(folder / name)
        found.append(Predictions.load(folder / name))
    return found[0], found[1]


def contrasts(
    predictions: Predictions, groups: Sequence[int], members: Sequence[int]
) -> dict[str, tuple[PairContrast, float]]:
    """Compare seed pairs with pairs of architectures on test, by every measure, with Holm-corrected p-values.

    Args:
        predictions: Of all solutions.
        groups: The architecture of each solution.
        members: The solutions that take part.
    """
    chosen = list(members)
    probs, labels = predictions.test_probs[chosen].astype(np.float64), predictions.test_labels
    of_members = [groups[index] for index in chosen]
    found = {name: contrast_pairs(measure(probs, labels), of_members) for name, measure in PAIR_MEASURES.items()}
    found[PAIR_NLL] = contrast_pairs(_pair_nll(predictions, chosen), of_members)
    corrected = holm([contrast.p_value for contrast in found.values()])
    return {name: (found[name], p_value) for name, p_value in zip(found, corrected, strict=True)}


def _pair_nll(predictions: Predictions, members: Sequence[int]) -> np.ndarray:
    """Return the calibrated NLL on test of every ensemble of two, (M, M); the diagonal is 0."""
    losses = np.zeros((len(members), len(members)))
    for row, column in itertools.combinations(range(len(members)), 2):
        pair = [members[row], members[column]]
        losses[row, column] = losses[column, row] = score(predictions, pair)[2]
    return losses


def score(predictions: Predictions, members: Sequence[int]) -> tuple[float, float, float]:
    """Return accuracy, NLL and calibrated NLL on test of the average of some members."""
    on_val, on_test = (
        probs[list(members)].astype(np.float64).mean(axis=0)
        for probs in (predictions.val_probs, predictions.test_probs)
    )
    labels = predictions.test_labels
    temperature = fit_temperature(on_val, predictions.val_labels)
    return accuracy(on_test, labels), nll(on_test, labels), calibrated_nll(on_test, labels, temperature)


def ensemble_sizes(predictions: Predictions, subsets: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, float]]:
    """Return metrics on test against ensemble size, averaged over ensembles of each size.

    Args:
        predictions: Of the members to choose from.
        subsets: For every size, the ensembles as members' positions.
    """
    rows = []
    for of_size in subsets:
        means = np.mean([score(predictions, subset) for subset in of_size], axis=0)
        rows.append(
            {
                "size": len(of_size[0]),
                "ensembles": len(of_size),
                **dict(zip(("accuracy", "nll", "calibrated_nll"), means.tolist(), strict=True)),
            }
        )
    return rows


def subsets_of_seeds(groups: Sequence[int], members: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Return for each size the ensembles of seeds of one architecture, at most `MAX_SUBSETS`."""
    by_group = [[index for index in members if groups[index] == group] for group in {groups[i] for i in members}]
    sizes = range(1, min(len(group) for group in by_group) + 1)
    return [_some([subset for group in by_group for subset in itertools.combinations(group, size)]) for size in sizes]


def subsets_of_groups(groups: Sequence[int], members: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Return for each size ensembles of different architectures, one seed each, at most `MAX_SUBSETS`."""
    generator = np.random.default_rng(0)
    names = sorted({groups[index] for index in members})
    by_group = {name: [index for index in members if groups[index] == name] for name in names}
    found = []
    for size in range(1, len(names) + 1):
        drawn = {
            tuple(int(generator.choice(by_group[name])) for name in sorted(generator.permutation(names)[:size]))
            for _ in range(10 * MAX_SUBSETS)
        }
        found.append(_some(sorted(drawn)))
    return found


def _some(subsets: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return at most `MAX_SUBSETS` of them, drawn at random."""
    chosen = np.random.default_rng(0).permutation(len(subsets))[:MAX_SUBSETS]
    return [subsets[index] for index in sorted(chosen)]


class Found:
    """Everything the report and the pictures show.

    Args:
        bench: What was trained how.
        solutions: M solutions.
        landscape: Of val.
        predictions: Of the solutions.
        late: Of the last checkpoints of the first training.

    Attributes:
        groups: The architecture of every solution.
        comparisons: For each kind of architectures (cells, reference models) with several: its contrasts.
        sizes: For each kind and way of building an ensemble: metrics on test against size.
    """

    def __init__(
        self,
        bench: Bench,
        solutions: Sequence[Solution],
        landscape: Landscape,
        predictions: Predictions,
        late: Predictions,
    ) -> None:
        self.bench, self.solutions, self.landscape = bench, solutions, landscape
        self.predictions = predictions
        self.groups = groups = [one.architecture for one in solutions]
        self.comparisons: dict[str, dict[str, tuple[PairContrast, float]]] = {}
        self.sizes: dict[str, list[dict[str, float]]] = {}
        kinds = {kind: self.members(kind) for kind in ("genotypes", "reference models")}
        for kind, members in kinds.items():
            mark = f"{kind}: " if all(kinds.values()) else ""
            if members:
                self.sizes[f"{mark}{SEEDS}"] = ensemble_sizes(predictions, subsets_of_seeds(groups, members))
            if len({groups[index] for index in members}) > 1:
                self.comparisons[kind] = contrasts(predictions, groups, members)
                self.sizes[f"{mark}{KINDS}"] = ensemble_sizes(predictions, subsets_of_groups(groups, members))
        last = len(late.val_probs)
        newest = [[tuple(range(last - size, last))] for size in range(1, last + 1)]
        self.sizes[TRAJECTORY] = ensemble_sizes(late, newest)

    def members(self, kind: str) -> list[int]:
        """Return the solutions of genotypes or of reference models."""
        return [
            index
            for index, group in enumerate(self.groups)
            if (self.bench.architectures[group].genotype is not None) == (kind == "genotypes")
        ]


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
