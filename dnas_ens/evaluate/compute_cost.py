"""What a network costs to use: floating-point operations and time of one image."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dnas_ens.training.prediction import EVALUATION_BATCH, evaluation_mode

#: A timing takes at least so many passes and seconds, after a first pass that does not count.
MIN_PASSES = 5
MIN_SECONDS = 0.2


def count_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Count the floating-point operations of classifying one image, in evaluation mode.

    Convolutions and matrix products count, a multiply-add as 2; normalisation, activations, pooling and sums do
    not (`torch.utils.flop_counter`). Papers that say FLOPs often mean multiply-adds, half of this.

    Args:
        model: Network (B, C, H, W) -> logits (B, K).
        image_shape: (C, H, W).
    """
    with evaluation_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(_images(model, 1, image_shape))
    return int(counter.get_total_flops())


def inference_seconds(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    batch_size: int = EVALUATION_BATCH,
    channels_last: bool = False,
) -> float:
    """Time the classification of a batch on the model's device, per image.

    Reading and normalising images is not in it. On a CPU it uses PyTorch's current number of threads; on a GPU it
    waits for the device.

    Args:
        model: Network (B, C, H, W) -> logits (B, K).
        image_shape: (C, H, W).

    Returns:
        Median over passes, in seconds an image.
    """
    images = _images(model, batch_size, image_shape)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    passes: list[float] = []
    with evaluation_mode(model), torch.inference_mode():
        _timed_pass(model, images)
        while len(passes) < MIN_PASSES or sum(passes) < MIN_SECONDS:
            passes.append(_timed_pass(model, images))
    return statistics.median(passes) / batch_size


def _timed_pass(model: nn.Module, images: Tensor) -> float:
    """Return the seconds of one pass, from an idle device to an idle device."""
    on_gpu = images.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    model(images)
    if on_gpu:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start


def _images(model: nn.Module, batch_size: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Return normalised noise of the model's type and device, drawn apart from the global stream."""
    floating = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    like = next(floating, torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, *image_shape, generator=generator).to(like)
