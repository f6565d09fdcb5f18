import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from dnas_ens.run.machine import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    return [torch.ones(10 * 2**20) for _ in range(4)]

# The heap grows until every tensor has a gap it fits in: two or three steps, now and then one more.
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it sets up the GNU C library's allocator")
def test_kept_memory_is_not_fetched_again():
    def page_faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    # Tensors of 40 MiB, past the size from which the library always asks the system: 163,840 pages of 4 KiB.
    # Where the system gives huge pages unasked, they are still 320.
    assert page_faults("keep") < 100 < page_faults("leave")
