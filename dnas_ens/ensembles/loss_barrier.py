"""Whether two models of one architecture are linearly connected: the loss along the line between their weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from torch import nn

from dnas_ens.ensembles.averaging import State, averaged_model
from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.training.prediction import Batches, predict_batches
from dnas_ens.types import FloatArray

BARRIER_THRESHOLD = 0.05
"""Nats a barrier must exceed for a warning; this package's choice (arXiv 1912.05671 has 2 points of error)."""


def evaluate_on_val(model: nn.Module, val_batches: Batches, *, name: str = "A model") -> tuple[float, float]:
    """Return the NLL in nats and the accuracy in [0, 1] of a classifier in evaluation mode.

    Args:
        model: Inputs (B, ...) -> logits (B, K); its modes are restored afterwards.
        val_batches: Validation batches.
        name: What an error calls it.

    Raises:
        UserError: There are no batches, or the logits are not finite.
        ValueError: Labels that do not fit; see `dnas_ens.metrics.scores.check_labels`.
    """
    probs, labels = predict_batches(model, val_batches)
    if not np.isfinite(probs).all():
        raise UserError(
            f"{name}'s logits on the validation batches are not finite.",
            "Leave out the models that diverged.",
        )
    return nll(probs, labels), accuracy(probs, labels)


@dataclass(frozen=True, kw_only=True)
class BarrierCheck:
    """How to check that two models are linearly connected; see `loss_barrier`.

    Args:
        num_points: k, points on the line, both ends included; 3 or more.
        threshold: Nats that a barrier must exceed for a warning.

    Raises:
        UserError: Fewer than 3 points.
    """

    num_points: int = 11
    threshold: float = BARRIER_THRESHOLD

    def __post_init__(self) -> None:
        if self.num_points < 3:
            raise UserError(
                f"A line of {self.num_points} points has none between its ends.", "Ask for 3 or more points."
            )


@dataclass(frozen=True, kw_only=True)
class LossBarrier:
    """NLL and accuracy on validation data along the straight line between two models.

    Args:
        positions: Share a of the second model, from 0 to 1, shape (k,).
        nll: Nats, shape (k,).
        accuracy: Range [0, 1], shape (k,).
        barrier: max_a [NLL(a) - (1 - a) NLL(0) - a NLL(1)] in nats; 0 or more, because the ends count.
    """

    positions: FloatArray
    nll: FloatArray
    accuracy: FloatArray
    barrier: float


def loss_barrier(
    model: nn.Module,
    first: State | nn.Module,
    second: State | nn.Module,
    batches: Batches,
    val_batches: Batches,
    *,
    check: BarrierCheck | None = None,
    names: tuple[str, str] = ("the first model", "the second model"),
) -> LossBarrier:
    """Measure the line (1 - a) w_first + a w_second, and warn where the models are not linearly connected.

    Linear mode connectivity (Frankle et al., arXiv 1912.05671), with the NLL instead of the error, and with the barrier
    above the straight line between the ends (Entezari et al., arXiv 2110.06296), not above their mean. BatchNorm
    statistics are recomputed at every point, the ends included.

    Args:
        model: A module of the architecture; it is left as it is.
        first: The model at a = 0.
        second: The model at a = 1.
        batches: Training batches, for BatchNorm.
        val_batches: Validation batches.
        check: Points and threshold; None for the defaults.
        names: What the warning calls the two models.

    Returns:
        The curve and its barrier.

    Raises:
        UserError: See `averaged_model` and `evaluate_on_val`.

    Warns:
        UserWarning: The barrier exceeds the threshold.
    """
    check = BarrierCheck() if check is None else check
    positions = np.linspace(0.0, 1.0, check.num_points)
    scores = np.array(
        [
            evaluate_on_val(averaged_model(model, [first, second], [1.0 - a, a], batches), val_batches)
            for a in positions
        ]
    )
    losses = scores[:, 0]
    # Written so that a flat line has a barrier of exactly 0.
    barrier = float((losses - (losses[0] + positions * (losses[-1] - losses[0])))[:-1].max())
    if barrier > check.threshold:
        warnings.warn(
            f"The loss barrier between {names[0]} and {names[1]} is {barrier:.4g} nats, above "
            f"{check.threshold:g}: they are not linearly connected, and their average may be worse than both.",
            UserWarning,
            stacklevel=2,
        )
    return LossBarrier(positions=positions, nll=losses, accuracy=scores[:, 1], barrier=barrier)
