"""Partial channel connections (PC-DARTS, arXiv 1907.05737): 1/K of the channels go through the operations.

The rest passes by unchanged, pooled where the edge has stride 2, and a channel shuffle behind every node lets the next
one see other channels. A supernet step then takes about 1/K of the time and memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dnas_ens.errors import UserError


def require_divisible(channels: int, partial_channels: int) -> None:
    """Check that K divides C.

    Raises:
        UserError: If it does not, or K is below 1.
    """
    if partial_channels < 1 or channels % partial_channels:
        raise UserError(
            f"1/{partial_channels} of {channels} channels is no whole number.",
            "Give --partial-channels a divisor of --channels.",
        )


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
    """Interleave K blocks of channels: channel k * C/K + c comes to place c * K + k."""
    if partial_channels == 1:
        return features
    return F.channel_shuffle(features, partial_channels)
