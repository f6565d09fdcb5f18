"""What the supernet and the discrete network have in common: stem, plan of the stack, input preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dnas_ens.nn.operations import FactorizedReduce, ReluConvBn
from dnas_ens.space.search_space import stack_cell_types

#: Side in pixels up to which images go through the small-image stem.
SMALL_IMAGE = 64
#: Channels of the small-image stem, as a multiple of C (DARTS).
STEM_MULTIPLIER = 3


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """Channels and type of one cell of a stack.

    Args:
        cell_type: "normal" or "reduction".
        before_last: Channels of the output of the cell before the last one.
        last: Channels of the output of the last cell.
        channels: C of this cell's nodes; its output has N * C.
        after_reduction: Whether the last cell was a reduction cell, so that the two inputs differ in size.
    """

    cell_type: str
    before_last: int
    last: int
    channels: int
    after_reduction: bool


def plan_stack(num_cells: int, *, channels: int, num_nodes: int) -> tuple[list[CellPlan], int]:
    """Plan a DARTS stack: C doubles at every reduction cell.

    Returns:
        The plan of every cell, and the number of channels of the stack's output.
    """
    before_last = last = STEM_MULTIPLIER * channels
    current, after_reduction = channels, False
    plans = []
    for cell_type in stack_cell_types(num_cells):
        if cell_type == "reduction":
            current *= 2
        plans.append(
            CellPlan(
                cell_type=cell_type,
                before_last=before_last,
                last=last,
                channels=current,
                after_reduction=after_reduction,
            )
        )
        before_last, last = last, num_nodes * current
        after_reduction = cell_type == "reduction"
    return plans, last


def build_stem(in_channels: int, channels: int, *, large_images: bool) -> nn.Sequential:
    """Build the stem: one 3x3 convolution, or three with a total stride of 4 for images past 64 pixels."""
    out_channels = STEM_MULTIPLIER * channels
    if not large_images:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
    half = out_channels // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, out_channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def build_preprocessing(plan: CellPlan, *, affine: bool) -> tuple[nn.Module, nn.Module]:
    """Build the two modules that bring a cell's inputs to its C channels and to one size."""
    before_last: nn.Module
    if plan.after_reduction:
        before_last = FactorizedReduce(plan.before_last, plan.channels, affine=affine)
    else:
        before_last = ReluConvBn(plan.before_last, plan.channels, affine=affine)
    return before_last, ReluConvBn(plan.last, plan.channels, affine=affine)


def edge_stride(cell_type: str, source: int) -> int:
    """Return the stride of an edge: 2 where it leaves an input of a reduction cell, else 1."""
    return 2 if cell_type == "reduction" and source < 2 else 1
