"""Where everything in the picture of a cell goes; geometry only, in points, y growing downwards.

Every node stands in the column of its depth, its operations as labels directly on its left. An edge that
passes a column gets a lane of its own there, so it never runs under a label or a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

import networkx

from dnas_ens.figures.style import spread

NODE_SIZE = 28.0
TERMINAL_WIDTH = 46.0
LABEL_HEIGHT = 21.0
LABEL_GAP = 6.0
CONNECTOR = 30.0
LANE_HEIGHT = 4.0
ITEM_GAP = 18.0
MIN_COLUMN_GAP, MAX_COLUMN_GAP = 46.0, 96.0
NUM_SWEEPS = 24
LANE_WEIGHT = 4.0  # of a link between two lanes, beside 1 of any other: long edges run straight

Point = tuple[float, float]
Item = tuple[int, ...]  # (node,), or (source, target, column) for the lane of an edge
Link = tuple[Item, Item]  # in neighbouring columns, left and right


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle by its centre and size."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        """The middle of the left side."""
        return (self.x - self.width / 2, self.y)

    @property
    def right(self) -> Point:
        """The middle of the right side."""
        return (self.x + self.width / 2, self.y)


@dataclass(frozen=True, kw_only=True)
class CellLayout:
    """Positions of a drawn cell, its upper left corner at the origin.

    Args:
        nodes: A box for each node of the graph.
        labels: A box for the operation of each edge (source, target) that has one.
        paths: For each edge the points it passes, from its source to its label or to the output. Every
            second stretch, beginning with the first, leads from one column to the next; the others are
            the level lanes through the columns in between.
    """

    width: float
    height: float
    nodes: dict[int, Box]
    labels: dict[tuple[int, int], Box]
    paths: dict[tuple[int, int], tuple[Point, ...]]


def layout_cell(graph: networkx.DiGraph, *, label_width: float) -> CellLayout:
    """Lay out a cell, of which the graph is what `Genotype.to_graph` returns."""
    generations = enumerate(networkx.topological_generations(graph))
    depth: dict[int, int] = {node: column for column, nodes in generations for node in nodes}
    routes = {
        (source, target): [
            (source,),
            *((source, target, column) for column in range(depth[source] + 1, depth[target])),
            (target,),
        ]
        for source, target in graph.edges
    }
    columns: list[list[Item]] = [[] for _ in range(depth[max(graph)] + 1)]
    for node in sorted(graph):
        columns[depth[node]].append((node,))
    for route in routes.values():
        for lane in route[1:-1]:
            columns[lane[2]].append(lane)
    heights = {item: _height(graph, item) for column in columns for item in column}
    links = sorted({link for route in routes.values() for link in pairwise(route)})
    columns, ys = _arrange(columns, links, heights)
    shifts = _label_shifts(columns, links, heights)
    top = min(ys[item] - heights[item] / 2 for item in ys)
    ys = {item: y - top for item, y in ys.items()}
    spans = _column_spans(columns, links, ys, label_width)

    nodes, labels = {}, {}
    for node in graph:
        start, end = spans[depth[node]]
        terminal = graph.nodes[node]["role"] != "intermediate"
        width = TERMINAL_WIDTH if terminal else NODE_SIZE
        nodes[node] = Box(x=end - width / 2, y=ys[node,], width=width, height=NODE_SIZE)
        if not terminal:
            for source in graph.predecessors(node):
                y = ys[node,] + shifts[routes[source, node][-2], (node,)]
                labels[source, node] = Box(x=start + label_width / 2, y=y, width=label_width, height=LABEL_HEIGHT)
    paths = {
        edge: (
            nodes[edge[0]].right,
            *((x, ys[lane]) for lane in route[1:-1] for x in spans[lane[2]]),
            (labels[edge] if edge in labels else nodes[edge[1]]).left,
        )
        for edge, route in routes.items()
    }
    height = max(ys[item] + heights[item] / 2 for item in ys)
    return CellLayout(width=spans[-1][1], height=height, nodes=nodes, labels=labels, paths=paths)


def _height(graph: networkx.DiGraph, item: Item) -> float:
    if len(item) > 1:
        return LANE_HEIGHT
    num_labels = graph.in_degree(item[0]) if graph.nodes[item[0]]["role"] == "intermediate" else 0
    return max(NODE_SIZE, num_labels * (LABEL_HEIGHT + LABEL_GAP) - LABEL_GAP)


def _arrange(
    columns: list[list[Item]], links: list[Link], heights: Mapping[Item, float]
) -> tuple[list[list[Item]], dict[Item, float]]:
    """Order the items of every column and place them; return the columns and the y of each item's centre.

    Sweeps of the barycentre method (Sugiyama et al., 1981): every item goes to the mean of its neighbours in the
    columns on the left, on the right, on both sides, in turn, and a column is then spread until nothing touches.
    The best sweep is kept: the one with the fewest crossings, of these the one with the shortest climbs. The
    inputs stay in their order, so that cells can be compared.
    """
    columns = [list(column) for column in columns]
    weights = {link: LANE_WEIGHT if min(map(len, link)) > 1 else 1.0 for link in links}
    ys = {item: 0.0 for column in columns for item in column}
    best: tuple[float, list[list[Item]], dict[Item, float]] | None = None
    for sweep in range(NUM_SWEEPS):
        shifts = _label_shifts(columns, links, heights)
        sides = ((0,), (1,), (0, 1))[sweep % 3]
        order = range(len(columns))
        for index in reversed(order) if sweep % 2 else order:
            wishes = {item: _barycentre(item, ys, shifts, weights, sides) for item in columns[index]}
            if index > 0:
                columns[index].sort(key=wishes.__getitem__)
            column = columns[index]
            distances = [(heights[above] + heights[below]) / 2 + ITEM_GAP for above, below in pairwise(column)]
            ys.update(zip(column, spread([wishes[item] for item in column], distances), strict=True))
        shifts = _label_shifts(columns, links, heights)
        climbs = sum(weights[link] * abs(ys[link[0]] - ys[link[1]] - shifts[link]) for link in links)
        cost = 1000 * _crossings(columns, links, ys) + climbs
        if best is None or cost < best[0]:
            best = cost, [list(column) for column in columns], dict(ys)
    assert best is not None
    return best[1:]


def _barycentre(
    item: Item,
    ys: Mapping[Item, float],
    shifts: Mapping[Link, float],
    weights: Mapping[Link, float],
    sides: tuple[int, ...],
) -> float:
    """Return the weighted mean of where links on the left (side 0) or right (side 1) want an item; else where it is."""
    total = mass = 0.0
    for link, shift in shifts.items():
        for side, sign in ((0, -1), (1, 1)):
            if side in sides and link[1 - side] == item:
                total += weights[link] * (ys[link[side]] + sign * shift)
                mass += weights[link]
    return total / mass if mass else ys[item]


def _crossings(columns: list[list[Item]], links: list[Link], ys: Mapping[Item, float]) -> int:
    column_of = {item: index for index, column in enumerate(columns) for item in column}
    return sum(
        column_of[one[0]] == column_of[two[0]] and (ys[one[0]] - ys[two[0]]) * (ys[one[1]] - ys[two[1]]) < 0
        for one, two in combinations(links, 2)
    )


def _label_shifts(columns: list[list[Item]], links: list[Link], heights: Mapping[Item, float]) -> dict[Link, float]:
    """Return how far below its node's centre each link ends: at its label, in the order of arrival."""
    places = {item: place for column in columns for place, item in enumerate(column)}
    output = columns[-1][-1]
    shifts = dict.fromkeys(links, 0.0)
    for node in (item for item in heights if len(item) == 1 and item != output):
        arriving = sorted((link for link in links if link[1] == node), key=lambda link: places[link[0]])
        for place, link in enumerate(arriving):
            shifts[link] = (place - (len(arriving) - 1) / 2) * (LABEL_HEIGHT + LABEL_GAP)
    return shifts


def _column_spans(
    columns: list[list[Item]], links: list[Link], ys: Mapping[Item, float], label_width: float
) -> list[tuple[float, float]]:
    """Return each column's left and right end; columns are further apart where edges climb more."""
    column_of = {item: index for index, column in enumerate(columns) for item in column}
    spans = [(0.0, TERMINAL_WIDTH)]
    for index in range(1, len(columns)):
        climb = max(abs(ys[left] - ys[right]) for left, right in links if column_of[right] == index)
        start = spans[-1][1] + min(max(0.4 * climb, MIN_COLUMN_GAP), MAX_COLUMN_GAP)
        width = TERMINAL_WIDTH if index == len(columns) - 1 else label_width + CONNECTOR + NODE_SIZE
        spans.append((start, start + width))
    return spans
