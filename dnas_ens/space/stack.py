"""The stack of cells that a supernet and the networks drawn from it have in common: its size and its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnas_ens.errors import UserError
from dnas_ens.space.search_space import stack_cell_types

if TYPE_CHECKING:
    from dnas_ens.data.dataset import ImageData

#: Side in pixels up to which images go through the small-image stem.
SMALL_IMAGE = 64
#: Channels of the small-image stem, as a multiple of C (DARTS, arXiv 1806.09055).
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

    def stride(self, source: int) -> int:
        """Return the stride of an edge: 2 where it leaves an input of a reduction cell, else 1."""
        return 2 if self.cell_type == "reduction" and source < 2 else 1


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """The size of a stack of cells, and the images it is for.

    Args:
        num_cells: Cells in the stack; reduction cells are at one and two thirds of it.
        channels: C of the first cell; it doubles at every reduction cell.
        in_channels: Channels of the images.
        num_classes: K.
        large_images: Whether the stem reduces the images fourfold first.
        partial_channels: 1/partial_channels of the channels go through the operations (PC-DARTS, arXiv 1907.05737).

    Raises:
        UserError: If ``partial_channels`` does not divide C.
    """

    num_cells: int
    channels: int
    in_channels: int
    num_classes: int
    large_images: bool = False
    partial_channels: int = 1

    def __post_init__(self) -> None:
        if self.partial_channels < 1 or self.channels % self.partial_channels:
            raise UserError(
                f"1/{self.partial_channels} of {self.channels} channels is not a whole number.",
                "Give --partial-channels a divisor of --channels.",
            )

    @classmethod
    def for_data(cls, data: ImageData, *, num_cells: int, channels: int, partial_channels: int = 1) -> StackSpec:
        """Return the stack for the images of a data set."""
        return cls(
            num_cells=num_cells,
            channels=channels,
            in_channels=data.num_channels,
            num_classes=data.num_classes,
            large_images=data.image_size > SMALL_IMAGE,
            partial_channels=partial_channels,
        )

    @property
    def stem_channels(self) -> int:
        """Channels of the stem's output."""
        return STEM_MULTIPLIER * self.channels

    def plan(self, num_nodes: int) -> tuple[list[CellPlan], int]:
        """Plan the cells, of N nodes each.

        Returns:
            The plan of every cell, and the number of channels of the stack's output.

        Raises:
            UserError: If there is no such stack; see ``stack_cell_types``.
        """
        before_last = last = self.stem_channels
        current, after_reduction = self.channels, False
        plans = []
        for cell_type in stack_cell_types(self.num_cells):
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
