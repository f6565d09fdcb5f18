"""Memory that stays with the process between steps."""

from __future__ import annotations

import ctypes
import platform

# From malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let the GNU C library keep freed memory for the next allocation instead of giving it back at once.

    Every training step frees and takes the same large tensors. By default each of them comes as fresh pages from the
    operating system, which are zeroed and mapped a page at a time; on two CPU cores that was a third of a search
    step. The process's memory then stays at its peak until it ends.

    Returns:
        Whether it took effect; False on systems with another C library, which stay as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
