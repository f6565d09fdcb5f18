"""The data sets known by name; no torch, so that a command line can list them at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KnownSource:
    """What is known of a named data set before any of it is read.

    Args:
        torchvision_class: Name of the class in `torchvision.datasets`, or None for scikit-learn's digits.
        flip: Whether an image means the same after a horizontal flip.
        where: Where torchvision keeps the files, below the data root.
        digit_classes: Whether the classes are the ten digits, named "0" to "9".
    """

    torchvision_class: str | None
    flip: bool
    where: str = ""
    digit_classes: bool = False


KNOWN_SOURCES = {
    "digits": KnownSource(torchvision_class=None, flip=False, digit_classes=True),
    "fashion-mnist": KnownSource(torchvision_class="FashionMNIST", flip=True, where="FashionMNIST/raw"),
    "mnist": KnownSource(torchvision_class="MNIST", flip=False, where="MNIST/raw", digit_classes=True),
    "cifar10": KnownSource(torchvision_class="CIFAR10", flip=True, where="cifar-10-batches-py"),
    "cifar100": KnownSource(torchvision_class="CIFAR100", flip=True, where="cifar-100-python"),
    "svhn": KnownSource(
        torchvision_class="SVHN", flip=False, where="{train,test}_32x32.mat", digit_classes=True
    ),
}

SOURCE_NAMES = tuple(KNOWN_SOURCES)

#: Patches of the photographs that come with scikit-learn; images to be told apart, not a data set to train on.
PHOTOGRAPHS = "photographs"

#: What a run's test images are to be told apart from, where nothing is said; none for a folder of images.
OUT_OF_DISTRIBUTION = {
    "digits": (PHOTOGRAPHS, "fashion-mnist"),
    "mnist": ("fashion-mnist",),
    "fashion-mnist": ("mnist", "digits"),
    "cifar10": ("svhn", "cifar100"),
    "cifar100": ("svhn", "cifar10"),
    "svhn": ("cifar10", "cifar100"),
}
