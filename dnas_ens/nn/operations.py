"""Candidate operations of a cell and the registry a user can extend.

An operation is built by ``build_operation(name, in_channels, out_channels, stride, affine=...)`` and maps
(B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride)). C_in and C_out differ only where the stride is 2.

Those of DARTS (arXiv 1806.09055) begin with ReLU. Those of the efficient space are one kernel deep, convolution and
BatchNorm: there the nodes have the ReLU.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.errors import UserError
from dnas_ens.nn.depthwise import DepthwiseConv2d

#: Called with in_channels, out_channels, stride and affine.
OperationBuilder = Callable[[int, int, int, bool], nn.Module]
# Past about 50 pixels, oneDNN's gradient of the weights of a strided 1x1 convolution writes beyond its memory where
# there are fewer than 16 output channels (seen with PyTorch 2.14 on a CPU with AVX-512), and ends the process.
_SAFE_WIDTH = 32
#: Groups of a grouped convolution, or as many of them as divide the channels.
NUM_GROUPS = 4


def register_operation(name: str) -> Callable[[OperationBuilder], OperationBuilder]:
    """Add an operation to the registry; use it as a decorator.

    The decorated callable takes ``(in_channels, out_channels, stride, affine)`` and returns a module that maps
    (B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride)). ``affine`` says whether BatchNorm has
    a learnt scale and shift: it has none in the search and both in the retrained network.

    Raises:
        ValueError: If the name is taken.
    """

    def add(builder: OperationBuilder) -> OperationBuilder:
        if name in _REGISTRY:
            raise ValueError(f"Operation {name!r} is registered already; choose another name.")
        _REGISTRY[name] = builder
        return builder

    return add


def require_operations(names: tuple[str, ...] | frozenset[str]) -> None:
    """Check that every name is registered.

    Raises:
        UserError: Naming the first unknown operation and the nearest known one.
    """
    for name in sorted(set(names) - set(_REGISTRY)):
        nearest = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"Unknown operation {name!r}.", f"{hint}Known are {', '.join(_REGISTRY)}.")


def build_operation(name: str, in_channels: int, out_channels: int, stride: int, *, affine: bool) -> nn.Module:
    """Build one registered operation.

    Args:
        in_channels: C_in, of what it reads.
        out_channels: C_out, of what it returns; another number than C_in only at stride 2.
        stride: 1, or 2 on the edges that leave an input of a reduction cell.

    Raises:
        UserError: If the name is unknown.
    """
    require_operations((name,))
    return _REGISTRY[name](in_channels, out_channels, stride, affine)


def average_pool(features: Tensor, stride: int) -> Tensor:
    """Average over 3x3 windows, counting only the pixels of a window that are in the image.

    Maps (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)).
    """
    if features.device.type == "cuda":
        return padded_average_pool(features, stride)
    return F.avg_pool2d(features, 3, stride, padding=1, count_include_pad=False)


def padded_average_pool(features: Tensor, stride: int) -> Tensor:
    """Return ``average_pool`` without a padded window.

    On a GPU PyTorch's gradient of padded average pooling is silently wrong for channels_last images: it takes
    each pixel for its neighbour (github.com/pytorch/pytorch/issues/188344; seen here with 2.11).
    """
    padded = F.pad(features, (1, 1, 1, 1))
    inside = F.pad(features.new_ones(1, 1, *features.shape[2:]), (1, 1, 1, 1))
    count = F.avg_pool2d(inside, 3, stride, divisor_override=1)
    return F.avg_pool2d(padded, 3, stride, divisor_override=1) / count


class AveragePool(nn.Module):
    """``average_pool`` as a module."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        """Return ``average_pool``."""
        return average_pool(features, self.stride)


class ReluConvBn(nn.Sequential):
    """ReLU, pointwise convolution, BatchNorm: the preprocessing of a cell's inputs."""

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )


def halving_pointwise(features: Tensor, weight: Tensor) -> Tensor:
    """Convolve (B, C, H, W) by 1x1 kernels (C_out, C, 1, 1) at stride 2: (B, C_out, ceil(H / 2), ceil(W / 2))."""
    if features.device.type == "cpu" and features.shape[-1] > _SAFE_WIDTH:
        return F.conv2d(features[:, :, ::2, ::2], weight)
    return F.conv2d(features, weight, stride=2)


class HalvingConv2d(nn.Conv2d):
    """``halving_pointwise`` as a convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride=2, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``halving_pointwise``."""
        return halving_pointwise(features, self.weight)


class FactorizedReduce(nn.Module):
    """Halve height and width by two strided 1x1 convolutions, the second one shifted by a pixel.

    Odd sizes are rounded up, like a padded convolution of stride 2 does.
    """

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool) -> None:
        super().__init__()
        half = out_channels // 2
        self.even = HalvingConv2d(in_channels, half)
        self.odd = HalvingConv2d(in_channels, out_channels - half)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C_out, ceil(H/2), ceil(W/2))."""
        active = F.relu(features)
        shifted = F.pad(active[:, :, 1:, 1:], (0, 1, 0, 1))
        reduced: Tensor = self.norm(torch.cat([self.even(active), self.odd(shifted)], dim=1))
        return reduced


def depthwise_separable(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, *, dilation: int = 1, affine: bool
) -> list[nn.Module]:
    """Return ReLU, depthwise convolution, pointwise convolution and BatchNorm, size kept at stride 1."""
    return [
        nn.ReLU(),
        DepthwiseConv2d(in_channels, kernel_size, stride, dilation=dilation),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    ]


def _separable_conv(kernel_size: int) -> OperationBuilder:
    """Build `depthwise_separable` twice; the stride is in the first half."""
    return lambda before, after, stride, affine: nn.Sequential(
        *depthwise_separable(before, before, kernel_size, stride, affine=affine),
        *depthwise_separable(before, after, kernel_size, 1, affine=affine),
    )


def _dilated_conv(kernel_size: int) -> OperationBuilder:
    """Build `depthwise_separable` of dilation 2."""
    return lambda before, after, stride, affine: nn.Sequential(
        *depthwise_separable(before, after, kernel_size, stride, dilation=2, affine=affine)
    )


class Zero(nn.Module):
    """The operation ``none``: no information passes. It has the output shape of any other operation."""

    def __init__(self, out_channels: int, stride: int) -> None:
        super().__init__()
        self.out_channels, self.stride = out_channels, stride

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to zeros (B, C_out, ceil(H / stride), ceil(W / stride))."""
        return torch.zeros_like(features[:, :1, :: self.stride, :: self.stride].expand(-1, self.out_channels, -1, -1))


def _pooling(pool: nn.Module, in_channels: int, out_channels: int, affine: bool) -> nn.Module:
    if in_channels == out_channels:
        # Pooling has no weights to set its scale, so DARTS always puts an affine-free BatchNorm behind it.
        return nn.Sequential(pool, nn.BatchNorm2d(out_channels, affine=False))
    # Added zero channels would stay dead in a node that has no other edge; a pointwise convolution learns all of them.
    mix = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(pool, mix, nn.BatchNorm2d(out_channels, affine=affine))


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    *,
    affine: bool,
    groups: int = 1,
    dilation: int = 1,
) -> nn.Sequential:
    """Return a convolution and BatchNorm, size kept at stride 1."""
    if kernel_size == 1 and stride == 2:
        convolution: nn.Conv2d = HalvingConv2d(in_channels, out_channels)
    else:
        padding = dilation * (kernel_size // 2)
        convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, affine=affine))


_REGISTRY: dict[str, OperationBuilder] = {
    "none": lambda before, after, stride, affine: Zero(after, stride),
    "max_pool_3x3": lambda before, after, stride, affine: _pooling(
        nn.MaxPool2d(3, stride, padding=1), before, after, affine
    ),
    "avg_pool_3x3": lambda before, after, stride, affine: _pooling(AveragePool(stride), before, after, affine),
    "skip_connect": lambda before, after, stride, affine: (
        nn.Identity() if stride == 1 else FactorizedReduce(before, after, affine=affine)
    ),
    "sep_conv_3x3": _separable_conv(3),
    "sep_conv_5x5": _separable_conv(5),
    "dil_conv_3x3": _dilated_conv(3),
    "dil_conv_5x5": _dilated_conv(5),
    "conv_3x3": lambda before, after, stride, affine: conv_bn(before, after, 3, stride, affine=affine),
    "conv_1x1": lambda before, after, stride, affine: conv_bn(before, after, 1, stride, affine=affine),
    "group_conv_3x3": lambda before, after, stride, affine: conv_bn(
        before, after, 3, stride, affine=affine, groups=math.gcd(NUM_GROUPS, before, after)
    ),
    "depthwise_conv_3x3": lambda before, after, stride, affine: nn.Sequential(
        DepthwiseConv2d(before, 3, stride), *conv_bn(before, after, 1, 1, affine=affine)
    ),
    "dilated_conv_3x3": lambda before, after, stride, affine: conv_bn(
        before, after, 3, stride, affine=affine, dilation=2
    ),
}
