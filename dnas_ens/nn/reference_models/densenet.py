"""DenseNet and DenseNet-BC for small images (Huang et al., arXiv 1608.06993)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnas_ens.nn.reference_models.base import (
    ReferenceModel,
    he_initialise,
    require_dropout,
    require_positive,
    units_of_depth,
)

#: Dense blocks of the networks for CIFAR and SVHN.
NUM_BLOCKS = 3
#: Width of a bottleneck as a multiple of the growth rate.
BOTTLENECK = 4
#: Share of the channels that a transition of DenseNet-BC keeps.
COMPRESSION = 0.5


def _bn_relu_conv(in_channels: int, out_channels: int, kernel_size: int, dropout: float) -> list[nn.Module]:
    return [
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.Dropout(dropout),
    ]


class DenseLayer(nn.Sequential):
    """BN-ReLU-conv3x3 to k channels, in front of it BN-ReLU-conv1x1 to 4 k channels if there is a bottleneck."""

    def __init__(self, in_channels: int, growth_rate: int, *, bottleneck: bool, dropout: float) -> None:
        width = BOTTLENECK * growth_rate
        super().__init__(
            *(_bn_relu_conv(in_channels, width, 1, dropout) if bottleneck else []),
            *_bn_relu_conv(width if bottleneck else in_channels, growth_rate, 3, dropout),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C + k, H, W): the input with k new channels behind it."""
        return torch.cat([features, super().forward(features)], dim=1)


class DenseNet(ReferenceModel):
    """DenseNet(-BC) of depth L with growth rate k for small images (arXiv 1608.06993, section 3).

    A 3x3 convolution with 16 channels (2 k for BC), three dense blocks, between them a transition of BN, 1x1
    convolution and 2x2 average pooling (BC halves the channels there), at the end global average pooling and a
    linear classifier. L = 3 n + 4, for BC L = 6 n + 4. The text names no ReLU in the transitions and neither BN
    nor ReLU before the last pooling; both are here, because otherwise the pre-activated features would be
    averaged raw. They change no published count of parameters.

    Args:
        growth_rate: k, at least 1.
        bottleneck: Whether this is DenseNet-BC: bottlenecks and compression by one half.
        dropout: After each convolution but the first, in [0, 1); the paper uses 0.2 on data that is not augmented.

    Raises:
        UserError: A depth that does not exist, a count below 1, or a dropout out of range.
    """

    def __init__(
        self,
        *,
        depth: int,
        growth_rate: int,
        bottleneck: bool,
        in_channels: int,
        num_classes: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            depth=depth,
            growth_rate=growth_rate,
            bottleneck=bottleneck,
            in_channels=in_channels,
            num_classes=num_classes,
            dropout=dropout,
        )
        num_layers = units_of_depth(
            depth,
            layers_per_unit=NUM_BLOCKS * (2 if bottleneck else 1),
            other_layers=NUM_BLOCKS + 1,
            family="DenseNet-BC" if bottleneck else "DenseNet",
        )
        require_positive(growth_rate=growth_rate, in_channels=in_channels, num_classes=num_classes)
        require_dropout(dropout)
        channels = 2 * growth_rate if bottleneck else 16
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
        for block in range(NUM_BLOCKS):
            if block > 0:
                kept = int(channels * COMPRESSION) if bottleneck else channels
                layers += [*_bn_relu_conv(channels, kept, 1, dropout), nn.AvgPool2d(2)]
                channels = kept
            for _ in range(num_layers):
                layers.append(DenseLayer(channels, growth_rate, bottleneck=bottleneck, dropout=dropout))
                channels += growth_rate
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)
