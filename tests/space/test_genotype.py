import itertools
import json
import re
from collections import Counter
from functools import partial

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.errors import UserError
from dnas_ens.space.genotype import (
    CELL_TYPES,
    Genotype,
    load_genotype,
    random_deviation,
    random_genotype,
    ranked_genotypes,
    read_genotypes,
)
from dnas_ens.space.search_space import SearchSpace, stack_cell_types
from dnas_ens.space.spaces import SPACES

OPERATIONS = ("skip_connect", "sep_conv_3x3", "max_pool_3x3")
HAND_MADE = {
    "normal": [[["sep_conv_3x3", 0], ["skip_connect", 1]], [["max_pool_3x3", 2], ["skip_connect", 0]]],
    "reduction": [[["skip_connect", 0]], [["skip_connect", 2], ["sep_conv_3x3", 1]]],
}


@st.composite
def genotypes(draw, num_nodes=None, space=None):
    if num_nodes is None:
        num_nodes = draw(st.integers(1, 4))
    space = space or draw(st.sampled_from(sorted(SPACES)))
    cells = {}
    for cell_type in draw(st.sampled_from([("normal",), ("reduction",), CELL_TYPES])):
        nodes = []
        for index in range(num_nodes):
            last = index + SPACES[space].num_inputs - 1
            sources = draw(st.lists(st.integers(0, last), min_size=1, max_size=3, unique=True))
            nodes.append(tuple((draw(st.sampled_from(OPERATIONS)), source) for source in sources))
        cells[cell_type] = tuple(nodes)
    return Genotype(**cells, space=space)


def triples(genotype, relabel=None):
    """The (cell type, node, source, operation) of a genotype, its nodes permuted if asked."""
    found = set()
    for cell_type in genotype.cell_types:
        cell = genotype.cell(cell_type)
        order = relabel[cell_type] if relabel else tuple(range(len(cell)))
        first = genotype.rules.num_inputs
        name = {0: "a", 1: "b"} | {index + first: new for index, new in enumerate(order)}
        for index, node in enumerate(cell):
            found |= {(cell_type, name[index + first], name[source], operation) for operation, source in node}
    return found


def test_hand_made_genotype_says_what_it_is():
    genotype = Genotype.from_dict(HAND_MADE)
    assert genotype.normal == (
        (("sep_conv_3x3", 0), ("skip_connect", 1)),
        (("max_pool_3x3", 2), ("skip_connect", 0)),
    )
    assert genotype.cell("reduction") == ((("skip_connect", 0),), (("skip_connect", 2), ("sep_conv_3x3", 1)))
    assert (genotype.cell_types, genotype.num_nodes, genotype.num_edges) == (("normal", "reduction"), 2, 7)
    assert genotype.operations == set(OPERATIONS)
    assert genotype.skip_counts() == {"normal": 2, "reduction": 2}
    assert "skip_connect x4, sep_conv_3x3 x2, max_pool_3x3 x1" in repr(genotype)
    assert "reduction 3 = skip_connect(2) + sep_conv_3x3(1)" in str(genotype)
    assert "</svg>" in genotype._repr_svg_()
    assert Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))) == genotype


def test_one_cell_is_enough_and_others_are_refused():
    genotype = Genotype(reduction=((("sep_conv_3x3", np.int64(1)),),))
    assert type(genotype.reduction[0][0][1]) is int
    assert (genotype.cell_types, genotype.cell("normal"), genotype.num_nodes) == (("reduction",), (), 1)
    with pytest.raises(UserError, match="middle"):
        genotype.cell("middle")
    with pytest.raises(UserError, match="no normal cell"):
        genotype.to_graph("normal")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({}, "{}"),
        ([], "[]"),
        ({"normal": [], "reduction": []}, "neither"),
        ({"norm": []}, "'norm'"),
        ({"normal": [[["skip_connect", 0]]], "reduction": [[["skip_connect", 0]]] * 2}, "1 nodes"),
        ({"normal": 3}, "3"),
        ({"normal": "ab"}, "'ab'"),
        ({"normal": [[]]}, "[]"),
        ({"normal": [["ab"]]}, "'ab'"),
        ({"normal": [[["skip_connect", 0, 1]]]}, "['skip_connect', 0, 1]"),
        ({"normal": [[[7, 0]]]}, "7"),
        ({"normal": [[["", 0]]]}, "''"),
        ({"normal": [[["skip_connect", -1]]]}, "-1"),
        ({"normal": [[["skip_connect", 0.0]]]}, "0.0"),
        ({"normal": [[["skip_connect", True]]]}, "True"),
        ({"normal": [[["skip_connect", 3]], [["skip_connect", 0]]]}, "source 3"),  # a later node: a cycle
        ({"normal": [[["skip_connect", 0], ["sep_conv_3x3", 0]]]}, "twice"),
    ],
)
def test_malformed_genotypes_are_named(value, named):
    with pytest.raises(UserError) as caught:
        Genotype.from_dict(value)
    assert named in caught.value.cause
    assert "\n" not in caught.value.cause + caught.value.remedy


def test_graph_of_the_hand_made_cell():
    graph = Genotype.from_dict(HAND_MADE).to_graph("normal")
    roles = ["before_last", "last", "intermediate", "intermediate", "output"]
    assert [role for _, role in sorted(graph.nodes(data="role"))] == roles
    edges = {(0, 2, "sep_conv_3x3"), (1, 2, "skip_connect"), (2, 3, "max_pool_3x3"), (0, 3, "skip_connect")}
    assert set(graph.edges(data="operation")) == edges | {(2, 4, None), (3, 4, None)}


def test_graph_of_a_cell_of_one_input_ends_in_its_loose_ends():
    cell = ((("conv_3x3", 0),), (("skip_connect", 0), ("conv_1x1", 1)), (("conv_3x3", 1),))
    genotype = Genotype(reduction=cell, space="efficient")
    assert str(genotype).splitlines()[1:] == [
        "reduction 1 = conv_3x3(0)",
        "reduction 2 = skip_connect(0) + conv_1x1(1)",
        "reduction 3 = conv_3x3(1)",
    ]
    graph = genotype.to_graph("reduction")
    assert [role for _, role in sorted(graph.nodes(data="role"))] == ["last", *["intermediate"] * 3, "output"]
    # Node 1 is read by both others.
    assert set(graph.predecessors(4)) == {2, 3}
    with pytest.raises(UserError, match="source 1, which does not exist before it") as caught:
        Genotype(normal=((("conv_3x3", 1),),), space="efficient")
    assert "0 is the input, 1 is node 0" in caught.value.remedy
    with pytest.raises(UserError, match="no space 'dense'"):
        Genotype(normal=cell, space="dense")


def smallest_by_trying_all(cell, first):
    """The smallest renumbering of a cell whose first node has that number, over all orders of its nodes."""
    found = []
    for order in itertools.permutations(range(first, first + len(cell))):
        new = {0: 0, 1: 1} | {old: position for position, old in enumerate(order, start=first)}
        if all(new[source] < new[old] for old in order for _, source in cell[old - first]):
            nodes = ([(operation, new[source]) for operation, source in cell[old - first]] for old in order)
            found.append(tuple(tuple(sorted(node, key=lambda edge: edge[1])) for node in nodes))
    return min(found)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_nodes=st.integers(1, 5),
    edges=st.integers(1, 3),
    names=st.integers(1, 3),
    space=st.sampled_from(sorted(SPACES)),
)
def test_the_canonical_form_is_the_smallest_of_all(seed, num_nodes, edges, names, space):
    # With few operations many nodes are alike.
    sizes = {"num_nodes": num_nodes, "edges_per_node": edges, "space": space}
    genotype = random_genotype(np.random.default_rng(seed), operations=OPERATIONS[:names], **sizes)
    canonical = genotype.canonical()
    assert canonical.space == space
    for cell_type in genotype.cell_types:
        first = genotype.rules.num_inputs
        assert canonical.cell(cell_type) == smallest_by_trying_all(genotype.cell(cell_type), first)
    assert genotype.canonical_hash() == canonical.canonical_hash()
    assert re.fullmatch("[0-9a-f]{16}", genotype.canonical_hash())


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32 - 1), space=st.sampled_from(sorted(SPACES)), num_nodes=st.integers(2, 3))
def test_equal_canonical_forms_are_isomorphic_graphs(seed, space, num_nodes):
    generator = np.random.default_rng(seed)
    sizes = {"operations": ("a", "b"), "num_nodes": num_nodes, "cell_types": ("normal",), "space": space}
    first, second = (random_genotype(generator, edges_per_node=2, **sizes) for _ in range(2))
    alike = networkx.is_isomorphic(
        first.to_graph("normal"),
        second.to_graph("normal"),
        node_match=lambda one, other: one["role"] == other["role"],
        edge_match=lambda one, other: one["operation"] == other["operation"],
    )
    assert (first.canonical() == second.canonical()) == alike
    if alike:
        assert first.shared_edges(second) == first.num_edges


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
    size, repeats = len(pattern), 9 // len(pattern)
    cell = [
        [[operation, source if source >= 0 else 2 + repeat * size + index + source] for operation, source in node]
        for repeat in range(repeats)
        for index, node in enumerate(pattern)
    ]
    # The same cell with its patterns interleaved.
    order = [repeat * size + index for index in range(size) for repeat in range(repeats)]
    new = {0: 0, 1: 1} | {2 + old: 2 + position for position, old in enumerate(order)}
    other = [[[operation, new[source]] for operation, source in cell[old]] for old in order]
    assert Genotype.from_dict({"normal": other}).canonical() == Genotype.from_dict({"normal": cell}).canonical()


@given(st.data(), st.integers(1, 3))
def test_shared_edges_is_the_brute_force_maximum(data, num_nodes):
    first, second = data.draw(genotypes(num_nodes)), data.draw(genotypes(num_nodes))
    choices = itertools.product(itertools.permutations(range(num_nodes)), repeat=2)
    relabelled = (triples(first, dict(zip(CELL_TYPES, choice, strict=True))) for choice in choices)
    expected = max(len(each & triples(second)) for each in relabelled) if first.space == second.space else 0
    assert first.shared_edges(second) == second.shared_edges(first) == expected


def test_shared_edges_of_pairs_worked_out_by_hand():
    base = Genotype.from_dict(HAND_MADE)
    changed = Genotype(normal=base.normal, reduction=((("skip_connect", 1),), base.reduction[1]))
    assert base.shared_edges(changed) == base.num_edges - 1
    assert base.shared_edges(Genotype(normal=base.normal)) == 4
    assert Genotype(normal=base.normal).shared_edges(Genotype(reduction=base.normal)) == 0
    deep = Genotype(normal=((("a", 0),), (("b", 1),), (("c", 2), ("d", 3))))
    shallow = Genotype(normal=((("b", 1),),))
    assert deep.shared_edges(shallow) == shallow.shared_edges(deep) == 1


def test_random_genotypes_have_the_asked_shape_and_reach_the_whole_space():
    operations = ("none", *OPERATIONS)
    drawn = random_genotype(np.random.default_rng(0), operations=operations, num_nodes=4, edges_per_node=3)
    assert (drawn.cell_types, drawn.operations) == (CELL_TYPES, set(OPERATIONS))
    assert [[len(node) for node in drawn.cell(cell_type)] for cell_type in CELL_TYPES] == [[2, 3, 3, 3]] * 2
    small = {"operations": ("a", "b"), "num_nodes": 2, "edges_per_node": 1, "cell_types": ("reduction",)}
    generator = np.random.default_rng(0)
    counts = Counter(random_genotype(generator, **small) for _ in range(2400))
    # 2 operations x 2 sources, times 2 x 3: 24 equally likely genotypes, 100 draws of each expected.
    assert len(counts) == 24
    assert 60 < min(counts.values()) < max(counts.values()) < 140


def test_random_genotypes_of_the_efficient_space_draw_their_numbers_of_edges():
    small = {"operations": ("a", "b"), "num_nodes": 2, "cell_types": ("normal",), "space": "efficient"}
    generator = np.random.default_rng(0)
    nodes = Counter(random_genotype(generator, **small).normal[1] for _ in range(2400))
    # The node before it always, and in half of the draws the input too: 600 of 2 nodes and 300 of 4 expected.
    assert Counter(map(len, nodes)) == {1: 2, 2: 4}
    assert all(1 in {source for _, source in node} for node in nodes)
    for count, low, high in ((1, 520, 680), (2, 220, 380)):
        assert all(low < drawn < high for node, drawn in nodes.items() if len(node) == count)


def test_genotypes_of_other_spaces_are_stored_with_their_name():
    cells = {"normal": [[["conv_3x3", 0]]], "reduction": []}
    genotype = Genotype.from_dict({"space": "efficient", **cells})
    assert genotype.to_dict() == {"space": "efficient", **cells}
    assert Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))) == genotype
    # Stored genotypes of DARTS, and their names, stay as they were.
    darts = Genotype.from_dict(cells)
    assert darts.to_dict() == cells
    assert darts.canonical_hash() == "70028b57efbf3646"
    assert genotype.canonical_hash() != darts.canonical_hash()
    assert (genotype.shared_edges(genotype), genotype.shared_edges(darts)) == (1, 0)
    for write in (genotype.to_flat_dict, genotype.to_flat_text):
        with pytest.raises(UserError, match="space efficient has no flat form"):
            write()


@given(st.data(), genotypes(), st.integers(0, 2**32 - 1))
def test_random_deviation_replaces_exactly_the_asked_number_of_edges(data, genotype, seed):
    num_edges = data.draw(st.integers(0, genotype.num_edges))
    operations = data.draw(st.sampled_from([OPERATIONS, OPERATIONS[:2], ("none", "new", "newer")]))
    generator = np.random.default_rng(seed)
    deviated = random_deviation(genotype, num_edges=num_edges, operations=operations, generator=generator)
    assert len(triples(genotype) - triples(deviated)) == num_edges
    assert len(triples(deviated) - triples(genotype)) == num_edges
    assert deviated.cell_types == genotype.cell_types
    for cell_type in genotype.cell_types:
        assert [len(node) for node in deviated.cell(cell_type)] == [len(node) for node in genotype.cell(cell_type)]
    assert "none" not in deviated.operations


def test_replaced_edges_of_one_node_do_not_restore_each_other():
    base = Genotype(normal=((("a", 0), ("b", 1)),))
    generator = np.random.default_rng(0)
    deviations = (random_deviation(base, num_edges=2, operations=("a", "b"), generator=generator) for _ in range(60))
    # Neither (a, 0) nor (b, 1) may return in the other's place: b from 0 and a from 1 is all that is left.
    assert {found.normal for found in deviations} == {((("b", 0), ("a", 1)),), ((("a", 1), ("b", 0)),)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_edges": 8}, "8 edges"),
        ({"num_edges": -1}, "-1 edges"),
        ({"operations": ("none", "skip_connect", "skip_connect"), "num_edges": 1}, "skip_connect"),
        ({"operations": ("none",)}, "0 operations"),
        ({"num_nodes": 0}, "num_nodes = 0"),
        ({"edges_per_node": 0}, "edges_per_node = 0"),
        ({"cell_types": ()}, "neither a normal nor a reduction cell"),
        ({"cell_types": ("middle",)}, "'middle'"),
    ],
)
def test_impossible_random_genotypes_and_deviations_are_refused(change, named):
    draw = partial(random_deviation, Genotype.from_dict(HAND_MADE)) if "num_edges" in change else random_genotype
    with pytest.raises(UserError, match=re.escape(named)):
        draw(**{"operations": OPERATIONS, "generator": np.random.default_rng(0), **change})


def test_genotypes_are_loaded_alone_from_a_run_file_and_from_a_run_folder(tmp_path):
    base = Genotype.from_dict(HAND_MADE)
    alone, run = tmp_path / "cell.json", tmp_path / "genotypes.json"
    for path, named in ((alone / "absent.json", r"absent\.json"), (tmp_path, r"genotypes\.json")):
        with pytest.raises(UserError, match=named):
            load_genotype(path)
    alone.write_text(json.dumps(HAND_MADE))
    other = Genotype(normal=base.normal).to_dict()
    run.write_text(json.dumps({"base": {"genotype": HAND_MADE, "lambda": 0}, "candidates": [{"genotype": other}]}))
    assert load_genotype(alone) == load_genotype(str(run)) == load_genotype(tmp_path) == base


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "3", "[" * 100_000, "\ud800", '{"base": 3}', '{"base": {}}', '{"base": {"genotype": []}}'),
        *('{"base": {"genotype": {"normal": [[["skip_connect", NaN]]]}}}', '{"candidates": []}'),
    ],
)
def test_unreadable_files_are_named(content, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"bad\.json") as caught:
        load_genotype(path)
    assert "\n" not in caught.value.cause


def test_the_genotypes_of_a_search_in_the_order_of_their_ranking(tmp_path):
    cells = [Genotype(normal=((("a", 0),),) * count).to_dict() for count in (1, 2, 3)]
    candidates = [{"genotype": cell} for cell in cells]
    found = {"selected": [2], "ranking": [2, 0], "candidates": candidates, "base": candidates[0]}
    found |= {"temperature": 1, "report": {}, "curve": None}
    file = tmp_path / "genotypes.json"
    file.write_text(json.dumps(found))
    read = read_genotypes(file)
    assert [genotype.num_nodes for genotype in ranked_genotypes(read)] == [3]
    assert [genotype.num_nodes for genotype in ranked_genotypes(read, 2)] == [3, 1]
    for asked, members, cause in (
        (read, 0, "0 members were asked for, but the search holds 2"),
        (read, 3, "3 members were asked for, but the search holds 2"),
        ({"selected": [0], "candidates": candidates}, 2, "no ranking"),
        ({"selected": [7], "candidates": candidates}, None, "candidate 7 of 3"),
    ):
        with pytest.raises(UserError, match=cause):
            ranked_genotypes(asked, members)
    wrong_rankings = ({"ranking": wrong} for wrong in ([0, 9], True, ["0"]))
    for wrong in ({"selected": []}, {"selected": [9]}, {"candidates": 5}, {"base": 5}, *wrong_rankings):
        file.write_text(json.dumps({**found, **wrong}))
        with pytest.raises(UserError, match=r"genotypes\.json"):
            read_genotypes(file)


# The space that they are of.


def test_the_efficient_space_has_6_edges_of_one_input():
    space = SearchSpace.for_stack(3, name="efficient")
    assert space.shape == (2, 6, 7)
    assert space.edges == ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2))
    assert [stop.stop - stop.start for stop in space.node_slices] == [1, 2, 3]


def test_space_has_the_papers_14_edges_in_order():
    space = SearchSpace()
    assert space.shape == (2, 14, 7)
    assert space.edges[:5] == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    assert [stop.stop - stop.start for stop in space.node_slices] == [2, 3, 4, 5]
    assert SearchSpace.for_stack(1, operations=space.operations, num_nodes=4).cell_types == ("reduction",)


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda: SearchSpace(operations=("none",)), "no operation to choose from"),
        (lambda: SearchSpace(operations=("a", "a")), "name one twice"),
        (lambda: SearchSpace(num_nodes=0), "0 nodes is empty"),
        (lambda: stack_cell_types(0), "A stack of 0 cells"),
        (lambda: stack_cell_types(10**7), "A stack of 10000000 cells"),
    ],
)
def test_spaces_and_stacks_that_nobody_means_are_refused(call, cause):
    with pytest.raises(UserError, match=cause):
        call()
