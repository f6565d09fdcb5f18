"""Tasks side by side: processes that share this machine's cores, or tasks of a Ray cluster."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

from dnas_ens.config.settings import Engine
from dnas_ens.errors import UserError
from dnas_ens.run.machine import keep_freed_memory
from dnas_ens.training.cluster import RayPool, ray_pool

R = TypeVar("R")
#: What runs tasks side by side, to be given to `completed`.
Pool = ProcessPoolExecutor | RayPool


def worker_pool(num_workers: int, *, engine: Engine = "local", gpu: bool = False) -> AbstractContextManager[Pool]:
    """Give what runs tasks side by side until the block ends; a task gives the same with both engines.

    Args:
        num_workers: How many share this machine's threads, at least 1; with ``ray`` see `ray_pool`.
        engine: Processes of this machine, or tasks of a Ray cluster.
        gpu: Whether each task needs its share of a GPU; with ``ray`` alone.
    """
    return ray_pool(num_workers, gpu=gpu) if engine == "ray" else process_pool(num_workers)


@contextmanager
def process_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of new processes that share this process's threads evenly and end with the block.

    A step on small images hardly gains from a second core; two steps side by side use both. Workers are spawned, so
    what they run must be importable. They ignore Ctrl-C: leaving the block ends them, at once where an exception
    leaves it, and otherwise when they have done what was submitted.

    Yields:
        An executor; `completed` gives results as they come, `map` of the executor in the order of the tasks.

    Raises:
        UserError: A worker was killed, perhaps because memory ran out, or could not start.
    """
    import torch

    # These compiled modules swallow a Ctrl-C that comes while they are imported, so they are imported before any work.
    importlib.import_module("numpy.random")
    threads = max(1, torch.get_num_threads() // num_workers)
    context = multiprocessing.get_context("spawn")
    # Only this process holds the writer: once it is closed, or this process has ended, the workers end at once.
    reader, writer = context.Pipe(duplex=False)
    # Made before the thread below blocks SIGINT: the pool's first lock starts a helper process of Python's own, which
    # must not inherit that.
    pool = ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(threads, reader))
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_start_with_sigint_blocked, pool, num_workers).result()
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process ended before its work was done: killed, as happens where memory runs out, or by an error "
            "at its start, which is then printed above.",
            'Take fewer with --workers or a smaller --batch-size; a script needs `if __name__ == "__main__":` before '
            "what it does.",
        ) from error
    except BaseException:
        writer.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        writer.close()
        reader.close()


def completed(pool: Pool, tasks: Mapping[Hashable, Callable[[], R]]) -> Iterator[R]:
    """Run tasks and yield what they return in the order in which it comes.

    Args:
        pool: What `worker_pool` gives.
        tasks: Importable functions by name, or a ``functools.partial`` of one each, called without arguments.

    Yields:
        What a task returns. An exception of it is raised here: at once by processes, and by Ray as one error when the
        other tasks are finished.
    """
    if isinstance(pool, RayPool):
        yield from pool.completed(tasks)
        return
    for future in as_completed([pool.submit(task) for task in tasks.values()]):
        yield future.result()


def _start_with_sigint_blocked(pool: ProcessPoolExecutor, num_workers: int) -> None:
    """Start the workers of a pool from a thread in which SIGINT is blocked, which they inherit.

    A terminal sends Ctrl-C to the workers too, and one that is still importing would die of it with a traceback. The
    main thread must not block it: another thread would then take the interrupt, and none of those wakes a main thread
    that waits for results.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # A worker is started for each task that finds none idle.
    for _ in range(num_workers):
        pool.submit(os.getpid)


def _begin(num_threads: int, reader: Connection) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()


def _end_with_parent(reader: Connection) -> None:
    """End this process at once when its parent has closed the other end, or was killed."""
    reader.poll(None)
    os._exit(1)
