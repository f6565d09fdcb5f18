"""How much each further member brings: metrics of the average of k of M members, against k, and their reading.

From predictions alone, so that a curve costs no training beyond the M members. The deep-ensemble equivalent reads a
curve the other way: a difference in NLL means little by itself; that an ensemble of 5 is as good as a deep ensemble of
3.2 is plain. Legend: M members, N images, K classes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dnas_ens.metrics.calibration import fit_temperature, tempered
from dnas_ens.metrics.scores import accuracy, check_predictions, nll

#: What is measured at every size.
CURVE_METRICS = ("accuracy", "nll", "calibrated_nll")
#: Losses closer than this are equal, in nats: the order in which members are added changes a loss by rounding.
SAME_LOSS = 1e-9


def ensemble_size_curve(
    val_probs: npt.ArrayLike,
    val_labels: npt.ArrayLike,
    test_probs: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    *,
    max_subsets: int = 30,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure the equally weighted average of k members on test, for k = 1..M.

    Every subset has a temperature of its own, fitted on val after averaging (Ashukha et al., arXiv 2002.06470).
    Probabilities and labels as for `dnas_ens.metrics.calibration.cross_fit`.

    The deviation is over subsets of the same M members. Subsets overlap, the more the larger they are, so it
    tells how much the choice among these members matters, not how another M trainings would turn out.

    Args:
        max_subsets: Largest number of subsets of one size, 1 or more; all of them where there are no more, else
            a sample without repetition.
        seed: Of the sample.

    Returns:
        A dictionary a size, ready for JSON: ``size``, ``subsets``, the mean over subsets of each of `CURVE_METRICS` and
        its ``_deviation``, the standard deviation over them, None where there is one subset.

    Raises:
        ValueError: Another number of members on val than on test, no subsets; else see
            `dnas_ens.metrics.scores.check_predictions`.
    """
    val, of_val = check_predictions(val_probs, val_labels, num_dims=3)
    test, of_test = check_predictions(test_probs, test_labels, num_dims=3)
    num_members = len(test)
    if val.shape[::2] != test.shape[::2]:
        raise ValueError(f"val and test must have the same members and classes, got {val.shape}, {test.shape}")
    if max_subsets < 1:
        raise ValueError(f"max_subsets must be at least 1, got {max_subsets}")
    generator = np.random.default_rng(seed)

    def measure(subset: tuple[int, ...]) -> tuple[float, ...]:
        members = list(subset)
        averaged = test[members].mean(axis=0)
        temperature = fit_temperature.of(val[members].mean(axis=0), of_val)
        return (
            accuracy.of(averaged, of_test),
            nll.of(averaged, of_test),
            nll.of(tempered(averaged, temperature), of_test),
        )

    rows = []
    for size in range(1, num_members + 1):
        subsets = draw_subsets(num_members, size, max_subsets, generator=generator)
        measured = np.array([measure(subset) for subset in subsets])
        deviations = measured.std(axis=0, ddof=1).tolist() if len(subsets) > 1 else [None] * len(CURVE_METRICS)
        row: dict[str, Any] = {"size": size, "subsets": len(subsets)}
        for name, mean, deviation in zip(CURVE_METRICS, measured.mean(axis=0).tolist(), deviations, strict=True):
            row |= {name: mean, f"{name}_deviation": deviation}
        rows.append(row)
    return rows


def draw_subsets(
    num_members: int, size: int, max_subsets: int, *, generator: np.random.Generator
) -> list[tuple[int, ...]]:
    """Return all subsets of a size, 1..M, or as many different ones at random as are allowed, 1 or more.

    They are sorted tuples of members, in lexicographic order.
    """
    if math.comb(num_members, size) <= max_subsets:
        return list(itertools.combinations(range(num_members), size))
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < max_subsets:
        drawn.add(tuple(sorted(generator.permutation(num_members)[:size].tolist())))
    return sorted(drawn)


@dataclass(frozen=True, kw_only=True)
class DeepEnsembleEquivalent:
    """How many copies reach the same calibrated log-likelihood.

    Args:
        value: Number of copies, from 1 to the largest deep ensemble that was measured.
        relation: "=" where the value is reached; ">" where even the largest measured deep ensemble is worse, so that
            more copies than ``value`` are needed; "<" where a single copy is better already.
    """

    value: float
    relation: Literal["<", "=", ">"]

    def __str__(self) -> str:
        """Return it as tables show it: 3.2, > 5 or < 1."""
        return f"{self.value:.1f}" if self.relation == "=" else f"{self.relation} {self.value:g}"


def deep_ensemble_equivalent(
    calibrated_nll: float, curve: npt.ArrayLike, *, sizes: npt.ArrayLike | None = None
) -> DeepEnsembleEquivalent:
    """Return the size of the deep ensemble that is as good, DEE = min {l >= 1 : NLL_DE(l) <= NLL}.

    NLL_DE is the calibrated NLL of deep ensembles, its running minimum over sizes, interpolated linearly between
    the measured sizes and never beyond them (Ashukha et al., arXiv 2002.06470). Losses within `SAME_LOSS` of each
    other count as equal, so that rounding does not put the largest deep ensemble beyond its own size. For a band, give
    the curve plus and minus its standard deviation.

    Args:
        calibrated_nll: Of the method in question, in nats, on the same test images.
        curve: Mean calibrated NLL of deep ensembles, shape (L,), nats.
        sizes: Their numbers of members, shape (L,), rising from 1; None for 1..L.

    Raises:
        ValueError: Losses that are not finite, shapes that differ, or sizes that do not rise from 1.
    """
    losses = np.asarray(curve, dtype=np.float64)
    members = np.arange(1.0, losses.size + 1) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if losses.ndim != 1 or losses.size == 0 or members.shape != losses.shape:
        raise ValueError(f"curve and sizes must have the same shape (L,), got {losses.shape} and {members.shape}")
    if members[0] != 1.0 or (np.diff(members) <= 0.0).any():
        raise ValueError(f"sizes must rise from 1, got {members.tolist()}")
    if not (np.isfinite(losses).all() and math.isfinite(calibrated_nll)):
        raise ValueError("losses must be finite")
    best = np.minimum.accumulate(losses)
    if calibrated_nll > best[0] + SAME_LOSS:
        return DeepEnsembleEquivalent(value=1.0, relation="<")
    if calibrated_nll < best[-1] - SAME_LOSS:
        return DeepEnsembleEquivalent(value=float(members[-1]), relation=">")
    reached = int(np.argmax(best <= calibrated_nll + SAME_LOSS))
    if best[reached] >= calibrated_nll - SAME_LOSS:
        return DeepEnsembleEquivalent(value=float(members[reached]), relation="=")
    # The size before is worse, so the piece between the two falls.
    share = (best[reached - 1] - calibrated_nll) / (best[reached - 1] - best[reached])
    value = members[reached - 1] + share * (members[reached] - members[reached - 1])
    return DeepEnsembleEquivalent(value=float(value), relation="=")
