"""Averages of the weights of models of one architecture: of saved models, and kept up to date during a training.

A state is what ``state_dict()`` returns; wherever states are asked for, modules will do. ``state_dict()`` does
not copy: clone the tensors of a model that trains on. `dnas_ens.ensembles.soups` chooses and judges averages on
validation data. Legend: B batch, n models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network
from dnas_ens.training.batch_norm import average_statistics, statistics_norms
from dnas_ens.training.prediction import Batches, like_parameters, no_batches, one_pass
from dnas_ens.types import FloatArray

State = Mapping[str, Tensor]
CoefficientKind = Literal["equal", "linear", "exponential"]

# Largest deviation of the coefficients' sum from 1: the rounding of single precision.
_SUM_TOLERANCE = 1e-6

_Model = TypeVar("_Model", bound=nn.Module)


def coefficients(kind: CoefficientKind, num_models: int, *, decay: float = 0.9) -> FloatArray:
    """Return how much each of the last n models weighs in their average, the oldest first.

    With i = 1..n from the oldest to the newest:
    equal 1/n; linear 2 i / (n (n + 1)); exponential d^(n-i) (1 - d) / (1 - d^n), which is 1/n at d = 1.

    Args:
        num_models: n, 1 or more.
        decay: d in (0, 1], the ratio between a model's weight and its successor's, for the exponential rule.

    Returns:
        Coefficients in [0, 1] that never fall and sum to 1, shape (n,).

    Raises:
        UserError: An unknown rule, no models, or a decay that is not possible.
    """
    if kind not in get_args(CoefficientKind):
        raise UserError(
            f"{kind!r} is not a rule of coefficients.", f"Use one of {', '.join(get_args(CoefficientKind))}."
        )
    if num_models < 1:
        raise UserError(f"Coefficients of {num_models} models were asked for.", "Ask for 1 or more.")
    if not 0.0 < decay <= 1.0:
        raise UserError(f"The decay is {decay}.", "Give a number above 0 and at most 1.")
    ages = np.arange(num_models - 1, -1, -1)
    raw = {
        "equal": np.ones(num_models),
        "linear": num_models - ages.astype(np.float64),
        "exponential": np.power(float(decay), ages),
    }[kind]
    shares: FloatArray = raw / raw.sum()
    return shares


def average_states(models: Sequence[State | nn.Module], coefficients: npt.ArrayLike | None = None) -> dict[str, Tensor]:
    """Average states tensor by tensor, w = sum_i c_i w_i.

    Floating tensors are averaged in double precision, as w_a + sum_i c_i (w_i - w_a) around the model a that
    weighs most, and cast back: models that are equal average to themselves exactly, and so does a model with
    coefficient 1. Integer buffers, such as BatchNorm's num_batches_tracked, are the last model's. The averaged
    running statistics of BatchNorm fit no network: see `averaged_model`.

    Args:
        models: n states or modules of one architecture.
        coefficients: c, shape (n,), sum 1; a negative one extrapolates. None for equal ones.

    Returns:
        A new state, on the last model's devices and with its dtypes.

    Raises:
        UserError: See `check_same_architecture`; coefficients that do not fit, or a tensor with a NaN.
    """
    states = check_same_architecture(models)
    shares = _check_coefficients(coefficients, len(states))
    anchor = int(np.abs(shares).argmax())
    averaged: dict[str, Tensor] = {}
    for name, newest in states[-1].items():
        # Integer buffers and a module's extra state are not averaged.
        if not (isinstance(newest, Tensor) and (newest.is_floating_point() or newest.is_complex())):
            averaged[name] = copy.deepcopy(newest)
            continue
        wide = torch.complex128 if newest.is_complex() else torch.float64
        start = states[anchor][name].detach().to(newest.device, wide)
        total = start.clone()
        for index, share in enumerate(shares):
            if index != anchor and share != 0.0:
                other = states[index][name].detach().to(newest.device, wide)
                # Equal infinities, as in masks, must not become inf - inf.
                total += float(share) * torch.where(other == start, 0.0, other - start)
        if total.isnan().any():
            broken = [index for index, state in enumerate(states) if not bool(state[name].isfinite().all())]
            whose = f" of model {broken[0]}" if broken else ""
            raise UserError(
                f"The average of the tensor {name} is not a number: that{whose} is not finite.",
                "Leave out the models that diverged.",
            )
        averaged[name] = total.to(newest.dtype)
    return averaged


def averaged_model(
    model: _Model,
    models: Sequence[State | nn.Module],
    coefficients: npt.ArrayLike | None,
    batches: Batches,
) -> _Model:
    """Return a copy of a module with averaged weights and BatchNorm statistics of its own, in evaluation mode.

    The module is left as it is. Other arguments and errors as for `average_states`, `recompute_batch_norm` and `clone`;
    UserError also for states that do not fit the module.
    """
    check_fit(model, models)
    averaged = clone(model).eval()
    averaged.load_state_dict(average_states(models, coefficients))
    recompute_batch_norm(averaged, batches)
    return averaged


def recompute_batch_norm(model: nn.Module, batches: Batches) -> bool:
    """Recompute BatchNorm's running statistics as plain averages over batches (SWA, arXiv 1803.05407).

    Everything but BatchNorm is in evaluation mode meanwhile, dropout included; see
    `dnas_ens.training.batch_norm.average_statistics`. Each module is back in its own mode afterwards.

    Args:
        model: Any module; it is changed.
        batches: Training batches; not asked for where no BatchNorm keeps running statistics.

    Returns:
        Whether there was anything to recompute.

    Raises:
        UserError: There are no batches, or one holds a single image where that has no variance.
    """
    if not statistics_norms(model):
        return False
    passing = one_pass(batches)
    first = next(passing, None)
    # Before the statistics are reset.
    if first is None:
        raise no_batches("BatchNorm statistics")
    average_statistics(model, (like_parameters(model, inputs) for inputs, _ in chain([first], passing)))
    return True


class RunningAverage(AveragedModel):
    """An average of the weights, kept up to date in any training loop; the base of the three below.

    Call `after_step` after every step of the optimiser, `after_epoch` after every epoch, and take the
    `finished` model at the end. ``state_dict()`` and ``load_state_dict()`` make it resumable. The averaging is
    `torch.optim.swa_utils.AveragedModel`'s, in the precision of the weights.

    Args:
        model: The model that will be trained; it is copied.
        options: See `torch.optim.swa_utils.AveragedModel`.

    Raises:
        UserError: It cannot be copied; see `clone`.
    """

    _checked = False

    def __init__(self, model: nn.Module, **options: Any) -> None:
        # A clone, because torch's own deep copy fails on some models.
        super().__init__(clone(model), **options)

    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of a model into the average; buffers are copied. See `check_same_architecture`."""
        # Once is enough to catch a mix-up, and at every step it would cost time.
        if not self._checked:
            check_same_architecture([self.module, model], ["The averaged model", "The trained model"])
            self._checked = True
        super().update_parameters(model)

    def after_step(self, model: nn.Module) -> None:
        """Take the weights after a step of the optimiser into the average."""
        self.update_parameters(model)

    def after_epoch(self, model: nn.Module, epochs_done: int) -> None:
        """Count an epoch; epochs_done is 1 after the first one."""

    def finished(self, batches: Batches) -> nn.Module:
        """Return a copy of the average in evaluation mode, BatchNorm statistics recomputed on training batches.

        Raises:
            UserError: Nothing has been averaged yet; else see `recompute_batch_norm`.
        """
        if int(self.n_averaged) == 0:
            raise UserError("The running average has seen no model.", "Train on, or let the averaging start earlier.")
        model = clone(self.module).eval()
        recompute_batch_norm(model, batches)
        return model


class PolyakAverage(RunningAverage):
    """The equal average of the weights after every step, w = 1/t sum_s w_s (Polyak and Juditsky, 1992)."""


class ExponentialMovingAverage(RunningAverage):
    """EMA of the weights after every step, w <- d w + (1 - d) w_t, which starts at the first w_t.

    Args:
        decay: d in [0, 1).

    Raises:
        UserError: A decay that is not possible, or a model that cannot be copied.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"The decay is {decay}.", "Give a number of at least 0 and below 1.")
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


class StochasticWeightAverage(RunningAverage):
    """SWA: the equal average of the weights at the ends of cycles (Izmailov et al., arXiv 1803.05407).

    The learning rate, constant or cyclic from the start on, is the training loop's: see
    `torch.optim.swa_utils.SWALR`.

    Args:
        start_epoch: Epochs that are done when the first weights are taken. With 0 the first are those after one
            cycle: untrained weights are not averaged.
        cycle: Epochs from one taking to the next, 1 or more.

    Raises:
        UserError: A start or a cycle that is not possible, or a model that cannot be copied.
    """

    def __init__(self, model: nn.Module, *, start_epoch: int, cycle: int = 1) -> None:
        if start_epoch < 0 or cycle < 1:
            raise UserError(
                f"The averaging starts after epoch {start_epoch} with cycles of {cycle} epochs.",
                "Start after 0 or more epochs, with cycles of 1 or more.",
            )
        super().__init__(model)
        self.start_epoch, self.cycle = start_epoch, cycle

    def after_step(self, model: nn.Module) -> None:
        """Steps within an epoch are not averaged."""

    def after_epoch(self, model: nn.Module, epochs_done: int) -> None:
        """Take the weights into the average where a cycle ends."""
        if epochs_done >= self.start_epoch and (epochs_done - self.start_epoch) % self.cycle == 0:
            self.update_parameters(model)


def check_same_architecture(models: Sequence[State | nn.Module], names: Sequence[str] | None = None) -> list[State]:
    """Check that models have one architecture, and return their states.

    The errors call them by `names`, by default "Model 0", "Model 1" and so on.

    Raises:
        UserError: No models; modules of different classes, or networks of different genotypes; or the first
            tensor that one model lacks or has in another shape or dtype.
    """
    if not models:
        raise UserError("There are no models to average.", "Give at least one state or module.")
    names = [f"Model {index}" for index in range(len(models))] if names is None else names
    modules = [(name, model) for name, model in zip(names, models, strict=True) if isinstance(model, nn.Module)]
    for name, module in modules[1:]:
        first_name, first = modules[0]
        # A parametrised module has a class of its own.
        kind, first_kind = type_before_parametrizations(module), type_before_parametrizations(first)
        if kind is not first_kind:
            raise UserError(
                f"{name} is a {kind.__name__}, but {_inside(first_name)} is a {first_kind.__name__}.",
                "Average weights of one architecture; combine others by their predictions, in an Ensemble.",
            )
        if isinstance(module, Network) and isinstance(first, Network) and module.genotype != first.genotype:
            raise UserError(
                f"{name} has another genotype than {_inside(first_name)}.",
                "Average weights of one genotype; combine others by their predictions, in an Ensemble.",
            )
    states = [as_state(model) for model in models]
    for name, state in zip(names[1:], states[1:], strict=True):
        _check_same_tensors((names[0], states[0]), (name, state))
    return states


def check_fit(model: nn.Module, models: Sequence[State | nn.Module]) -> None:
    """Check that there are models, and that they have the module's architecture; see `check_same_architecture`."""
    check_same_architecture(models)
    check_same_architecture([model, models[0]], ["The given module", "Model 0"])


def as_state(model: State | nn.Module) -> State:
    """Return a module's state, or the state itself."""
    return model.state_dict() if isinstance(model, nn.Module) else model


def clone(model: _Model) -> _Model:
    """Copy a module.

    Tensors that it has computed from its parameters, as ``torch.nn.utils.weight_norm``, ``spectral_norm`` and pruning
    leave them in a module for their next forward pass, are copied as values, where ``copy.deepcopy`` alone refuses.

    Raises:
        UserError: It holds something else that cannot be copied.
    """
    return _deep_copy(model, {id(value): value.detach().clone() for value in _tensors_of(model) if not value.is_leaf})


def check_clone(model: nn.Module) -> None:
    """Raise UserError for a module that `clone` cannot copy, without allocating the copy."""
    _deep_copy(model, {id(value): value for value in _tensors_of(model)})


def copied_to_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what ``state_dict()`` returns, which changes with the model, to the CPU."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def _deep_copy(model: _Model, copied: dict[int, Any]) -> _Model:
    """Copy a module, except the tensors whose copies are given by their ids."""
    try:
        return copy.deepcopy(model, copied)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a module's own parts may raise anything when they are copied
        raise UserError(
            f"The {type(model).__name__} cannot be copied ({' '.join(str(error).split())[:200]}).",
            "Keep what cannot be copied, such as locks and open files, out of the module, or give what holds it a "
            "__deepcopy__.",
        ) from error


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield everything in a module that is a tensor, parameters and buffers or not."""
    return _tensors_in([list(vars(module).values()) for module in model.modules()])


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors among lists, tuples and dicts of anything."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def _check_same_tensors(first: tuple[str, State], other: tuple[str, State]) -> None:
    """Raise UserError for the first tensor that two named states do not share in name, shape and dtype."""
    remedy = "Average states of one architecture, saved in one precision."
    (first_name, first_state), (name, state) = first, other
    for key in [*first_state, *(key for key in state if key not in first_state)]:
        if key not in state or key not in first_state:
            lacks, has = (name, first_name) if key not in state else (first_name, name)
            raise UserError(f"{lacks} lacks the tensor {key} that {_inside(has)} has.", remedy)
        for what in ("shape", "dtype"):
            ours, theirs = (_property(values[key], what) for values in (first_state, state))
            if ours != theirs:
                raise UserError(
                    f"The tensor {key} has {what} {theirs} in {_inside(name)} and {ours} in {_inside(first_name)}.",
                    remedy,
                )


def _property(value: object, what: str) -> object:
    """Return a tensor's shape as a tuple, or its dtype; None for a module's extra state."""
    found = getattr(value, what, None)
    return tuple(found) if isinstance(found, torch.Size) else found


def _inside(name: str) -> str:
    """Return a name for the middle of a sentence."""
    return name[0].lower() + name[1:]


def _check_coefficients(coefficients: npt.ArrayLike | None, num_models: int) -> FloatArray:
    """Return coefficients (n,) in double precision; UserError says what does not fit."""
    if coefficients is None:
        return np.full(num_models, 1.0 / num_models)
    shares = np.asarray(coefficients, dtype=np.float64)
    if shares.shape != (num_models,):
        raise UserError(
            f"There are coefficients of shape {shares.shape} for {num_models} models.",
            "Give one coefficient a model.",
        )
    # Written so that a sum that is not a number is refused too.
    if not abs(shares.sum() - 1.0) <= _SUM_TOLERANCE:
        raise UserError(f"The coefficients sum to {shares.sum():.6g}.", "Give finite coefficients that sum to 1.")
    return shares
