"""How sure a difference between two methods is: paired over test images, and over seeds where there are several.

Losses are per image, lower is better; methods are compared on the same images and, seed by seed, on the same
search seeds. A test over images says how these trained networks compare on other images of the same kind; only
the spread over seeds says what another search or training would give. Both are given; a plain verdict needs both.
Legend: S seeds, N test images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap, monte_carlo_test, permutation_test, ttest_1samp

from dnas_ens.types import FloatArray

#: Level of every interval, and 1 minus the corrected p-value below which a difference counts.
CONFIDENCE = 0.95
#: Resamples of a bootstrap and of a permutation test.
NUM_RESAMPLES = 9_999
#: Resamples that are drawn at once, which bounds the memory.
_BATCH = 500
#: Differences below this share of the largest loss are rounding of probabilities that are stored in single precision.
_ROUNDING = 1e-5


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """First minus second: mean loss, intervals, effect size and p-value.

    Args:
        mean: Over seeds and images, in the unit of the losses (nats for the calibrated NLL); negative where
            the first is better.
        over_images: Percentile interval of a paired bootstrap over images, of the mean over seeds (Efron, 1979).
        over_seeds: Paired t interval over seeds; NaN for a single seed.
        effect_size: Mean over standard deviation of the paired differences of images (Cohen's d_z); 0 where
            the two are the same.
        p_value: Of a paired permutation test over images (random signs), corrected where several comparisons
            were made together, in (0, 1].
        same: Whether both predict the same to single precision.
    """

    mean: float
    over_images: tuple[float, float]
    over_seeds: tuple[float, float]
    effect_size: float
    p_value: float
    same: bool = False

    @property
    def verdict(self) -> str:
        """The verdict in a few words."""
        if self.same:
            return "the same"
        if self.p_value > 1.0 - CONFIDENCE:
            return "not distinguishable at this size"
        word = "better" if self.mean < 0.0 else "worse"
        if math.isnan(self.over_seeds[0]):
            return f"{word} on these networks; one seed tells nothing beyond them"
        if self.over_seeds[0] <= 0.0 <= self.over_seeds[1]:
            return f"{word} on these networks, but not distinguishable over seeds"
        return word

    def sentence(self, first: str, second: str, *, digits: int = 4) -> str:
        """Say it as a sentence with the methods' names and the figures, differences to so many decimals."""
        if self.same:
            return f"{first} predicts the same as {second}."
        figures = self.figures(digits=digits)
        verdict = self.verdict
        if verdict.startswith("not"):
            return f"{first} and {second} are {verdict} ({figures})."
        word, mark, rest = verdict.partition(" ")
        return f"{first} is {word} than {second}{mark}{rest} ({figures})."

    def figures(self, *, digits: int = 4) -> str:
        """Return mean, intervals, effect size and p-value as text."""

        def ends(interval: tuple[float, float]) -> str:
            return " to ".join(f"{end:+.{digits}f}" for end in interval)

        seeds = "" if math.isnan(self.over_seeds[0]) else f"over seeds {ends(self.over_seeds)}, "
        return (
            f"{self.mean:+.{digits}f}, {seeds}over images {ends(self.over_images)}, "
            f"d {self.effect_size:+.2f}, p {self.p_value:.2g}"
        )


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike) -> PairedDifference:
    """Compare the losses of two methods on the same seeds and images, first minus second.

    Args:
        first: Loss of every seed on every image, shape (S, N), or (N,) of one seed.
        second: The same of the other method, the same shape.

    Raises:
        ValueError: Shapes that differ, fewer than two images, or losses that are not finite.
    """
    ours, theirs = _checked(first), _checked(second, like=np.shape(first))
    difference = ours - theirs
    if np.abs(difference).max() <= _ROUNDING * max(np.abs(ours).max(), np.abs(theirs).max()):
        return PairedDifference(
            mean=0.0, over_images=(0.0, 0.0), over_seeds=(0.0, 0.0), effect_size=0.0, p_value=1.0, same=True
        )
    of_images = difference.mean(axis=0)
    deviation = float(of_images.std(ddof=1))
    return PairedDifference(
        mean=float(of_images.mean()),
        over_images=image_interval(of_images),
        over_seeds=t_interval(difference.mean(axis=1)),
        effect_size=_effect_size(float(of_images.mean()), deviation),
        p_value=_sign_p_value(of_images),
    )


def _effect_size(mean: float, deviation: float) -> float:
    # A difference that is the same on every image has only the deviation of rounding.
    if deviation > 1e-12 * abs(mean):
        return mean / deviation
    return math.copysign(math.inf, mean) if mean else 0.0


def compare(first: npt.ArrayLike, others: Mapping[str, npt.ArrayLike]) -> dict[str, PairedDifference]:
    """Compare one method with several, their p-values corrected together by Holm's procedure.

    The first minus each of the others, by name and in their order; losses and errors as for `paired_difference`.
    """
    found = {name: paired_difference(first, losses) for name, losses in others.items()}
    corrected = holm([each.p_value for each in found.values()])
    return {
        name: replace(each, p_value=p_value) for (name, each), p_value in zip(found.items(), corrected, strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values in [0, 1] for their number (Holm, Scandinavian Journal of Statistics 6, 1979), in their order.

    The i-th smallest of n is multiplied by n - i + 1, never falls, and is at most 1; this bounds the chance of
    one false claim among all, whatever their dependence.
    """
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return [float(value) for value in corrected]


def image_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over images (Efron, Annals of Statistics 7, 1979).

    Args:
        values: One value an image, shape (N,), N of 2 or more.
    """
    drawn = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        batch=_BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(drawn.low), float(drawn.high)


def t_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Return the t interval of a mean over seeds, values of shape (S,); NaN for a single seed."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return math.nan, math.nan
    if float(np.ptp(array)) == 0.0:
        return float(array[0]), float(array[0])
    interval = ttest_1samp(array, 0.0).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


@dataclass(frozen=True, kw_only=True)
class NestedSpread:
    """Mean and standard deviations of a figure over search seeds and, within each, retraining seeds.

    Args:
        mean: Over everything.
        between: Standard deviation between search seeds, what retraining adds taken out; NaN for one search seed.
        within: Standard deviation between retraining seeds of one search seed; NaN where each has one.
    """

    mean: float
    between: float
    within: float


def nested_spread(values: npt.ArrayLike) -> NestedSpread:
    """Separate the spread of searches from that of trainings, by a one-way analysis of variance.

    sigma_within^2 is the mean of the variances within search seeds, sigma_between^2 the variance of their means
    minus sigma_within^2 / R, at least 0 (Searle, Casella and McCulloch, Variance Components, 1992).

    Args:
        values: One figure a search seed and retraining seed, shape (S, R).

    Raises:
        ValueError: Not two axes, or empty.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"values must have shape (S, R), one a search and retraining seed, got {array.shape}")
    searches, retrainings = array.shape
    within = float(array.var(axis=1, ddof=1).mean()) if retrainings > 1 else math.nan
    between = math.nan
    if searches > 1:
        of_means = float(array.mean(axis=1).var(ddof=1))
        between = max(0.0, of_means - (within / retrainings if retrainings > 1 else 0.0))
    return NestedSpread(mean=float(array.mean()), between=math.sqrt(between), within=math.sqrt(within))


def mean_and_deviation(values: Sequence[float], *, digits: int) -> str:
    """Return mean ± standard deviation as text to so many decimals; the mean alone of a single value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _sign_p_value(of_images: FloatArray) -> float:
    """Return the two-sided p-value of the mean of values (N,) under random signs, exact where N is small."""
    if 2 ** len(of_images) <= NUM_RESAMPLES:
        exact = permutation_test((of_images,), np.mean, permutation_type="samples", n_resamples=NUM_RESAMPLES)
        return float(exact.pvalue)
    rng = np.random.default_rng(0)

    def signed(size: tuple[int, ...]) -> FloatArray:
        return (1.0 - 2.0 * rng.integers(0, 2, size, dtype=np.int8)) * of_images

    # permutation_test draws each sign by sorting, which takes many times as long.
    drawn = monte_carlo_test(of_images, signed, np.mean, n_resamples=NUM_RESAMPLES, batch=_BATCH)
    return float(drawn.pvalue)


def _checked(losses: npt.ArrayLike, like: tuple[int, ...] | None = None) -> FloatArray:
    """Return losses in float64 with shape (S, N)."""
    array = np.asarray(losses, dtype=np.float64)
    if like is not None and array.shape != like:
        raise ValueError(f"both methods need losses of the same seeds and images, got {like} and {array.shape}")
    if array.ndim not in (1, 2) or array.shape[-1] < 2 or array.size == 0:
        raise ValueError(f"losses must have shape (S, N) or (N,) with N of 2 or more, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"losses must be finite, {int((~np.isfinite(array)).sum())} are not")
    return np.atleast_2d(array)
