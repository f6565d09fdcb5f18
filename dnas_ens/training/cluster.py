"""Tasks on a Ray cluster: on the one that RAY_ADDRESS names, else on a Ray of this machine that ends with the block.

What a task is and gives is as in `dnas_ens.training.workers`; only where it runs differs.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from dnas_ens.errors import UserError
from dnas_ens.run.machine import keep_freed_memory
from dnas_ens.run.progress import Progress

R = TypeVar("R")
#: How often a task whose process died is begun again; members go on from their newest state.
RETRIES = 3
#: Seconds after which a cluster that does not answer counts as unreachable.
TIMEOUT = 30
_JOIN = "import ray, sys; ray.init(sys.argv[1], logging_level=50, log_to_driver=False)"
#: A Ray of our own gives out shares of one machine. Of a CPU it could only give out whole cores.
MACHINE = "machine"


class RayPool:
    """Runs tasks on a Ray cluster that this process is connected to.

    Args:
        num_threads: Threads of PyTorch in a task.
        resources: What a task asks Ray for, as arguments of ``ray.remote``.
        slots: How many fit side by side.
    """

    def __init__(self, ray: ModuleType, *, num_threads: int, resources: Mapping[str, Any], slots: int) -> None:
        self._ray, self.slots = ray, slots
        # One table of all bars on a terminal; elsewhere Ray passes on the lines of the tasks.
        self._bars = sys.stderr.isatty()
        self._settings = num_threads, os.getcwd(), self._bars
        # An exception is not tried again: with the same seeds it would be raised again.
        self._remote = ray.remote(max_retries=RETRIES, retry_exceptions=False, **resources)(_run)

    def completed(self, tasks: Mapping[Hashable, Callable[[], R]]) -> Iterator[R]:
        """Run tasks and yield what they return in the order in which it comes.

        Args:
            tasks: By name.

        Raises:
            UserError: Some tasks failed. The others were finished first, and each failure was told when it happened.
        """
        names = [", ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in tasks]
        # Once for all: what they share, such as images, goes to every machine once.
        shared = self._ray.put(list(tasks.values()))
        running = {
            self._remote.options(name=name).remote(shared, number, *self._settings): name
            for number, name in enumerate(names)
        }
        failed: dict[str, str] = {}
        try:
            with _shared_bars(self._bars), Progress(len(names), description="tasks", steps_per_epoch=1) as progress:
                while running:
                    (finished,), _ = self._ray.wait(list(running))
                    name = running.pop(finished)
                    try:
                        result = self._ray.get(finished)
                    except self._ray.exceptions.RayError as error:
                        failed[name] = _cause(error)
                        print(f"failed: {name}: {_told(error)}", file=sys.stderr, flush=True)
                    else:
                        yield result
                    progress.step()
                    progress.epoch(len(names) - len(running), failed=len(failed), last=name)
        finally:
            for task in running:
                self._ray.cancel(task, force=True)
        if failed:
            first, cause = next(iter(failed.items()))
            raise UserError(
                f"{len(failed)} of {len(names)} tasks failed, the others are finished and kept. {first}: {cause}",
                "Mend what is said of each above, then run the same command again to go on.",
            )


@contextmanager
def ray_pool(num_workers: int, *, gpu: bool = False) -> Iterator[RayPool]:
    """Give a pool of tasks on the cluster that RAY_ADDRESS names, else on a Ray of this machine.

    A task has as many threads as with the engine ``local``, so that it gives the same. Leaving the block ends what
    still runs, and a Ray that was started for it.

    Args:
        num_workers: Tasks that share a machine of our own, or a GPU. On a cluster there are as many side by side as it
            has cores for.
        gpu: Whether each needs its share of a GPU.

    Raises:
        UserError: Ray is not installed, does not answer, or has no machine that is large enough.
    """
    import torch

    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Read when Ray is imported, and meant for systems whose firewalls ask: all its ports on the loopback address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Without it Ray begins a task for ever again that takes more memory than there is.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--engine ray needs a package that is not installed: {error.name}.",
            "pip install 'dnas_ens[cluster]', or leave --engine out.",
        ) from error
    num_threads = 1 if gpu else max(1, torch.get_num_threads() // num_workers)
    share = int(1e4 / num_workers) / 1e4
    resources: dict[str, Any] = {"num_cpus": num_threads, "num_gpus": share if gpu else 0}
    if address:
        _require_answer(address)
        start: dict[str, Any] = {"address": address}
    else:
        start = {"address": "local", "include_dashboard": False}
        if not gpu:
            start |= {"num_cpus": num_workers, "resources": {MACHINE: 1}}
            resources |= {"num_cpus": 0, "resources": {MACHINE: share}}
    try:
        ray.init(**start, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"Ray could not be {'joined' if address else 'started'}: {_first_line(error)}",
            "Leave --engine out, or see its logs in /tmp/ray.",
        ) from error
    try:
        slots = _slots(ray.nodes(), resources)
        yield RayPool(ray, num_threads=num_threads, resources=resources, slots=slots)
    finally:
        ray.shutdown()


@contextmanager
def _shared_bars(wanted: bool) -> Iterator[None]:
    if wanted:
        from ray.experimental import tqdm_ray

        Progress.shared_bar = tqdm_ray.tqdm
    try:
        yield
    finally:
        Progress.shared_bar = None


def _run(tasks: Sequence[Callable[[], R]], number: int, num_threads: int, directory: str, bars: bool) -> R:
    import torch

    torch.set_num_threads(num_threads)
    keep_freed_memory()
    try:
        # Paths may be relative to it.
        os.chdir(directory)
    except OSError as error:
        raise UserError(
            f"{directory} is not on the machine {socket.gethostname()}: {error.strerror}.",
            "Work in a folder that all machines of the cluster share.",
        ) from error
    with _shared_bars(bars):
        return tasks[number]()


@functools.cache
def _require_answer(address: str) -> None:
    """Refuse an address at which no Ray answers; joining it here would try for minutes, and not hear Ctrl-C."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    try:
        if colon and port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT).close()
        probe = [sys.executable, "-c", _JOIN, address]
        done = subprocess.run(probe, timeout=TIMEOUT, capture_output=True, text=True, check=False)
        cause = "".join(done.stderr.strip().splitlines()[-1:]) if done.returncode else ""
    except subprocess.TimeoutExpired:
        cause = f"nothing within {TIMEOUT} seconds"
    except OSError as error:
        cause = error.strerror or str(error)
    if cause:
        raise UserError(
            f"No Ray cluster can be joined at {address}, which RAY_ADDRESS names: {cause}.",
            "Start it with ray start, or unset RAY_ADDRESS for one of this machine's own. One with a token needs "
            "RAY_AUTH_MODE=token here too.",
        )


def _slots(nodes: Sequence[Mapping[str, Any]], resources: Mapping[str, Any]) -> int:
    """Return how many tasks the machines of a cluster take at once, and refuse those that would wait for ever."""
    asked = {"CPU": resources["num_cpus"], "GPU": resources.get("num_gpus", 0), **resources.get("resources", {})}
    asked = {kind: share for kind, share in asked.items() if share}
    slots = sum(min(int(node["Resources"].get(kind, 0) / share) for kind, share in asked.items()) for node in nodes)
    if not slots:
        needed = ", ".join(f"{share:g} {kind}" for kind, share in asked.items())
        raise UserError(
            f"No machine of the Ray cluster has what a task needs: {needed}.",
            "Give more --workers, so that each needs less, or --device cpu.",
        )
    return slots


def _cause(error: Exception) -> str:
    """Return in a line why a task failed."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return cause.cause
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {_first_line(cause)}"
    return f"its process died {RETRIES + 1} times, as happens where memory runs out ({_first_line(error)})"


def _told(error: Exception) -> str:
    """Return all that there is to say of a failure: a traceback where it is no mistake of the user's."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return str(cause)
    return str(error) if isinstance(cause, Exception) else _cause(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
