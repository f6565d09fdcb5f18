from itertools import combinations, pairwise

import networkx
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from dnas_ens.figures.cell_layout import layout_cell
from dnas_ens.figures.style import spread
from dnas_ens.space.cells import loose_ends
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.spaces import SPACES


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3), st.sampled_from(sorted(SPACES)))
def test_layouts_keep_their_promises(seed, num_nodes, edges_per_node, space):
    sizes = {"num_nodes": num_nodes, "edges_per_node": edges_per_node, "space": space}
    genotype = tiny.genotype(seed, cell_types=("normal",), **sizes)
    layout = layout_cell(genotype.to_graph("normal"), label_width=80.0)
    boxes = [*layout.nodes.values(), *layout.labels.values()]
    assert set(layout.nodes) == set(range(genotype.rules.num_inputs + num_nodes + 1))
    assert len(layout.paths) == len(layout.labels) + len(loose_ends(genotype.normal, genotype.rules))
    for box in boxes:
        assert box.width / 2 <= box.x <= layout.width - box.width / 2 + 1e-6
        assert box.height / 2 - 1e-6 <= box.y <= layout.height - box.height / 2 + 1e-6
    for one, other in combinations(boxes, 2):
        apart_x = abs(one.x - other.x) - (one.width + other.width) / 2
        apart_y = abs(one.y - other.y) - (one.height + other.height) / 2
        assert max(apart_x, apart_y) > 5
    assert layout.nodes[0].y < layout.nodes[1].y or space == "efficient"
    for (source, target), points in layout.paths.items():
        end = layout.labels.get((source, target), layout.nodes[target])
        assert points[0] == layout.nodes[source].right
        assert points[-1] == end.left
        assert all(start[0] < stop[0] for start, stop in pairwise(points))
        lanes = list(zip(points[1:-1:2], points[2:-1:2], strict=True))
        assert all(start[1] == stop[1] for start, stop in lanes)
        for start, stop in lanes:
            for box in boxes:
                beside = box.x + box.width / 2 <= start[0] or stop[0] <= box.x - box.width / 2
                assert beside or abs(box.y - start[1]) > box.height / 2 + 5


def test_long_edges_run_straight():
    graph = networkx.DiGraph()
    for node, role in enumerate(("before_last", "last", *["intermediate"] * 3, "output")):
        graph.add_node(node, role=role)
    graph.add_edges_from([(1, 2), (2, 3), (3, 4), (0, 4)], operation="a")
    graph.add_edges_from([(2, 5), (3, 5), (4, 5)], operation=None)
    layout = layout_cell(graph, label_width=80.0)
    heights = [y for _, y in layout.paths[0, 4]]
    assert heights == pytest.approx([heights[0]] * len(heights), abs=1.0)


def test_edges_do_not_cross_where_they_need_not():
    genotype = Genotype(normal=((("a", 1),), (("a", 0),)))
    layout = layout_cell(genotype.to_graph("normal"), label_width=80.0)
    assert layout.nodes[0].y < layout.nodes[1].y
    assert layout.nodes[3].y < layout.nodes[2].y


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 3)), min_size=1, max_size=8))
def test_spread_is_the_nearest_row_that_is_far_enough_apart(drawn):
    wishes, gaps = [wish for wish, _ in drawn], [gap for _, gap in drawn[1:]]
    placed = spread(wishes, gaps)
    assert np.mean(placed) == pytest.approx(np.mean(wishes), abs=1e-6)
    assert (np.diff(placed) > np.array(gaps) - 1e-6).all()
    found = minimize(
        lambda row: ((row - wishes) ** 2).sum(),
        np.cumsum([-12.0, *(gap + 1e-3 for gap in gaps)]),
        constraints={"type": "ineq", "fun": lambda row: np.diff(row) - gaps} if gaps else (),
        method="SLSQP",
        options={"ftol": 1e-10, "maxiter": 500},
    )
    assert placed == pytest.approx(found.x, abs=1e-3)
