"""Genotypes: the discrete cells a search ends in, when two are equal, their files, and random ones; no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from dnas_ens.errors import UserError
from dnas_ens.run.files import read_checked, unreadable, verified
from dnas_ens.space.cells import (
    CELL_PATTERN,
    CELL_TYPES,
    Cell,
    Edge,
    Node,
    canonical_cell,
    cell_graph,
    check_cell_type,
    checked_cell,
    most_shared_edges,
    shown,
)
from dnas_ens.space.flat_genotype import flat_fields, is_flat, nested_cells, printed_fields
from dnas_ens.space.spaces import Space, rules_of

if TYPE_CHECKING:
    import networkx
    import numpy as np

__all__ = [
    "CELL_TYPES",
    "Cell",
    "Edge",
    "Genotype",
    "Node",
    "load_genotype",
    "random_deviation",
    "random_genotype",
    "ranked_genotypes",
    "read_genotypes",
]


@dataclass(frozen=True, kw_only=True, repr=False)
class Genotype:
    """The cells of one network; equality is literal, `canonical` compares up to renumbering.

    Args:
        normal: N nodes of (operation, source) edges, the cell that keeps the resolution, or empty.
        reduction: The same for the cell that halves it; a network of one cell has only this one.
        space: The name of the space that they are of, in `dnas_ens.space.spaces.SPACES`.

    Raises:
        UserError: There is no such space, both cells are empty or differ in N, or an edge is malformed, comes from a
            source that does not precede its node, or repeats a source of its node.
    """

    normal: Cell = ()
    reduction: Cell = ()
    space: str = "darts"

    def __post_init__(self) -> None:
        rules = rules_of(self.space)
        for cell_type in CELL_TYPES:
            object.__setattr__(self, cell_type, checked_cell(getattr(self, cell_type), cell_type, rules))
        if not self.cell_types:
            raise UserError("The genotype has neither a normal nor a reduction cell.", CELL_PATTERN)
        if self.normal and self.reduction and len(self.normal) != len(self.reduction):
            raise UserError(
                f"The normal cell has {len(self.normal)} nodes and the reduction cell {len(self.reduction)}.",
                "Give both cells the same number of nodes, or leave one of them empty.",
            )

    def __repr__(self) -> str:
        """One line: its size, and how often it uses which operation."""
        names = [name for cell_type in self.cell_types for name, _ in self.edges(cell_type)]
        used = ", ".join(f"{name} x{count}" for name, count in Counter(names).most_common())
        cells = " and ".join(self.cell_types)
        return f"Genotype({self.space}, {cells}, {self.num_nodes} nodes, {self.num_edges} edges: {used})"

    def __str__(self) -> str:
        """A line a node: the edges that it sums."""
        lines = [
            f"{cell_type} {index} = {' + '.join(f'{name}({source})' for name, source in node)}"
            for cell_type in self.cell_types
            for index, node in enumerate(self.cell(cell_type), self.rules.num_inputs)
        ]
        return "\n".join([repr(self), *lines])

    def _repr_svg_(self) -> str:
        """A drawing of the cells, for notebooks."""
        from dnas_ens.figures.cells import draw_genotype
        from dnas_ens.figures.style import to_svg

        return to_svg(draw_genotype(self), title=repr(self))

    @property
    def rules(self) -> Space:
        """The rules of its space."""
        return rules_of(self.space)

    @property
    def cell_types(self) -> tuple[str, ...]:
        """The cell types that are not empty, in the order of `CELL_TYPES`."""
        return tuple(cell_type for cell_type in CELL_TYPES if self.cell(cell_type))

    @property
    def num_nodes(self) -> int:
        """N, the number of intermediate nodes of each cell."""
        return len(self.cell(self.cell_types[0]))

    @property
    def num_edges(self) -> int:
        """The number of edges in all cells."""
        return sum(len(self.edges(cell_type)) for cell_type in self.cell_types)

    @property
    def operations(self) -> frozenset[str]:
        """The names of the operations in use."""
        return frozenset(operation for operation, _ in self.edges("normal") + self.edges("reduction"))

    def cell(self, cell_type: str) -> Cell:
        """Return the cell of a type, empty if the genotype has none; UserError for an unknown type."""
        check_cell_type(cell_type)
        cell: Cell = getattr(self, cell_type)
        return cell

    def edges(self, cell_type: str) -> list[Edge]:
        """Return the edges of a cell, node after node."""
        return [edge for node in self.cell(cell_type) for edge in node]

    def require_space(self, space: str) -> None:
        """Raise UserError unless it is of the space that is searched."""
        if self.space != space:
            raise UserError(
                f"The genotype is of the space {self.space}; the search is in {space}.",
                f"Search with --space {self.space}.",
            )

    def skip_counts(self) -> dict[str, int]:
        """Count the skip_connect edges of each cell; many are the sign of a collapsing search."""
        return {
            cell_type: sum(name == "skip_connect" for name, _ in self.edges(cell_type)) for cell_type in self.cell_types
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, {"normal": [[["sep_conv_3x3", 0], ...], ...], "reduction": [...]}.

        Other spaces than ``darts`` are named by a key ``space``.
        """
        cells = {
            cell_type: [[list(edge) for edge in node] for node in self.cell(cell_type)] for cell_type in CELL_TYPES
        }
        return cells if self.space == "darts" else {"space": self.space, **cells}

    def to_flat_dict(self) -> dict[str, list[Any]]:
        """Return the flat form of DARTS repositories as JSON holds it; see `dnas_ens.space.flat_genotype`.

        {"normal": [["sep_conv_3x3", 0], ...], "normal_concat": [2, ...], "reduce": [...], "reduce_concat": [...]}.

        Raises:
            UserError: It is of another space, or a node has another number of edges than two.
        """
        fields = self._flat_fields()
        return {
            field: [list(value) if isinstance(value, tuple) else value for value in values]
            for field, values in fields.items()
        }

    def to_flat_text(self) -> str:
        """Return the flat form as DARTS repositories print it; UserError as in `to_flat_dict`."""
        fields = self._flat_fields()
        return f"Genotype({', '.join(f'{field}={values!r}' for field, values in fields.items())})"

    def _flat_fields(self) -> dict[str, Any]:
        if self.space != "darts":
            raise UserError(
                f"A genotype of the space {self.space} has no flat form, which is for cells of DARTS.",
                "Write it in the nested form: to_dict.",
            )
        return flat_fields({cell_type: self.cell(cell_type) for cell_type in CELL_TYPES})

    @classmethod
    def from_dict(cls, value: Any) -> Genotype:
        """Read the JSON form, in which a missing cell is an empty one, or the flat form of DARTS repositories.

        Args:
            value: What `to_dict` or `to_flat_dict` returns, the namedtuple of a DARTS repository, or its printed text.

        Raises:
            UserError: It is malformed, or has a cell that does not concatenate all its nodes.
        """
        if isinstance(value, str):
            value = printed_fields(value)
        elif isinstance(value, tuple) and hasattr(value, "_asdict"):
            value = value._asdict()
        if not isinstance(value, dict) or not value:
            raise UserError(
                f"A genotype is an object of cells, not {shown(value)}.", "Use the keys normal and reduction."
            )
        if is_flat(value):
            value = nested_cells(value)
        for key in value:
            if key != "space":
                check_cell_type(key)
        return cls(**value)

    def to_graph(self, cell_type: str) -> networkx.DiGraph:
        """Return a cell as a graph whose nodes are the source indices.

        The inputs come first, then the N intermediate nodes, then the output. They are told apart by the attribute
        `role`: before_last and last, the cells whose outputs the inputs are, intermediate, output. Edges carry
        `operation`, None on those into the output.

        Raises:
            UserError: The genotype has no cell of this type.
        """
        if not self.cell(cell_type):
            raise UserError(f"The genotype has no {cell_type} cell.", f"Use its {self.cell_types[0]} cell.")
        return cell_graph(self.cell(cell_type), self.rules)

    def canonical(self) -> Genotype:
        """Return the one genotype that stands for all isomorphic ones.

        The output concatenates all nodes or sums the loose ends, so renumbering the nodes changes at most the order
        of its channels. Of all topological orders this takes the one whose cell, edges sorted by source, is
        lexicographically smallest. Exact: equal canonical forms are isomorphic cells, and the other way round.
        """
        cells = {kind: canonical_cell(self.cell(kind), self.rules.num_inputs) for kind in self.cell_types}
        return Genotype(**cells, space=self.space)

    def canonical_hash(self) -> str:
        """Return a name for the isomorphism class: 16 hexadecimal digits, SHA-256 of the canonical JSON."""
        text = json.dumps(self.canonical().to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def shared_edges(self, other: Genotype) -> int:
        """Count the (node, source, operation) triples two genotypes share when their nodes are matched best.

        The maximum runs over every one-to-one matching of the intermediate nodes. Topological renumberings of
        one side alone would make the count depend on how the other happens to be numbered.

        Returns:
            The sum over the cell types both have, in 0 .. min(num_edges): symmetric, invariant under
            isomorphism of either side, and num_edges exactly for isomorphic genotypes. 0 across spaces.
        """
        if self.space != other.space:
            return 0
        both = [cell_type for cell_type in self.cell_types if other.cell(cell_type)]
        num_inputs = self.rules.num_inputs
        return sum(most_shared_edges(self.cell(kind), other.cell(kind), num_inputs) for kind in both)


def load_genotype(path: str | Path) -> Genotype:
    """Read a genotype from JSON, or from the text that DARTS repositories print.

    Args:
        path: A file holding one genotype, in any form of `Genotype.from_dict`, or a run's genotypes.json (its base is
            taken), or the run folder.

    Raises:
        UserError: The file is missing, is neither, or holds no valid genotype.
    """
    file, value = _read_any(Path(path))
    if isinstance(value, dict) and "base" in value:
        value = value["base"].get("genotype") if isinstance(value["base"], dict) else value["base"]
    return _genotype_in(file, value)


def load_genotypes(path: str | Path) -> list[Genotype]:
    """Read the genotypes of an ensemble from JSON.

    Args:
        path: A file holding a list of genotypes, each in any form of `Genotype.from_dict`, an ensemble.json, or what
            `load_genotype` takes; of a search the members are taken.

    Raises:
        UserError: As for `load_genotype`, or there is no genotype.
    """
    file, value = _read_any(Path(path))
    if isinstance(value, dict) and "base" in value:
        if (file.parent / "budget.json").exists():
            raise UserError(
                f"{file} holds cells that a budget may have trained, not its networks.",
                f"Give {file.parent / 'ensemble.json'}.",
            )
        return ranked_genotypes(read_genotypes(file))
    if isinstance(value, dict) and "members" in value:
        form = {"members": [{"spec": {"genotype": dict}}]}
        value = [member["spec"]["genotype"] for member in read_checked(file, form)["members"]]
    found = value if isinstance(value, list) else [value]
    if not found:
        raise UserError(f"{file} holds no genotype.", "Give it one or more, as a JSON list.")
    return [_genotype_in(file, each) for each in found]


def _genotype_in(file: Path, value: object) -> Genotype:
    try:
        return Genotype.from_dict(value)
    except UserError as error:
        raise UserError(f"In {file}: {error.cause}", error.remedy) from error


def _read_any(path: Path) -> tuple[Path, Any]:
    """Return the file that a path means and what it holds; see `load_genotype`."""
    file = path / "genotypes.json" if path.is_dir() else path
    remedy = "Give the genotypes.json of a finished search, or a JSON file of genotypes."
    try:
        text = file.read_text(encoding="utf-8")
        # JSON has no such call.
        value = text if text.lstrip()[:1] not in ("{", "[", '"') and "Genotype(" in text else json.loads(text)
    except OSError as error:
        raise UserError(f"Cannot read the genotype {file}: {error.strerror or error}.", remedy) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The genotype {file} is not JSON: {error}.", remedy) from error
    return file, verified(value, file)


def read_genotypes(path: Path) -> dict[str, Any]:
    """Read the genotypes.json of a search; UserError if it is missing or malformed."""
    form = {
        "base": {"genotype": dict},
        "selected": [int],
        "candidates": [{"genotype": dict}],
        "temperature": (int, float),
        "ranking?": ([int], NoneType),
        "report": dict,
        "curve": (dict, NoneType),
    }
    found: dict[str, Any] = read_checked(path, form)
    named = [*found["selected"], *(found.get("ranking") or [])]
    if not found["selected"] or not all(0 <= index < len(found["candidates"]) for index in named):
        raise unreadable(path, f"it names candidates other than its {len(found['candidates'])}")
    return found


def ranked_genotypes(found: Mapping[str, Any], members: int | None = None) -> list[Genotype]:
    """Return the genotypes of an ensemble from the content of genotypes.json.

    Args:
        found: Candidates, their ranking, and the selected ones, which the ranking begins with.
        members: How many are taken in the order of the ranking; None for as many as the search selected.

    Raises:
        UserError: Fewer were found, or they were not ranked.
    """
    chosen = found["selected"]
    if members not in (None, len(chosen)):
        ranking = found.get("ranking")
        if ranking is None:
            raise UserError(
                "The search of an earlier version left no ranking of its candidates.",
                "Run the same search once more with --resume, which ranks them without searching again.",
            )
        if not 1 <= members <= len(ranking):
            raise UserError(
                f"{members} members were asked for, but the search holds {len(ranking)} candidates.",
                f"Ask for 1 to {len(ranking)}, or search with a larger --pool-size.",
            )
        chosen = ranking[:members]
    candidates = found["candidates"]
    if outside := [index for index in chosen if not 0 <= index < len(candidates)]:
        raise UserError(
            f"The search's result names candidate {outside[0]} of {len(candidates)}.",
            "Restore genotypes.json from a copy, or search again.",
        )
    return [Genotype.from_dict(candidates[index]["genotype"]) for index in chosen]


def random_genotype(
    generator: np.random.Generator,
    *,
    operations: Sequence[str],
    num_nodes: int = 4,
    edges_per_node: int = 2,
    cell_types: Sequence[str] = CELL_TYPES,
    space: str = "darts",
) -> Genotype:
    """Draw a genotype: every node takes distinct sources and an operation for each, all uniformly.

    Where nodes may keep fewer edges than they are allowed, the number is drawn too, uniformly; where they read the node
    before them, that is one of their sources.

    Args:
        operations: Names to draw from; "none" is never drawn.
        num_nodes: N, at least 1.
        edges_per_node: At least 1; a node with fewer sources than this takes them all.
        cell_types: The cells to draw, from `CELL_TYPES`.

    Raises:
        UserError: Nothing to draw from, or a count below 1.
    """
    names = _drawable(operations, at_least=1)
    for field, count in (("num_nodes", num_nodes), ("edges_per_node", edges_per_node)):
        if count < 1:
            raise UserError(f"A random cell cannot have {field} = {count}.", f"Set {field} to 1 or more.")

    rules = rules_of(space)

    def draw_node(num_sources: int) -> Node:
        counts = rules.edge_counts(edges_per_node, num_sources)
        count = counts[int(generator.integers(len(counts)))] if rules.keeps_fewer_edges else counts[0]
        always = [num_sources - 1] if rules.reads_previous else []
        others = generator.choice(num_sources - len(always), size=count - len(always), replace=False)
        sources = [*others, *always]
        return tuple((names[int(generator.integers(len(names)))], int(source)) for source in sorted(sources))

    for cell_type in cell_types:
        check_cell_type(cell_type)
    cells = {
        cell_type: tuple(draw_node(rules.num_inputs + index) for index in range(num_nodes)) for cell_type in cell_types
    }
    return Genotype(**cells, space=space)


def random_deviation(
    genotype: Genotype, *, num_edges: int, operations: Sequence[str], generator: np.random.Generator
) -> Genotype:
    """Replace a number of edges by random others: the "random deviation" regime of EdgeNES.

    A replacement has another operation, another source or both, and is none of its node's original edges,
    so exactly `num_edges` (node, source, operation) triples of the genotype are gone from the result as
    numbered. (`shared_edges`, which may renumber, can find that more of them survive.) With two operations there is
    always a replacement: whichever source is free, at least one of them makes a new edge on it.

    Args:
        num_edges: How many edges over all cells to replace, in 0 .. genotype.num_edges.
        operations: At least two names to draw from; "none" is never drawn.

    Raises:
        UserError: `num_edges` is out of range, or fewer than two operations are given.
    """
    names = _drawable(operations, at_least=2)
    if not 0 <= num_edges <= genotype.num_edges:
        raise UserError(
            f"Cannot replace {num_edges} edges of a genotype that has {genotype.num_edges}.",
            f"Choose a number of edges from 0 to {genotype.num_edges}.",
        )
    replaced = iter(generator.permutation([True] * num_edges + [False] * (genotype.num_edges - num_edges)))

    def deviated(node: Node, num_sources: int) -> Node:
        marks = [next(replaced) for _ in node]
        fixed = {num_sources - 1} if genotype.rules.reads_previous else set()
        taken = fixed | {source for (_, source), mark in zip(node, marks, strict=True) if not mark}
        edges = list(node)
        for position in (position for position, mark in enumerate(marks) if mark):
            free = [source for source in range(num_sources) if source not in taken]
            if node[position][1] in fixed:
                free = [node[position][1]]
            new = [(name, source) for source in free for name in names if (name, source) not in node]
            edges[position] = new[int(generator.integers(len(new)))]
            taken.add(edges[position][1])
        return tuple(edges)

    first = genotype.rules.num_inputs
    cells = {
        cell_type: tuple(deviated(node, n) for n, node in enumerate(genotype.cell(cell_type), first))
        for cell_type in genotype.cell_types
    }
    return Genotype(**cells, space=genotype.space)


def _drawable(operations: Sequence[str], *, at_least: int) -> list[str]:
    """Return the different operations other than "none"; UserError if there are too few to draw from."""
    names = [name for name in dict.fromkeys(operations) if name != "none"]
    if len(names) < at_least:
        raise UserError(
            f"There are {len(names)} operations to draw from: {shown(names)}.",
            f'Give at least {at_least} different operations other than "none".',
        )
    return names
