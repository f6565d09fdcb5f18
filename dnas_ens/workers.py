"""Processes that work side by side on a CPU, each on its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool

from dnas_ens.allocator import keep_freed_memory


@contextmanager
def worker_pool(num_workers: int) -> Iterator[Pool]:
    """Give a pool of fresh processes that share this process's threads evenly and do not outlive the block.

    A step on small images hardly gains from a second core; two steps side by side use both. Workers are spawned, so
    what they run must be importable. Ctrl-C is left to the caller, whose leaving the block ends them.

    Args:
        num_workers: How many.

    Yields:
        A ``multiprocessing`` pool.
    """
    import torch

    threads = max(1, torch.get_num_threads() // num_workers)
    context = multiprocessing.get_context("spawn")
    pool = None
    try:
        with _interrupts_held():
            pool = context.Pool(num_workers, initializer=_begin, initargs=(threads,))
        yield pool
        # A worker that is terminated leaves its semaphores behind; with nothing left to do it ends by itself.
        pool.close()
    except BaseException:
        if pool is not None:
            pool.terminate()
        raise
    finally:
        if pool is not None:
            pool.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block; what is started in it does not hear it at all.

    A terminal sends Ctrl-C to the workers, too. One that dies of it while it still imports would be replaced while the
    pool is being ended, which may hang. Workers inherit that it is blocked, and ignore it once they have begun.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield  # only the main thread may say what a signal does
        return
    held = []
    # Blocked for this thread and its children; another thread may still take it, for which there is the handler.
    before = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


def _begin(num_threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent was killed and could not end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
