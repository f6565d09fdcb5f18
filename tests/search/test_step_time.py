"""The expected time of a step, by given tables: no test asserts a measured time."""

import copy
import json

import pytest
import torch
from tiny import WITH_NONE, distributions, genotype, mixture, stack

from dnas_ens.config.fields import to_dict, with_fields
from dnas_ens.nn.execution import PLAIN
from dnas_ens.run.folder import RunFolder
from dnas_ens.search.objective import nearest_discrete
from dnas_ens.search.run import run_search
from dnas_ens.search.star import StarLoop
from dnas_ens.search.step_time import StepTimes, measured_step_times
from dnas_ens.space.search_space import SearchSpace

SPACE = SearchSpace(num_nodes=2, operations=("none", "skip_connect", "sep_conv_3x3"))


def table(space, *, operations=None, rest=5.0, edges_per_node=2):
    times = 3 * mixture(space) if operations is None else operations
    return StepTimes(space=space, edges_per_node=edges_per_node, operations=times, rest=rest, places={})


EFFICIENT = SearchSpace(name="efficient", operations=("none", "skip_connect", "conv_3x3"))


@pytest.mark.parametrize("space", [SPACE, EFFICIENT], ids=["darts", "efficient"])
@pytest.mark.parametrize("edges_per_node", [1, 2, 3])
def test_a_discrete_architecture_takes_the_sum_of_its_operations(space, edges_per_node):
    times = table(space, edges_per_node=edges_per_node)
    discrete = nearest_discrete(distributions(space, 20, scale=2.0), space, edges_per_node=edges_per_node)
    expected = [5.0 + float(times.operations[one > 0].sum()) for one in discrete]
    assert times.expected(discrete).tolist() == pytest.approx(expected)
    cells = genotype(edges_per_node=edges_per_node, cell_types=("normal", "reduction"))
    space = SearchSpace(num_nodes=2)
    by_hand = 5.0
    for index, cell_type in enumerate(space.cell_types):
        for node, edges in enumerate(cells.cell(cell_type)):
            for name, source in edges:
                place = index, space.edges.index((node, source)), space.operations.index(name)
                by_hand += float(table(space).operations[place])
    assert table(space).of(cells) == pytest.approx(by_hand)


@pytest.mark.parametrize("space", [SPACE, EFFICIENT], ids=["darts", "efficient"])
def test_the_gradient_against_finite_differences(space):
    # Far from the edge at which the number of kept edges stops growing.
    mixtures = distributions(space, 2, scale=3.0).requires_grad_()
    assert torch.autograd.gradcheck(table(space).expected, mixtures)


def test_the_uniform_mixture():
    times = table(SPACE)
    # Two nodes a cell, of two and of three edges, both keeping two.
    by_hand = 5.0 + sum(
        2 * float(times.operations[cell_type, node].mean()) for cell_type in range(2) for node in SPACE.node_slices
    )
    assert times.uniform() == pytest.approx(by_hand)


def rising(space):
    """Operations that take the longer the later they come, and the more the later their edge is."""
    edges = torch.arange(1.0, space.num_edges + 1).view(1, -1, 1)
    return table(space, operations=edges * torch.arange(1.0, len(space.operations) + 1).expand(space.shape))


def test_a_search_for_cheap_steps_finds_cheaper_cells(tiny_search):
    config = with_fields(tiny_search, likelihood="none", star_steps=60, operation_balance=(0.0, 0.0))
    space = StarLoop(config).family.space
    times = rising(space)
    taken, expected = [], []
    for weight in (0.0, 3.0):
        loop = StarLoop(with_fields(config, step_time_weight=weight), step_times=times)
        for _ in range(loop.num_epochs):
            scalars = loop.run_epoch()
        genotypes = loop.family.genotypes(loop.family.grid(torch.tensor([0.0, 0.8])))
        taken.append(sum(times.of(one) for one in genotypes) / len(genotypes))
        expected.append(scalars["step_ms"])
    assert expected[1] < 0.7 * expected[0]
    assert taken[1] < 0.7 * taken[0]


def test_measured_times_cover_every_place_and_survive_json():
    space = SearchSpace(num_nodes=2, operations=WITH_NONE)
    times = measured_step_times(space, stack(3), image_size=8, batch_size=4, edges_per_node=2, execution=PLAIN)
    # Channels and sizes of a normal cell and two reduction cells, and in the latter both strides.
    shapes = {(place.input_shape, place.output_shape) for place in times.places}
    expected = [(4, 8, 4, 8), (8, 8, 8, 4), (8, 4, 8, 4), (16, 4, 16, 2), (16, 2, 16, 2)]
    assert shapes == {((before, side, side), (after, small, small)) for before, side, after, small in expected}
    assert len(times.places) == 5 * 7
    assert min(times.places.values()) > 0
    assert not times.operations[..., 0].any()  # none
    of = {(place.operation, place.input_shape, place.output_shape[1]): taken for place, taken in times.places.items()}
    name = "sep_conv_5x5"
    index = WITH_NONE.index(name)
    # The edge from an input in both reduction cells, and the one between nodes.
    halved = of[name, (8, 8, 8), 4] + of[name, (16, 4, 4), 2]
    kept = of[name, (8, 4, 4), 4] + of[name, (16, 2, 2), 2]
    assert times.operations[1, [0, 4], index].tolist() == pytest.approx([halved, kept])
    assert times.operations[0, 0, index].item() == pytest.approx(of[name, (4, 8, 8), 8])
    again = StepTimes.from_dict(json.loads(json.dumps(times.to_dict())), space=space, edges_per_node=2)
    assert torch.equal(again.operations, times.operations)
    assert (again.rest, again.places) == (times.rest, times.places)


def test_a_run_keeps_its_times_and_resumes_with_them(few_digits, tiny_search, tmp_path):
    config = with_fields(tiny_search, likelihood="none", star_steps=60, step_time_weight=1.0)
    with RunFolder.create(tmp_path / "run", config=to_dict(config)) as run:
        found = run_search(config, few_digits, run=run)
        times = StepTimes.from_dict(run.read_json("step_time.json"), space=found.family.space, edges_per_node=2)
        for candidate in found.candidates:
            assert candidate.expected_step_ms == pytest.approx(times.of(candidate.genotype))
        assert f"expected step {found.candidates[found.selected[0]].expected_step_ms:.1f} ms" in repr(found)
        # Its table counts, not the machine's times of the moment.
        other = copy.deepcopy(times.to_dict())
        other["rest_ms"] = 1000.0
        run.write_json("step_time.json", other)
        run.file("genotypes.json").unlink()
        resumed = run_search(config, few_digits, run=run, resume=True)
    assert [one.genotype for one in resumed.candidates] == [one.genotype for one in found.candidates]
    assert min(candidate.expected_step_ms for candidate in resumed.candidates) > 1000
