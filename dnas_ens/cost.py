"""What a computation costs, over all the sittings it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping


class CostMeter:
    """Wall-clock and CPU seconds of this process since the meter was made, plus what came before.

    Args:
        before: ``seconds()`` of an earlier sitting, such as a checkpoint holds.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self._before = dict(before or {})
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Return ``wall_seconds`` and ``cpu_seconds``; the latter counts all threads, also waiting ones."""
        return {
            "wall_seconds": self._before.get("wall_seconds", 0.0) + time.perf_counter() - self._wall,
            "cpu_seconds": self._before.get("cpu_seconds", 0.0) + time.process_time() - self._cpu,
        }
