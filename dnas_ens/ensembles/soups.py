"""How good averages of saved models are on validation data: loss barriers, the curve over n, and soups.

Everything is scored by its NLL; `dnas_ens.ensembles.averaging` does the averaging. The module that is given
with the states only says what to build: it is copied, never changed. Legend: B batch, K classes, n models.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from tqdm import tqdm

from dnas_ens.ensembles.averaging import (
    CoefficientKind,
    State,
    as_state,
    averaged_model,
    check_fit,
    clone,
    coefficients,
)
from dnas_ens.errors import UserError
from dnas_ens.metrics.scores import accuracy, check_predictions, nll
from dnas_ens.training.prediction import Batches, predict_batches
from dnas_ens.types import FloatArray


def evaluate_on_val(model: nn.Module, val_batches: Batches, *, name: str = "A model") -> tuple[float, float]:
    """Return the NLL in nats and the accuracy in [0, 1] of a classifier, (B, ...) -> (B, K), in evaluation mode.

    Its modes are restored afterwards; `name` is what an error calls it.

    Raises:
        UserError: There are no batches, or the logits are not finite.
        ValueError: Labels that do not fit; see `dnas_ens.metrics.scores.check_labels`.
    """
    found = _score(model, val_batches)
    if found is None:
        raise UserError(
            f"{name}'s logits on the validation batches are not finite.",
            "Leave out the models that diverged.",
        )
    return found


def _score(model: nn.Module, val_batches: Batches) -> tuple[float, float] | None:
    """Return what `evaluate_on_val` does; None where the logits are not finite."""
    probs, labels = predict_batches(model, val_batches)
    if not np.isfinite(probs).all():
        return None
    checked = check_predictions(probs, labels)
    return nll.of(*checked), accuracy.of(*checked)


@dataclass(frozen=True, kw_only=True)
class BarrierCheck:
    """How to check that two models are linearly connected; see `loss_barrier`.

    Args:
        num_points: k, points on the line, both ends included; 3 or more.
        threshold: Nats that a barrier must exceed for a warning; the default is this package's choice
            (arXiv 1912.05671 has 2 points of error).

    Raises:
        UserError: Fewer than 3 points.
    """

    num_points: int = 11
    threshold: float = 0.05

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
        first: The model at a = 0.
        second: The model at a = 1.
        batches: Training batches, for BatchNorm.
        names: What the warning calls the two models.

    Raises:
        UserError: See `averaged_model` and `evaluate_on_val`.

    Warns:
        UserWarning: The barrier exceeds the threshold.
    """
    check = BarrierCheck() if check is None else check
    positions = np.linspace(0.0, 1.0, check.num_points)
    scores = np.array(
        [evaluate_on_val(averaged_model(model, [first, second], [1.0 - a, a], batches), val_batches) for a in positions]
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


@dataclass(frozen=True, kw_only=True)
class AveragingPoint:
    """One point of the curve over n: the average of the last n models beside the oldest of them alone.

    Args:
        num_models: n.
        index: Which of the given models is the single one, from 0.
        single_nll: Of that model alone, nats.
        single_accuracy: Of that model alone, in [0, 1].
        average_nll: Of the average of the last n models, nats.
        average_accuracy: Of the average of the last n models, in [0, 1].
        barrier: Between that model and the newest, nats; None for the newest itself, or where not asked for.
    """

    num_models: int
    index: int
    single_nll: float
    single_accuracy: float
    average_nll: float
    average_accuracy: float
    barrier: float | None


def averaging_curve(
    model: nn.Module,
    states: Sequence[State | nn.Module],
    kind: CoefficientKind,
    batches: Batches,
    val_batches: Batches,
    *,
    decay: float = 0.9,
    recompute_singles: bool = True,
    barrier_check: BarrierCheck | None = None,
) -> list[AveragingPoint]:
    """Score the average of the last n models for every n, beside the n-th model from the end.

    BatchNorm statistics are recomputed for every average and, by default, for every single model: the running
    ones of a training may fit so badly that recomputing them alone would pass for a gain of averaging.

    Args:
        states: Saved models, the oldest first.
        kind: Rule of the `coefficients`, which ``decay`` belongs to.
        batches: Training batches, for BatchNorm.
        recompute_singles: Whether single models get recomputed statistics too; False scores them as saved.
        barrier_check: Asks for the loss barrier between each model and the newest, with a warning.

    Returns:
        One point for every n = 1..len(states).

    Raises:
        UserError: See `coefficients`, `averaged_model` and `evaluate_on_val`.

    Warns:
        UserWarning: See `loss_barrier`.
    """
    check_fit(model, states)
    # A rule that is not possible is refused before the first pass.
    shares = [coefficients(kind, count, decay=decay) for count in range(1, len(states) + 1)]
    newest = len(states) - 1
    barriers = _barriers(model, states, newest, range(newest), batches, val_batches, barrier_check)
    singles = _score_singles(model, states, batches if recompute_singles else None, val_batches)
    points = []
    for of_count in tqdm(shares, desc=f"{kind} averages", unit="model", disable=None, leave=False):
        index = len(states) - len(of_count)
        average = averaged_model(model, states[index:], of_count, batches)
        average_nll, average_accuracy = evaluate_on_val(average, val_batches)
        points.append(
            AveragingPoint(
                num_models=len(of_count),
                index=index,
                single_nll=singles[index][0],
                single_accuracy=singles[index][1],
                average_nll=average_nll,
                average_accuracy=average_accuracy,
                barrier=barriers.get(index),
            )
        )
    return points


@dataclass(frozen=True, kw_only=True)
class Soup:
    """A model soup and what is in it.

    Args:
        model: The averaged model, in evaluation mode.
        ingredients: Which of the given models are in it, from 0, in the order they were taken.
        val_nll: Its NLL on the validation batches, nats.
        val_accuracy: Its accuracy on the validation batches, in [0, 1].
        barriers: By a model's index the loss barrier between it and the best single model, nats; empty where no
            check was asked for.
    """

    model: nn.Module
    ingredients: tuple[int, ...]
    val_nll: float
    val_accuracy: float
    barriers: Mapping[int, float]


def uniform_soup(
    model: nn.Module,
    states: Sequence[State | nn.Module],
    batches: Batches,
    val_batches: Batches,
    *,
    barrier_check: BarrierCheck | None = None,
) -> Soup:
    """Average all models equally (model soups, Wortsman et al., arXiv 2203.05482).

    The models should come from one initialisation; a check of barriers goes from the best single one to each other.
    Arguments, errors and warnings as for `averaging_curve`; returns the soup of all models, in the order given.
    """
    soup = averaged_model(model, states, None, batches)
    val_nll, val_accuracy = evaluate_on_val(soup, val_batches)
    barriers: dict[int, float] = {}
    if barrier_check is not None:
        best, *others = _best_first(_score_singles(model, states, batches, val_batches))
        barriers = _barriers(model, states, best, others, batches, val_batches, barrier_check)
    return Soup(
        model=soup,
        ingredients=tuple(range(len(states))),
        val_nll=val_nll,
        val_accuracy=val_accuracy,
        barriers=barriers,
    )


def greedy_soup(
    model: nn.Module,
    states: Sequence[State | nn.Module],
    batches: Batches,
    val_batches: Batches,
    *,
    recompute_singles: bool = True,
    barrier_check: BarrierCheck | None = None,
) -> Soup:
    """Add models to an equal average as long as it does not get worse (arXiv 2203.05482, recipe 1).

    Models are tried in ascending order of their own validation NLL, a tie in the order given; each stays if the
    soup's validation NLL does not rise. The paper does the same with the accuracy, which is coarser. The soup
    begins as the best single model, the first of its ``ingredients``, and is never worse than that on the validation
    batches. These choose, so other data must judge. Arguments, errors and warnings as for `uniform_soup`; BatchNorm
    statistics as for `averaging_curve`.
    """
    of_singles = batches if recompute_singles else None
    singles = _score_singles(model, states, of_singles, val_batches)
    best, *others = _best_first(singles)
    soup = _single(model, states[best], of_singles)
    ingredients, (val_nll, val_accuracy) = [best], singles[best]
    for index in tqdm(others, desc="greedy soup", unit="model", disable=None, leave=False):
        tried = [*ingredients, index]
        candidate = averaged_model(model, [states[each] for each in tried], None, batches)
        # The average of good models may still overflow; it is then not better.
        found = _score(candidate, val_batches)
        if found is not None and found[0] <= val_nll:
            soup, ingredients, (val_nll, val_accuracy) = candidate, tried, found
    return Soup(
        model=soup,
        ingredients=tuple(ingredients),
        val_nll=val_nll,
        val_accuracy=val_accuracy,
        barriers=_barriers(model, states, best, others, batches, val_batches, barrier_check),
    )


def _single(model: nn.Module, state: State | nn.Module, batches: Batches | None) -> nn.Module:
    """Return a copy of the module with one state; its statistics are as saved where there are no batches."""
    if batches is not None:
        return averaged_model(model, [state], None, batches)
    single = clone(model).eval()
    single.load_state_dict(as_state(state))
    return single


def _score_singles(
    model: nn.Module, states: Sequence[State | nn.Module], batches: Batches | None, val_batches: Batches
) -> list[tuple[float, float]]:
    """Return NLL and accuracy of every model alone; see `_single`."""
    check_fit(model, states)
    bar = tqdm(states, desc="single models", unit="model", disable=None, leave=False)
    return [
        evaluate_on_val(_single(model, state, batches), val_batches, name=f"Model {index}")
        for index, state in enumerate(bar)
    ]


def _best_first(scores: Sequence[tuple[float, float]]) -> list[int]:
    """Return the models in ascending order of their NLL; a tie goes to the lowest index."""
    return sorted(range(len(scores)), key=lambda index: scores[index][0])


def _barriers(
    model: nn.Module,
    states: Sequence[State | nn.Module],
    anchor: int,
    others: Sequence[int],
    batches: Batches,
    val_batches: Batches,
    check: BarrierCheck | None,
) -> dict[int, float]:
    """Return the loss barrier between one model and each of the others; none where no check is asked for."""
    if check is None:
        return {}
    bar = tqdm(others, desc="loss barriers", unit="line", disable=None, leave=False)
    return {
        index: loss_barrier(
            model,
            states[anchor],
            states[index],
            batches,
            val_batches,
            check=check,
            names=(f"model {anchor}", f"model {index}"),
        ).barrier
        for index in bar
    }
