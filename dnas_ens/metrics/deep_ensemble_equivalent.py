"""The deep-ensemble equivalent: an ensemble's worth in independently trained copies of one network.

A difference in NLL means little by itself; that an ensemble of 5 is as good as a deep ensemble of 3.2 is plain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

#: Losses nearer to each other are the same, in nats: an ensemble's own differs by the order its members are added in.
SAME_LOSS = 1e-9


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
    other count as equal, so that the largest deep ensemble itself is worth its size and not more. For a band, give
    the curve plus and minus its standard deviation.

    Args:
        calibrated_nll: Of the method in question, in nats, on the same test images.
        curve: Mean calibrated NLL of deep ensembles, shape (L,), nats, such as
            ``EnsembleSizeCurve.mean["calibrated_nll"]``.
        sizes: Their numbers of members, shape (L,), rising from 1; None for 1..L.

    Returns:
        The number of copies, and whether it is reached or lies past an end of what was measured.

    Raises:
        ValueError: Losses that are not finite, shapes that differ, or sizes that do not rise from 1.
    """
    losses = np.asarray(curve, dtype=np.float64)
    members = np.arange(1.0, losses.size + 1) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if losses.ndim != 1 or losses.size == 0 or members.shape != losses.shape:
        raise ValueError(
            f"curve and sizes must have the same shape (L,), got {losses.shape} and {members.shape}"
        )
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
