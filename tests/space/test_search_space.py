import pytest

from dnas_ens.errors import UserError
from dnas_ens.space.search_space import SearchSpace, stack_cell_types


def test_space_has_the_papers_14_edges_in_order():
    space = SearchSpace()
    assert space.shape == (2, 14, 7)
    assert space.edges[:5] == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    assert [space.edges[i][0] for s in space.node_slices for i in range(s.start, s.stop)] == [
        node for node in range(4) for _ in range(node + 2)
    ]
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
