"""How much there is to spend: a time, or a number of epochs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dnas_ens.errors import UserError
from dnas_ens.run.progress import duration

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_REMEDY = "Write it as 90s, 30m, 2h or 1h30m."


@dataclass(frozen=True, kw_only=True)
class Amount:
    """A budget.

    Args:
        total: Above 0; seconds of wall-clock time, or epochs over all the training images.
        unit: Which of the two.
    """

    total: float
    unit: Literal["seconds", "epochs"] = "seconds"

    def shown(self, spent: float) -> str:
        """Return a part of it and all of it as text, such as "12:05 of 30:00"."""
        if self.unit == "epochs":
            return f"{spent:.0f} of {self.total:.0f} epochs"
        return f"{duration(spent)} of {duration(self.total)}"


def parse_time(text: str) -> float:
    """Return the seconds of a time such as 90s, 30m, 2h or 1h30m.

    Raises:
        UserError: It is no time, or none above 0.
    """
    parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)([smhd])", text.strip().lower())
    if "".join(number + unit for number, unit in parts) != text.strip().lower() or not parts:
        raise UserError(f"The budget {text!r} is no time.", _REMEDY)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise UserError(f"The budget {text} buys nothing.", _REMEDY)
    return seconds
