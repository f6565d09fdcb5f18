"""BatchNorm's statistics: of each batch, or recomputed for a network whose weights have changed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dnas_ens.data.batches import Augmentation
from dnas_ens.data.dataset import Split
from dnas_ens.errors import UserError
from dnas_ens.training.prediction import evaluation_batches, evaluation_mode

#: Training images that BatchNorm's statistics are recomputed from.
CALIBRATION_IMAGES = 2048


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise with the statistics of each batch, without touching its running ones.

    The running statistics of a supernet average over all the architectures that were drawn and fit none.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    with evaluation_mode(model):
        try:
            for norm in norms:
                norm.train()
                norm.track_running_stats = False
            yield
        finally:
            for norm, tracks in zip(norms, tracked, strict=True):
                norm.track_running_stats = tracks


@torch.no_grad()
def accuracy_under_batch_statistics(
    classify: Callable[[Tensor], Tensor], model: nn.Module, split: Split, *, augmentation: Augmentation
) -> float:
    """Return the share of right answers in [0, 1] with BatchNorm on each batch's own statistics."""
    hits = torch.zeros((), device=split.labels.device)
    with batch_statistics(model):
        for images, labels in evaluation_batches(split, augmentation=augmentation):
            hits += (classify(images).argmax(-1) == labels).sum()
    return float(hits) / len(split)


def recalibrate(
    model: nn.Module, split: Split, *, augmentation: Augmentation, num_images: int = CALIBRATION_IMAGES
) -> None:
    """Recompute BatchNorm's running statistics as plain averages over training images.

    Args:
        augmentation: For its normalisation alone; images are not augmented.
    """
    batches = evaluation_batches(split.drawn(num_images), augmentation=augmentation)
    average_statistics(model, (images for images, _ in batches))


def statistics_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm modules of a model that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@torch.no_grad()
def average_statistics(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Recompute BatchNorm's running statistics as averages over batches, every batch by its number of images.

    Like `torch.optim.swa_utils.update_bn` (SWA, arXiv 1803.05407), and equal to it for batches of one size; but a
    last batch of few images counts less than a full one, and BatchNorm alone is in training mode: with dropout
    or drop-path active the statistics would be random, and would fit another network than the one that predicts. A
    BatchNorm that no batch reaches, as in an auxiliary head, keeps its statistics; so does every one where the pass
    fails.

    Args:
        model: Any module; it is changed.
        inputs: (B, ...) each, on the model's device.

    Raises:
        UserError: A batch holds a single value per channel, which has no variance.
    """
    norms = statistics_norms(model)
    before = [(copy.deepcopy(norm.state_dict()), norm.momentum) for norm in norms]
    finished = False
    hooks = [norm.register_forward_pre_hook(_ImageWeight()) for norm in norms]
    try:
        with evaluation_mode(model), _without_compiled_code():
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                # A plain average over calls, where the hook does not run: the module is not called itself.
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
        for hook in hooks:
            hook.remove()
        for norm, (state, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not (finished and norm.num_batches_tracked):
                norm.load_state_dict(state)


def _without_compiled_code() -> AbstractContextManager[object]:
    """Run compiled modules as they are written: compiled code does not look for hooks."""
    # torch._dynamo is imported by the first compilation; importing it here would be slow.
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class _ImageWeight:
    """Before each call of one BatchNorm: lets the batch count by its images among all that were seen."""

    def __init__(self) -> None:
        # By device: DataParallel keeps the statistics of one replica only.
        self.num_images: dict[torch.device, int] = {}

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        images = inputs[0]
        self.num_images[images.device] = self.num_images.get(images.device, 0) + len(images)
        # For batches of one size this is 1 / t to the last bit.
        norm.momentum = len(images) / self.num_images[images.device]  # type: ignore[assignment]
