"""Residual networks for small images: wide ones with pre-activation, and the first version of ResNet.

Both have three stages of n blocks of two 3x3 convolutions; the second and third stage halve the resolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.nn.reference_models.base import (
    ReferenceModel,
    he_initialise,
    require_dropout,
    require_positive,
    units_of_depth,
)

#: Channels of the three stages before widening.
STAGE_CHANNELS = (16, 32, 64)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class WideBlock(nn.Module):
    """BN-ReLU-conv-dropout-BN-ReLU-conv with a shortcut: the block B(3,3) of arXiv 1605.07146.

    Args:
        stride: 1, or 2 to halve the resolution.
        dropout: Probability that a feature between the convolutions is zeroed, in [0, 1).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, dropout: float) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.residual = nn.Sequential(
            _conv3x3(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            _conv3x3(out_channels, out_channels),
        )
        keeps_shape = in_channels == out_channels and stride == 1
        self.shortcut = None if keeps_shape else nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride))."""
        activated = self.activate(features)
        # A projection sees what the convolutions see (arXiv 1603.05027); the identity stays untouched.
        shortcut = features if self.shortcut is None else self.shortcut(activated)
        total: Tensor = shortcut + self.residual(activated)
        return total


class WideResNet(ReferenceModel):
    """WRN-depth-k (Zagoruyko and Komodakis, arXiv 1605.07146, Table 1); depth 6 n + 4 counts the convolutions.

    A 3x3 convolution with 16 channels, three stages of 16 k, 32 k and 64 k channels, BN-ReLU, global average
    pooling and a linear classifier. Where the shape changes the shortcut is a 1x1 convolution.

    Args:
        depth: 6 n + 4, such as 16 or 28.
        widening: k, at least 1.
        dropout: Between a block's convolutions, in [0, 1); the paper uses 0, or 0.3 on CIFAR.

    Raises:
        UserError: A depth that does not exist, a count below 1, or a dropout out of range.
    """

    def __init__(self, *, depth: int, widening: int, in_channels: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__(
            depth=depth, widening=widening, in_channels=in_channels, num_classes=num_classes, dropout=dropout
        )
        num_blocks = units_of_depth(depth, layers_per_unit=6, other_layers=4, family="wide ResNet")
        require_positive(widening=widening, in_channels=in_channels, num_classes=num_classes)
        require_dropout(dropout)
        channels = STAGE_CHANNELS[0]
        layers: list[nn.Module] = [_conv3x3(in_channels, channels)]
        for stage, narrow in enumerate(STAGE_CHANNELS):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(WideBlock(channels, widening * narrow, stride, dropout=dropout))
                channels = widening * narrow
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)


class ResNetBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, shortcut added, ReLU (He et al., arXiv 1512.03385), with shortcuts of option A.

    Option A has no parameters: where the shape changes, every second pixel is taken and the new channels are 0.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, out_channels - in_channels
        self.residual = nn.Sequential(
            _conv3x3(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            _conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride))."""
        shortcut = features[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(shortcut + self.residual(features))


class ResNet(ReferenceModel):
    """The ResNet of depth 6 n + 2 for CIFAR (He et al., arXiv 1512.03385, section 4.2), "v1" of later papers.

    A 3x3 convolution with BN and ReLU, three stages of 16, 32 and 64 channels, global average pooling and a
    linear classifier. Some ResNet20v1 in use elsewhere project with 1x1 convolutions where the shape changes,
    and so have a few thousand parameters more.

    Args:
        depth: 6 n + 2, such as 20.

    Raises:
        UserError: A depth that does not exist, or a count below 1.
    """

    def __init__(self, *, depth: int, in_channels: int, num_classes: int) -> None:
        super().__init__(depth=depth, in_channels=in_channels, num_classes=num_classes)
        num_blocks = units_of_depth(depth, layers_per_unit=6, other_layers=2, family="ResNet for small images")
        require_positive(in_channels=in_channels, num_classes=num_classes)
        channels = STAGE_CHANNELS[0]
        layers: list[nn.Module] = [_conv3x3(in_channels, channels), nn.BatchNorm2d(channels), nn.ReLU()]
        for stage, out_channels in enumerate(STAGE_CHANNELS):
            for block in range(num_blocks):
                layers.append(ResNetBlock(channels, out_channels, 2 if stage > 0 and block == 0 else 1))
                channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)
