"""What the reference models have in common: a description to rebuild them from, He's initialisation, checks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dnas_ens.errors import UserError

#: The kind that a reference model's description names.
REFERENCE_KIND = "reference"
#: The smallest side in pixels: three stages of 8, 4 and 2.
SMALLEST_IMAGE = 8


class ReferenceModel(nn.Module):
    """A network (B, C, H, W) -> logits (B, K) that knows the arguments it was built with.

    Its `features` are averaged over the pixels for its `classifier`, unless it has a ``forward`` of its own.

    Args:
        arguments: The constructor's arguments by name, ready for JSON.
    """

    features: nn.Sequential
    classifier: nn.Linear

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._arguments = arguments

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits

    def spec(self) -> dict[str, Any]:
        """Return what `dnas_ens.nn.reference_models.model_from_spec` rebuilds this network from."""
        return {"kind": REFERENCE_KIND, "model": type(self).__name__, "arguments": self._arguments}


def he_initialise(module: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out), set BatchNorm to 1 and 0 (He et al., arXiv 1502.01852).

    Linear layers keep the initialisation of torch.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def require_positive(**counts: int) -> None:
    """Raise UserError for the first of channels, classes and widths that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"A reference model cannot have {name} = {count}.", f"Set {name} to 1 or more.")


def require_dropout(dropout: float) -> None:
    """Raise UserError unless the probability is in [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"The dropout probability is {dropout}.", "Give a number from 0 to below 1.")


def units_of_depth(depth: int, *, layers_per_unit: int, other_layers: int, family: str) -> int:
    """Return n of depth = layers_per_unit * n + other_layers: how many blocks or layers a stage has.

    Args:
        depth: Weighted layers in all, as a name such as WRN-16-4 counts them.
        layers_per_unit: Layers that one more unit in each of the three stages adds.
        other_layers: Layers outside the stages.

    Raises:
        UserError: No n of at least 1 gives this depth; the nearest depth that exists is named.
    """
    units, rest = divmod(depth - other_layers, layers_per_unit)
    if rest or units < 1:
        nearest = layers_per_unit * max(1, round((depth - other_layers) / layers_per_unit)) + other_layers
        raise UserError(
            f"There is no {family} of depth {depth}.",
            f"Use {nearest}; depths are {layers_per_unit} n + {other_layers}.",
        )
    return units
