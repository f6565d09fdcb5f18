"""The corruptions known by name, and how strong each is; no torch, so that a command line can list them at once.

Kinds and severities follow CIFAR-10-C (Hendrycks and Dietterich, arXiv 1903.12261). The implementations and the
strengths are this project's own, hence "CIFAR-10-C-style": figures are not comparable with those on the
published files, which `dnas_ens.data.cifar10_c` reads.
"""

from __future__ import annotations

import difflib

from dnas_ens.errors import UserError

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
    """Refuse a name that is not among `CORRUPTION_NAMES`.

    Raises:
        UserError: With the nearest names.
    """
    if name not in STRENGTHS:
        near = difflib.get_close_matches(name.replace("-", "_"), CORRUPTION_NAMES, n=14, cutoff=0.0)
        raise UserError(f"There is no corruption {name!r}.", f"Give one of {', '.join(near)}.")


def check_severity(severity: int) -> None:
    """Refuse a severity outside 1 to 5.

    Raises:
        UserError: If it is.
    """
    if severity not in SEVERITIES:
        raise UserError(f"The severity is {severity}.", "Give whole numbers from 1 to 5.")
