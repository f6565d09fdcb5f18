"""One cell: what makes it valid, its renumberings, and the edges it shares with another.

A cell has I inputs (sources 0 .. I-1) and N intermediate nodes (sources I .. I+N-1). Each node sums its edges, an
operation applied to an earlier source. How many inputs there are, and which nodes reach the output, are the rules of
its space (`dnas_ens.space.spaces`).
"""

from __future__ import annotations

import reprlib
from operator import index as to_index
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from dnas_ens.errors import UserError
from dnas_ens.space.spaces import Space

if TYPE_CHECKING:
    import networkx

Edge = tuple[str, int]
Node = tuple[Edge, ...]
Cell = tuple[Node, ...]

CELL_TYPES = ("normal", "reduction")
#: Limit on the equal beginnings of a canonical form that are followed.
MOST_ORDERS = 20_000

CELL_PATTERN = 'Write a cell as nodes of [operation, source] pairs: [[["sep_conv_3x3", 0], ["skip_connect", 1]]].'


def check_cell_type(cell_type: object) -> None:
    """Raise UserError unless this is one of `CELL_TYPES`."""
    if cell_type not in CELL_TYPES:
        raise UserError(f"{shown(cell_type)} is not a cell type.", f"Use {' or '.join(CELL_TYPES)}.")


def shown(value: object) -> str:
    """Return a value as an error message shows it, shortened if it is long."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked_cell(cell: Any, cell_type: str, rules: Space) -> Cell:
    """Return a cell, given as nested lists or tuples, as tuples; UserError names what is wrong with it."""
    if not isinstance(cell, list | tuple):
        raise UserError(f"The {cell_type} cell is {shown(cell)}, not a list of nodes.", CELL_PATTERN)
    return tuple(_checked_node(node, index, cell_type, rules.num_inputs) for index, node in enumerate(cell))


def _checked_node(node: Any, index: int, cell_type: str, num_inputs: int) -> Node:
    def wrong(what: str, remedy: str = CELL_PATTERN) -> UserError:
        return UserError(f"Node {index} of the {cell_type} cell {what}.", remedy)

    if not isinstance(node, list | tuple) or not node:
        raise wrong(f"is {shown(node)}, not a list of at least one edge")
    edges: dict[int, str] = {}
    for edge in node:
        if not isinstance(edge, list | tuple) or len(edge) != 2:
            raise wrong(f"has the edge {shown(edge)}, not an [operation, source] pair")
        operation, source = edge
        if not isinstance(operation, str) or not operation:
            raise wrong(f"has the operation {shown(operation)}, which is not a name")
        try:
            number = None if isinstance(source, bool) else to_index(source)
        except TypeError:
            number = None
        if number is None:
            raise wrong(f"has the source {shown(source)}, which is not a whole number")
        if not 0 <= number < num_inputs + index:
            inputs = "0 is the input" if num_inputs == 1 else "0 and 1 are the inputs"
            raise wrong(
                f"takes {shown(operation)} from source {number}, which does not exist before it",
                f"Use a source from 0 to {num_inputs + index - 1}; {inputs}, {num_inputs} is node 0.",
            )
        if number in edges:
            raise wrong(f"takes a source twice: {shown(node)}", "Give each edge of a node its own source.")
        edges[number] = operation
    return tuple((operation, source) for source, operation in edges.items())


def loose_ends(cell: Cell, rules: Space) -> list[int]:
    """Return the sources that the output is made of: the nodes that no other node reads, or all of them."""
    nodes = range(rules.num_inputs, rules.num_inputs + len(cell))
    read = {source for node in cell for _, source in node} if rules.sums_loose_ends else set()
    return [node for node in nodes if node not in read]


def cell_graph(cell: Cell, rules: Space) -> networkx.DiGraph:
    """Return a cell as a graph whose nodes are the source indices; `Genotype.to_graph` describes it."""
    import networkx

    graph = networkx.DiGraph()
    for index, role in enumerate(rules.inputs):
        graph.add_node(index, role=role)
    output = rules.num_inputs + len(cell)
    for index, node in enumerate(cell, start=rules.num_inputs):
        graph.add_node(index, role="intermediate")
        graph.add_edges_from((source, index, {"operation": operation}) for operation, source in node)
    graph.add_node(output, role="output")
    graph.add_edges_from(((index, output) for index in loose_ends(cell, rules)), operation=None)
    return graph


def canonical_cell(cell: Cell, num_inputs: int) -> Cell:
    """Return the lexicographically smallest of a cell's topological renumberings, edges sorted by source.

    Nodes are placed one after the other. A beginning is kept if its next node is the smallest of all. Beginnings with
    the same nodes left are merged, and of interchangeable nodes only the first is tried, so that N alike nodes take N
    choices and not N!.

    Raises:
        UserError: More than MOST_ORDERS beginnings are equal, which only a cell made for that has.
    """
    chosen: list[Node] = []
    # New index of every old one, of the inputs and the nodes that are placed.
    beginnings: list[dict[int, int]] = [{index: index for index in range(num_inputs)}]
    twins = _twins(cell, num_inputs)
    for new in range(num_inputs, num_inputs + len(cell)):
        following: dict[Node, dict[object, dict[int, int]]] = {}
        for index in beginnings:
            for old in _next_nodes(cell, index, twins, num_inputs):
                edges = ((operation, index[source]) for operation, source in cell[old - num_inputs])
                node = tuple(sorted(edges, key=itemgetter(1)))
                extended = {**index, old: new}
                following.setdefault(node, {}).setdefault(_to_come(cell, extended, num_inputs), extended)
        smallest = min(following)
        chosen.append(smallest)
        beginnings = list(following[smallest].values())
        if len(beginnings) > MOST_ORDERS:
            raise UserError(
                f"A cell of {len(cell)} nodes is too regular to be compared with its renumberings.",
                "Use cells with fewer nodes.",
            )
    return tuple(chosen)


def _next_nodes(cell: Cell, index: dict[int, int], twins: list[int], num_inputs: int) -> list[int]:
    """Return the old indices of the nodes that can be placed next: all sources placed, the first of its twins."""
    found: dict[int, int] = {}
    for old, node in enumerate(cell, start=num_inputs):
        if old not in index and all(source in index for _, source in node):
            found.setdefault(twins[old - num_inputs], old)
    return list(found.values())


def _to_come(cell: Cell, index: dict[int, int], num_inputs: int) -> object:
    """Return a key of the nodes left: two beginnings with an equal key can end in the same ways."""
    left = [old for old in range(num_inputs, num_inputs + len(cell)) if old not in index]
    # A source that is not placed yet keeps its old index, told apart by its sign.
    nodes = {
        old: tuple(sorted((operation, index.get(source, -source)) for operation, source in cell[old - num_inputs]))
        for old in left
    }
    if all(source in index for old in left for _, source in cell[old - num_inputs]):
        # No node that is left reads another: their order does not matter.
        return tuple(sorted(nodes.values()))
    return tuple(sorted(nodes.items()))


def _twins(cell: Cell, num_inputs: int) -> list[int]:
    """Return for every node the first one (it may be itself) that can be exchanged with it without a change."""
    readers: list[dict[int, str]] = [{} for _ in range(num_inputs + len(cell))]
    for old, node in enumerate(cell, start=num_inputs):
        for operation, source in node:
            readers[source][old] = operation
    first: dict[object, int] = {}
    return [
        first.setdefault((frozenset(node), frozenset(readers[old].items())), old)
        for old, node in enumerate(cell, start=num_inputs)
    ]


def most_shared_edges(cell: Cell, other: Cell, num_inputs: int) -> int:
    """Return the most edges two cells share over all matchings of their nodes, by branch and bound.

    A node's sources precede it, so they are matched before it is and its gain is known at once.
    """
    if len(cell) > len(other):
        cell, other = other, cell
    targets = [frozenset(node) for node in other]
    edges_left = [sum(len(node) for node in cell[index:]) for index in range(len(cell) + 1)]
    best = 0

    def extend(matching: tuple[int, ...], gained: int) -> None:
        nonlocal best
        best = max(best, gained)
        index = len(matching) - num_inputs
        if gained + edges_left[index] <= best:
            return
        for target, edges in enumerate(targets, start=num_inputs):
            if target not in matching:
                gain = sum((operation, matching[source]) in edges for operation, source in cell[index])
                extend((*matching, target), gained + gain)

    extend(tuple(range(num_inputs)), 0)
    return best
