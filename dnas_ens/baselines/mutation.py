"""Mutation of a genotype: one edge gets another operation, or another source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from dnas_ens.errors import UserError
from dnas_ens.space.genotype import NUM_INPUTS, Cell, Edge, Genotype

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Kind = Literal["operation", "source"]
KINDS: tuple[Kind, ...] = ("operation", "source")


def mutate(genotype: Genotype, *, operations: Sequence[str], generator: np.random.Generator) -> Genotype:
    """Change one edge of one cell, as regularised evolution does (Real et al., arXiv 1802.01548).

    Drawn uniformly, one after the other: whether an operation or a source (there: hidden state) changes, the cell,
    the edge, and what it changes to. What is not possible is passed over: a source can only become one that its
    node does not take yet. A change that gives the parent back under another numbering of its nodes is none, and
    is passed over as well. The identity, which the paper allows at a low rate, is not among the mutations.

    Args:
        genotype: The parent.
        operations: Names to draw from; "none" is never drawn.
        generator: The source of randomness.

    Returns:
        A valid genotype that differs from the parent in exactly one edge, and there in the operation or in the
        source but not in both, and that is not isomorphic to it.

    Raises:
        UserError: No edge can change: there is but one operation, and every node takes all its sources.
    """
    parent = genotype.canonical()
    names = [name for name in dict.fromkeys(operations) if name != "none"]
    for kind in _shuffled(KINDS, generator):
        for cell_type in _shuffled(genotype.cell_types, generator):
            cell = genotype.cell(cell_type)
            slots = [(node, position) for node, edges in enumerate(cell) for position in range(len(edges))]
            for node, position in _shuffled(slots, generator):
                for edge in _shuffled(_other_edges(cell, node, position, kind, names), generator):
                    cells = {
                        **{other: genotype.cell(other) for other in genotype.cell_types},
                        cell_type: _with_edge(cell, node, position, edge),
                    }
                    child = Genotype(**cells)
                    if child.canonical() != parent:
                        return child
    raise UserError(
        f"No edge of the genotype can change: there are {len(names)} operations to draw from.",
        "Give at least 2 different operations.",
    )


def _shuffled(items: Sequence[T], generator: np.random.Generator) -> Iterator[T]:
    return (items[index] for index in generator.permutation(len(items)))


def _other_edges(cell: Cell, node: int, position: int, kind: Kind, names: Sequence[str]) -> list[Edge]:
    """List what one edge can become by a change of a kind."""
    operation, source = cell[node][position]
    if kind == "operation":
        return [(name, source) for name in names if name != operation]
    taken = {other for _, other in cell[node]}
    return [(operation, other) for other in range(NUM_INPUTS + node) if other not in taken]


def _with_edge(cell: Cell, node: int, position: int, edge: Edge) -> Cell:
    edges = cell[node]
    changed = (*edges[:position], edge, *edges[position + 1 :])
    return (*cell[:node], changed, *cell[node + 1 :])
