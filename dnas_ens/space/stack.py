"""The stack of cells that a supernet and the networks drawn from it have in common: its size and its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnas_ens.errors import UserError
from dnas_ens.space.search_space import stack_cell_types
from dnas_ens.space.spaces import Space, check_partial_channels, rules_of

if TYPE_CHECKING:
    from dnas_ens.data.dataset import ImageData

#: Sides in pixels below which the stem keeps the size, and up to which it reduces images twofold at most. So from 12
#: pixels on the cells begin with maps of 12 to 32 pixels, and end with such of 3 at least (docs/log.md).
TINY_IMAGE, SMALL_IMAGE = 24, 64


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """Channels and type of one cell of a stack.

    Args:
        rules: Those of its space.
        cell_type: "normal" or "reduction".
        before_last: Channels of the output of the cell before the last one.
        last: Channels of the output of the last cell.
        channels: C of this cell's nodes.
        num_nodes: N.
        after_reduction: Whether the last cell was a reduction cell, so that two inputs differ in size.
    """

    rules: Space
    cell_type: str
    before_last: int
    last: int
    channels: int
    num_nodes: int
    after_reduction: bool

    @property
    def out_channels(self) -> int:
        """Channels of the cell's output: C for the sum of loose ends, N * C for all nodes side by side."""
        return self.channels if self.rules.sums_loose_ends else self.num_nodes * self.channels

    def stride(self, source: int) -> int:
        """Return the stride of an edge: 2 where it leaves an input of a reduction cell, else 1."""
        return 2 if self.cell_type == "reduction" and source < self.rules.num_inputs else 1

    def in_channels(self, source: int) -> int:
        """Return the channels an edge reads: those of the last cell where no preprocessing brings them to C."""
        return self.last if self.rules.sums_loose_ends and source < self.rules.num_inputs else self.channels


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """The size of a stack of cells, and the images it is for.

    Args:
        num_cells: Cells in the stack; reduction cells are at one and two thirds of it.
        channels: C of the first cell; it doubles at every reduction cell.
        in_channels: Channels of the images.
        num_classes: K.
        stem_stride: What the stem divides the sides of the images by: 1, 2 or 4.
        partial_channels: 1/partial_channels of the channels go through the operations (PC-DARTS, arXiv 1907.05737).

    Raises:
        UserError: If ``partial_channels`` does not divide C.
    """

    num_cells: int
    channels: int
    in_channels: int
    num_classes: int
    stem_stride: int = 1
    partial_channels: int = 1

    def __post_init__(self) -> None:
        if self.partial_channels < 1 or self.channels % self.partial_channels:
            raise UserError(
                f"1/{self.partial_channels} of {self.channels} channels is not a whole number.",
                "Give --partial-channels a divisor of --channels.",
            )

    @classmethod
    def for_data(
        cls,
        data: ImageData,
        *,
        space: str,
        num_cells: int,
        channels: int,
        stem_stride: int | None = None,
        partial_channels: int = 1,
    ) -> StackSpec:
        """Return the stack for the images of a data set.

        Args:
            space: The name of the space that its cells are of.
            stem_stride: None for what `default_stem_stride` says; 1 on a trunk, which has made images small.
        """
        if stem_stride is None:
            stem_stride = default_stem_stride(data.image_size, space) if data.trunk is None else 1
        return cls(
            num_cells=num_cells,
            channels=channels,
            in_channels=data.num_channels,
            num_classes=data.num_classes,
            stem_stride=stem_stride,
            partial_channels=partial_channels,
        )

    def plan(self, space: str, num_nodes: int) -> list[CellPlan]:
        """Plan the cells of a space, of N nodes each.

        Raises:
            UserError: If there is no such stack (see ``stack_cell_types``), or the space has no such stem or no partial
                channels.
        """
        rules = rules_of(space)
        if self.stem_stride not in rules.stem_strides:
            raise UserError(
                f"The stem of the space {space} has no stride of {self.stem_stride}.",
                f"Give --stem-stride one of {', '.join(map(str, rules.stem_strides))}.",
            )
        check_partial_channels(space, self.partial_channels)
        before_last = last = rules.stem_channels * self.channels
        current, after_reduction = self.channels, False
        plans: list[CellPlan] = []
        for cell_type in stack_cell_types(self.num_cells):
            if cell_type == "reduction":
                current *= 2
            plans.append(
                CellPlan(
                    rules=rules,
                    cell_type=cell_type,
                    before_last=before_last,
                    last=last,
                    channels=current,
                    num_nodes=num_nodes,
                    after_reduction=after_reduction,
                )
            )
            before_last, last = last, plans[-1].out_channels
            after_reduction = cell_type == "reduction"
        return plans


def default_stem_stride(image_size: int, space: str) -> int:
    """Return what a stem divides the sides of images, in pixels, by: as DARTS does, or once below 64 pixels already."""
    if image_size > SMALL_IMAGE:
        return 4
    return 2 if image_size >= TINY_IMAGE and 2 in rules_of(space).stem_strides else 1
