"""How fast is one bilevel step of the search, and how much memory does it take, beside the textbook's?

    python experiments/benchmarks/search_step.py --setting digits
    python experiments/benchmarks/search_step.py --setting 28x28

A step is two passes over a batch of B random images for m members: the gradient of the loss with respect to the
members' mixture weights, and that with respect to the supernet's weights. No optimiser, no data. Three sides:

- textbook, whole batch: the reference supernet, contiguous, PyTorch's own depthwise gradients, a pass for each member
  over all B images. Its work on images is m times that of the others.
- textbook, same images: the same, each pass over the member's own B / m images. This is the strict comparison: work
  and images are equal.
- ours: the fast supernet, channels_last, one pass over B images in m slices, parameters frozen for the architecture;
  with --precision bfloat16 and --cuda-graph as a GPU wants it.

The textbook runs backward after each pass, which is the least memory it can take. Sides are timed in turn in one
process; peak memory is taken of each alone in a process of its own. Two to four minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from timing import ExecutedOptions, Side, parse_benchmark, run_benchmark, timed

from dnas_ens.commands.parse import peek, run_main
from dnas_ens.config import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dnas_ens.nn.execution import Execution

OURS, SAME_IMAGES, WHOLE_BATCH = "ours", "textbook, same images", "textbook, whole batch"
NUM_CLASSES = 10
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"image_size": 8, "in_channels": 1, "channels": 8, "batch_size": 64},
    "28x28": {"image_size": 28, "in_channels": 1, "channels": 16, "batch_size": 64},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Options that are read first, because they decide the defaults of the others."""

    setting: Literal["digits", "28x28"] = "digits"
    """Sets the defaults of the sizes."""


@dataclass(frozen=True, kw_only=True)
class SearchStep(Setting, ExecutedOptions):
    """Options of the benchmark."""

    image_size: int
    """Side of the images in pixels."""
    in_channels: int
    """Channels of the images."""
    channels: int
    """C of the first cell."""
    batch_size: int
    """B, images of each of the two passes."""
    members: int = 4
    """m, members of a step."""
    num_cells: int = 3
    """Cells in the stack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.layout == "channels_last",
            "The fast supernet is computed channels_last.",
            "Leave --layout out.",
        )
        require(
            self.batch_size % self.members == 0,
            f"{self.members} members do not divide a batch of {self.batch_size} images.",
            "Give --batch-size a multiple of --members.",
        )


Step = TypeVar("Step", bound=SearchStep)


def build_step(side: str, options: SearchStep, device: torch.device) -> Side:
    """Return the timed step of a side, on a supernet and images of its own."""
    if side == OURS:
        step = our_step_of(options, device)
        return timed(options.execution.graphed(step, device), device)
    supernet, images, labels, mixtures = _inputs(options, device, fast=False)
    share = options.members if side == SAME_IMAGES else 1
    repeats = options.members // share
    batches = list(zip(images.chunk(share) * repeats, labels.chunk(share) * repeats, strict=True))
    return timed(lambda: textbook_step(supernet, batches, mixtures), device)


def our_step_of(options: SearchStep, device: torch.device) -> Callable[[], None]:
    """Return our step, on a supernet and images of its own."""
    supernet, images, labels, mixtures = _inputs(options, device, fast=True)
    execution = options.execution
    images = execution.place(images)
    execution.place_module(supernet, device)
    return lambda: our_step(supernet, images, labels, mixtures, execution)


def _inputs(options: SearchStep, device: torch.device, *, fast: bool) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor]:
    """Return a supernet, random images and labels, and the members' mixture weights."""
    import torch

    from dnas_ens.nn.fast_supernet import FastSupernet
    from dnas_ens.nn.supernet import Supernet
    from dnas_ens.space.search_space import SearchSpace
    from dnas_ens.space.spaces import DARTS_OPERATIONS
    from dnas_ens.space.stack import StackSpec, default_stem_stride

    torch.manual_seed(0)
    space = SearchSpace.for_stack(options.num_cells, operations=DARTS_OPERATIONS, num_nodes=4)
    form = FastSupernet if fast else Supernet
    stack = StackSpec(
        num_cells=options.num_cells,
        channels=options.channels,
        in_channels=options.in_channels,
        num_classes=NUM_CLASSES,
        stem_stride=default_stem_stride(options.image_size, space.name),
    )
    supernet = form(space, stack).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.in_channels, options.image_size, options.image_size)
    images = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(NUM_CLASSES, (options.batch_size,), generator=generator).to(device)
    mixtures = torch.randn(options.members, *space.shape, generator=generator).softmax(-1).to(device)
    return supernet, images, labels, mixtures


def textbook_step(supernet: torch.nn.Module, batches: list[tuple[Tensor, Tensor]], mixtures: Tensor) -> None:
    """Take both gradients with a pass for each member over its batch."""
    import torch
    import torch.nn.functional as F

    from dnas_ens.nn.depthwise import native_depthwise

    def losses(weights: list[Tensor]) -> Iterator[Tensor]:
        for (images, labels), mixture in zip(batches, weights, strict=True):
            yield F.cross_entropy(supernet(images, mixture), labels) / len(batches)

    fixed = list(mixtures.unbind())
    leaves = [mixture.clone().requires_grad_() for mixture in fixed]
    with native_depthwise():
        for leaf, loss in zip(leaves, losses(leaves), strict=True):
            torch.autograd.grad(loss, leaf)
        supernet.zero_grad(set_to_none=True)
        for loss in losses(fixed):
            loss.backward()


def our_step(supernet: torch.nn.Module, images: Tensor, labels: Tensor, mixtures: Tensor, execution: Execution) -> None:
    """Take both gradients with one pass each, as ``dnas_ens.search.steps`` does."""
    import torch
    import torch.nn.functional as F

    def loss(weights: Tensor) -> Tensor:
        with execution.autocast(images.device):
            logits = supernet(images, weights)
        return F.cross_entropy(logits.float(), labels)

    leaf = mixtures.clone().requires_grad_()
    supernet.requires_grad_(False)
    torch.autograd.grad(loss(leaf), leaf)
    supernet.requires_grad_(True)
    supernet.zero_grad(set_to_none=True)
    loss(mixtures).backward()


def parse_setting(kind: type[Step], script: str, doc: str | None, argv: list[str]) -> tuple[str, Step]:
    """Parse options whose sizes default to those of --setting; returns its name and the options."""
    setting = peek(Setting, argv, prog=f"python experiments/benchmarks/{script}.py").setting
    default = kind(setting=setting, **SETTINGS[setting])
    return setting, parse_benchmark(script, doc, default, argv)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    setting, options = parse_setting(SearchStep, "search_step", __doc__, argv)
    sides = (WHOLE_BATCH, SAME_IMAGES, OURS)
    heading = f"one step of the search, {setting}: {options.members} members, batch {options.batch_size}"
    run_benchmark("search_step", argv, options, build_step, sides, ours=OURS, heading=heading, setting=setting)


if __name__ == "__main__":
    sys.exit(run_main(main))
