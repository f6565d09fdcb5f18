"""The machine a run uses: its device, its memory, and what env.json notes of it.

torch is imported where it is used.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnas_ens.errors import UserError

if TYPE_CHECKING:
    import torch

# From malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make the GNU C library keep freed memory for the next allocation instead of giving it back at once.

    Every training step frees and allocates the same large tensors. By default each comes as fresh pages from the
    operating system, which zeroes and maps them one by one: a third of a search step on two CPU cores. In return the
    process keeps its peak of memory until it ends.

    Returns:
        Whether it took effect; False with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def peak_resident_bytes() -> int:
    """Return the most memory this process has held so far, in bytes."""
    try:
        # Linux counts the parent's memory at the fork in ru_maxrss as well; VmHWM is of this program alone.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resolve_device(name: str) -> torch.device:
    """Return the device a name stands for: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: If the name is unknown or the device is not there.
    """
    import torch

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
    # An installed copy may be inside another project's checkout; only a tracked one has a revision.
    tracked = ("git", "ls-files", "--error-unmatch", Path(__file__).name)
    describe = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        subprocess.run(tracked, cwd=folder, check=True, capture_output=True, timeout=10)
        done = subprocess.run(describe, cwd=folder, check=True, capture_output=True, timeout=10, text=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
