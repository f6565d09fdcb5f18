"""Predictions of a network, and the BatchNorm statistics they stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from dnas_ens.analysis.metrics import FloatArray, IntArray
from dnas_ens.data.batches import Augmentation, iterate_batches
from dnas_ens.data.dataset import Split
from dnas_ens.errors import UserError

#: Images of a pass without gradients.
EVALUATION_BATCH = 256
#: One pass over data at every call: inputs (B, ...) on the model's device, labels (B,).
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


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
    chosen = split.subset(torch.arange(0, len(split), max(1, len(split) // num_images)))
    batches = (
        images.contiguous(memory_format=torch.channels_last)
        for images, _ in iterate_batches(chosen, EVALUATION_BATCH, augmentation=augmentation)
    )
    with torch.no_grad():
        update_bn(batches, model)


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
        model: Inputs (B, ...) -> logits (B, K).
        val_batches: Validation batches.

    Returns:
        Class probabilities, shape (N, K), range [0, 1], NaN where logits are not finite; labels, shape (N,).

    Raises:
        UserError: There are no batches.
    """
    probs, labels = [], []
    with evaluation_mode(model), torch.inference_mode():
        for inputs, classes in val_batches():
            probs.append(model(inputs).double().softmax(dim=1))
            labels.append(classes)
    if not labels:
        raise no_batches("validation")
    # Copied once at the end, so that a GPU need not wait at every batch.
    return torch.cat(probs).cpu().numpy(), torch.cat(labels).cpu().numpy()


def predict_members(members: Iterable[nn.Module], val_batches: Batches) -> tuple[FloatArray, IntArray]:
    """Compute the probabilities of members, one after another.

    Args:
        members: Modules (B, ...) -> logits (B, K); one at a time is taken.
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
        "Give a function that starts a new pass over the data at every call.",
    )
