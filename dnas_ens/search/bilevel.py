"""Gradients of the architecture for the bilevel problem: first order, and second order by finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LossFunction = Callable[[], Tensor]
#: Length of the finite-difference step in weight space.
RADIUS = 0.01


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradient reach a module's parameters inside the block; they are trainable again after it."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def first_order_gradient(validation_loss: LossFunction, architecture: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the validation loss and its gradient with the weights held fixed.

    Returns:
        The detached loss and one gradient a parameter, zeros where the loss does not depend on it.
    """
    loss = validation_loss()
    gradients = torch.autograd.grad(loss, list(architecture), allow_unused=True)
    return loss.detach(), filled(gradients, architecture)


def second_order_gradient(
    training_loss: LossFunction,
    validation_loss: LossFunction,
    *,
    weights: Sequence[Tensor],
    architecture: Sequence[Tensor],
    learning_rate: float,
    momentum: float = 0.0,
    momentum_buffers: Sequence[Tensor | None] | None = None,
    weight_decay: float = 0.0,
    average: Callable[[list[Tensor]], list[Tensor]] = list,
) -> tuple[Tensor, list[Tensor]]:
    """Return the validation loss after one virtual weight step and its total gradient (DARTS, arXiv 1806.09055).

    Equation: grad_a L_val(w', a) - xi * grad^2_{a,w} L_train(w, a) grad_{w'} L_val(w', a), with the virtual step
    w' = w - xi * (mu * buffer + grad_w L_train + decay * w) and the matrix-vector product as the central
    difference (grad_a L_train(w+) - grad_a L_train(w-)) / (2 eps), w+- = w +- eps * v, eps = radius / |v|.

    The weights are restored; BatchNorm's running statistics see the extra passes.

    Args:
        training_loss: Evaluates the training loss at the current parameters; the same value at each call.
        learning_rate: xi, of the virtual step.
        momentum: mu of the weights' optimiser.
        momentum_buffers: Its buffers, or None before the first step.
        average: Takes the means of gradients over several processes that have a share of the images each; the returned
            gradient is left to be averaged.
    """
    weights, architecture = list(weights), list(architecture)
    saved = [weight.detach().clone() for weight in weights]
    gradients = average(filled(torch.autograd.grad(training_loss(), weights, allow_unused=True), weights))
    buffers = momentum_buffers if momentum_buffers is not None else [None] * len(weights)
    with torch.no_grad():
        for weight, gradient, buffer in zip(weights, gradients, buffers, strict=True):
            step = gradient + weight_decay * weight
            if buffer is not None:
                step = step + momentum * buffer
            weight.sub_(learning_rate * step)
    try:
        loss = validation_loss()
        both = torch.autograd.grad(loss, architecture + weights, allow_unused=True)
        direct = filled(both[: len(architecture)], architecture)
        vector = average(filled(both[len(architecture) :], weights))
        length = torch.stack([entry.norm() for entry in vector]).norm()
        if length == 0:
            return loss.detach(), direct
        epsilon = RADIUS / length
        sides = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for weight, original, entry in zip(weights, saved, vector, strict=True):
                    weight.copy_(original + sign * epsilon * entry)
            sides.append(filled(torch.autograd.grad(training_loss(), architecture, allow_unused=True), architecture))
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, saved, strict=True):
                weight.copy_(original)
    total = [
        gradient - learning_rate * (plus - minus) / (2 * epsilon)
        for gradient, plus, minus in zip(direct, *sides, strict=True)
    ]
    return loss.detach(), total


def filled(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients with zeros where a parameter has none."""
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
