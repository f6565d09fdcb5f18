"""Pictures of cells, drawn with networkx and matplotlib alone."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import BoxStyle, FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Outline

from dnas_ens.figures import style
from dnas_ens.figures.cell_layout import Box, CellLayout, Point, layout_cell
from dnas_ens.space.genotype import Genotype

NOTE_SIZE, LABEL_SIZE, NODE_TEXT_SIZE, TITLE_SIZE = 8.0, 10.0, 11.0, 13.0
MARGIN, TITLE_HEIGHT, CELL_GAP = 16.0, 30.0, 4.0
LABEL_PADDING = 9.0
ARROW = 7.0

TERMINALS = {"before_last": "$c_{k-2}$", "last": "$c_{k-1}$", "output": "$c_k$"}

FAMILIES = {
    "conv": style.BLUE,
    "sep_conv": style.BLUE,
    "group_conv": style.SKY,
    "depthwise_conv": style.SKY,
    "dil": style.VERMILION,
    "max_pool": style.GREEN,
    "avg_pool": style.GREEN,
    "skip_connect": style.PURPLE,
}
OTHER_COLOUR = style.MUTED_COLOUR


def operation_colour(operation: str) -> str:
    """Return the colour of an operation's family: dense, grouped or dilated convolution, pooling, skip, other."""
    return next((colour for family, colour in FAMILIES.items() if operation.startswith(family)), OTHER_COLOUR)


def operation_label(operation: str) -> str:
    """Return an operation's name as people write it: "sep_conv_3x3" as "sep conv 3×3"."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", operation.replace("_", " ")).replace("$", r"\$")


def draw_genotype(genotype: Genotype, *, title: str | None = None) -> Figure:
    """Draw all cells of a genotype, one above the other, under a common heading if one is given.

    A cell runs from left to right: its inputs, its nodes with the operations before them, its output. Grey lines
    lead from the nodes that the output concatenates or sums.
    """
    layouts = {cell_type: _layout(genotype, cell_type) for cell_type in genotype.cell_types}
    sizes = [_size(layout) for layout in layouts.values()]
    heading_width = style.text_width(title, TITLE_SIZE, bold=True) + 2 * MARGIN if title else 0.0
    total_width = max(heading_width, *(width for width, _ in sizes))
    top = TITLE_HEIGHT if title else 0.0
    total_height = top + sum(height for _, height in sizes) + CELL_GAP * (len(sizes) - 1)
    figure = style.new_figure(total_width, total_height)
    if title:
        place = (MARGIN / total_width, 1 - MARGIN / total_height)
        heading = style.font(TITLE_SIZE, bold=True)
        figure.text(*place, title, fontproperties=heading, color=style.TEXT_COLOUR, va="top")
    for (cell_type, layout), (width, height) in zip(layouts.items(), sizes, strict=True):
        bottom = total_height - top - height
        bounds = (0, bottom / total_height, width / total_width, height / total_height)
        _paint(figure.add_axes(bounds, label=cell_type), genotype, cell_type, layout=layout)
        top += height + CELL_GAP
    return figure


def save_cells(genotype: Genotype, path: Path, *, title: str | None = None) -> Figure:
    """Draw all cells of a genotype into one SVG file, the same bytes for the same genotype; return the figure."""
    figure = draw_genotype(genotype, title=title)
    style.save_svg(figure, path, title=title or f"Cells of genotype {genotype.canonical_hash()}")
    return figure


def _layout(genotype: Genotype, cell_type: str) -> CellLayout:
    graph = genotype.to_graph(cell_type)
    widths = [style.text_width(operation_label(name), LABEL_SIZE) for name, _ in genotype.edges(cell_type)]
    return layout_cell(graph, label_width=max(widths) + 2 * LABEL_PADDING)


def _size(layout: CellLayout) -> tuple[float, float]:
    return layout.width + 2 * MARGIN, layout.height + 2 * MARGIN + TITLE_HEIGHT


def _tint(colour: str, strength: float) -> tuple[float, ...]:
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))


def _before_arrow(tip: Point) -> Point:
    return (tip[0] - ARROW / 2, tip[1])


def _curve(points: tuple[Point, ...]) -> Outline:
    """Join points by a smooth curve: columns to columns as an S, level stretches as lines."""
    vertices, codes = [points[0]], [Outline.MOVETO]
    for index, (start, end) in enumerate(pairwise(points)):
        if index % 2:
            vertices.append(end)
            codes.append(Outline.LINETO)
        else:
            middle = (start[0] + end[0]) / 2
            vertices += [(middle, start[1]), (middle, end[1]), end]
            codes += [Outline.CURVE4] * 3
    return Outline(vertices, codes)


def _paint(axis: Axes, genotype: Genotype, cell_type: str, *, layout: CellLayout) -> None:
    """Draw a cell on an axis of its natural size, so that a unit of the layout is a point on paper."""
    width, height = _size(layout)
    top = layout.height + MARGIN - height
    axis.set_axis_off()
    axis.set_xlim(-MARGIN, width - MARGIN)
    axis.set_ylim(layout.height + MARGIN, top)
    brush = _Brush(axis, cell_type)
    heading = f"{cell_type.capitalize()} cell"
    brush.text(heading, (0.0, top + MARGIN), TITLE_SIZE, name="title", bold=True, ha="left", va="top")
    graph = genotype.to_graph(cell_type)
    for (source, node), box in layout.labels.items():
        operation = graph.edges[source, node]["operation"]
        colour = operation_colour(operation)
        brush.line(layout.paths[source, node], colour, 1.5)
        brush.line((box.right, _before_arrow(layout.nodes[node].left)), colour, 1.5)
        brush.box(box, fill=_tint(colour, 0.13), edge=colour, radius=box.height / 2)
        brush.text(operation_label(operation), (box.x, box.y), LABEL_SIZE, name=f"edge-{source}-{node}")
    for node, box in layout.nodes.items():
        role = graph.nodes[node]["role"]
        name = f"node-{node}"
        if role == "intermediate":
            number = str(node - genotype.rules.num_inputs)
            if path := layout.paths.get((node, max(graph))):
                brush.line((*path[:-1], _before_arrow(path[-1])), style.LINE_COLOUR, 1.2)
            brush.arrow(box.left, style.TEXT_COLOUR)
            brush.box(box, fill=style.TEXT_COLOUR, edge=style.TEXT_COLOUR, radius=7)
            brush.text(number, (box.x, box.y), NODE_TEXT_SIZE, name=name, bold=True, colour="white")
        else:
            used = graph.degree(node) > 0
            colour = style.TEXT_COLOUR if used else style.LINE_COLOUR
            brush.box(box, fill=style.PANEL_COLOUR, edge=style.LINE_COLOUR if used else style.GRID_COLOUR, radius=7)
            brush.text(TERMINALS[role], (box.x, box.y), NODE_TEXT_SIZE + 1, name=name, colour=colour)
            if role == "output":
                brush.arrow(box.left, style.LINE_COLOUR)
                below = (box.x, box.y + box.height / 2 + 8)
                how = "sum" if genotype.rules.sums_loose_ends else "concat"
                brush.text(how, below, NOTE_SIZE, name=how, colour=style.MUTED_COLOUR)


class _Brush:
    """Draws shapes and texts on an axis, in points; names of texts begin with a prefix."""

    def __init__(self, axis: Axes, prefix: str) -> None:
        self.axis = axis
        self.prefix = prefix

    def line(self, points: tuple[Point, ...], colour: str, width: float) -> None:
        path = _curve(points)
        order = 0.5 if colour == style.LINE_COLOUR else 1.0  # concatenation below operations
        self.axis.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=width, zorder=order))

    def arrow(self, tip: Point, colour: str) -> None:
        x, y = tip
        corners = [(x, y), (x - ARROW, y - ARROW / 2), (x - ARROW, y + ARROW / 2)]
        self.axis.add_patch(Polygon(corners, closed=True, facecolor=colour, edgecolor="none", zorder=2))

    def box(self, box: Box, *, fill: str | tuple[float, ...], edge: str, radius: float) -> None:
        corner = (box.x - box.width / 2, box.y - box.height / 2)
        shape = BoxStyle.Round(pad=0, rounding_size=radius)
        patch = FancyBboxPatch(corner, box.width, box.height, boxstyle=shape, facecolor=fill, edgecolor=edge)
        patch.set(linewidth=1.2, zorder=3)
        self.axis.add_patch(patch)

    def text(
        self,
        text: str,
        position: Point,
        size: float,
        *,
        name: str,
        bold: bool = False,
        colour: str = style.TEXT_COLOUR,
        ha: Literal["left", "center"] = "center",
        va: Literal["top", "center_baseline"] = "center_baseline",
    ) -> None:
        properties = style.font(size, bold=bold)
        drawn = self.axis.text(*position, text, fontproperties=properties, color=colour, ha=ha, va=va, zorder=4)
        drawn.set_gid(f"{self.prefix}-{name}")
