"""Does a network of the efficient space take as long as the same network written by hand?

    python experiments/benchmarks/by_hand.py --network plain-cnn
    python experiments/benchmarks/by_hand.py --network resnet --data fashion-mnist

The plain CNN (``SixLayerCNN``) and a ResNet of three blocks with projections are points of the space: the same layers,
wired by cells. Both sides are trained by the same trainer from the same images; a round is some steps. Expected: a
ratio by hand / ours of at least 0.91, so that what the cells add is below 10 %. Half a minute on one CPU core.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from steps import NetworkOptions, some_steps
from timing import ExecutedOptions, Side, parse_benchmark, run_benchmark, timed

from dnas_ens.commands.parse import run_main
from dnas_ens.space.known_cells import PLAIN_CNN, RESNET

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dnas_ens.space.stack import StackSpec

BY_HAND, OURS = "by hand", "ours"
#: With the stem, one convolution before the first reduction makes the pair that the plain CNN begins with.
SIX_LAYERS = replace(PLAIN_CNN, normal=((("conv_3x3", 0),), (("skip_connect", 1),), (("skip_connect", 2),)))
POINTS = {"plain-cnn": SIX_LAYERS, "resnet": RESNET}


@dataclass(frozen=True, kw_only=True)
class ByHand(NetworkOptions, ExecutedOptions):
    """Options of the benchmark; the networks have three cells."""

    network: Literal["plain-cnn", "resnet"] = "plain-cnn"
    """Which network."""
    batches: int = 16
    """Steps of a round."""


def written_by_hand(network: str, stack: StackSpec) -> nn.Module:
    """Return the network as one would write it."""
    from torch import Tensor, nn

    from dnas_ens.nn.reference_models.small_networks import SixLayerCNN

    if network == "plain-cnn":
        return SixLayerCNN(width=stack.channels, in_channels=stack.in_channels, num_classes=stack.num_classes)

    def conv_bn(before: int, after: int, size: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, size, stride, size // 2, bias=False), nn.BatchNorm2d(after)]

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.residual = nn.Sequential(*conv_bn(before, after, 3, stride), nn.ReLU(), *conv_bn(after, after, 3, 1))
            self.shortcut = nn.Sequential(*(conv_bn(before, after, 1, stride) if stride > 1 else []))
            self.relu = nn.ReLU()

        def forward(self, features: Tensor) -> Tensor:
            activated: Tensor = self.relu(self.residual(features) + self.shortcut(features))
            return activated

    channels = stack.channels
    return nn.Sequential(
        *conv_bn(stack.in_channels, channels, 3, stack.stem_stride),
        nn.ReLU(),
        Block(channels, channels, 1),
        Block(channels, 2 * channels, 2),
        Block(2 * channels, 4 * channels, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * channels, stack.num_classes),
    )


def build_round(side: str, options: ByHand, device: torch.device) -> Side:
    """Return the timed round of a side, with a network of its own."""
    from dnas_ens.nn.network import Network
    from dnas_ens.space.stack import StackSpec
    from dnas_ens.training.trainer import NetworkTraining

    data, point = options.images(), POINTS[options.network]
    # The plain CNN halves the images three times, whatever their size.
    stack = StackSpec.for_data(
        data,
        space=point.space,
        num_cells=3,
        channels=options.channels,
        stem_stride=2 if options.network == "plain-cnn" else None,
    )

    def build() -> nn.Module:
        return Network(point, stack) if side == OURS else written_by_hand(options.network, stack)

    recipe = options.recipe(options.execution)
    training: NetworkTraining[nn.Module] = NetworkTraining(build, data, recipe, index=0, device=device)
    return timed(some_steps(training, options.batches), device)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("by_hand", __doc__, ByHand(), argv)
    heading = f"{options.network} on {options.data}: C={options.channels}, batch {options.batch_size}"
    run_benchmark("by_hand", argv, options, build_round, (BY_HAND, OURS), ours=OURS, heading=heading)


if __name__ == "__main__":
    sys.exit(run_main(main))
