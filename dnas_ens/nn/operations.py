"""Candidate operations of a cell (DARTS, arXiv 1806.09055) and the registry a user can extend.

An operation is built by ``build_operation(name, channels, stride, affine=...)`` and maps
(B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.errors import UserError
from dnas_ens.nn.depthwise import DepthwiseConv2d

OperationBuilder = Callable[[int, int, bool], nn.Module]
_REGISTRY: dict[str, OperationBuilder] = {}
# Past about 50 pixels, oneDNN's gradient of the weights of a strided 1x1 convolution writes beyond its memory where
# there are fewer than 16 output channels (seen with PyTorch 2.14 on a CPU with AVX-512), and ends the process.
_SAFE_WIDTH = 32


def register_operation(name: str) -> Callable[[OperationBuilder], OperationBuilder]:
    """Add an operation to the registry; use it as a decorator.

    The decorated callable takes ``(channels, stride, affine)`` and returns a module that maps
    (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)). ``affine`` says whether BatchNorm has
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


def build_operation(name: str, channels: int, stride: int, *, affine: bool) -> nn.Module:
    """Build one registered operation.

    Args:
        channels: C, kept by the operation.
        stride: 1, or 2 on the edges that leave an input of a reduction cell.

    Raises:
        UserError: If the name is unknown.
    """
    require_operations((name,))
    return _REGISTRY[name](channels, stride, affine)


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

    def __init__(self, channels: int, kernel_size: int, stride: int, *, affine: bool) -> None:
        layers: list[nn.Module] = []
        for half_stride in (stride, 1):
            layers += depthwise_separable(channels, kernel_size, half_stride, dilation=1, affine=affine)
        super().__init__(*layers)


class DilatedConv(nn.Sequential):
    """ReLU, depthwise convolution of dilation 2, pointwise convolution, BatchNorm."""

    def __init__(self, channels: int, kernel_size: int, stride: int, *, affine: bool) -> None:
        super().__init__(*depthwise_separable(channels, kernel_size, stride, dilation=2, affine=affine))


def depthwise_separable(
    channels: int, kernel_size: int, stride: int, *, dilation: int, affine: bool
) -> list[nn.Module]:
    """Return ReLU, depthwise convolution, pointwise convolution and BatchNorm, size kept at stride 1."""
    return [
        nn.ReLU(),
        DepthwiseConv2d(channels, kernel_size, stride, dilation=dilation),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


class Zero(nn.Module):
    """The operation ``none``: no information passes. It has the output shape of any other operation."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to zeros of the strided shape."""
        return torch.zeros_like(features[:, :, :: self.stride, :: self.stride])


def _pooling(pool: nn.Module, channels: int) -> nn.Module:
    # Pooling has no weights to set its scale, so DARTS always puts an affine-free BatchNorm behind it.
    return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False))


@register_operation("none")
def _none(channels: int, stride: int, affine: bool) -> nn.Module:
    return Zero(stride)


@register_operation("max_pool_3x3")
def _max_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    return _pooling(nn.MaxPool2d(3, stride, padding=1), channels)


@register_operation("avg_pool_3x3")
def _avg_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    return _pooling(AveragePool(stride), channels)


@register_operation("skip_connect")
def _skip_connect(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine=affine)


def _convolution(kind: type[SeparableConv | DilatedConv], kernel_size: int) -> OperationBuilder:
    return lambda channels, stride, affine: kind(channels, kernel_size, stride, affine=affine)


for _name, _kind in (("sep_conv", SeparableConv), ("dil_conv", DilatedConv)):
    for _size in (3, 5):
        register_operation(f"{_name}_{_size}x{_size}")(_convolution(_kind, _size))
