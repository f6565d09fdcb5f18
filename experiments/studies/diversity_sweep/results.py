"""Groups of predictors of finished seeds with their metrics and losses, and the curves of searches.

Legend: S seeds, N images, K classes, E evaluated epochs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studies.diversity_sweep.choosing import path_cells
from studies.diversity_sweep.options import (
    BASE_SETTING,
    LIMITS,
    RETRAINED_LIMITS,
    RETRAINED_POINTS,
    SETTINGS,
    STEERED,
)
from studies.diversity_sweep.records import Records
from studies.from_scratch import load

#: A network's or an ensemble's probabilities on val and test, (N, K) each.
Probs = tuple[np.ndarray, np.ndarray]
#: What a group is: its part in the study, setting, where, and "inherited" or "retrained" weights.
Key = tuple[str, str, float | str, str]
WEIGHTS = ("inherited", "retrained")
#: Shares of the largest lambda in the table of paths.
SHOWN_POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
ALL, TOGETHER = "all", "as an ensemble"


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Predictors that play one part: figures a seed, each the mean over the seed's predictors.

    Args:
        seeds: Those that have such predictors.
        figures: val_accuracy, test_accuracy, test_nll and calibrated_nll, S values each.
        losses: Calibrated NLL on each test image, mean over the predictors, (S, N) in nats.
        num_predictors: Over all seeds.
    """

    seeds: list[int]
    figures: dict[str, list[float]]
    losses: np.ndarray
    num_predictors: int


class Results:
    """What the records of finished seeds hold, predictions included.

    Args:
        records: Finished units.
        seeds: Those of which everything was run.
    """

    def __init__(self, records: Records, seeds: Sequence[int]) -> None:
        self.records, self.study, self.seeds = records, records.study, list(seeds)
        self.data = load(self.study.configuration(STEERED[0], 0).data)
        self.labels = tuple(split.labels.numpy() for split in (self.data.val, self.data.test))
        self._arrays: dict[tuple[str, str, int], dict[str, np.ndarray]] = {}

    def _loaded(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        key = record["kind"], record.get("setting", record.get("cells", "")), record["seed"]
        if key not in self._arrays:
            with np.load(self.records.predictions(record)) as stored:
                self._arrays[key] = {name: stored[name] for name in stored.files}
        return self._arrays[key]

    def searches(self, setting: str) -> list[dict[str, Any]]:
        """Return the records of a setting's searches, seed by seed."""
        return [self.records.search(setting, seed) for seed in self.seeds]

    def networks(self, setting: str, seed: int, names: Sequence[str], weights: str) -> list[Probs]:
        """Return predictions of networks of a search.

        Args:
            setting: The search's.
            seed: Its seed.
            names: Cells; "base" or "deviation I" with inherited weights.
            weights: "inherited" or "retrained".
        """
        if weights == "retrained":
            found = [self._loaded(self.records.units["training", name, seed]) for name in names]
            return [(arrays["val_probs"], arrays["test_probs"]) for arrays in found]
        arrays = self._loaded(self.records.search(setting, seed))
        positions = [arrays["names"].tolist().index(name) for name in names]
        return [(arrays["val_probs"][index], arrays["test_probs"][index]) for index in positions]

    def group(self, by_seed: Mapping[int, Sequence[Probs]]) -> Group:
        """Measure predictors; seeds without any are left out."""
        from dnas_ens.metrics.calibration import per_image_calibrated_nll
        from dnas_ens.metrics.scores import accuracy, nll

        val_labels, test_labels = self.labels
        figures: dict[str, list[float]] = {
            name: [] for name in ("val_accuracy", "test_accuracy", "test_nll", "calibrated_nll")
        }
        seeds, losses = [], []
        for seed, predictors in by_seed.items():
            if not predictors:
                continue
            of_images = np.stack(
                [per_image_calibrated_nll(val, val_labels, test, test_labels) for val, test in predictors]
            )
            seeds.append(seed)
            losses.append(of_images.mean(axis=0))
            found = {
                "val_accuracy": [accuracy(val, val_labels) for val, _ in predictors],
                "test_accuracy": [accuracy(test, test_labels) for _, test in predictors],
                "test_nll": [nll(test, test_labels) for _, test in predictors],
                "calibrated_nll": of_images.mean(axis=1).tolist(),
            }
            for name, values in found.items():
                figures[name].append(statistics.fmean(values))
        return Group(
            seeds=seeds,
            figures=figures,
            losses=np.stack(losses) if losses else np.empty((0, len(test_labels))),
            num_predictors=sum(len(predictors) for predictors in by_seed.values()),
        )

    def groups(self) -> dict[Key, Group]:
        """Measure everything that tables and comparisons need; empty groups are left out."""
        found: dict[Key, Callable[[int], list[Probs]]] = {}
        for setting in SETTINGS:
            for weights in WEIGHTS:
                steered, inherited = setting in STEERED, weights == "inherited"
                limits = (LIMITS if inherited else RETRAINED_LIMITS) if steered else (1.0,)
                for share in limits:
                    found["ensemble", setting, share, weights] = self._ensemble(setting, share, weights)
                if not steered:
                    continue
                for share in SHOWN_POINTS if inherited else RETRAINED_POINTS:
                    found["path", setting, share, weights] = self._path(setting, share, weights)
                found["base", setting, ALL, weights] = self._base(setting, weights)
                shared = {
                    int(sample["shared"]) for record in self.searches(setting) for sample in record["samples"]
                }
                numbers: list[float | str] = [*sorted(shared), ALL, TOGETHER]
                for number in numbers:
                    for kind in ("samples", "deviations"):
                        found[kind, setting, number, weights] = self._matched(kind, setting, number, weights)
        measured = {
            key: self.group({seed: predictors(seed) for seed in self.seeds})
            for key, predictors in found.items()
        }
        return {key: group for key, group in measured.items() if group.seeds}

    def _ensemble(self, setting: str, share: float, weights: str) -> Callable[[int], list[Probs]]:
        def of_seed(seed: int) -> list[Probs]:
            ensembles = self.records.search(setting, seed)["ensembles"]
            (cells,) = [each["cells"] for each in ensembles if each["share"] == share]
            return [averaged(self.networks(setting, seed, cells, weights))]

        return of_seed

    def _path(self, setting: str, share: float, weights: str) -> Callable[[int], list[Probs]]:
        """With inherited weights on every direction, retrained on direction 0."""

        def of_seed(seed: int) -> list[Probs]:
            record = self.records.search(setting, seed)
            directions = record["config"]["hypernetwork"]["directions"] if weights == "inherited" else 1
            cells = [path_cells(record, share, direction) for direction in range(directions)]
            return self.networks(setting, seed, cells, weights)

        return of_seed

    def _base(self, setting: str, weights: str) -> Callable[[int], list[Probs]]:
        def of_seed(seed: int) -> list[Probs]:
            cells = self.records.search(setting, seed)["base"]["cells"]
            return self.networks(setting, seed, ["base" if weights == "inherited" else cells], weights)

        return of_seed

    def _matched(
        self, kind: str, setting: str, number: float | str, weights: str
    ) -> Callable[[int], list[Probs]]:
        def of_seed(seed: int) -> list[Probs]:
            entries = self.records.search(setting, seed)[kind]
            names = [
                f"deviation {index}"
                if kind == "deviations" and weights == "inherited"
                else str(entry["cells"])
                for index, entry in enumerate(entries)
                if isinstance(number, str) or entry["shared"] == number
            ]
            probs = self.networks(setting, seed, names, weights)
            return [averaged(probs)] if number == TOGETHER and probs else probs

        return of_seed

    def epoch_losses(self, setting: str) -> tuple[list[int], np.ndarray]:
        """Return the evaluated epochs and the ensemble's NLL on every val image, (S, E, N)."""
        records = self.searches(setting)
        epochs = [int(entry["epoch"]) for entry in records[0]["epochs"]]
        return epochs, np.stack([self._loaded(record)["epoch_losses"] for record in records])

    def search_seconds(self, setting: str) -> list[float]:
        """Return CPU seconds of each search with its measurements, for hypernet with the search of its base."""
        stages = (BASE_SETTING, setting) if setting.startswith("hypernet") else (setting,)
        return [
            sum(float(self.records.search(stage, seed)["cpu_seconds"]) for stage in stages)
            for seed in self.seeds
        ]


def averaged(probs: Sequence[Probs]) -> Probs:
    """Return the mean of predictions, an ensemble's."""
    return np.mean([val for val, _ in probs], axis=0), np.mean([test for _, test in probs], axis=0)


def mean_height(epochs: Sequence[float], values: np.ndarray, *, axis: int) -> np.ndarray:
    """Return the area under a curve by the trapezoidal rule, divided by the length of its base.

    Args:
        epochs: E positions, ascending; of a single one its value is returned.
        values: The curve along `axis`.
        axis: Of length E.

    Returns:
        In the unit of the values, without that axis.
    """
    if len(epochs) == 1:
        first: np.ndarray = np.take(values, 0, axis=axis)
        return first
    area: np.ndarray = np.trapezoid(values, np.asarray(epochs, dtype=float), axis=axis)
    height: np.ndarray = area / (epochs[-1] - epochs[0])
    return height
