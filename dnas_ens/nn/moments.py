"""BatchNorm behind a pointwise convolution, from the second moments of the convolution's input.

With y = P z at every pixel, mean(y) = P mean(z) and var(y) = diag(P Cov(z) P^T). BatchNorm(P z) is therefore one
matrix A = P / sqrt(var(y) + eps) and one shift -A mean(z), known before y is computed: y itself, and what
BatchNorm would keep of it for the backward pass, are never stored, and mixture weights fold into A.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnas_ens.nn.depthwise import runs_in_triton
from dnas_ens.nn.execution import without_autocast

#: Channels of a group up to which a GPU multiplies by one dense matrix (experiments/results/gpu.md).
DENSE_PRODUCT, DENSE_GRAM = 32, 16
#: Channels of a group that the kernels of ``pointwise_norm_triton`` are written for.
TRITON_CHANNELS = (16, 32, 64)


def suits_large_products(features: Tensor) -> bool:
    """Say whether one large product with zeros takes less time than several small ones, as on a GPU."""
    return features.device.type != "cpu"


def folds_in_triton(features: Tensor, channels: int) -> bool:
    """Say whether our Triton kernels fold BatchNorm for groups of so many channels."""
    return channels in TRITON_CHANNELS and runs_in_triton(features)


def grouped_pointwise(features: Tensor, matrices: Tensor, shift: Tensor | None = None) -> Tensor:
    """Multiply every group of channels by a matrix at every pixel.

    Args:
        features: (B, G * c, H, W), channels_last.
        matrices: (G, d, c), rounded to the features' dtype.
        shift: (G, d), added; None for none.

    Returns:
        (B, G * d, H, W), channels_last.
    """
    groups, outputs, inputs = matrices.shape
    if suits_large_products(features):
        # Generic grouped convolutions are slow on GPUs.
        if inputs <= DENSE_PRODUCT:
            return sliced_pointwise(features, matrices[None], None if shift is None else shift[None])
        return batched_pointwise(features, matrices, shift)
    weight = matrices.to(features.dtype).reshape(groups * outputs, inputs, 1, 1)
    bias = None if shift is None else shift.to(features.dtype).reshape(-1)
    return F.conv2d(features, weight, bias, groups=groups)


def batched_pointwise(features: Tensor, matrices: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return ``grouped_pointwise`` as a batch of products, which on a GPU suits many channels a group."""
    groups, outputs, inputs = matrices.shape
    batch, _, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(-1, groups, inputs).transpose(0, 1)
    product = torch.bmm(rows, matrices.to(features.dtype).transpose(1, 2))
    if shift is not None:
        product = product + shift.to(features.dtype).unsqueeze(1)
    product = product.transpose(0, 1).reshape(batch, height, width, groups * outputs)
    return product.permute(0, 3, 1, 2)


def sliced_pointwise(features: Tensor, matrices: Tensor, shift: Tensor | None = None) -> Tensor:
    """Multiply the groups of channels of every slice of a batch by matrices of its own, as one product a slice.

    A block-diagonal matrix also multiplies zeros; a GPU's matrix units do that faster than they start small products.

    Args:
        features: (S * B', G * c, H, W), channels_last.
        matrices: (S, G, d, c), rounded to the features' dtype.
        shift: (S, G, d), added; None for none.

    Returns:
        (S * B', G * d, H, W), channels_last.
    """
    slices, groups, outputs, inputs = matrices.shape
    batch, _, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(slices, -1, groups * inputs)
    dense = block_diagonal(matrices.to(features.dtype)).transpose(1, 2)
    if shift is None:
        product = torch.bmm(rows, dense)
    else:
        product = torch.baddbmm(shift.to(features.dtype).reshape(slices, 1, -1), rows, dense)
    return product.view(batch, height, width, groups * outputs).permute(0, 3, 1, 2)


def block_diagonal(matrices: Tensor) -> Tensor:
    """Return matrices (..., G, d, c) as the blocks of one matrix each, (..., G * d, G * c)."""
    if matrices.shape[-3] == 1:
        return matrices.squeeze(-3)
    # Sizes (..., d, c, G) to (..., G, d, G, c).
    return matrices.movedim(-3, -1).diag_embed(dim1=-4, dim2=-2).flatten(-4, -3).flatten(-2)


def _gram(features: Tensor, groups: int) -> Tensor:
    """Return sum over pixels of z z^T for every group, (G, c, c), in float32 at least."""
    channels = features.shape[1] // groups
    if suits_large_products(features):
        rows = features.permute(0, 2, 3, 1)
        return dense_gram(rows, groups) if channels <= DENSE_GRAM else batched_gram(rows, groups)
    features = features.to(_accumulated(features))
    # The weight gradient of a pointwise convolution is this sum, by the fastest kernel a CPU has for it.
    weight = features.new_empty(groups * channels, channels, 1, 1)
    gram: Tensor = torch.ops.aten.convolution_backward(
        features, features, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups, [False, True, False]
    )[1]
    return gram.view(groups, channels, channels)


def batched_gram(rows: Tensor, groups: int) -> Tensor:
    """Return z^T z of every group of channels of rows z (..., G * c) as a batch of products, (G, c, c)."""
    return _squares(rows.reshape(-1, groups, rows.shape[-1] // groups).transpose(0, 1))


def dense_gram(rows: Tensor, groups: int) -> Tensor:
    """Return the same as the blocks on the diagonal of one product, which fills a GPU where groups are small."""
    channels = rows.shape[-1] // groups
    product = _squares(rows.reshape(1, -1, rows.shape[-1]))
    return product.view(groups, channels, groups, channels).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _squares(rows: Tensor) -> Tensor:
    if rows.dtype == torch.bfloat16 and rows.is_cuda:
        return torch.bmm(rows.transpose(1, 2), rows, out_dtype=torch.float32)
    return torch.bmm(rows.transpose(1, 2), rows)


def _accumulated(features: Tensor) -> torch.dtype:
    # A covariance is a small difference of large sums: bfloat16's eight bits would leave nothing of it.
    return torch.promote_types(features.dtype, torch.float32)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        count = features.numel() // features.shape[1]
        mean = features.mean(dim=(0, 2, 3), dtype=_accumulated(features)).view(groups, -1)
        covariance = _gram(features, groups) / count - mean.unsqueeze(2) * mean.unsqueeze(1)
        ctx.save_for_backward(features, mean)
        return mean, covariance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_covariance: Tensor) -> tuple[Tensor, None]:
        features, mean = ctx.saved_tensors
        count = features.numel() // features.shape[1]
        # The covariance's derivative is the one of (z - mean)(z - mean)^T; the mean's own part sums to zero.
        matrices = (of_covariance + of_covariance.transpose(1, 2)) / count
        shift = of_mean / count - (matrices @ mean.unsqueeze(2)).squeeze(2)
        return grouped_pointwise(features, matrices, shift), None


def moments(features: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of every group of channels over all images and pixels.

    Args:
        features: (B, G * c, H, W), channels_last.

    Returns:
        Mean (G, c) and biased covariance (G, c, c), in float32 for features of lower precision.
    """
    result: tuple[Tensor, Tensor] = _Moments.apply(features, groups)
    return result


class PointwiseNorm(nn.BatchNorm2d):
    """G pointwise convolutions side by side, each followed by affine-free BatchNorm, as matrices and shifts.

    It is a BatchNorm with all its settings (momentum, running statistics, training mode) that holds the
    convolutions' weights too.

    Args:
        channels: c, in and out of each convolution.
        convolve: False for BatchNorm alone, as if every convolution were the identity.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, groups: int, channels: int, *, convolve: bool = True) -> None:
        super().__init__(groups * channels, affine=False)
        self.groups = groups
        self.pointwise = nn.Parameter(torch.empty(groups, channels, channels)) if convolve else None

    def matrices(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what maps features to the normalised outputs of the convolutions.

        Args:
            features: (B, G' * c, H, W), channels_last; groups past the first G are ignored.

        Returns:
            A (G, c, c) and b (G, c): the output of group g is A_g z_g + b_g. Both keep the weights' precision under
            autocast.
        """
        with without_autocast(features.device):
            return self._matrices(features)

    def _matrices(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.training or not self.track_running_stats:
            channels = self.num_features // self.groups
            num_groups = features.shape[1] // channels
            if self.momentum is not None and self._folds_in_triton(features, channels):
                return self._folded(features, num_groups, channels, momentum=self.momentum)
            count, mean, covariance = self._moments(features, num_groups)
            mean, covariance = mean[: self.groups], covariance[: self.groups]
            if self.pointwise is None:
                variance = covariance.diagonal(dim1=1, dim2=2)
            else:
                mean = (self.pointwise @ mean.unsqueeze(2)).squeeze(2)
                variance = ((self.pointwise @ covariance) * self.pointwise).sum(2)
            # Rounding can make a tiny variance negative.
            variance = variance.clamp_min(0.0)
            if self.training and self.track_running_stats:
                track(self, mean.detach(), variance.detach(), count)
        else:
            mean, variance = self.running_mean.view(self.groups, -1), self.running_var.view(self.groups, -1)
        scale = torch.rsqrt(variance + self.eps)
        matrices = scale.diag_embed() if self.pointwise is None else self.pointwise * scale.unsqueeze(2)
        return matrices, -mean * scale

    def _folds_in_triton(self, features: Tensor, channels: int) -> bool:
        return folds_in_triton(features, channels)

    def _moments(self, features: Tensor, num_groups: int) -> tuple[int, Tensor, Tensor]:
        """Return how many values a channel has, and mean and covariance of every group; see ``moments``."""
        return features.numel() // features.shape[1], *moments(features, num_groups)

    def _folded(self, features: Tensor, num_groups: int, channels: int, *, momentum: float) -> tuple[Tensor, Tensor]:
        from dnas_ens.nn.pointwise_norm_triton import folded_norm

        tracks = self.training and self.track_running_stats
        with torch.no_grad():
            rows = features.permute(0, 2, 3, 1)
            dense = channels <= DENSE_PRODUCT
            gram = _squares(rows.reshape(1, -1, rows.shape[-1]))[0] if dense else batched_gram(rows, num_groups)
        return folded_norm(
            features,
            self.pointwise,
            gram,
            (self.running_mean, self.running_var, self.num_batches_tracked) if tracks else None,
            groups=self.groups,
            channels=channels,
            epsilon=self.eps,
            momentum=momentum,
        )


@torch.no_grad()
def track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move running statistics towards those of a batch, as BatchNorm does.

    Args:
        mean: Of every channel, in any shape.
        variance: The biased one.
        count: Values a channel has.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    share = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
    unbiased = variance * (count / max(1, count - 1))
    norm.running_mean.lerp_(mean.reshape(-1), share)
    norm.running_var.lerp_(unbiased.reshape(-1), share)
