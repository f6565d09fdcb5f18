# ruff: noqa: N803
"""BatchNorm folded into pointwise convolutions on a GPU, in Triton: what ``moments`` does in fifty small operations.

A recorded step was 15,554 kernels of 3.2 microseconds on average with them (docs/log.md). Here
are three kernels forward, products of matrices included, and three backward, by the gradients in closed form. With mean
mu and covariance S of the input, weights P, m = P mu, v = diag(P S P^T), s = (v + eps)^-1/2:

    A = s P, b = -s m                                 of every group
    ds = sum_j dA_ij P_ij - db m, dm = -s db, dv = -s^3 ds / 2
    dP = s dA + dm mu^T + 2 dv (P S), dmu = P^T dm, dS = P^T dv P
    dz = (2 dS z + dmu - 2 dS mu) / number of pixels    of every pixel z
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dnas_ens.nn.execution import on_device_of

#: Chunks of pixels that sums are taken over apart, in a fixed order.
_CHUNKS = 64


@triton.jit(do_not_specialize=("num_pixels", "pixels_of_chunk"))
def _sums_kernel(
    rows, partial, num_pixels, pixels_of_chunk, num_channels, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum over a chunk of pixels: partial[chunk, channel]."""
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((PIXELS, BLOCK), dtype=tl.float32)
    for start in range(0, pixels_of_chunk, PIXELS):
        pixel = chunk * pixels_of_chunk + start + tl.arange(0, PIXELS)
        mask = (pixel < num_pixels)[:, None]
        value = tl.load(rows + (pixel * num_channels)[:, None] + channel[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32)
    tl.store(partial + chunk * num_channels + channel, tl.sum(total, axis=0))


@triton.jit
def _moments_of(
    squares, partial, pointwise, count, num_channels, group, block_stride, row_stride,
    CHUNKS: tl.constexpr, C: tl.constexpr, CONVOLVE: tl.constexpr,
):  # fmt: skip
    """Return mu (C,), P (C, C), P S (C, C), m (C,) and v (C,) of a group."""
    own = tl.arange(0, C)
    each = tl.arange(0, CHUNKS)
    sums = tl.load(partial + each[:, None] * num_channels + (group * C + own)[None, :])
    mean = tl.sum(sums, axis=0) / count
    square = tl.load(squares + group * block_stride + own[:, None] * row_stride + own[None, :])
    covariance = square / count - mean[:, None] * mean[None, :]
    if CONVOLVE:
        weights = tl.load(pointwise + group * C * C + own[:, None] * C + own[None, :])
        product = tl.dot(weights, covariance, input_precision="ieee")
    else:
        weights = tl.where(own[:, None] == own[None, :], 1.0, 0.0)
        product = covariance
    variance = tl.maximum(tl.sum(product * weights, axis=1), 0.0)
    return mean, weights, product, tl.sum(weights * mean[None, :], axis=1), variance


@triton.jit(do_not_specialize=("count", "epsilon", "momentum", "unbiased", "block_stride", "row_stride"))
def _fold_kernel(
    squares, partial, pointwise, matrices, shifts, running_mean, running_var, num_batches, count, epsilon, momentum,
    unbiased, num_channels, block_stride, row_stride,
    CHUNKS: tl.constexpr, C: tl.constexpr, CONVOLVE: tl.constexpr, TRACK: tl.constexpr,
):  # fmt: skip
    """Write A (C, C) and b (C,) of a group, and update its running statistics."""
    group = tl.program_id(0)
    own = tl.arange(0, C)
    _, weights, _, inner, variance = _moments_of(
        squares, partial, pointwise, count, num_channels, group, block_stride, row_stride, CHUNKS, C, CONVOLVE
    )
    scale = 1.0 / tl.sqrt(variance + epsilon)
    tl.store(matrices + group * C * C + own[:, None] * C + own[None, :], weights * scale[:, None])
    tl.store(shifts + group * C + own, -inner * scale)
    if TRACK:
        place = group * C + own
        before = tl.load(running_mean + place)
        tl.store(running_mean + place, before + momentum * (inner - before))
        before = tl.load(running_var + place)
        tl.store(running_var + place, before + momentum * (variance * unbiased - before))
        if group == 0:
            tl.store(num_batches, tl.load(num_batches) + 1)


@triton.jit(do_not_specialize=("count", "epsilon", "num_groups", "block_stride", "row_stride"))
def _unfold_kernel(
    squares, partial, pointwise, of_matrices, of_shifts, of_pointwise, of_rows, of_constant, count, epsilon, num_groups,
    num_channels, block_stride, row_stride, CHUNKS: tl.constexpr, C: tl.constexpr, CONVOLVE: tl.constexpr,
):  # fmt: skip
    """Write dP of a group, and the matrix and the constant of dz; zeros for groups that were not looked at."""
    group = tl.program_id(0)
    own = tl.arange(0, C)
    square = own[:, None] * C + own[None, :]
    place = of_rows + group * block_stride + own[:, None] * row_stride + own[None, :]
    if group < num_groups:
        mean, weights, product, inner, variance = _moments_of(
            squares,
            partial,
            pointwise,
            count,
            num_channels,
            group,
            block_stride,
            row_stride,
            CHUNKS,
            C,
            CONVOLVE,
        )
        scale = 1.0 / tl.sqrt(variance + epsilon)
        slope = tl.load(of_matrices + group * C * C + square)
        shift_slope = tl.load(of_shifts + group * C + own)
        of_scale = tl.sum(slope * weights, axis=1) - shift_slope * inner
        of_inner = -scale * shift_slope
        of_variance = tl.where(variance > 0.0, -0.5 * scale * scale * scale * of_scale, 0.0)
        if CONVOLVE:
            of_weights = slope * scale[:, None] + of_inner[:, None] * mean[None, :]
            of_weights += 2.0 * of_variance[:, None] * product
            tl.store(of_pointwise + group * C * C + square, of_weights)
            twice = 2.0 * tl.dot(tl.trans(weights), weights * of_variance[:, None], input_precision="ieee")
        else:
            twice = 2.0 * weights * of_variance[:, None]
        constant = tl.sum(weights * of_inner[:, None], axis=0) - tl.sum(twice * mean[None, :], axis=1)
        tl.store(place, (twice / count).to(of_rows.dtype.element_ty))
        tl.store(of_constant + group * C + own, (constant / count).to(of_constant.dtype.element_ty))
    else:
        zero = tl.zeros((C, C), dtype=tl.float32)
        tl.store(place, zero.to(of_rows.dtype.element_ty))
        tl.store(of_constant + group * C + own, tl.sum(zero, axis=1).to(of_constant.dtype.element_ty))


def _sums(rows: Tensor) -> Tensor:
    """Return sums over chunks of the rows (P, channels), (chunks, channels) in float32."""
    num_pixels, num_channels = rows.shape
    pixels_of_chunk = 128 * triton.cdiv(num_pixels, 128 * _CHUNKS)
    partial = torch.empty(_CHUNKS, num_channels, device=rows.device)
    with on_device_of(rows):
        _sums_kernel[(_CHUNKS, num_channels // 16)](
            rows, partial, num_pixels, pixels_of_chunk, num_channels, PIXELS=128, BLOCK=16
        )
    return partial


class _FoldedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        pointwise: Tensor | None,
        gram: Tensor,
        tracked: tuple[Tensor, Tensor, Tensor] | None,
        settings: tuple[int, int, float, float],
    ) -> tuple[Tensor, Tensor]:
        groups, channels, epsilon, momentum = settings
        batch, num_channels, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, num_channels)
        count = batch * height * width
        partial = _sums(rows)
        # Blocks on the diagonal of one product, or products of their own.
        blocks = (channels * num_channels + channels, num_channels) if gram.dim() == 2 else (channels**2, channels)
        matrices = torch.empty(groups, channels, channels, device=features.device)
        shifts = torch.empty(groups, channels, device=features.device)
        weights = matrices if pointwise is None else pointwise.contiguous()
        with on_device_of(features):
            _fold_kernel[(groups,)](
                gram,
                partial,
                weights,
                matrices,
                shifts,
                *(tracked or (shifts, shifts, shifts)),
                float(count),
                epsilon,
                momentum,
                count / max(1, count - 1),
                num_channels,
                *blocks,
                CHUNKS=_CHUNKS,
                C=channels,
                CONVOLVE=pointwise is not None,
                TRACK=tracked is not None,
            )
        ctx.save_for_backward(features, gram, partial, weights)
        ctx.settings, ctx.blocks, ctx.convolves = settings, blocks, pointwise is not None
        return matrices, shifts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_matrices: Tensor, of_shifts: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        features, gram, partial, weights = ctx.saved_tensors
        groups, channels, epsilon, _ = ctx.settings
        batch, num_channels, height, width = features.shape
        of_pointwise = torch.empty_like(weights)
        # The product with each pixel is as the Gram matrix is: one with zeros between blocks, or one a group.
        of_rows = gram.new_zeros(gram.shape, dtype=features.dtype)
        of_constant = torch.empty(num_channels, dtype=features.dtype, device=features.device)
        with on_device_of(features):
            _unfold_kernel[(num_channels // channels,)](
                gram,
                partial,
                weights,
                of_matrices.contiguous(),
                of_shifts.contiguous(),
                of_pointwise,
                of_rows,
                of_constant,
                float(batch * height * width),
                epsilon,
                groups,
                num_channels,
                *ctx.blocks,
                CHUNKS=_CHUNKS,
                C=channels,
                CONVOLVE=ctx.convolves,
            )
        of_features = None
        if ctx.needs_input_grad[0]:
            rows = features.permute(0, 2, 3, 1).reshape(-1, num_channels)
            if gram.dim() == 2:
                product = torch.addmm(of_constant, rows, of_rows)
            else:
                parts = rows.view(len(rows), -1, channels).transpose(0, 1)
                product = torch.baddbmm(of_constant.view(-1, 1, channels), parts, of_rows)
                product = product.transpose(0, 1).reshape(len(rows), num_channels)
            of_features = product.view(batch, height, width, num_channels).permute(0, 3, 1, 2)
        return of_features, of_pointwise if ctx.convolves else None, None, None, None


def folded_norm(
    features: Tensor,
    pointwise: Tensor | None,
    gram: Tensor,
    tracked: tuple[Tensor, Tensor, Tensor] | None,
    *,
    groups: int,
    channels: int,
    epsilon: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Return what maps features to normalised outputs, as ``PointwiseNorm.matrices`` does in training.

    Args:
        features: (B, G' * c, H, W), channels_last, c one of 16, 32 and 64; groups past the first G are ignored.
        pointwise: P, (G, c, c) float32; None for the identity.
        gram: Sums of z z^T over pixels in float32: (G' * c, G' * c), or the blocks on its diagonal (G', c, c).
        tracked: running_mean, running_var (G * c,) and num_batches_tracked, updated in place; None for none.
        momentum: Share of the batch in the running statistics.

    Returns:
        A (G, c, c) and b (G, c), float32.
    """
    result: tuple[Tensor, Tensor] = _FoldedNorm.apply(
        features, pointwise, gram, tracked, (groups, channels, epsilon, momentum)
    )
    return result
