"""What long work shows while it runs (a bar on a terminal, a line an epoch), and what it costs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TextIO

from tqdm import tqdm


class Progress:
    """A bar on a terminal, and everywhere one printed line an epoch.

    Args:
        description: What is being done, the first word of the line.
        initial_epoch: Epochs that an earlier process has done.
        stream: Where to write; stderr by default.
    """

    #: Makes bars that share a terminal with other processes' (of tqdm's interface total, desc, unit, update,
    #: set_description and close); None for tqdm, where the stream is a terminal.
    shared_bar: ClassVar[Callable[..., Any] | None] = None

    def __init__(
        self,
        total_epochs: int,
        *,
        description: str,
        steps_per_epoch: int,
        initial_epoch: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_epochs
        self._description = description
        self._initial = initial_epoch
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = self._epoch_start = clock()
        self._images = 0
        self._bar: tqdm[Any] | None = None
        self._shared: Any = None
        if self.shared_bar is not None:
            self._shared = self.shared_bar(total=total_epochs * steps_per_epoch, desc=description, unit="step")
            self._shared.update(initial_epoch * steps_per_epoch)
        elif self._stream.isatty():
            self._bar = tqdm(
                total=total_epochs * steps_per_epoch,
                initial=initial_epoch * steps_per_epoch,
                desc=description,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )

    def step(self, **postfix: object) -> None:
        """Count one step; `postfix` is shown behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix({name: _shown(value) for name, value in postfix.items()}, refresh=False)
            self._bar.update(1)
        elif self._shared is not None:
            self._shared.update(1)

    def count_images(self, count: int) -> None:
        """Count images for the images/s of the epoch's line."""
        self._images += count

    def epoch(self, epoch: int, **values: object) -> None:
        """Print the line of an epoch: its values, images/s where images were counted, and the time left.

        Args:
            epoch: Epochs done, this one included: 1 ... total_epochs.
        """
        now = self._clock()
        parts = [f"{self._description} {epoch}/{self._total}"]
        parts += [f"{name} {_shown(value)}" for name, value in values.items()]
        if self._images:
            parts.append(f"images/s {self._images / max(now - self._epoch_start, 1e-9):.0f}")
        if epoch > self._initial:
            left = (now - self._start) / (epoch - self._initial) * (self._total - epoch)
            parts.append(f"eta {duration(left)}")
        self._images, self._epoch_start = 0, now
        if self._shared is not None:
            self._shared.set_description("  ".join(parts[:2]))
        elif self._bar is None:
            print("  ".join(parts), file=self._stream, flush=True)
        else:
            self._bar.write("  ".join(parts), file=self._stream)

    def close(self) -> None:
        """Take the bar away."""
        for bar in (self._bar, self._shared):
            if bar is not None:
                bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shown(value: object) -> str:
    """A value for a reader: about four digits, no exponent where none is needed."""
    if isinstance(value, bool | int | str) or value is None:
        return str(value)
    number = float(value)  # type: ignore[arg-type]  # numpy scalars and tensors of one element
    size = abs(number)
    if not math.isfinite(number):
        return str(number)
    if size >= 100:
        return f"{number:.0f}" if size >= 1000 else f"{number:.1f}"
    if size >= 1:
        return f"{number:.3f}"
    return f"{number:.4f}" if size >= 1e-3 or size == 0 else f"{number:.2e}"


def duration(seconds: float) -> str:
    """Return seconds as minutes and seconds, with hours where there are any: 1:05, 2:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class CostMeter:
    """Wall-clock, CPU and GPU seconds of this process while the meter runs, and of earlier processes.

    CPU and GPU seconds of several processes that take steps together are taken to be equal.

    Args:
        before: ``seconds()`` of earlier processes, as a checkpoint holds them.
        gpu: Whether this process holds a GPU.
        processes: How many work together.
    """

    def __init__(self, before: Mapping[str, float] | None = None, *, gpu: bool = False, processes: int = 1) -> None:
        self._before, self._gpu, self._processes = dict(before or {}), gpu, processes
        self._running = False
        self.resume()

    def resume(self) -> None:
        """Count again."""
        if not self._running:
            self._running = True
            self._wall, self._cpu = time.perf_counter(), time.process_time()

    def pause(self) -> None:
        """Stop counting until ``resume``."""
        self._before, self._running = self.seconds(), False

    def seconds(self) -> dict[str, float]:
        """Return ``wall_seconds``, ``cpu_seconds`` of all threads, and ``gpu_seconds`` a GPU was held, busy or not."""
        wall = cpu = 0.0
        if self._running:
            wall, cpu = time.perf_counter() - self._wall, self._processes * (time.process_time() - self._cpu)
        spent = {"wall_seconds": wall, "cpu_seconds": cpu}
        spent |= {"gpu_seconds": self._processes * wall} if self._gpu else {}
        return {
            name: self._before.get(name, 0.0) + spent.get(name, 0.0)
            for name in ("wall_seconds", "cpu_seconds", "gpu_seconds")
            if name in spent or name in self._before
        }
