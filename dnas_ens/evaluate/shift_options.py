"""Options of the evaluation under shift; no torch, so that a command line can list them at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from dnas_ens.data.names import CORRUPTION_NAMES, SEVERITIES, check_corruption, check_severity
from dnas_ens.errors import UserError

#: In place of a data set's name: those of `dnas_ens.data.names.OUT_OF_DISTRIBUTION` that are on the disk.
USUAL = "auto"


@dataclass(frozen=True, kw_only=True)
class ShiftOptions:
    """What is measured under shift.

    Raises:
        UserError: An unknown corruption or severity, or an option without ``--shift``.
    """

    shift: bool = False
    """Measure corrupted test images and images of other data sets as well."""
    corruptions: tuple[str, ...] = CORRUPTION_NAMES
    """Corruptions of the test images; none after the flag for none."""
    severities: tuple[int, ...] = SEVERITIES
    """How strong, from 1 to 5."""
    ood: tuple[str, ...] = (USUAL,)
    """Data sets or folders whose images are to be told apart; auto for the usual ones that are on the disk."""
    cifar10_c: Path | None = None
    """Folder of the public CIFAR-10-C .npy files, here or below the data root; for runs on cifar10."""

    def __post_init__(self) -> None:
        for name in self.corruptions:
            check_corruption(name)
        for severity in self.severities:
            check_severity(severity)
        if not self.severities:
            raise UserError("--severities is empty.", "Give whole numbers from 1 to 5.")
        # Named twice is meant once, and a table reads best in order.
        object.__setattr__(self, "corruptions", tuple(dict.fromkeys(self.corruptions)))
        object.__setattr__(self, "severities", tuple(sorted(set(self.severities))))
        object.__setattr__(self, "ood", tuple(dict.fromkeys(self.ood)))
        changed = [f.name for f in fields(self) if f.name != "shift" and getattr(self, f.name) != f.default]
        if changed and not self.shift:
            flag = "--" + changed[0].replace("_", "-")
            raise UserError(f"{flag} is an option of --shift, which is not given.", "Add --shift.")
