"""What averages of saved models are worth on validation data: the curve over n, and soups.

Everything is scored by its NLL; `dnas_ens.ensembles.averaging` does the averaging. The module that is given
with the states only says what to build: it is copied, never changed. Legend: B batch, K classes, n models.
"""

from __future__ import annotations

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
from dnas_ens.ensembles.loss_barrier import BarrierCheck, evaluate_on_val, loss_barrier
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.training.prediction import Batches, predict_batches


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
        model: A module of the architecture; it is left as it is.
        states: Saved models, the oldest first.
        kind: Rule of the coefficients; see `coefficients`.
        batches: Training batches, for BatchNorm.
        val_batches: Validation batches.
        decay: See `coefficients`.
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
    newest, older = len(states) - 1, range(len(states) - 1)
    barriers = _barriers(model, states, newest, older, batches, val_batches, barrier_check)
    singles = _score_singles(model, states, batches if recompute_singles else None, val_batches)
    points = []
    for count in tqdm(
        range(1, len(states) + 1), desc=f"{kind} averages", unit="model", disable=None, leave=False
    ):
        index = len(states) - count
        average = averaged_model(model, states[index:], shares[count - 1], batches)
        average_nll, average_accuracy = evaluate_on_val(average, val_batches)
        points.append(
            AveragingPoint(
                num_models=count,
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
        barriers: Index of each model the check was asked for -> loss barrier between it and the best single
            model, nats; empty where no check was asked for.
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

    Args:
        model: A module of the architecture; it is left as it is.
        states: Models that were trained from one initialisation.
        batches: Training batches, for BatchNorm.
        val_batches: Validation batches.
        barrier_check: Asks for the loss barrier between the best single model and each other, with a warning.

    Returns:
        The soup of all models, in the order given.

    Raises:
        UserError: See `averaged_model` and `evaluate_on_val`.

    Warns:
        UserWarning: See `loss_barrier`.
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
    begins as the best single model and is never worse than that on the validation batches. BatchNorm statistics
    are recomputed for every soup and, by default, for every single model: see `averaging_curve`.

    Args:
        model: A module of the architecture; it is left as it is.
        states: Models that were trained from one initialisation.
        batches: Training batches, for BatchNorm.
        val_batches: Validation batches; they choose, so another set must judge.
        recompute_singles: See `averaging_curve`; False scores single models as saved.
        barrier_check: Asks for the loss barrier between the best single model and each other, with a warning.

    Returns:
        The soup; ``ingredients`` begins with the best single model.

    Raises:
        UserError: See `averaged_model` and `evaluate_on_val`.

    Warns:
        UserWarning: See `loss_barrier`.
    """
    singles = _score_singles(model, states, batches if recompute_singles else None, val_batches)
    best, *others = _best_first(singles)
    soup = _single(model, states[best], batches if recompute_singles else None)
    ingredients, (val_nll, val_accuracy) = [best], singles[best]
    for index in tqdm(others, desc="greedy soup", unit="model", disable=None, leave=False):
        tried = [*ingredients, index]
        candidate = averaged_model(model, [states[each] for each in tried], None, batches)
        probs, labels = predict_batches(candidate, val_batches)
        # Of models that are good alone an average may still overflow: it is no better then.
        if not np.isfinite(probs).all() or nll(probs, labels) > val_nll:
            continue
        soup, ingredients = candidate, tried
        val_nll, val_accuracy = nll(probs, labels), accuracy(probs, labels)
    barriers = _barriers(model, states, best, others, batches, val_batches, barrier_check)
    return Soup(
        model=soup,
        ingredients=tuple(ingredients),
        val_nll=val_nll,
        val_accuracy=val_accuracy,
        barriers=barriers,
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
        for index in tqdm(others, desc="loss barriers", unit="line", disable=None, leave=False)
    }
