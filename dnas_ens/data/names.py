"""What a command line names, without importing torch: data sets, their usual out-of-distribution sets, corruptions."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dnas_ens.errors import UserError


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
    "svhn": KnownSource(torchvision_class="SVHN", flip=False, where="{train,test}_32x32.mat", digit_classes=True),
}
SOURCE_NAMES = tuple(KNOWN_SOURCES)

#: Patches of the photographs that come with scikit-learn: out-of-distribution images, not a data set to train on.
PHOTOGRAPHS = "photographs"
#: The out-of-distribution sets of a run by default; a folder of images has none.
OUT_OF_DISTRIBUTION = {
    "digits": (PHOTOGRAPHS, "fashion-mnist"),
    "mnist": ("fashion-mnist",),
    "fashion-mnist": ("mnist", "digits"),
    "cifar10": ("svhn", "cifar100"),
    "cifar100": ("svhn", "cifar10"),
    "svhn": ("cifar10", "cifar100"),
}

SEVERITIES = (1, 2, 3, 4, 5)
#: The strength at severity 1 to 5; `dnas_ens.data.corruptions` says what each number is.
STRENGTHS: dict[str, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.06, 0.10, 0.15, 0.22, 0.32),
    "shot_noise": (100.0, 40.0, 18.0, 9.0, 4.0),
    "impulse_noise": (0.02, 0.05, 0.10, 0.18, 0.30),
    "gaussian_blur": (0.6, 0.9, 1.2, 1.6, 2.2),
    "defocus_blur": (1.2, 1.6, 2.1, 2.7, 3.5),
    "motion_blur": (3.0, 4.5, 6.0, 8.0, 11.0),
    "brightness": (0.05, 0.10, 0.20, 0.30, 0.45),
    "contrast": (0.75, 0.5, 0.35, 0.2, 0.1),
    "jpeg": (50, 25, 14, 8, 4),
    "pixelate": (0.85, 0.7, 0.55, 0.42, 0.3),
    "rotation": (10.0, 20.0, 30.0, 40.0, 50.0),
    "translation": (0.05, 0.10, 0.15, 0.20, 0.26),
    "elastic": (0.02, 0.04, 0.06, 0.085, 0.12),
    "occlusion": (0.2, 0.3, 0.4, 0.5, 0.6),
}
CORRUPTION_NAMES = tuple(STRENGTHS)


def check_corruption(name: str) -> None:
    """Raise UserError, with the nearest names, for a name that is not among `CORRUPTION_NAMES`."""
    if name not in STRENGTHS:
        near = difflib.get_close_matches(name.replace("-", "_"), CORRUPTION_NAMES, n=14, cutoff=0.0)
        raise UserError(f"There is no corruption {name!r}.", f"Give one of {', '.join(near)}.")


def check_severity(severity: int) -> None:
    """Raise UserError for a severity outside 1 to 5."""
    if severity not in SEVERITIES:
        raise UserError(f"The severity is {severity}.", "Give whole numbers from 1 to 5.")
