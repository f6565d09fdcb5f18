"""How far is our search step from what the machine's memory allows?

    python experiments/benchmarks/floor.py --setting digits
    python experiments/benchmarks/floor.py --setting 28x28

Every operation of the step reads its inputs and writes its outputs at least once. The bytes of both are summed over
all operations that move data, forward and backward; the floor is a plain copy of that many bytes (half read, half
written) in pieces too large for caches. The step, the same as in ``search_step.py``, and the copy are timed in turn.
Below its floor a step can only get by fused operations or by data that stay in caches; far above it, it is
bound by arithmetic or by starting operations. --profile FILE writes where its time goes. A minute on two CPU cores.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_step import OURS, SearchStep, our_step_of, parse_setting
from steps import profile
from timing import MEBIBYTE, Side, in_fresh_process, prepare, run_benchmark, tell, timed

from dnas_ens.commands.parse import run_main

if TYPE_CHECKING:
    import torch

FLOOR = "copy of its bytes"
#: Bytes of a piece that is copied; larger than any cache.
PIECE = 256 * MEBIBYTE
#: Operations, apart from views, that only reserve or rename memory.
MOVES_NOTHING = ("empty", "new_empty", "_unsafe_view")


@dataclass(frozen=True, kw_only=True)
class Floor(SearchStep):
    """Options of the benchmark."""

    profile: Path | None = None
    """Where to write the step's operations by time, from PyTorch's profiler."""


def moved_bytes(step: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """Return the bytes that the operations of a step read and write, in all and by operation.

    Views move nothing. An operation counts each tensor among its inputs and outputs once.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    by_operation: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            if not (function.is_view or name.startswith(MOVES_NOTHING)):
                tensors = {
                    id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)
                }
                by_operation[name] += sum(leaf.numel() * leaf.element_size() for leaf in tensors.values())
            return result

    with Counting():
        step()
    return sum(by_operation.values()), dict(by_operation.most_common())


def _count(options: Floor) -> tuple[int, dict[str, int]]:
    device = prepare(options)
    step = our_step_of(options, device)
    step()
    return moved_bytes(step)


def build_side(side: str, options: Floor, device: torch.device) -> Side:
    """Return the timed step, or the timed copy of as many bytes."""
    import torch

    if side == OURS:
        step = our_step_of(options, device)
        return timed(options.execution.graphed(step, device), device)
    wanted, _ = _count(options)
    source = torch.ones(PIECE, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    pieces, rest = divmod(wanted // 2, PIECE)

    def copy() -> None:
        for _ in range(pieces):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return timed(copy, device)


def _profile(options: Floor) -> str:
    device = prepare(options)
    return profile(our_step_of(options, device), device, repeats=3, row_limit=25)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    setting, options = parse_setting(Floor, "floor", __doc__, argv)
    total, by_operation = in_fresh_process(_count, options)
    for name, moved in list(by_operation.items())[:8]:
        tell(f"  {name}: {moved / MEBIBYTE:,.0f} MiB")
    if options.profile is not None:
        options.profile.write_text(in_fresh_process(_profile, options))
        tell(f"wrote {options.profile}")
    run_benchmark(
        "floor",
        argv,
        options,
        build_side,
        (FLOOR, OURS),
        ours=OURS,
        heading=f"one step of the search, {setting}: {total / MEBIBYTE:,.0f} MiB read and written",
        setting=setting,
        bytes=total,
        by_operation=by_operation,
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
