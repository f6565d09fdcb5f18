"""Work that pauses after every step, so that several trainings can take turns in one process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
#: Pauses after every step; returns its result at the end.
Steps = Generator[None, None, T]


def exhaust(steps: Steps[T]) -> T:
    """Run all steps without a pause and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def in_turns(
    works: Sequence[Steps[T]],
    *,
    context: Callable[[int], AbstractContextManager[object]] = lambda index: nullcontext(),
) -> list[T]:
    """Do a step of each work in turn until all are done.

    Args:
        context: Gives what a step of the work of that number is done in, such as a CUDA stream.

    Returns:
        The results, in the order of the works. An exception of one ends all of them.
    """
    results: dict[int, T] = {}
    try:
        while len(results) < len(works):
            for index, work in enumerate(works):
                if index in results:
                    continue
                with context(index):
                    try:
                        next(work)
                    except StopIteration as end:
                        results[index] = end.value
    finally:
        for work in works:
            work.close()
    return [results[index] for index in range(len(works))]


def on_streams(device: torch.device, count: int) -> Callable[[int], AbstractContextManager[object]]:
    """Return the context of each of several works: on a GPU a stream of its own, elsewhere nothing.

    Waits for earlier work on the GPU, because other streams would not.
    """
    if device.type != "cuda":
        return lambda index: nullcontext()
    import torch

    streams = [torch.cuda.Stream(device) for _ in range(count)]
    torch.cuda.synchronize(device)
    return lambda index: torch.cuda.stream(streams[index])
