"""The device a run uses."""

from __future__ import annotations

import torch

from dnas_ens.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Return the device a name stands for: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: If the name is unknown or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UserError(f"Unknown device {name!r}.", "Give --device auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise UserError(
            f"The device {name} is not there: this machine offers {count} CUDA devices to PyTorch.",
            "Give --device cpu, or leave it out to take what is there.",
        )
    return torch.device(name)
