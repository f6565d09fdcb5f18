"""Depthwise convolution, fast in its backward pass too: on a CPU by three identities, on a GPU in Triton.

On a CPU, PyTorch runs depthwise convolutions and their 3x3 gradients by fast kernels, but the gradients of 5x5 and of
dilated kernels by generic ones that take five to forty times as long. Three identities reduce them to the fast ones:

- the gradient of the input, at stride 1, is the convolution of the output's gradient with the turned kernel;
- a convolution of dilation 2 is one of dilation 1 on each of the four grids of pixels of equal parity, and one of
  dilation and stride 2 sees a single one of them;
- the 25 weights of a 5x5 kernel are four 3x3 kernels on images shifted by one pixel to each corner.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Channels from which four 3x3 gradients beat the generic 5x5 one (a vector register holds 16 floats).
_WIDE = 16
_accelerated = True


@contextmanager
def native_depthwise() -> Iterator[None]:
    """Leave depthwise convolutions to PyTorch inside the block: the plain form, for comparison."""
    global _accelerated
    before, _accelerated = _accelerated, False
    try:
        yield
    finally:
        _accelerated = before


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution without bias that keeps the size at stride 1; parameters as in ``nn.Conv2d``.

    Args:
        channels: C, in and out.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, *, dilation: int = 1) -> None:
        super().__init__(
            channels,
            channels,
            kernel_size,
            stride,
            dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            groups=channels,
            bias=False,
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        return depthwise_conv(features, self.weight, stride=self.stride[0], dilation=self.dilation[0])


def depthwise_conv(features: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1) -> Tensor:
    """Convolve every channel with kernels of its own, zero-padded by dilation * (s - 1) / 2.

    Args:
        features: (B, C, H, W).
        weight: (k * C, 1, s, s), s odd: k kernels a channel, that of output e * C + c for channel c.

    Returns:
        (B, k * C, ceil(H / stride), ceil(W / stride)).
    """
    if runs_in_triton(features):
        from dnas_ens.nn import depthwise_triton

        if torch.is_autocast_enabled("cuda"):
            features = features.to(torch.get_autocast_dtype("cuda"))
        return depthwise_triton.depthwise_conv(features, weight, stride=stride, dilation=dilation)
    if len(weight) > features.shape[1]:
        features = torch.cat([features] * (len(weight) // features.shape[1]), dim=1)
    needs_gradient = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    if not (_accelerated and needs_gradient and features.device.type == "cpu"):
        return _convolve(features, weight, stride, dilation)
    if torch.is_autocast_enabled("cpu"):
        # As autocast does for PyTorch's own convolution; otherwise the gradients would mix two dtypes.
        dtype = torch.get_autocast_dtype("cpu")
        features, weight = features.to(dtype), weight.to(dtype)
    if stride == dilation == 2:
        return depthwise_conv(features[:, :, ::2, ::2], weight)
    result: Tensor = _DepthwiseConv.apply(features, weight, stride, dilation)
    return result


def runs_in_triton(features: Tensor) -> bool:
    """Say whether our own kernels compute on these features (B, C, H, W): on a GPU, channels_last, not double."""
    return (
        _accelerated
        and features.device.type == "cuda"
        and features.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and features.is_contiguous(memory_format=torch.channels_last)
        and triton_works()
    )


@functools.cache
def triton_works() -> bool:
    """Try one of our kernels on the GPU, once per process; if it fails, say so and use PyTorch's."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from dnas_ens.nn import depthwise_triton

        images = torch.ones(1, 16, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last)
        weight = torch.ones(16, 1, 3, 3, device="cuda")
        works = bool((depthwise_triton.depthwise_conv(images, weight, stride=1, dilation=1)[..., 1, 1] == 9).all())
    except Exception as error:  # Triton needs a C compiler and a driver, and reports in many ways that one is missing
        reason = " ".join(str(error).split())[:200]
        print(f"our GPU kernels do not run here ({reason}); PyTorch's are taken", file=sys.stderr, flush=True)
        return False
    return works


def _convolve(features: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] - 1) // 2
    return F.conv2d(features, weight, None, stride, padding, dilation, groups=len(weight))


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        # Saved without making them contiguous: copying again in the backward pass costs less than keeping a copy.
        ctx.save_for_backward(features, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return _convolve(features.contiguous(memory_format=torch.channels_last), weight, stride, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        features, weight = ctx.saved_tensors
        features = features.contiguous(memory_format=torch.channels_last)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_features = of_weight = None
        if ctx.needs_input_grad[0]:
            if ctx.stride == 1:
                of_features = _convolve(gradient, weight.flip(2, 3), 1, ctx.dilation)
            else:
                of_features = _native_gradients(gradient, features, weight, ctx.stride, ctx.dilation)[0]
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(gradient, features, weight, ctx.stride, ctx.dilation)
        return of_features, of_weight, None, None


def _native_gradients(
    gradient: Tensor, features: Tensor, weight: Tensor, stride: int, dilation: int, *, of_weight: bool = False
) -> tuple[Tensor, Tensor]:
    padding = dilation * (weight.shape[-1] - 1) // 2
    steps = ([stride] * 2, [padding] * 2, [dilation] * 2)
    mask = [not of_weight, of_weight, False]
    gradients = torch.ops.aten.convolution_backward(
        gradient, features, weight, None, *steps, False, [0, 0], len(weight), mask
    )
    return gradients[0], gradients[1]


def _weight_gradient(gradient: Tensor, features: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    if stride == 1 and dilation == 2:
        gradient, features, dilation = parity_grids(gradient), parity_grids(features), 1
    if stride == 1 and dilation == 1 and weight.shape[-1] == 5 and len(weight) >= _WIDE:
        return _weight_gradient_5x5(gradient, features)
    return _native_gradients(gradient, features, weight, stride, dilation, of_weight=True)[1]


def parity_grids(features: Tensor) -> Tensor:
    """Return the pixels of equal row and column parity as images of their own, zero-padded to an even size.

    Of (B, C, H, W), as (4B, C, ceil(H / 2), ceil(W / 2)) in channels_last layout.
    """
    batch, channels, height, width = features.shape
    if height % 2 or width % 2:
        features = F.pad(features, (0, width % 2, 0, height % 2))
        height, width = features.shape[2:]
    pixels = features.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels)
    grids = pixels.permute(2, 4, 0, 1, 3, 5).reshape(4 * batch, height // 2, width // 2, channels)
    return grids.permute(0, 3, 1, 2)


def _weight_gradient_5x5(gradient: Tensor, features: Tensor) -> Tensor:
    """Return the gradient (C, 1, 5, 5) of a 5x5 kernel at stride 1 from four gradients of 3x3 kernels.

    Images are in memory one after the other, each in a frame of zeros one pixel wide. A shift by a pixel is then
    an offset into that memory and copies nothing: pixels shifted over an edge fall on the next image's frame.
    """
    batch, channels, height, width = features.shape
    frame = (batch, height + 2, width + 2, channels)
    size = batch * (height + 2) * (width + 2) * channels
    margin = (width + 3) * channels
    memory = features.new_zeros(size + 2 * margin)
    memory[margin : margin + size].view(frame)[:, 1:-1, 1:-1] = features.permute(0, 2, 3, 1)
    framed = gradient.new_zeros(frame)
    framed[:, 1:-1, 1:-1] = gradient.permute(0, 2, 3, 1)
    framed = framed.permute(0, 3, 1, 2)
    kernel = features.new_empty(channels, 1, 3, 3)
    result = features.new_empty(channels, 1, 5, 5)
    for row in (-1, 1):
        for column in (-1, 1):
            start = margin + (row * (width + 2) + column) * channels
            shifted = memory[start : start + size].view(frame).permute(0, 3, 1, 2)
            part = _native_gradients(framed, shifted, kernel, 1, 1, of_weight=True)[1]
            result[:, :, row + 1 : row + 4, column + 1 : column + 4] = part
    return result
