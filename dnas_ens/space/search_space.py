"""The search space: cell types, nodes, edges and candidate operations, without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dnas_ens.errors import UserError
from dnas_ens.space.genotype import CELL_TYPES
from dnas_ens.space.spaces import DARTS_OPERATIONS, NONE, Space, rules_of

#: The largest stack; a number in a file must not cost hours.
MOST_CELLS = 1000


def stack_cell_types(num_cells: int) -> tuple[str, ...]:
    """Return the type of every cell of a stack, the first cell first; reductions are at one and two thirds (DARTS).

    Raises:
        UserError: There is none, or more than MOST_CELLS.
    """
    if not 1 <= num_cells <= MOST_CELLS:
        raise UserError(f"A stack of {num_cells} cells.", f"Give 1 to {MOST_CELLS} cells.")
    reductions = num_cells // 3, 2 * num_cells // 3
    return tuple("reduction" if index in reductions else "normal" for index in range(num_cells))


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """T cell types, N intermediate nodes, E edges and O candidate operations.

    Node n (counted from 0) of a cell receives an edge from each of its I inputs and from every
    earlier node, so E = sum over n of (I + n). Edges are ordered by node, then by source, and the
    edges of one node are contiguous.

    Args:
        name: Whose rules hold, in `dnas_ens.space.spaces.SPACES`.
        operations: Names of the candidate operations, in the order of the last axis of alpha.
        num_nodes: N, at least 1.
        cell_types: Types that are searched, a subset of ``CELL_TYPES`` in that order.
    """

    name: str = "darts"
    operations: tuple[str, ...] = DARTS_OPERATIONS
    num_nodes: int = 4
    cell_types: tuple[str, ...] = CELL_TYPES

    def __post_init__(self) -> None:
        rules_of(self.name)
        if self.num_nodes < 1:
            raise UserError(f"A cell of {self.num_nodes} nodes is empty.", "Give --num-nodes 1 or more.")
        if len(set(self.operations)) != len(self.operations):
            raise UserError(f"The operations {', '.join(self.operations)} name one twice.", "Name each operation once.")
        if not set(self.operations) - {NONE}:
            raise UserError("There is no operation to choose from.", "Give --operations at least one name.")

    @classmethod
    def for_stack(
        cls,
        num_cells: int,
        *,
        name: str = "darts",
        operations: tuple[str, ...] | None = None,
        num_nodes: int | None = None,
    ) -> SearchSpace:
        """Return the space of a stack of cells, holding only the cell types that occur in it.

        Args:
            operations: None for those of the named space.
            num_nodes: N, likewise.
        """
        rules, present = rules_of(name), set(stack_cell_types(num_cells))
        return cls(
            name=name,
            operations=rules.operations if operations is None else operations,
            num_nodes=rules.num_nodes if num_nodes is None else num_nodes,
            cell_types=tuple(cell_type for cell_type in CELL_TYPES if cell_type in present),
        )

    @property
    def rules(self) -> Space:
        """The rules of its cells."""
        return rules_of(self.name)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All (node, source) pairs of a cell; the first I sources are its inputs, I + n is node n."""
        first = self.rules.num_inputs
        return tuple((node, source) for node in range(self.num_nodes) for source in range(first + node))

    @cached_property
    def node_slices(self) -> tuple[slice, ...]:
        """For every node the slice of its incoming edges on the edge axis."""
        first = self.rules.num_inputs
        starts = [sum(range(first, first + node)) for node in range(self.num_nodes)]
        return tuple(slice(start, start + first + node) for node, start in enumerate(starts))

    @property
    def num_edges(self) -> int:
        """E, edges of one cell."""
        return len(self.edges)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, E, O), the shape of the operation logits alpha."""
        return (len(self.cell_types), self.num_edges, len(self.operations))
