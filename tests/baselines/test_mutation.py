"""Mutation: always a valid genotype at edit distance one, every kind reached, nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnas_ens.baselines.mutation import mutate
from dnas_ens.errors import UserError
from dnas_ens.space.genotype import CELL_TYPES, Genotype, random_genotype

OPERATIONS = ("skip_connect", "sep_conv_3x3", "max_pool_3x3")


def slots(genotype: Genotype) -> dict[tuple[str, int, int], tuple[str, int]]:
    return {
        (cell_type, node, position): edge
        for cell_type in genotype.cell_types
        for node, edges in enumerate(genotype.cell(cell_type))
        for position, edge in enumerate(edges)
    }


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([("normal",), ("reduction",), CELL_TYPES]),
    st.integers(2, 3),
)
def test_a_mutant_is_valid_and_one_edit_away(
    seed, num_nodes, edges_per_node, cell_types, num_operations
) -> None:
    generator = np.random.default_rng(seed)
    operations = OPERATIONS[:num_operations]
    parent = random_genotype(
        generator,
        operations=operations,
        num_nodes=num_nodes,
        edges_per_node=edges_per_node,
        cell_types=cell_types,
    )
    child = mutate(parent, operations=("none", *operations), generator=generator)
    # The constructor validates; through JSON, so that nothing is taken over unchecked.
    assert Genotype.from_dict(child.to_dict()) == child
    before, after = slots(parent), slots(child)
    assert before.keys() == after.keys()
    changed = [slot for slot in before if before[slot] != after[slot]]
    assert len(changed) == 1
    (operation, source), (new_operation, new_source) = before[changed[0]], after[changed[0]]
    assert (operation == new_operation) != (source == new_source)
    assert child.operations <= set(operations)
    assert child.canonical() != parent.canonical()


def test_every_neighbour_is_reached_with_the_rates_by_hand() -> None:
    # One node of inputs 0 and 1 cannot change a source; node 1 can, to the one source that is free.
    parent = Genotype(normal=((("a", 0), ("b", 1)), (("a", 0), ("a", 2))))
    generator = np.random.default_rng(0)
    draws = 4000
    counts = Counter(mutate(parent, operations=("a", "b"), generator=generator) for _ in range(draws))
    operations = [
        Genotype(normal=((("b", 0), ("b", 1)), (("a", 0), ("a", 2)))),
        Genotype(normal=((("a", 0), ("a", 1)), (("a", 0), ("a", 2)))),
        Genotype(normal=((("a", 0), ("b", 1)), (("b", 0), ("a", 2)))),
        Genotype(normal=((("a", 0), ("b", 1)), (("a", 0), ("b", 2)))),
    ]
    sources = [
        Genotype(normal=((("a", 0), ("b", 1)), (("a", 1), ("a", 2)))),
        Genotype(normal=((("a", 0), ("b", 1)), (("a", 0), ("a", 1)))),
    ]
    assert set(counts) == {*operations, *sources}
    # Half the draws change an operation, 1/8 each; half a source, 1/4 each. Five standard deviations.
    for mutant in counts:
        share = 1 / 8 if mutant in operations else 1 / 4
        assert abs(counts[mutant] - share * draws) < 5 * (draws * share * (1 - share)) ** 0.5


def test_a_renumbering_is_no_mutation() -> None:
    # Nodes 2 and 3 are twins, so moving node 4's edge from one to the other changes nothing.
    twins = ((("a", 0), ("a", 1)), (("a", 0), ("a", 1)), (("a", 0), ("a", 1), ("a", 2)))
    parent = Genotype(normal=twins)
    generator = np.random.default_rng(0)
    children = {mutate(parent, operations=("a",), generator=generator) for _ in range(50)}
    renumbered = Genotype(normal=(*twins[:2], (("a", 0), ("a", 1), ("a", 3))))
    assert renumbered.canonical() == parent.canonical()
    assert renumbered not in children
    # Node 3 may take node 2 in place of either input; node 4 may take node 3 in place of either input.
    assert len(children) == 4


def test_the_same_seed_gives_the_same_child() -> None:
    parent = random_genotype(np.random.default_rng(1), operations=OPERATIONS)
    one, two = (mutate(parent, operations=OPERATIONS, generator=np.random.default_rng(5)) for _ in range(2))
    assert one == two


def test_nothing_to_change() -> None:
    parent = Genotype(normal=((("a", 0), ("a", 1)),))
    with pytest.raises(UserError, match="No edge"):
        mutate(parent, operations=("a", "none"), generator=np.random.default_rng(0))
