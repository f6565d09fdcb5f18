"""The reference models by name, and their descriptions back into networks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from dnas_ens.errors import UserError
from dnas_ens.nn.reference_models.base import (
    REFERENCE_KIND,
    SMALLEST_IMAGE,
    ReferenceModel,
    require_positive,
)
from dnas_ens.nn.reference_models.densenet import DenseNet
from dnas_ens.nn.reference_models.residual_networks import ResNet, WideResNet
from dnas_ens.nn.reference_models.small_networks import (
    FORT_DROPOUT,
    MEDIUM_CNN_CHANNELS,
    MLP,
    SHALLOW_CNN_CHANNELS,
    SMALL_CNN_CHANNELS,
    PlainCNN,
    SixLayerCNN,
)

#: The names in use; the families with numbers take any others that exist, such as wrn-40-2 or resnet56.
REFERENCE_MODELS = (
    "wrn-16-4",
    "wrn-28-8",
    "wrn-28-10",
    "densenet-40-12",
    "densenet-100-12",
    "densenet-100-24",
    "densenet-bc-100-12",
    "densenet-bc-100-24",
    "resnet20",
    "small-cnn",
    "medium-cnn",
    "shallow-cnn",
    "cnn6-32",
    "mlp",
)

_MODELS: dict[str, type[ReferenceModel]] = {
    model.__name__: model for model in (WideResNet, ResNet, DenseNet, PlainCNN, SixLayerCNN, MLP)
}

# A builder takes the numbers in the name, image_size, and in_channels and num_classes by name.
_Builder = Callable[[list[int], int, dict[str, int]], ReferenceModel]

#: Depths that are of the form 6 n + 2 by chance and mean another network everywhere else.
IMAGENET_RESNETS = (50, 152)


def _resnet(depth: int, **images: int) -> ResNet:
    if depth in IMAGENET_RESNETS:
        raise UserError(
            f"resnet{depth} is the name of a network for ImageNet; here are those for CIFAR of depth 6 n + 2.",
            f"Take resnet20, resnet32, resnet44, resnet56 or resnet110, or torchvision.models.resnet{depth}.",
        )
    return ResNet(depth=depth, **images)


def _plain_cnn(channels: tuple[int, ...], *, convolutions_per_pool: int = 1, dropout: float = FORT_DROPOUT) -> _Builder:
    return lambda numbers, size, images: PlainCNN(
        channels=channels,
        image_size=size,
        convolutions_per_pool=convolutions_per_pool,
        dropout=dropout,
        **images,
    )


def _densenet(*, bottleneck: bool) -> _Builder:
    return lambda numbers, size, images: DenseNet(
        depth=numbers[0], growth_rate=numbers[1], bottleneck=bottleneck, **images
    )


_FAMILIES: dict[str, _Builder] = {
    r"wrn-(\d+)-(\d+)": lambda numbers, size, images: WideResNet(depth=numbers[0], widening=numbers[1], **images),
    r"densenet-(\d+)-(\d+)": _densenet(bottleneck=False),
    r"densenet-bc-(\d+)-(\d+)": _densenet(bottleneck=True),
    r"resnet-?(\d+)(?:v1)?": lambda numbers, size, images: _resnet(numbers[0], **images),
    r"small-cnn": _plain_cnn(SMALL_CNN_CHANNELS),
    r"medium-cnn": _plain_cnn(MEDIUM_CNN_CHANNELS),
    r"shallow-cnn": _plain_cnn(SHALLOW_CNN_CHANNELS, convolutions_per_pool=2, dropout=0.0),
    r"cnn6-(\d+)": lambda numbers, size, images: SixLayerCNN(width=numbers[0], **images),
    r"mlp": lambda numbers, size, images: MLP(
        in_features=images["in_channels"] * size**2, num_classes=images["num_classes"]
    ),
}


def reference_model(name: str, in_channels: int, num_classes: int, image_size: int) -> ReferenceModel:
    """Build a reference model with fresh weights, drawn from torch's global generator.

    Args:
        name: wrn-N-K, densenet-L-K, densenet-bc-L-K, resnetN, cnn6-W, small-cnn, medium-cnn, shallow-cnn or mlp,
            in small or capital letters; `REFERENCE_MODELS` lists the usual ones.
        in_channels: Channels of the images, such as 1 or 3.
        image_size: Side of the images in pixels, at least 8. Only the plain networks and the MLP depend on it; the
            others pool over the pixels that are left.

    Raises:
        UserError: An unknown name (the nearest is named), a depth that does not exist, a count below 1, or images
            that are too small.
    """
    require_positive(in_channels=in_channels, num_classes=num_classes)
    if image_size < SMALLEST_IMAGE:
        raise UserError(
            f"The reference models take no images of {image_size} pixels a side.",
            f"Enlarge the images to {SMALLEST_IMAGE} or more.",
        )
    for pattern, build in _FAMILIES.items():
        if found := re.fullmatch(pattern, name, flags=re.ASCII | re.IGNORECASE):
            numbers = [int(number) for number in found.groups()]
            return build(numbers, image_size, {"in_channels": in_channels, "num_classes": num_classes})
    nearest = difflib.get_close_matches(name.lower(), REFERENCE_MODELS, n=1)
    hint = f"Did you mean {nearest[0]}? " if nearest else ""
    raise UserError(f"Unknown reference model {name!r}.", f"{hint}Known are {', '.join(REFERENCE_MODELS)}.")


def model_from_spec(spec: Mapping[str, Any]) -> ReferenceModel:
    """Build the reference model that a ``spec()`` describes, with fresh weights.

    Raises:
        UserError: It describes something else, or its fields do not fit.
    """
    model = _MODELS.get(str(spec.get("model")))
    arguments = spec.get("arguments")
    if spec.get("kind") != REFERENCE_KIND or model is None or not isinstance(arguments, dict):
        raise UserError(
            f"The description of kind {spec.get('kind')!r} and model {spec.get('model')!r} is not of a reference "
            "model.",
            "Load the folder with members=[...] that holds the fresh modules to fill.",
        )
    try:
        return model(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The description of a {model.__name__} does not fit: {error}.",
            "Use a folder this version wrote.",
        ) from error
