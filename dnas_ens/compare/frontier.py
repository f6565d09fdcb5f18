"""What a method reaches at each total cost: its options, and the one that val chooses within a budget.

An option is a way to spend: so many members, trained for so many epochs. Options are evaluated from networks that are
trained already; one that takes k of n exchangeable networks is the mean over balanced subsets of k. Within a
budget a method takes its option with the lowest NLL on val; test only measures that choice.

Legend: N test images, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.metrics.calibration import per_image_calibrated_nll
from dnas_ens.metrics.scores import nll
from dnas_ens.types import FloatArray


@dataclass(frozen=True, eq=False, kw_only=True)
class Option:
    """One way to spend on a method.

    Args:
        members: Networks whose predictions are averaged.
        epochs: Epochs each was trained for.
        cpu_seconds: Everything it needs, searches and discarded networks included.
        val_nll: NLL on val, nats; what options are chosen by.
        losses: Calibrated NLL of every test image, (N,), nats.
        hits: Whether it is classified rightly, (N,), in [0, 1]; a share where subsets were averaged.
        spent: Members and epochs in words.
    """

    members: int
    epochs: int
    cpu_seconds: float
    val_nll: float
    losses: FloatArray
    hits: FloatArray
    spent: str

    @property
    def calibrated_nll(self) -> float:
        """Mean over the test images, nats."""
        return float(self.losses.mean())


def windows(count: int, size: int) -> list[list[int]]:
    """Return subsets of ``size`` out of ``count`` of which every element is in equally many.

    They are the windows of a circle, i, i + 1, ..., i + size - 1 modulo count: ``count`` of them, or the whole once,
    or nothing once.
    """
    starts = range(count if 0 < size < count else 1)
    return [[(start + step) % count for step in range(size)] for start in starts]


def option(
    predictions: Predictions,
    subsets: Sequence[Sequence[int]],
    *,
    cpu_seconds: Sequence[float],
    epochs: int,
    spent: str = "",
) -> Option:
    """Evaluate an option as the mean over subsets of the members, each averaged with equal weights.

    Args:
        predictions: Of all members.
        subsets: Positions of members, subsets of one size.
        cpu_seconds: What each subset needs.
        spent: Members and epochs in words; by default one times the other.
    """
    val_nlls, losses, hits = [], [], []
    for subset in subsets:
        val, test = (
            probs[list(subset)].astype(np.float64).mean(axis=0)
            for probs in (predictions.val_probs, predictions.test_probs)
        )
        val_nlls.append(nll(val, predictions.val_labels))
        losses.append(per_image_calibrated_nll(val, predictions.val_labels, test, predictions.test_labels))
        hits.append(test.argmax(axis=1) == predictions.test_labels)
    return Option(
        members=len(subsets[0]),
        epochs=epochs,
        cpu_seconds=float(np.mean(cpu_seconds)),
        val_nll=float(np.mean(val_nlls)),
        losses=np.mean(losses, axis=0),
        hits=np.mean(hits, axis=0),
        spent=spent or f"{len(subsets[0])} × {epochs}",
    )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Networks trained for a method: their predictions with equal weights, and CPU seconds and epochs of each."""

    predictions: Predictions
    seconds: list[float]
    epochs: int

    def joined(self, more: Trained) -> Trained:
        """Return these networks and others that were trained as long."""
        predictions = self.predictions.with_members_of(more.predictions)
        return replace(self, predictions=predictions, seconds=[*self.seconds, *more.seconds])

    def first(self, count: int) -> Trained:
        """Return the first so many networks."""
        return replace(self, predictions=self.predictions.of_members(range(count)), seconds=self.seconds[:count])


def of_exchangeable(trained: Trained, *, fixed_seconds: float = 0.0, paid: int = 0) -> list[Option]:
    """Return the options of 1, 2, ..., all members where none is preferred to another.

    Args:
        trained: The members; ``seconds`` of those that are not paid for.
        fixed_seconds: What is spent before the first, such as a search.
        paid: The first so many members are in every option, and their cost is in ``fixed_seconds``.
    """
    seconds, options = trained.seconds, []
    for size in range(0 if paid else 1, len(seconds) + 1):
        subsets = windows(len(seconds), size)
        costs = [fixed_seconds + sum(seconds[index] for index in subset) for subset in subsets]
        members = [[*range(paid), *(paid + index for index in subset)] for subset in subsets]
        options.append(option(trained.predictions, members, cpu_seconds=costs, epochs=trained.epochs))
    return options


def of_ordered(trained: Trained, *, fixed_seconds: float = 0.0) -> list[Option]:
    """Return the options of the first 1, 2, ..., all members, in the order they were chosen in."""
    return [
        option(
            trained.predictions,
            [range(size)],
            cpu_seconds=[fixed_seconds + sum(trained.seconds[:size])],
            epochs=trained.epochs,
        )
        for size in range(1, len(trained.seconds) + 1)
    ]


def best_within(options: Sequence[Option], budget: float) -> Option | None:
    """Return the option with the lowest NLL on val that costs no more than the budget; None where all cost more.

    Of equals the cheapest is taken.
    """
    affordable = [one for one in options if one.cpu_seconds <= budget]
    return min(affordable, key=lambda one: (one.val_nll, one.cpu_seconds), default=None)


def frontier(seeds: Sequence[Sequence[Option]]) -> tuple[list[float], list[float]]:
    """Return a method's frontier, the mean over seeds of the calibrated NLL of what val chooses at each budget.

    It is a staircase: it changes where another option can be afforded with some seed, and begins where every seed
    can afford one. As val chooses, it may rise.

    Returns:
        Budgets in rising order, and the calibrated NLL on test from each to the next, nats.
    """
    budgets, heights = [], []
    for budget in sorted({one.cpu_seconds for options in seeds for one in options}):
        chosen = [best_within(options, budget) for options in seeds]
        found = [one.calibrated_nll for one in chosen if one is not None]
        if len(found) < len(seeds):
            continue
        budgets.append(budget)
        heights.append(float(np.mean(found)))
    return budgets, heights
