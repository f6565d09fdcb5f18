"""Figures and findings in plain words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dnas_ens.metrics.significance import PairedDifference

NARROW = "\u202f"  # a narrow space that does not break, between a figure and its unit
_WORDS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def count(number: int, noun: str, *, plural: str | None = None) -> str:
    """Return a number with its noun, small numbers as words: "five members", "1,000 images"."""
    word = _WORDS[number] if number < len(_WORDS) else f"{number:,}"
    return f"{word} {noun if number == 1 else plural or noun + 's'}"


def percent(share: float, *, digits: int = 1) -> str:
    """Return a share as per cent with its sign."""
    return f"{100 * share:.{digits}f}{NARROW}%"


def interval(ends: tuple[float, float], *, digits: int, factor: float = 1.0, unit: str = "") -> str:
    """Return the two ends of an interval as text, empty where there is none."""
    if math.isnan(ends[0]):
        return ""
    low, high = (minus(f"{factor * end:.{digits}f}") for end in ends)
    return f"{low} to {high}{NARROW + unit if unit else ''}"


def minus(text: str) -> str:
    """Write a negative number with a minus sign rather than a hyphen."""
    return text.replace("-", "−")


def minus_signs(text: str) -> str:
    """Write the negative numbers of a sentence with minus signs."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


def duration(seconds: float) -> str:
    """Return seconds in the units people use."""
    if seconds < 100:
        return f"{seconds:.0f}{NARROW}s"
    if seconds < 5_400:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}{NARROW}min" + (f" {rest}{NARROW}s" if rest and minutes < 10 else "")
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours:,}{NARROW}h" + (f" {rest}{NARROW}min" if rest and hours < 10 else "")


def headline(num_members: int, *, different: bool, accuracy: float, num_images: int, data: str) -> str:
    """Say what the run achieved, in one sentence."""
    noun = "image" if num_images == 1 else "images"
    images = f"{percent(accuracy)} of {num_images:,} test {noun} of {data} right"
    if num_members == 1:
        return f"One network classifies {images}."
    kind = "different network" if different else "network"
    return f"{count(num_members, kind).capitalize()} together classify {images}."


def calibration(ece: float, *, num_members: int) -> str:
    """Say how far stated probabilities are from what happens."""
    whose = "Its" if num_members == 1 else "Their"
    return f"{whose} stated probabilities are off by {100 * ece:.1f} percentage points on average."


def against_best(difference: PairedDifference, *, num_images: int, ours: float, other: float) -> str:
    """Say whether the ensemble beats its best member, as the paired tests have it.

    Args:
        difference: Ensemble minus best member, of calibrated NLLs.
        num_images: N.
        ours: Calibrated NLL of the ensemble.
        other: That of the best member.
    """
    if difference.same:
        return "The ensemble predicts the same as its best member."
    figures = f"{ours:.4f} against {other:.4f} nats of calibrated NLL"
    ends = interval(difference.over_images, digits=4)
    mean = minus(f"{difference.mean:+.4f}")
    spread = (
        f"difference {mean}, 95{NARROW}% interval {ends}, p {difference.p_value:.2g} by a permutation test"
    )
    verdict = difference.verdict
    if verdict.startswith("not"):
        return (
            f"Whether they beat the best one of them alone cannot be told from {num_images:,} images: "
            f"{figures} ({spread})."
        )
    word = verdict.split()[0]
    beyond = " One search and one training tell nothing beyond these networks." if "seed" in verdict else ""
    return f"Together they are {word} than the best one of them alone: {figures} ({spread}).{beyond}"


def cost(search: float, training: float, device: str, *, parameters: int | None) -> str:
    """Say what it took."""
    size = f", and they hold {parameters:,} parameters" if parameters else ""
    return (
        f"Search and training took {duration(search + training)} of {device} time, {duration(search)} of it for the "
        f"search{size}."
    )


def place_among(rows: Sequence[Mapping[str, Any]], ours: int) -> str:
    """Say where one method of a comparison comes out in calibrated NLL.

    Args:
        rows: With name, calibrated_nll, and cpu_seconds where it was measured.
        ours: Position of the method.
    """
    losses = [float(row["calibrated_nll"]) for row in rows]
    rank = sum(loss < losses[ours] for loss in losses)
    best = rows[min(range(len(rows)), key=losses.__getitem__)]
    place = _ORDINALS[rank] if rank < len(_ORDINALS) else f"number {rank + 1}"
    start = f"Of the {len(rows)} rows compared it comes {place} in calibrated NLL"
    if rank == 0:
        return f"{start} ({losses[ours]:.4f})."
    costs = best.get("cpu_seconds"), rows[ours].get("cpu_seconds")
    times = f", for {costs[0] / costs[1]:.1f} times the CPU time" if costs[0] and costs[1] else ""
    return f"{start} ({losses[ours]:.4f}); the lowest is {min(losses):.4f}, of “{best['name']}”{times}."
