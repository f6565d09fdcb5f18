from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.errors import UserError
from dnas_ens.space.genotype import (
    CELL_TYPES,
    Cell,
    Genotype,
    load_genotype,
    random_deviation,
    random_genotype,
    ranked_genotypes,
    read_genotypes,
)

OPERATIONS = ("skip_connect", "sep_conv_3x3", "max_pool_3x3")
HAND_MADE: dict[str, Any] = {
    "normal": [[["sep_conv_3x3", 0], ["skip_connect", 1]], [["max_pool_3x3", 2], ["skip_connect", 0]]],
    "reduction": [[["skip_connect", 0]], [["skip_connect", 2], ["sep_conv_3x3", 1]]],
}


@st.composite
def cells(draw: st.DrawFn, num_nodes: int, operations: tuple[str, ...] = OPERATIONS) -> Cell:
    nodes = []
    for index in range(num_nodes):
        sources = draw(st.lists(st.integers(0, index + 1), min_size=1, max_size=3, unique=True))
        nodes.append(tuple((draw(st.sampled_from(operations)), source) for source in sources))
    return tuple(nodes)


@st.composite
def genotypes(
    draw: st.DrawFn,
    operations: tuple[str, ...] = OPERATIONS,
    max_nodes: int = 4,
    num_nodes: int | None = None,
) -> Genotype:
    if num_nodes is None:
        num_nodes = draw(st.integers(1, max_nodes))
    cell_types = draw(st.sampled_from([("normal",), ("reduction",), CELL_TYPES]))
    return Genotype(**{cell_type: draw(cells(num_nodes, operations)) for cell_type in cell_types})


@st.composite
def renumberings(draw: st.DrawFn, genotype: Genotype) -> Genotype:
    """Renumber a genotype's nodes at random, written without the code under test."""
    renumbered = {}
    for cell_type in genotype.cell_types:
        cell = genotype.cell(cell_type)
        new_index, nodes = {0: 0, 1: 1}, []
        while len(nodes) < len(cell):
            ready = [
                index
                for index, node in enumerate(cell)
                if index + 2 not in new_index and all(source in new_index for _, source in node)
            ]
            index = draw(st.sampled_from(ready))
            new_index[index + 2] = len(nodes) + 2
            edges = draw(st.permutations(cell[index]))
            nodes.append(tuple((operation, new_index[source]) for operation, source in edges))
        renumbered[cell_type] = tuple(nodes)
    return Genotype(**renumbered)


def isomorphic(first: Genotype, second: Genotype) -> bool:
    """Say what networkx says of each cell, its inputs and output told apart."""
    return first.cell_types == second.cell_types and all(
        networkx.is_isomorphic(
            first.to_graph(cell_type),
            second.to_graph(cell_type),
            node_match=lambda one, other: one["role"] == other["role"],
            edge_match=lambda one, other: one["operation"] == other["operation"],
        )
        for cell_type in first.cell_types
    )


def triples(genotype: Genotype, relabel: dict[str, tuple[int, ...]] | None = None) -> set[tuple[Any, ...]]:
    """List the (cell type, node, source, operation) of a genotype, its nodes permuted if asked."""
    found = set()
    for cell_type in genotype.cell_types:
        cell = genotype.cell(cell_type)
        order = relabel[cell_type] if relabel else tuple(range(len(cell)))
        name = {0: "a", 1: "b", **{index + 2: new for index, new in enumerate(order)}}
        found |= {
            (cell_type, name[index + 2], name[source], operation)
            for index, node in enumerate(cell)
            for operation, source in node
        }
    return found


def most_shared_by_brute_force(first: Genotype, second: Genotype) -> int:
    orders = list(itertools.permutations(range(first.num_nodes)))
    return max(
        len(triples(first, dict(zip(CELL_TYPES, choice, strict=True))) & triples(second))
        for choice in itertools.product(orders, repeat=2)
    )


# The value itself.


def test_hand_made_genotype_says_what_it_is():
    genotype = Genotype.from_dict(HAND_MADE)
    assert genotype.normal == (
        (("sep_conv_3x3", 0), ("skip_connect", 1)),
        (("max_pool_3x3", 2), ("skip_connect", 0)),
    )
    assert genotype.cell("reduction") == ((("skip_connect", 0),), (("skip_connect", 2), ("sep_conv_3x3", 1)))
    assert genotype.cell_types == ("normal", "reduction")
    assert (genotype.num_nodes, genotype.num_edges) == (2, 7)
    assert genotype.operations == set(OPERATIONS)
    assert genotype.skip_counts() == {"normal": 2, "reduction": 2}
    assert repr(genotype) == (
        "Genotype(normal and reduction, 2 nodes, 7 edges: skip_connect x4, sep_conv_3x3 x2, max_pool_3x3 x1)"
    )
    assert str(genotype).splitlines()[1:] == [
        "normal 2 = sep_conv_3x3(0) + skip_connect(1)",
        "normal 3 = max_pool_3x3(2) + skip_connect(0)",
        "reduction 2 = skip_connect(0)",
        "reduction 3 = skip_connect(2) + sep_conv_3x3(1)",
    ]
    drawing = genotype._repr_svg_()
    assert "</svg>" in drawing
    assert repr(genotype) in drawing


def test_one_cell_is_enough_and_others_are_refused():
    genotype = Genotype(reduction=((("sep_conv_3x3", np.int64(1)),),))  # type: ignore[arg-type]
    assert type(genotype.reduction[0][0][1]) is int
    assert genotype.cell_types == ("reduction",)
    assert genotype.cell("normal") == ()
    assert genotype.num_nodes == 1
    assert genotype.skip_counts() == {"reduction": 0}
    with pytest.raises(UserError, match="middle"):
        genotype.cell("middle")
    with pytest.raises(UserError, match="no normal cell"):
        genotype.to_graph("normal")


@given(genotypes())
def test_json_round_trip(genotype: Genotype):
    assert Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))) == genotype


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({}, "{}"),
        ([], "[]"),
        ({"normal": [], "reduction": []}, "neither"),
        ({"normal": 3}, "3"),
        ({"norm": []}, "'norm'"),
        ({"normal": "ab"}, "'ab'"),
        ({"normal": [[]]}, "[]"),
        ({"normal": ["ab"]}, "'ab'"),
        ({"normal": [["ab"]]}, "'ab'"),
        ({"normal": [[["skip_connect"]]]}, "['skip_connect']"),
        ({"normal": [[["skip_connect", 0, 1]]]}, "['skip_connect', 0, 1]"),
        ({"normal": [[[7, 0]]]}, "7"),
        ({"normal": [[["", 0]]]}, "''"),
        ({"normal": [[["skip_connect", -1]]]}, "-1"),
        ({"normal": [[["skip_connect", 0.0]]]}, "0.0"),
        ({"normal": [[["skip_connect", "0"]]]}, "'0'"),
        ({"normal": [[["skip_connect", True]]]}, "True"),
        ({"normal": [[["skip_connect", 2]]]}, "source 2"),  # its own index: a cycle
        ({"normal": [[["skip_connect", 3]], [["skip_connect", 0]]]}, "source 3"),  # a later node: a cycle
        ({"normal": [[["skip_connect", 0]], [["skip_connect", 9]]]}, "source 9"),  # no node at all
        ({"normal": [[["skip_connect", 0], ["sep_conv_3x3", 0]]]}, "twice"),
        ({"normal": [[["skip_connect", 0]]], "reduction": [[["skip_connect", 0]]] * 2}, "1 nodes"),
    ],
)
def test_malformed_genotypes_are_named(value: Any, named: str):
    with pytest.raises(UserError) as caught:
        Genotype.from_dict(value)
    assert named in caught.value.cause
    assert "\n" not in caught.value.cause + caught.value.remedy


def test_module_needs_neither_torch_nor_networkx():
    code = "import sys, dnas_ens.space.genotype; print({'torch', 'networkx', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The graph and the canonical form.


def test_graph_of_the_hand_made_cell():
    graph = Genotype.from_dict(HAND_MADE).to_graph("normal")
    assert dict(graph.nodes(data="role")) == {
        0: "input0",
        1: "input1",
        2: "intermediate",
        3: "intermediate",
        4: "output",
    }
    assert set(graph.edges(data="operation")) == {
        (0, 2, "sep_conv_3x3"),
        (1, 2, "skip_connect"),
        (2, 3, "max_pool_3x3"),
        (0, 3, "skip_connect"),
        (2, 4, None),
        (3, 4, None),
    }


@given(st.data())
def test_canonical_form_is_idempotent_and_blind_to_numbering(data: st.DataObject):
    genotype = data.draw(genotypes())
    renumbered = data.draw(renumberings(genotype))
    canonical = genotype.canonical()
    assert canonical.canonical() == canonical
    assert renumbered.canonical() == canonical
    assert renumbered.canonical_hash() == genotype.canonical_hash()
    assert re.fullmatch("[0-9a-f]{16}", genotype.canonical_hash())
    assert isomorphic(canonical, genotype)


@settings(max_examples=150)
@given(st.data())
def test_canonical_forms_agree_exactly_when_networkx_finds_an_isomorphism(data: st.DataObject):
    # Two operations and three nodes, so that a good part of unrelated pairs is isomorphic.
    few = OPERATIONS[:2]
    genotype = data.draw(genotypes(few, num_nodes=3))
    other = data.draw(st.one_of(genotypes(few, num_nodes=3), renumberings(genotype)))
    witness = isomorphic(genotype, other)
    assert (genotype.canonical() == other.canonical()) == witness
    assert (genotype.canonical_hash() == other.canonical_hash()) == witness


def test_the_two_inputs_are_not_interchangeable():
    first = Genotype(normal=((("a", 0), ("b", 1)),))
    second = Genotype(normal=((("b", 0), ("a", 1)),))
    assert first.canonical() != second.canonical()


# Shared edges.


@given(st.data())
def test_shared_edges_is_symmetric_bounded_and_blind_to_numbering(data: st.DataObject):
    first, second = data.draw(genotypes()), data.draw(genotypes())
    shared = first.shared_edges(second)
    assert shared == second.shared_edges(first)
    assert 0 <= shared <= min(first.num_edges, second.num_edges)
    renumbered_first, renumbered_second = data.draw(renumberings(first)), data.draw(renumberings(second))
    assert renumbered_first.shared_edges(renumbered_second) == shared
    assert first.shared_edges(renumbered_first) == first.num_edges


@given(st.data())
def test_shared_edges_is_the_brute_force_maximum(data: st.DataObject):
    num_nodes = data.draw(st.integers(1, 3))
    first, second = data.draw(genotypes(num_nodes=num_nodes)), data.draw(genotypes(num_nodes=num_nodes))
    assert first.shared_edges(second) == most_shared_by_brute_force(first, second)
    assert first.shared_edges(second) >= len(triples(first) & triples(second))


def test_shared_edges_of_pairs_worked_out_by_hand():
    base = Genotype.from_dict(HAND_MADE)
    changed = Genotype(normal=base.normal, reduction=((("skip_connect", 1),), base.reduction[1]))
    assert base.shared_edges(changed) == base.num_edges - 1
    assert base.shared_edges(Genotype(normal=base.normal)) == 4
    assert Genotype(normal=base.normal).shared_edges(Genotype(reduction=base.normal)) == 0
    deep = Genotype(normal=((("a", 0),), (("b", 1),), (("c", 2), ("d", 3))))
    shallow = Genotype(normal=((("b", 1),),))
    assert deep.shared_edges(shallow) == shallow.shared_edges(deep) == 1


# Random genotypes.


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4))
def test_random_genotypes_have_the_asked_shape(seed: int, num_nodes: int, edges_per_node: int):
    genotype = random_genotype(
        np.random.default_rng(seed),
        operations=("none", *OPERATIONS),
        num_nodes=num_nodes,
        edges_per_node=edges_per_node,
    )
    assert genotype.cell_types == CELL_TYPES
    assert genotype.num_nodes == num_nodes
    assert genotype.operations <= set(OPERATIONS)
    for cell_type in CELL_TYPES:
        sizes = [len(node) for node in genotype.cell(cell_type)]
        assert sizes == [min(edges_per_node, index + 2) for index in range(num_nodes)]


def test_random_genotypes_follow_their_seed_and_reach_the_whole_space():
    def draw(generator: np.random.Generator) -> Genotype:
        return random_genotype(
            generator, operations=("a", "b"), num_nodes=2, edges_per_node=1, cell_types=("reduction",)
        )

    assert draw(np.random.default_rng(5)) == draw(np.random.default_rng(5))
    generator = np.random.default_rng(0)
    counts = Counter(draw(generator) for _ in range(2400))
    # 2 operations x 2 sources, times 2 x 3: 24 equally likely genotypes, 100 draws of each expected.
    assert len(counts) == 24
    assert 60 < min(counts.values()) < max(counts.values()) < 140


@given(st.data())
def test_random_deviation_replaces_exactly_the_asked_number_of_edges(data: st.DataObject):
    genotype = data.draw(genotypes())
    num_edges = data.draw(st.integers(0, genotype.num_edges))
    seed = data.draw(st.integers(0, 2**32 - 1))
    operations = data.draw(st.sampled_from([OPERATIONS, OPERATIONS[:2], ("none", "new", "newer")]))
    deviated = random_deviation(
        genotype, num_edges=num_edges, operations=operations, generator=np.random.default_rng(seed)
    )
    assert len(triples(genotype) - triples(deviated)) == num_edges
    assert len(triples(deviated) - triples(genotype)) == num_edges
    assert deviated.cell_types == genotype.cell_types
    for cell_type in genotype.cell_types:
        assert [len(node) for node in deviated.cell(cell_type)] == [len(node) for node in genotype.cell(cell_type)]
    assert deviated.shared_edges(genotype) >= genotype.num_edges - num_edges
    assert "none" not in deviated.operations


def test_replaced_edges_of_one_node_do_not_restore_each_other():
    base = Genotype(normal=((("a", 0), ("b", 1)),))
    found = {
        random_deviation(base, num_edges=2, operations=("a", "b"), generator=np.random.default_rng(seed)).normal
        for seed in range(60)
    }
    # Neither (a, 0) nor (b, 1) may return in the other's place: b from 0 and a from 1 is all that is left.
    assert found == {((("b", 0), ("a", 1)),), ((("a", 1), ("b", 0)),)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_edges": 8}, "8 edges"),
        ({"num_edges": -1}, "-1 edges"),
        ({"operations": ("none", "skip_connect", "skip_connect"), "num_edges": 1}, "skip_connect"),
        ({"operations": ()}, "0 operations"),
        ({"operations": ("none",)}, "0 operations"),
        ({"num_nodes": 0}, "num_nodes = 0"),
        ({"edges_per_node": 0}, "edges_per_node = 0"),
        ({"cell_types": ()}, "{}"),
        ({"cell_types": ("middle",)}, "'middle'"),
    ],
)
def test_impossible_random_genotypes_and_deviations_are_refused(change: dict[str, Any], named: str):
    given_arguments = {"operations": OPERATIONS, "generator": np.random.default_rng(0), **change}
    base = Genotype.from_dict(HAND_MADE)
    draw = partial(random_deviation, base) if "num_edges" in change else random_genotype
    with pytest.raises(UserError) as caught:
        draw(**given_arguments)
    assert named in caught.value.cause


# Files.


def test_genotypes_are_loaded_alone_from_a_run_file_and_from_a_run_folder(tmp_path: Path):
    base = Genotype.from_dict(HAND_MADE)
    alone = tmp_path / "cell.json"
    alone.write_text(json.dumps(HAND_MADE))
    run = tmp_path / "genotypes.json"
    other = Genotype(normal=base.normal).to_dict()
    run.write_text(json.dumps({"base": {"genotype": HAND_MADE, "lambda": 0}, "candidates": [{"genotype": other}]}))
    assert load_genotype(alone) == load_genotype(str(run)) == load_genotype(tmp_path) == base


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "3",
        "null",
        "[" * 100_000,
        "\ud800",
        '{"base": 3}',
        '{"base": {}}',
        '{"base": {"genotype": []}}',
        '{"base": {"genotype": {"normal": [[["skip_connect", NaN]]]}}}',
        '{"candidates": []}',
    ],
)
def test_unreadable_files_are_named(content: str, tmp_path: Path):
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"bad\.json") as caught:
        load_genotype(path)
    assert "\n" not in caught.value.cause


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent\.json"):
        load_genotype(tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"genotypes\.json"):
        load_genotype(tmp_path)


def test_the_genotypes_of_a_search_in_the_order_of_their_ranking(tmp_path: Path):
    cells = [Genotype(normal=((("a", 0),),) * count).to_dict() for count in (1, 2, 3)]
    candidates = [{"genotype": cell} for cell in cells]
    found = {"selected": [2], "ranking": [2, 0], "candidates": candidates, "base": candidates[0]}
    found |= {"temperature": 1, "report": {}, "curve": None}
    file = tmp_path / "genotypes.json"
    file.write_text(json.dumps(found))
    read = read_genotypes(file)
    assert [genotype.num_nodes for genotype in ranked_genotypes(read)] == [3]
    assert [genotype.num_nodes for genotype in ranked_genotypes(read, 2)] == [3, 1]
    for members in (0, 3):
        with pytest.raises(UserError, match=f"{members} members were asked for, but the search holds 2"):
            ranked_genotypes(read, members)
    with pytest.raises(UserError, match="no ranking"):
        ranked_genotypes({"selected": [0], "candidates": candidates}, 2)
    with pytest.raises(UserError, match="candidate 7 of 3"):
        ranked_genotypes({"selected": [7], "candidates": candidates})
    for wrong in ({"selected": []}, {"selected": [9]}, {"ranking": [0, 9]}, {"candidates": 5}, {"base": 5}):
        file.write_text(json.dumps({**found, **wrong}))
        with pytest.raises(UserError, match=r"genotypes\.json"):
            read_genotypes(file)


def smallest_by_trying_all(cell):
    """The smallest renumbering of a cell, over all orders of its nodes."""
    found = []
    for order in itertools.permutations(range(2, 2 + len(cell))):
        new = {0: 0, 1: 1} | {old: position for position, old in enumerate(order, start=2)}
        if all(new[source] < new[old] for old in order for _, source in cell[old - 2]):
            nodes = ([(operation, new[source]) for operation, source in cell[old - 2]] for old in order)
            found.append(tuple(tuple(sorted(node, key=lambda edge: edge[1])) for node in nodes))
    return min(found)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_nodes=st.integers(1, 6),
    edges=st.integers(1, 3),
    names=st.integers(1, 3),
)
def test_the_canonical_form_is_the_smallest_of_all(seed, num_nodes, edges, names):
    # With few operations many nodes are alike.
    genotype = random_genotype(
        np.random.default_rng(seed), operations=OPERATIONS[:names], num_nodes=num_nodes, edges_per_node=edges
    )
    for cell_type in genotype.cell_types:
        cell = genotype.cell(cell_type)
        assert genotype.canonical().cell(cell_type) == smallest_by_trying_all(cell)


@pytest.mark.parametrize(
    "pattern",
    [
        [[["a", 0], ["b", 1]]],
        [[["a", 0], ["a", 1]], [["a", 0], ["b", -1]]],
        [[["a", 0], ["a", 1]], [["a", 0], ["b", -1]], [["a", -2], ["a", -1]]],
    ],
)
def test_regular_cells_have_a_canonical_form_at_once(pattern):
    """The pattern over and over, with negative sources counted back from the node: alike nodes, chains, diamonds."""
    cell = [
        [[operation, source if source >= 0 else 2 + index + source] for operation, source in node]
        for repeat in range(12 // len(pattern))
        for index, node in enumerate(pattern, start=repeat * len(pattern))
    ]
    genotype = Genotype.from_dict({"normal": cell})
    assert genotype.canonical().canonical() == genotype.canonical()
    # The same cell with its patterns interleaved.
    size, repeats = len(pattern), 12 // len(pattern)
    order = [repeat * size + index for index in range(size) for repeat in range(repeats)]
    new = {0: 0, 1: 1} | {2 + old: 2 + position for position, old in enumerate(order)}
    other = [[[operation, new[source]] for operation, source in cell[old]] for old in order]
    assert Genotype.from_dict({"normal": other}).canonical() == genotype.canonical()
