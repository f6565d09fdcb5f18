# ruff: noqa: N803
"""Depthwise convolution of channels_last images on a GPU, in Triton: forward pass and both gradients.

PyTorch's own kernels take about twice as long in this layout, cuDNN's three to four times with dilated kernels and two
thirds to nearly twice with plain ones (experiments/results/gpu.md). Here every output channel e * C + c convolves
input channel c, so that the k edges that leave a node read it without a copy for each. Sums are float32 and in a fixed
order: no atomics, so that two runs agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnas_ens.nn.execution import on_device_of

#: Outputs of a program.
_BLOCK = 2048
#: Chunks of pixels that a weight gradient is summed over apart, at most.
_CHUNKS = 32


#: Arguments of a launch that kernels are not recompiled for.
_GENERAL = ("num_pixels", "in_height", "in_width", "out_height", "out_width", "stride", "dilation")


@triton.jit
def _position(pixel, height, width):
    """Return image, row and column of pixels that are counted image by image and row by row."""
    return pixel // (width * height), (pixel // width) % height, pixel % width


@triton.jit(do_not_specialize=(*_GENERAL, "num_terms"))
def _convolve_kernel(
    features, taps, result, num_pixels, in_height, in_width, out_height, out_width, in_channels, out_channels, channels,
    num_weights, num_terms, stride, dilation, SIDE: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum over terms e and taps: result[p, o] = features[p + tap, o % C + e C] * taps[tap, o + e C].

    Forward: one term, output o = e C + c reads input c. Transposed, for the gradient of the input: output c sums over
    the k edges' gradients.
    """
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image, row, column = _position(pixel, out_height, out_width)
    own = out < out_channels
    total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    pad = dilation * (SIDE // 2)
    for term in range(num_terms):
        source = out % channels + term * channels
        kernel = out + term * channels
        # Only columns are unrolled: that gives enough loads at a time and compiles in a third of a second.
        for down in range(SIDE):
            if TRANSPOSED:
                y = row + pad - down * dilation
                in_row = (y >= 0) & (y % STEP == 0)
                y = y // STEP
            else:
                y = row * stride + down * dilation - pad
                in_row = y >= 0
            in_row = in_row & (y < in_height) & (pixel < num_pixels)
            for across in tl.static_range(SIDE):
                if TRANSPOSED:
                    x = column + pad - across * dilation
                    inside = in_row & (x >= 0) & (x % STEP == 0)
                    x = x // STEP
                else:
                    x = column * stride + across * dilation - pad
                    inside = in_row & (x >= 0)
                inside = inside & (x < in_width)
                place = ((image * in_height + y) * in_width + x) * in_channels
                mask = inside[:, None] & own[None, :]
                value = tl.load(features + place[:, None] + source[None, :], mask=mask, other=0.0)
                weight = tl.load(taps + (down * SIDE + across) * num_weights + kernel, mask=own, other=0.0)
                total += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    mask = (pixel < num_pixels)[:, None] & own[None, :]
    place = (pixel * out_channels)[:, None] + out[None, :]
    tl.store(result + place, total.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*_GENERAL, "pixels_of_chunk"))
def _weight_gradient_kernel(
    features, gradient, partial, num_pixels, in_height, in_width, out_height, out_width, out_channels, channels,
    pixels_of_chunk, stride, dilation, SIDE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum over a chunk of pixels: partial[chunk, tap, o] = gradient[p, o] * features[p + tap, o % C]."""
    chunk, tap = tl.program_id(0), tl.program_id(2)
    out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own = out < out_channels
    pad = dilation * (SIDE // 2)
    total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    for start in range(0, pixels_of_chunk, PIXELS):
        pixel = chunk * pixels_of_chunk + start + tl.arange(0, PIXELS)
        image, row, column = _position(pixel, out_height, out_width)
        y = row * stride + (tap // SIDE) * dilation - pad
        x = column * stride + (tap % SIDE) * dilation - pad
        inside = (y >= 0) & (x >= 0) & (y < in_height) & (x < in_width) & (pixel < num_pixels)
        mask = inside[:, None] & own[None, :]
        place = ((image * in_height + y) * in_width + x) * channels
        value = tl.load(features + place[:, None] + (out % channels)[None, :], mask=mask, other=0.0)
        slope = tl.load(gradient + (pixel * out_channels)[:, None] + out[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32) * slope.to(tl.float32)
    place = (chunk * SIDE * SIDE + tap) * out_channels
    tl.store(partial + place + out, tl.sum(total, axis=0), mask=own)


def _sizes(source: Tensor, result: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the numbers of a launch (pixels, in_height, in_width, out_height, out_width), and its blocks.

    Blocks are pixels and channels of a program; few different ones, because each is compiled.
    """
    batch, out_channels, *size = result.shape
    channels = min(16, triton.next_power_of_2(out_channels))
    blocks = {"PIXELS": _BLOCK // channels, "CHANNELS": channels}
    return (batch * math.prod(size), *source.shape[2:], *size), blocks


def _launch(features: Tensor, taps: Tensor, result: Tensor, *, stride: int, dilation: int, transposed: bool) -> Tensor:
    """Fill the result with the convolution by taps (s * s, k * C), or with its transpose."""
    in_channels, out_channels = features.shape[1], result.shape[1]
    channels = min(in_channels, out_channels)
    sizes, blocks = _sizes(features, result)
    grid = triton.cdiv(sizes[0], blocks["PIXELS"]), triton.cdiv(out_channels, blocks["CHANNELS"])
    with on_device_of(features):
        _convolve_kernel[grid](
            features,
            taps,
            result,
            *sizes,
            in_channels,
            out_channels,
            channels,
            taps.shape[1],
            taps.shape[1] // channels if transposed else 1,
            stride,
            dilation,
            SIDE=math.isqrt(len(taps)),
            # The step of the transpose, a constant because dividing by a variable is slow.
            STEP=stride if transposed else 1,
            TRANSPOSED=transposed,
            **blocks,
        )
    return result


def _weight_gradient(features: Tensor, gradient: Tensor, side: int, *, stride: int, dilation: int) -> Tensor:
    """Return the gradient of the weights (k * C, 1, s, s) in float32."""
    channels, out_channels = features.shape[1], gradient.shape[1]
    sizes, blocks = _sizes(features, gradient)
    pixels_of_chunk = blocks["PIXELS"] * triton.cdiv(sizes[0], blocks["PIXELS"] * _CHUNKS)
    chunks = triton.cdiv(sizes[0], pixels_of_chunk)
    partial = torch.empty(chunks, side * side, out_channels, device=features.device)
    with on_device_of(features):
        _weight_gradient_kernel[(chunks, triton.cdiv(out_channels, blocks["CHANNELS"]), side * side)](
            features,
            gradient,
            partial,
            *sizes,
            out_channels,
            channels,
            pixels_of_chunk,
            stride,
            dilation,
            SIDE=side,
            **blocks,
        )
    return partial.sum(0).t().reshape(out_channels, 1, side, side)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (len(like), channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        features = features.contiguous(memory_format=torch.channels_last)
        # Neighbouring channels' weights of a tap side by side, as they are read.
        taps = weight.flatten(1).t().contiguous()
        ctx.save_for_backward(features, taps)
        ctx.steps = {"stride": stride, "dilation": dilation}
        ctx.weight = weight.shape[-1], weight.dtype
        height, width = (-(-side // stride) for side in features.shape[2:])
        result = _empty(features, len(weight), height, width)
        return _launch(features, taps, result, transposed=False, **ctx.steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        features, taps = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_features = of_weight = None
        if ctx.needs_input_grad[0]:
            of_features = _empty(features, *features.shape[1:])
            _launch(gradient, taps, of_features, transposed=True, **ctx.steps)
        if ctx.needs_input_grad[1]:
            side, dtype = ctx.weight
            of_weight = _weight_gradient(features, gradient, side, **ctx.steps).to(dtype)
        return of_features, of_weight, None, None


def depthwise_conv(features: Tensor, weight: Tensor, *, stride: int, dilation: int) -> Tensor:
    """Convolve as ``dnas_ens.nn.depthwise.depthwise_conv``, on a GPU.

    Args:
        features: (B, C, H, W) of float32 or lower precision, of fewer than 2^31 numbers, as the result's; taken to
            channels_last where they are not.
        weight: (k * C, 1, s, s), s odd, in float32 or the features' precision.

    Returns:
        (B, k * C, ceil(H / stride), ceil(W / stride)) in channels_last and the features' precision.
    """
    result: Tensor = _DepthwiseConv.apply(features, weight, stride, dilation)
    return result
