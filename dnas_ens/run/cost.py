"""What a computation costs, over all the sittings it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping


class CostMeter:
    """Wall-clock, CPU and GPU seconds of this process while the meter runs, from the start on, plus what came before.

    Args:
        before: ``seconds()`` of an earlier sitting, such as a checkpoint holds.
        gpu: Whether a GPU is held all the while.
    """

    def __init__(self, before: Mapping[str, float] | None = None, *, gpu: bool = False) -> None:
        self._before, self._gpu = dict(before or {}), gpu
        self._running = False
        self.resume()

    def resume(self) -> None:
        """Go on counting."""
        if not self._running:
            self._running = True
            self._wall, self._cpu = time.perf_counter(), time.process_time()

    def pause(self) -> None:
        """Count no more until ``resume``: something else has its turn."""
        self._before, self._running = self.seconds(), False

    def seconds(self) -> dict[str, float]:
        """Return ``wall_seconds``, ``cpu_seconds``, and ``gpu_seconds`` where a GPU was held.

        CPU seconds count all threads, also waiting ones; GPU seconds count a GPU from the first to the last moment,
        also where it waits.
        """
        wall, cpu = (
            (time.perf_counter() - self._wall, time.process_time() - self._cpu)
            if self._running
            else (0.0, 0.0)
        )
        spent = {"wall_seconds": wall, "cpu_seconds": cpu} | ({"gpu_seconds": wall} if self._gpu else {})
        return {
            name: self._before.get(name, 0.0) + spent.get(name, 0.0)
            for name in ("wall_seconds", "cpu_seconds", "gpu_seconds")
            if name in spent or name in self._before
        }
