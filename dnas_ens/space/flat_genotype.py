"""The flat form in which DARTS and its descendants print and store cells.

``Genotype(normal=[("sep_conv_3x3", 0), ...], normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6))``:
two edges a node, one after another, and which nodes a cell concatenates (arXiv 1806.09055). Sources are numbered as
here: 0 and 1 are the inputs, 2 is node 0. No torch.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from operator import index as to_index
from typing import Any

from dnas_ens.errors import UserError
from dnas_ens.space.cells import CELL_PATTERN, Cell, shown
from dnas_ens.space.spaces import SPACES

EDGES_PER_NODE = 2
NUM_INPUTS = SPACES["darts"].num_inputs
#: The fields in the order of DARTS' namedtuple, each with the cell type that it is of here.
FIELDS = {
    "normal": "normal",
    "normal_concat": "normal",
    "reduce": "reduction",
    "reduce_concat": "reduction",
}
_PATTERN = f"Give {', '.join(FIELDS)} as a DARTS repository prints them."


def is_flat(value: Mapping[str, Any]) -> bool:
    """Tell whether a genotype is in the flat form: by the fields that the nested one lacks."""
    return any(field in value for field in FIELDS if field != "normal")


def nested_cells(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of a flat genotype by their type, as lists of nodes, whose edges are not checked.

    Args:
        value: The four fields. A concat list may be in any order, which permutes channels alone; edges may be
            grouped by nodes, as some repositories do.

    Raises:
        UserError: A field is missing or too many, edges do not make nodes of two, or a cell does not concatenate all
            its nodes.
    """
    for field in value:
        if field not in FIELDS:
            raise UserError(f"A flat genotype has no field {shown(field)}.", _PATTERN)
    for field in FIELDS:
        if field not in value:
            raise UserError(
                f"The flat genotype lacks {field}.",
                f"{_PATTERN[:-1]}; in the nested form the cells are normal and reduction.",
            )
    cells: dict[str, Any] = {}
    for field, cell_type in FIELDS.items():
        if field.endswith("_concat"):
            _check_concat(field, value[field], num_nodes=len(cells[cell_type]))
            continue
        edges = value[field]
        if not isinstance(edges, list | tuple):
            raise UserError(f"The flat genotype's {field} is {shown(edges)}, not a list of edges.", _PATTERN)
        if edges and all(isinstance(node, list | tuple) and not _is_edge(node) for node in edges):
            cells[cell_type] = edges
            continue
        if len(edges) % EDGES_PER_NODE:
            raise UserError(
                f"The flat genotype's {field} has {len(edges)} edges, which do not make nodes of two.",
                f"Give an even number of edges, or the nested form: {CELL_PATTERN}",
            )
        cells[cell_type] = [edges[start : start + EDGES_PER_NODE] for start in range(0, len(edges), EDGES_PER_NODE)]
    return cells


def _is_edge(part: list[Any] | tuple[Any, ...]) -> bool:
    return bool(part) and isinstance(part[0], str)


def _check_concat(field: str, concat: Any, *, num_nodes: int) -> None:
    """Refuse a concat list that does not name all nodes of the cell; every cell here concatenates all of them."""
    every = list(range(NUM_INPUTS, NUM_INPUTS + num_nodes))
    try:
        # A range may be of any length.
        fits = len(concat) == num_nodes and sorted(to_index(source) for source in concat) == every
    except TypeError:
        fits = False
    if not fits:
        raise UserError(
            f"The flat genotype's {field} is {shown(concat)}, but a cell of {num_nodes} nodes concatenates {every}.",
            "Only cells whose concat holds all their nodes and no input can be built.",
        )


def flat_fields(cells: Mapping[str, Cell]) -> dict[str, Any]:
    """Return the four fields of cells by their type, edges as (operation, source) tuples and concats as ranges.

    Raises:
        UserError: A node has another number of edges than two.
    """
    fields: dict[str, Any] = {}
    for field, cell_type in FIELDS.items():
        cell = cells[cell_type]
        odd = [index for index, node in enumerate(cell) if len(node) != EDGES_PER_NODE]
        if odd:
            raise UserError(
                f"Node {odd[0]} of the {cell_type} cell has {len(cell[odd[0]])} edges, and the flat form two a node.",
                "Write this genotype in the nested form: to_dict.",
            )
        edges = [edge for node in cell for edge in node]
        fields[field] = range(NUM_INPUTS, NUM_INPUTS + len(cell)) if field.endswith("_concat") else edges
    return fields


def printed_fields(text: str) -> dict[str, Any]:
    """Return the fields of the one ``Genotype(...)`` in Python text, such as a line of a DARTS repository.

    Nothing in it is run: literals, ``range`` and ``list`` are all that is understood.

    Raises:
        UserError: The text is no Python, holds no genotype or several, or has something else in one.
    """
    try:
        tree = ast.parse(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"The genotype {shown(text)} can not be read ({_line(error)}).", _PATTERN) from error
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node) == "Genotype"]
    if len(calls) != 1:
        raise UserError(f"The text holds {len(calls)} genotypes.", "Give the text of one: Genotype(normal=[...], ...).")
    try:
        fields = {
            **{field: _literal(node) for field, node in zip(FIELDS, calls[0].args, strict=False)},
            **{str(keyword.arg): _literal(keyword.value) for keyword in calls[0].keywords},
        }
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"A field of the genotype can not be read ({_line(error)}).", _PATTERN) from error
    return fields


def _name(call: ast.Call) -> str:
    """Return what is called, without a module in front of it."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal, a range of literals, or a list of either."""
    if isinstance(node, ast.Call) and _name(node) in ("range", "list", "tuple"):
        values = [_literal(argument) for argument in node.args]
        if _name(node) == "range":
            return range(*values)
        # What is in it matters, not whether it is a list.
        return values[0] if len(values) == 1 else []
    return ast.literal_eval(node)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:100]
