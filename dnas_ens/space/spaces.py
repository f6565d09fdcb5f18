"""The kinds of cells that can be searched, and the rules of each: one table, which everything else reads.

- ``darts``: two inputs, heavy operations, an output that concatenates all nodes (DARTS, arXiv 1806.09055).
- ``efficient``: one input, operations of one kernel, ReLU in the nodes, and an output that is the sum of the loose
  ends, the nodes that no other node reads (ENAS, arXiv 1802.03268, and NASNet, arXiv 1707.07012, concatenate them).
  All features are C channels wide, so no preprocessing only adapts widths, and none are negative. Plain convolutional
  networks and ResNets (arXiv 1512.03385) are points of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dnas_ens.errors import UserError

SpaceName = Literal["efficient", "darts"]
NONE = "none"
SKIP_CONNECT = "skip_connect"
#: The candidate operations of DARTS (arXiv 1806.09055) without ``none``.
DARTS_OPERATIONS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    SKIP_CONNECT,
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
EFFICIENT_OPERATIONS = (
    "conv_3x3",
    "conv_1x1",
    "group_conv_3x3",
    "depthwise_conv_3x3",
    "dilated_conv_3x3",
    "max_pool_3x3",
    SKIP_CONNECT,
)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The rules of one kind of cells.

    Args:
        inputs: What the first sources of a cell are: the outputs of the cell "before_last" and of the "last" one.
        operations: Candidate operations, unless others are asked for.
        num_nodes: N, likewise.
        channels: C of a search, likewise.
        keeps_fewer_edges: Whether a node may keep fewer edges than it is allowed, down to one; else it keeps exactly
            so many, or all it has.
        reads_previous: Whether every node of a cell that is searched or drawn reads the node before it, so that cells
            are deep: a supernet prefers nodes that all read the input, since they learn first.
        sums_loose_ends: Whether the output is the sum of the nodes that no other node reads, C channels wide; else
            all N nodes are concatenated, N * C channels.
        stem_channels: Channels of the stem's output, as a multiple of C.
        stem_strides: What the stem may divide the sides of the images by.
    """

    inputs: tuple[str, ...]
    operations: tuple[str, ...]
    num_nodes: int
    channels: int
    keeps_fewer_edges: bool
    reads_previous: bool
    sums_loose_ends: bool
    stem_channels: int
    stem_strides: tuple[int, ...]

    @property
    def num_inputs(self) -> int:
        """How many inputs a cell has; they are its first sources."""
        return len(self.inputs)

    def edge_counts(self, edges_per_node: int, num_sources: int) -> range:
        """Return how many edges a node with so many sources may keep, where it is allowed ``edges_per_node``."""
        most = min(edges_per_node, num_sources)
        return range(1 if self.keeps_fewer_edges else most, most + 1)


SPACES: dict[str, Space] = {
    "efficient": Space(
        inputs=("last",),
        operations=EFFICIENT_OPERATIONS,
        num_nodes=3,
        channels=16,
        keeps_fewer_edges=True,
        reads_previous=True,
        sums_loose_ends=True,
        stem_channels=1,
        stem_strides=(1, 2, 4),
    ),
    "darts": Space(
        inputs=("before_last", "last"),
        operations=DARTS_OPERATIONS,
        num_nodes=4,
        channels=8,
        keeps_fewer_edges=False,
        reads_previous=False,
        sums_loose_ends=False,
        stem_channels=3,
        stem_strides=(1, 4),
    ),
}


def rules_of(space: object) -> Space:
    """Return the rules of a space by its name; UserError if there is none of that name."""
    if not isinstance(space, str) or space not in SPACES:
        raise UserError(f"There is no space {str(space)[:60]!r}.", f"Use one of {', '.join(SPACES)}.")
    return SPACES[space]


def check_partial_channels(space: str, partial_channels: int) -> None:
    """Raise UserError if there is no such space, or partial channels are asked for where there are none."""
    if rules_of(space).sums_loose_ends and partial_channels > 1:
        raise UserError(
            f"Channels do not pass by the operations of the space {space}.",
            "Leave --partial-channels out, or give --space darts.",
        )
