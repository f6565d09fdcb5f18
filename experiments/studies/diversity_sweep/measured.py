"""Everything the parts are written from: groups of predictors, their comparisons on test, and how both are told."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from studies.comparisons import compare_pairs
from studies.diversity_sweep.options import PAIRS, STEERED
from studies.diversity_sweep.results import ALL, TOGETHER, Group, Key, Results
from studies.report import markdown_table

if TYPE_CHECKING:
    from dnas_ens.metrics.significance import PairedDifference

#: Where the published tables of ensembles are from.
CIFAR = "accuracy %; published: CIFAR-100, one cell searched, two stacked"
#: Comparisons on test by the part they belong to; those of missing groups are left out.
COMPARED: dict[str, list[tuple[Key, Key]]] = {
    "a": [(("path", way, 1.0, "retrained"), ("path", way, 0.0, "retrained")) for way in STEERED],
    "b": [(("ensemble", way, 0.5, "retrained"), ("ensemble", way, 1.0, "retrained")) for way in STEERED],
    "c": [
        (("ensemble", first, 1.0, "retrained"), ("ensemble", second, 1.0, "retrained"))
        for first, second in PAIRS
    ],
    "d": [
        (("samples", way, number, weights), ("deviations", way, number, weights))
        for way in STEERED
        for weights, number in (("inherited", ALL), ("retrained", ALL), ("retrained", TOGETHER))
    ],
}


@dataclass(frozen=True, eq=False)
class Figures:
    """Everything the parts are written from.

    Args:
        results: Finished seeds.
        groups: Their predictors.
        compared: The comparisons on test.
    """

    results: Results
    groups: Mapping[Key, Group]
    compared: Mapping[tuple[Key, Key], PairedDifference]

    @classmethod
    def of(cls, results: Results) -> Figures:
        """Measure and compare."""
        groups = results.groups()
        pairs = [
            pair for pairs in COMPARED.values() for pair in pairs if pair[0] in groups and pair[1] in groups
        ]
        return cls(results, groups, compare_pairs({key: each.losses for key, each in groups.items()}, pairs))

    def percent(self, key: Key, figure: str = "test_accuracy") -> str:
        """Return an accuracy in %, mean ± standard deviation over seeds; empty for a missing group."""
        return self._spread(key, figure, factor=100.0, digits=2)

    def nats(self, key: Key, figure: str = "test_nll") -> str:
        """Return an NLL, mean ± standard deviation over seeds; empty for a missing group."""
        return self._spread(key, figure, factor=1.0, digits=4)

    def points(self, first: Key, second: Key) -> str:
        """Return first minus second in percentage points of accuracy, the seeds' mean; a dash for missing groups."""
        if first not in self.groups or second not in self.groups:
            return "–"
        means = [statistics.fmean(self.groups[key].figures["test_accuracy"]) for key in (first, second)]
        return f"{100 * (means[0] - means[1]):+.2f}"

    def _spread(self, key: Key, figure: str, *, factor: float, digits: int) -> str:
        from dnas_ens.metrics.significance import mean_and_deviation

        if key not in self.groups:
            return ""
        return mean_and_deviation(
            [factor * value for value in self.groups[key].figures[figure]], digits=digits
        )

    def sentences(self, part: str) -> str:
        """Say how the compared pairs of a part differ."""
        return "".join(
            f"- {difference.sentence(called(first), called(second))}\n"
            for (first, second), difference in self.compared.items()
            if (first, second) in COMPARED[part]
        )


def called(key: Key) -> str:
    """Return what a sentence calls a group."""
    part, setting, place, weights = key
    if part == "path":
        return f"*{setting}, one network at λ = {place:g} of the range, {weights}*"
    if part == "ensemble":
        return f"*{setting}, ensemble with Λ = {place:g} of the range, {weights}*"
    of_all = f" {TOGETHER}" if place == TOGETHER else ""
    return f"*{setting}: {'samples' if part == 'samples' else 'random deviations'}{of_all}, {weights}*"


def beside(rows: Mapping[str, Sequence[str]], of: str = "accuracy %") -> str:
    """Return a table of published figures beside ours; a row is the published one, then one a way of steering."""
    header = [of, "published", *(f"ours, {way}" for way in STEERED)]
    return markdown_table(header, ([name, *values] for name, values in rows.items()))


def mean(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard deviation over seeds as text."""
    from dnas_ens.metrics.significance import mean_and_deviation

    return mean_and_deviation(values, digits=digits)


def num_edges(figures: Figures, way: str) -> int:
    """Return how many edges the base of a way of steering has."""
    base = figures.results.searches(way)[0]["base"]["genotype"]
    return sum(len(node) for cell in base.values() for node in cell)
