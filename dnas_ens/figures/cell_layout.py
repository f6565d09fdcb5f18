"""Where everything in the picture of a cell goes; geometry only, in points, y growing downwards.

Every node stands in the column of its depth, its operations as labels directly on its left. An edge that
passes a column gets a lane of its own there, so it never runs under a label or a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import networkx

from dnas_ens.figures.layered_layout import Item, Link, fewest_crossings, level_links

NODE_SIZE = 28.0
TERMINAL_WIDTH = 46.0
LABEL_HEIGHT = 21.0
LABEL_GAP = 6.0
CONNECTOR = 30.0
LANE_HEIGHT = 4.0
MIN_COLUMN_GAP, MAX_COLUMN_GAP = 46.0, 96.0

Point = tuple[float, float]


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
        width: Width of everything.
        height: Height of everything.
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
    """Lay out a cell.

    Args:
        graph: What `Genotype.to_graph` returns.
        label_width: The width of a label box.
    """
    output = max(graph)
    depth = {0: 0, 1: 0}
    for node in range(2, output + 1):
        depth[node] = 1 + max(depth[source] for source in graph.predecessors(node))
    routes = {
        (source, target): [
            (source,),
            *((source, target, column) for column in range(depth[source] + 1, depth[target])),
            (target,),
        ]
        for source, target in graph.edges
    }
    columns: list[list[Item]] = [[] for _ in range(depth[output] + 1)]
    for node in sorted(graph):
        columns[depth[node]].append((node,))
    for route in routes.values():
        for lane in route[1:-1]:
            columns[lane[2]].append(lane)

    heights = {item: _height(graph, item) for column in columns for item in column}
    links = sorted({link for route in routes.values() for link in pairwise(route)})
    columns = fewest_crossings(columns, links, heights)
    places = {item: place for column in columns for place, item in enumerate(column)}
    shifts = _label_shifts(graph, links, places)
    ys = level_links(columns, links, shifts=shifts, heights=heights)
    top = min(ys[item] - heights[item] / 2 for item in ys)
    ys = {item: y - top for item, y in ys.items()}
    spans = _column_spans(columns, links, ys, label_width)

    nodes, labels = {}, {}
    for node in graph:
        start, end = spans[depth[node]]
        terminal = graph.nodes[node]["role"] != "intermediate"
        width = TERMINAL_WIDTH if terminal else NODE_SIZE
        nodes[node] = Box(x=end - width / 2, y=ys[(node,)], width=width, height=NODE_SIZE)
        if not terminal:
            for source in graph.predecessors(node):
                y = ys[(node,)] + shifts[routes[source, node][-2], (node,)]
                labels[source, node] = Box(
                    x=start + label_width / 2, y=y, width=label_width, height=LABEL_HEIGHT
                )
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


def _label_shifts(
    graph: networkx.DiGraph, links: list[Link], places: Mapping[Item, int]
) -> dict[Link, float]:
    """Return how far below its node's centre each link ends: at its label, in the order of arrival."""
    shifts = dict.fromkeys(links, 0.0)
    for node, role in graph.nodes(data="role"):
        if role == "intermediate":
            arriving = sorted(
                (link for link in links if link[1] == (node,)), key=lambda link: places[link[0]]
            )
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
