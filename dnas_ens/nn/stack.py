"""What the supernet and the discrete network have in common: stem, input preprocessing, partial channels.

Partial channel connections (PC-DARTS, arXiv 1907.05737): 1/K of the channels go through the operations. The rest passes
by unchanged, pooled where the edge has stride 2, and a channel shuffle behind every node lets the next one see other
channels. A supernet step then takes about 1/K of the time and memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.nn.operations import FactorizedReduce, ReluConvBn
from dnas_ens.space.spaces import rules_of
from dnas_ens.space.stack import CellPlan, StackSpec


def build_stem(stack: StackSpec, space: str) -> nn.Sequential:
    """Build the stem: one 3x3 convolution of stride 1 or 2, or two or three with a total stride of 4.

    Where the cells sum loose ends it ends in a ReLU, like every node; the operations of DARTS begin with one.
    """
    rules = rules_of(space)
    out_channels = rules.stem_channels * stack.channels
    half = max(1, out_channels // 2)
    if stack.stem_stride < 4:
        sizes = [(stack.in_channels, out_channels, stack.stem_stride)]
    else:
        sizes = [(stack.in_channels, half, 2), (half, out_channels, 2)]
        if not rules.sums_loose_ends:
            sizes.append((out_channels, out_channels, 1))
    layers: list[nn.Module] = []
    for before, after, stride in sizes:
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*(layers if rules.sums_loose_ends else layers[:-1]))


def build_preprocessing(plan: CellPlan, *, affine: bool) -> nn.ModuleList:
    """Build the modules that bring each input of a cell to its C channels and to one size.

    Where the cells sum loose ends, there is one input, and its width is left to the operations.
    """
    if plan.rules.sums_loose_ends:
        return nn.ModuleList([nn.Identity()])
    before_last: nn.Module
    if plan.after_reduction:
        before_last = FactorizedReduce(plan.before_last, plan.channels, affine=affine)
    else:
        before_last = ReluConvBn(plan.before_last, plan.channels, affine=affine)
    return nn.ModuleList([before_last, ReluConvBn(plan.last, plan.channels, affine=affine)])


def preprocessed(preprocessing: nn.ModuleList, before_last: Tensor, last: Tensor) -> list[Tensor]:
    """Return the inputs of a cell, the output of the last cell at the end."""
    outputs = (before_last, last)[-len(preprocessing) :]
    return [module(features) for module, features in zip(preprocessing, outputs, strict=True)]


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
