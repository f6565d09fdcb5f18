"""The machine and the software a command runs on, so that its numbers can be understood later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def environment(command: Sequence[str]) -> dict[str, Any]:
    """The machine and the software a command runs on, as env.json notes them."""
    import torch

    packages = ("dnas_ens", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "git_revision": _git_revision(Path(__file__).parent),
    }


def describe_device(device: torch.device | str) -> str:
    """Return a device in words: a GPU's name, or the processor and how many threads PyTorch has on it."""
    import torch

    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _git_revision(folder: Path) -> str | None:
    """The commit of the checkout that tracks the package, with -dirty where files differ from it."""
    # An installed copy may lie inside somebody else's checkout; only a tracked one has a revision.
    tracked = ("git", "ls-files", "--error-unmatch", Path(__file__).name)
    describe = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        subprocess.run(tracked, cwd=folder, check=True, capture_output=True, timeout=10)
        done = subprocess.run(describe, cwd=folder, check=True, capture_output=True, timeout=10, text=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
