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

OperationBuilder = Callable[[int, int, int, bool], nn.Module]
_REGISTRY: dict[str, OperationBuilder] = {}
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

    Args:
        features: (B, C, H, W).

    Returns:
        (B, C, ceil(H / stride), ceil(W / stride)).
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
        """Map (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        return average_pool(features, self.stride)


class ReluConvBn(nn.Sequential):
    """ReLU, convolution, BatchNorm: the preprocessing of a cell's inputs."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, *, affine: bool) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )


def halving_pointwise(features: Tensor, weight: Tensor) -> Tensor:
    """Convolve by 1x1 kernels at stride 2.

    Args:
        features: (B, C, H, W).
        weight: (C_out, C, 1, 1).

    Returns:
        (B, C_out, ceil(H / 2), ceil(W / 2)).
    """
    if features.device.type == "cpu" and features.shape[-1] > _SAFE_WIDTH:
        return F.conv2d(features[:, :, ::2, ::2], weight)
    return F.conv2d(features, weight, stride=2)


class HalvingConv2d(nn.Conv2d):
    """``halving_pointwise`` as a convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride=2, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C_out, ceil(H / 2), ceil(W / 2))."""
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


class SeparableConv(nn.Sequential):
    """ReLU, depthwise and pointwise convolution, BatchNorm, twice; the stride is in the first half."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, *, affine: bool) -> None:
        super().__init__(
            *depthwise_separable(in_channels, in_channels, kernel_size, stride, dilation=1, affine=affine),
            *depthwise_separable(in_channels, out_channels, kernel_size, 1, dilation=1, affine=affine),
        )


class DilatedConv(nn.Sequential):
    """ReLU, depthwise convolution of dilation 2, pointwise convolution, BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, *, affine: bool) -> None:
        super().__init__(
            *depthwise_separable(in_channels, out_channels, kernel_size, stride, dilation=2, affine=affine)
        )


def depthwise_separable(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, *, dilation: int, affine: bool
) -> list[nn.Module]:
    """Return ReLU, depthwise convolution, pointwise convolution and BatchNorm, size kept at stride 1."""
    return [
        nn.ReLU(),
        DepthwiseConv2d(in_channels, kernel_size, stride, dilation=dilation),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    ]


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


@register_operation("none")
def _none(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return Zero(out_channels, stride)


@register_operation("max_pool_3x3")
def _max_pool(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return _pooling(nn.MaxPool2d(3, stride, padding=1), in_channels, out_channels, affine)


@register_operation("avg_pool_3x3")
def _avg_pool(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return _pooling(AveragePool(stride), in_channels, out_channels, affine)


@register_operation("skip_connect")
def _skip_connect(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(in_channels, out_channels, affine=affine)


def _darts_convolution(kind: type[SeparableConv | DilatedConv], kernel_size: int) -> OperationBuilder:
    return lambda in_channels, out_channels, stride, affine: kind(
        in_channels, out_channels, kernel_size, stride, affine=affine
    )


for _name, _kind in (("sep_conv", SeparableConv), ("dil_conv", DilatedConv)):
    for _size in (3, 5):
        register_operation(f"{_name}_{_size}x{_size}")(_darts_convolution(_kind, _size))


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


@register_operation("conv_3x3")
def _conv_3x3(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return conv_bn(in_channels, out_channels, 3, stride, affine=affine)


@register_operation("conv_1x1")
def _conv_1x1(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return conv_bn(in_channels, out_channels, 1, stride, affine=affine)


@register_operation("group_conv_3x3")
def _group_conv_3x3(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    groups = math.gcd(NUM_GROUPS, in_channels, out_channels)
    return conv_bn(in_channels, out_channels, 3, stride, affine=affine, groups=groups)


@register_operation("depthwise_conv_3x3")
def _depthwise_conv_3x3(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(
        DepthwiseConv2d(in_channels, 3, stride), *conv_bn(in_channels, out_channels, 1, 1, affine=affine)
    )


@register_operation("dilated_conv_3x3")
def _dilated_conv_3x3(in_channels: int, out_channels: int, stride: int, affine: bool) -> nn.Module:
    return conv_bn(in_channels, out_channels, 3, stride, affine=affine, dilation=2)
