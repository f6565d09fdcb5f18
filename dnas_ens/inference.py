"""Predictions of a network, and the BatchNorm statistics they stand on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnas_ens.analysis.metrics import FloatArray, IntArray
from dnas_ens.data.batches import Augmentation, iterate_batches
from dnas_ens.data.dataset import Split
from dnas_ens.errors import UserError

#: Images of a pass without gradients.
EVALUATION_BATCH = 256
#: Passes over data, inputs (B, ...) and labels (B,): what starts one at every call, or a DataLoader or list, which can
#: be passed over again.
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]] | Iterable[tuple[Tensor, Tensor]]
#: What torch's errors say of shapes that do not fit a convolution or a product.
_SHAPE_WORDS = (
    "channels",
    "shapes cannot be multiplied",
    "size mismatch",
    "must match the size",
    "Kernel size",
)


def one_pass(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Start a pass over data.

    Raises:
        UserError: It could not be started again, as with a generator.
    """
    passing = iter(batches() if callable(batches) else batches)
    if passing is batches:
        raise UserError(
            "The batches can be passed over only once.",
            "Give a DataLoader, a list, or a function that starts a new pass at every call.",
        )
    return passing


def like_parameters(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return inputs on the device of a model, floating ones in the dtype of its parameters; as they are without any."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            floating = inputs.is_floating_point()
            return inputs.to(parameter.device, parameter.dtype if floating else inputs.dtype)
    return inputs


def class_probs(
    model: nn.Module, inputs: Tensor, *, name: str = "The model", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the class probabilities (B, K) of a classifier.

    Args:
        model: Inputs (B, ...) -> logits (B, K), on any device; or an `Ensemble`, which returns probabilities.
        inputs: (B, ...), moved to the model's device and dtype.
        name: What an error calls it.
        dtype: What the softmax is computed in at least.

    Raises:
        UserError: It does not return (B, K), or takes inputs of another form.
    """
    try:
        found = model(like_parameters(model, inputs))
    except RuntimeError as error:
        # An operation that was given another shape than it wants; memory that ran out is another kind of error.
        if type(error) is not RuntimeError or not any(word in str(error) for word in _SHAPE_WORDS):
            raise
        raise UserError(
            f"{name} does not take inputs of shape {tuple(inputs.shape)} ({error}).",
            "Combine networks that were trained on images of one size and number of channels, and give it those.",
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2:
        form = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"{name} returns {form} instead of logits of shape (B, K).",
            "Wrap it in a module that returns the logits alone.",
        )
    # A sum over classes in half precision is not 1 to the accuracy that metrics ask for.
    wide = found.to(torch.promote_types(found.dtype, dtype))
    # An `Ensemble` says so of itself.
    return wide if getattr(model, "returns_probabilities", False) else wide.softmax(dim=1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise with the statistics of each batch, without touching its running ones.

    The running statistics of a supernet average over all the architectures that were drawn and fit none.
    """
    was_training = model.training
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracks in zip(norms, tracked, strict=True):
            norm.track_running_stats = tracks
        model.train(was_training)


def recalibrate(
    model: nn.Module, split: Split, *, augmentation: Augmentation, num_images: int = 2048
) -> None:
    """Recompute BatchNorm's running statistics as plain averages over training images.

    Args:
        model: Network (B, C, H, W) -> logits.
        split: Training images.
        augmentation: For its normalisation alone; images are not augmented.
        num_images: How many images to use at most.
    """
    batches = iterate_batches(split.drawn(num_images), EVALUATION_BATCH, augmentation=augmentation)
    inputs = (images.contiguous(memory_format=torch.channels_last) for images, _ in batches)
    average_statistics(model, inputs)


def statistics_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm modules of a model that keep running statistics."""
    return [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


@torch.no_grad()
def average_statistics(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Recompute BatchNorm's running statistics as plain averages over batches, every batch counting the same.

    As `torch.optim.swa_utils.update_bn` (SWA, arXiv 1803.05407), but BatchNorm alone is in training mode: with dropout
    or drop-path active the statistics would be random, and those of another network than the one that predicts. A
    BatchNorm that no batch reaches, as in an auxiliary head, keeps its statistics; so does every one where the pass
    fails.

    Args:
        model: Any module; it is changed.
        inputs: (B, ...) each, on the model's device.

    Raises:
        UserError: A batch holds a single value a channel, of which there is no variance.
    """
    norms = statistics_norms(model)
    before = [(copy.deepcopy(norm.state_dict()), norm.momentum) for norm in norms]
    finished = False
    try:
        with evaluation_mode(model):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                # A plain average instead of a moving one.
                norm.momentum = None
            for batch in inputs:
                model(batch)
        finished = True
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"BatchNorm statistics cannot be computed from a batch of one image ({error}).",
            "Give batches of two or more; a DataLoader's drop_last leaves out a smaller last one.",
        ) from error
    finally:
        for norm, (state, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not (finished and norm.num_batches_tracked):
                norm.load_state_dict(state)


@torch.inference_mode()
def predict_log_probs(model: nn.Module, split: Split, *, augmentation: Augmentation) -> Tensor:
    """Return log-probabilities (N, K) of a network in evaluation mode, in the order of the split."""
    was_training = model.training
    model.eval()
    parts = [
        model(images.contiguous(memory_format=torch.channels_last)).float().log_softmax(-1)
        for images, _ in iterate_batches(split, EVALUATION_BATCH, augmentation=augmentation)
    ]
    model.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def accuracy_under_batch_statistics(
    classify: Callable[[Tensor], Tensor], model: nn.Module, split: Split, *, augmentation: Augmentation
) -> float:
    """Return the share of right answers in [0, 1] with BatchNorm on each batch's own statistics."""
    hits = torch.zeros((), device=split.labels.device)
    with batch_statistics(model):
        for images, labels in iterate_batches(split, EVALUATION_BATCH, augmentation=augmentation):
            images = images.contiguous(memory_format=torch.channels_last)
            hits += (classify(images).argmax(-1) == labels).sum()
    return float(hits) / len(split)


def predict_batches(model: nn.Module, val_batches: Batches) -> tuple[FloatArray, IntArray]:
    """Compute a classifier's probabilities in evaluation mode; its modes are restored afterwards.

    Args:
        model: Inputs (B, ...) -> logits (B, K); or an `Ensemble`.
        val_batches: Validation batches.

    Returns:
        Class probabilities, shape (N, K), range [0, 1], NaN where logits are not finite; labels, shape (N,).

    Raises:
        UserError: There are no batches, or see `class_probs`.
    """
    probs, labels = [], []
    with evaluation_mode(model), torch.inference_mode():
        for inputs, classes in one_pass(val_batches):
            probs.append(class_probs(model, inputs, dtype=torch.float64))
            labels.append(classes)
    if not labels:
        raise no_batches("validation")
    # Copied once at the end, so that a GPU need not wait at every batch.
    return torch.cat(probs).cpu().numpy(), torch.cat(labels).cpu().numpy()


def predict_members(members: Iterable[nn.Module], val_batches: Batches) -> tuple[FloatArray, IntArray]:
    """Compute the probabilities of members, one after another.

    Args:
        members: Modules (B, ...) -> logits (B, K), or ensembles; one at a time is taken.
        val_batches: Validation batches, in the same order at every call.

    Returns:
        Class probabilities, shape (M, N, K), range [0, 1]; labels, shape (N,).

    Raises:
        UserError: No members or no batches, a member whose probabilities are not finite or that has another
            number of classes, or labels that change from call to call.
    """
    parts: list[FloatArray] = []
    first_labels: IntArray | None = None
    for index, member in enumerate(members):
        probs, labels = predict_batches(member, val_batches)
        if not np.isfinite(probs).all():
            raise UserError(
                f"Member {index} predicts probabilities that are not finite.",
                "Train it again, with a lower learning rate if it diverged, or leave it out.",
            )
        if first_labels is not None and not np.array_equal(labels, first_labels):
            raise UserError(
                f"Member {index} saw other labels than member 0.",
                "Give validation batches that come in the same order at every call.",
            )
        if parts and probs.shape[1] != parts[0].shape[1]:
            raise UserError(
                f"Member {index} has {probs.shape[1]} classes, but member 0 has {parts[0].shape[1]}.",
                "Combine members that were trained on the same classes.",
            )
        parts.append(probs)
        first_labels = labels
    if first_labels is None:
        raise UserError("There are no members to predict with.", "Give at least one network.")
    return np.stack(parts), first_labels


def no_batches(purpose: str) -> UserError:
    """Return the error for a pass over the data that was empty."""
    return UserError(
        f"There are no batches for {purpose}.",
        "Give a DataLoader, a list, or a function that starts a new pass over the data at every call.",
    )
