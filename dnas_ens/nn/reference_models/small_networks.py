"""Plain convolutional networks and a multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from dnas_ens.errors import UserError
from dnas_ens.nn.reference_models.base import ReferenceModel, require_dropout, require_positive

#: Channels of SmallCNN and MediumCNN (Fort et al., arXiv 1912.02757, appendix).
SMALL_CNN_CHANNELS = (16, 32, 32)
MEDIUM_CNN_CHANNELS = (64, 128, 256, 256)
#: Their dropout (same place).
FORT_DROPOUT = 0.1
#: Channels of the shallow network of four convolutions.
SHALLOW_CNN_CHANNELS = (32, 32, 64, 64)


class PlainCNN(ReferenceModel):
    """3x3 convolutions with ReLU and max pooling, then one linear layer on the flattened features.

    With ``SMALL_CNN_CHANNELS`` and ``MEDIUM_CNN_CHANNELS`` these are SmallCNN and MediumCNN of Fort et al. (arXiv
    1912.02757). The paper gives the channels, the dropout of 0.1 and the accuracies (64 % and 71 % on CIFAR-10).
    It leaves open the padding, where and how far is pooled, how many dense layers follow, and where dropout is;
    here convolutions keep the size, each is followed by 2x2 max pooling and then dropout, and the only dense layer
    is the classifier. BatchNorm is not mentioned and is not here. With ``SHALLOW_CNN_CHANNELS``, pooling after
    every second convolution and no dropout it is the shallow network of four convolutions, whose layout is ours.

    Pooling is left out where the features are down to one pixel, so that images of 8 x 8 fit any of them.

    Args:
        channels: Channels of each convolution, at least one.
        image_size: Side of the images in pixels; the linear layer depends on it.
        convolutions_per_pool: After how many convolutions to pool.
        dropout: Probability that a pooled feature is zeroed, in [0, 1).

    Raises:
        UserError: A count below 1, no convolutions, or a dropout out of range.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int],
        in_channels: int,
        num_classes: int,
        image_size: int,
        convolutions_per_pool: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            channels=list(channels),
            in_channels=in_channels,
            num_classes=num_classes,
            image_size=image_size,
            convolutions_per_pool=convolutions_per_pool,
            dropout=dropout,
        )
        require_positive(
            convolutions=len(channels),
            channels=min(channels, default=1),
            in_channels=in_channels,
            num_classes=num_classes,
            image_size=image_size,
            convolutions_per_pool=convolutions_per_pool,
        )
        require_dropout(dropout)
        self.image_size = image_size
        layers: list[nn.Module] = []
        size = image_size
        for index, (before, after) in enumerate(pairwise((in_channels, *channels)), start=1):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
            if index % convolutions_per_pool == 0:
                if size > 1:
                    layers.append(nn.MaxPool2d(2))
                    size //= 2
                layers.append(nn.Dropout(dropout))
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(channels[-1] * size * size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) with H = W = image_size to logits (B, K).

        Raises:
            UserError: If the images have another size.
        """
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            height, width = images.shape[-2:]
            raise UserError(
                f"The images have {height} x {width} pixels, but the network was built for {self.image_size}.",
                "Build it with the image_size of the data, or resize the images.",
            )
        logits: Tensor = self.classifier(self.features(images))
        return logits


class SixLayerCNN(ReferenceModel):
    """Six 3x3 convolutions, each with BatchNorm and ReLU, then the mean over pixels and one linear layer.

    Widths are w, w, 2w, 2w, 4w, 4w; the first convolution of each pair has stride 2. It is what one would write
    without a search, and the network to beat at equal time.

    Raises:
        UserError: A count below 1.
    """

    def __init__(self, *, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__(width=width, in_channels=in_channels, num_classes=num_classes)
        require_positive(width=width, in_channels=in_channels, num_classes=num_classes)
        channels = [in_channels, *(factor * width for factor in (1, 1, 2, 2, 4, 4))]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(channels)):
            stride = 2 if index % 2 == 0 else 1
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels[-1], num_classes)


class MLP(ReferenceModel):
    """A multi-layer perceptron with ReLU; inputs of any shape are flattened.

    Args:
        in_features: Numbers in one input: 2 for points in the plane, C * H * W for images.
        hidden: Units of each hidden layer; none makes it softmax regression.

    Raises:
        UserError: A count below 1.
    """

    def __init__(self, *, in_features: int, num_classes: int, hidden: Sequence[int] = (25,)) -> None:
        super().__init__(in_features=in_features, num_classes=num_classes, hidden=list(hidden))
        require_positive(in_features=in_features, num_classes=num_classes, hidden=min(hidden, default=1))
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise((in_features, *hidden)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(hidden[-1] if hidden else in_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, ...) with in_features numbers each to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
