"""What the supernet and the discrete network have in common: stem, input preprocessing, partial channels.

Partial channel connections (PC-DARTS, arXiv 1907.05737): 1/K of the channels go through the operations. The rest passes
by unchanged, pooled where the edge has stride 2, and a channel shuffle behind every node lets the next one see other
channels. A supernet step then takes about 1/K of the time and memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.nn.operations import FactorizedReduce, ReluConvBn
from dnas_ens.space.stack import CellPlan, StackSpec


def build_stem(stack: StackSpec) -> nn.Sequential:
    """Build the stem: one 3x3 convolution, or three with a total stride of 4 for large images."""
    in_channels, out_channels = stack.in_channels, stack.stem_channels
    if not stack.large_images:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
    half = out_channels // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, out_channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def build_preprocessing(plan: CellPlan, *, affine: bool) -> tuple[nn.Module, nn.Module]:
    """Build the two modules that bring a cell's inputs to its C channels and to one size."""
    before_last: nn.Module
    if plan.after_reduction:
        before_last = FactorizedReduce(plan.before_last, plan.channels, affine=affine)
    else:
        before_last = ReluConvBn(plan.before_last, plan.channels, affine=affine)
    return before_last, ReluConvBn(plan.last, plan.channels, affine=affine)


def split_channels(features: Tensor, partial_channels: int) -> tuple[Tensor, Tensor | None]:
    """Return the first C/K channels, and the rest of (B, C, H, W); None where K is 1 and there is no rest."""
    if partial_channels == 1:
        return features, None
    share = features.shape[1] // partial_channels
    return features[:, :share], features[:, share:]


def pass_by(features: Tensor, stride: int) -> Tensor:
    """Bring the channels that pass by to the size of the others, (B, C', ceil(H / stride), ceil(W / stride))."""
    return features if stride == 1 else F.max_pool2d(features, 2, 2, ceil_mode=True)


def shuffle_channels(features: Tensor, partial_channels: int) -> Tensor:
    """Interleave K blocks of channels: channel k * C/K + c moves to place c * K + k."""
    return features if partial_channels == 1 else F.channel_shuffle(features, partial_channels)
