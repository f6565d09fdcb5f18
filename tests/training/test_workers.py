import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from dnas_ens.errors import UserError
from dnas_ens.training.workers import completed, worker_pool

PARENT = """
import os, time
from dnas_ens.training.workers import worker_pool

if __name__ == "__main__":
    with worker_pool(2) as pool:
        # Every worker has begun once a task has come back.
        print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
        time.sleep(60)
"""

INTERRUPTED = """
import multiprocessing, os, signal, threading, time
from dnas_ens.training.workers import worker_pool

def interrupt():
    while not multiprocessing.active_children():
        time.sleep(0.001)
    # To the whole group, as a terminal sends it.
    os.killpg(os.getpgrp(), signal.SIGINT)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with worker_pool(2) as pool:
            list(pool.map(print, range(3)))
    except KeyboardInterrupt:
        print("interrupted")
    print(len(multiprocessing.active_children()))
"""

UNGUARDED = """
from dnas_ens.training.workers import worker_pool

with worker_pool(1) as pool:
    print(list(pool.map(abs, [-1])))
"""


def state_of_worker(_):
    # A bar makes a semaphore in its process.
    list(tqdm(range(2), file=io.StringIO()))
    return torch.get_num_threads(), signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_workers_share_the_threads_ignore_ctrl_c_and_leave_nothing_behind():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with worker_pool(2) as pool:
            assert list(pool.map(state_of_worker, range(4))) == [(2, True)] * 4
            workers = list(multiprocessing.active_children())
    finally:
        torch.set_num_threads(before)
    assert [worker.exitcode for worker in workers] == [0, 0]


def is_running(pid):
    """Whether a process is there and not only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in Linux's /proc")
def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert workers
        assert all(is_running(pid) for pid in workers)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)


def run_script(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    command = [sys.executable, str(script)]
    # A session of its own, for the script interrupts its whole group.
    return subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)


def test_ctrl_c_while_workers_start_is_heard(tmp_path):
    found = run_script(tmp_path, INTERRUPTED)
    assert found.stdout.splitlines()[-2:] == ["interrupted", "0"], found.stderr
    assert "Traceback" not in found.stderr


def test_a_script_that_workers_cannot_import_ends_with_an_error(tmp_path):
    found = run_script(tmp_path, UNGUARDED)
    assert found.returncode == 1
    assert "UserError: A worker process ended before its work was done" in found.stderr
    assert '`if __name__ == "__main__":`' in found.stderr


@pytest.mark.parametrize(
    ("task", "error", "cause"),
    [
        (partial(signal.raise_signal, signal.SIGKILL), UserError, "A worker process ended before its work was done"),
        (partial(int, "four"), ValueError, "four"),
    ],
    ids=["killed", "error"],
)
def test_an_error_ends_busy_workers_at_once(task, error, cause):
    workers = []

    def leave():
        with worker_pool(2) as pool:
            workers.extend(multiprocessing.active_children())
            list(completed(pool, dict(enumerate([task, *[partial(time.sleep, 600)] * 3]))))

    with pytest.raises(error, match=cause):
        leave()
    assert multiprocessing.active_children() == []
    # One that had been waited for would have ended with 0.
    assert len(workers) == 2
    assert 0 not in [worker.exitcode for worker in workers]
