"""Pools of random cells and deviations, distances in closed form, NES-RS by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.baselines.evaluations import Evaluations, forward_select
from dnas_ens.baselines.random_search import (
    deviations_at_distance,
    deviations_sharing,
    discrete_distance,
    nes_random_search,
    random_pool,
)
from dnas_ens.ensembles.selection import greedy_selection
from dnas_ens.errors import UserError
from dnas_ens.space.genotype import Genotype, random_deviation
from dnas_ens.space.search_space import SearchSpace

SPACE = SearchSpace(operations=("none", "skip_connect", "sep_conv_3x3", "max_pool_3x3", "avg_pool_3x3"))
TINY = SearchSpace(operations=("a", "b"), num_nodes=1, cell_types=("normal",))


def triples(genotype: Genotype) -> set[tuple[str, int, str, int]]:
    return {
        (cell_type, node, *edge)
        for cell_type in genotype.cell_types
        for node, edges in enumerate(genotype.cell(cell_type))
        for edge in edges
    }


def closed_form_distance(first: Genotype, second: Genotype) -> float:
    """Mean over nodes of sqrt(1 - c / 2), c of two edges shared."""
    terms = []
    for cell_type in first.cell_types:
        for one, other in zip(first.cell(cell_type), second.cell(cell_type), strict=True):
            terms.append(math.sqrt(1 - len(set(one) & set(other)) / 2))
    return sum(terms) / len(terms)


def test_a_random_pool_is_seeded_distinct_and_of_the_space() -> None:
    pool = random_pool(SPACE, 30, seed=4)
    assert pool == random_pool(SPACE, 30, seed=4)
    assert pool[:10] == random_pool(SPACE, 10, seed=4)
    assert pool != random_pool(SPACE, 30, seed=5)
    assert len({genotype.canonical_hash() for genotype in pool}) == 30
    for genotype in pool:
        assert genotype.num_nodes == 4
        assert genotype.num_edges == 16
        assert genotype.operations <= set(SPACE.operations) - {"none"}


def test_a_space_is_drawn_to_its_last_genotype() -> None:
    # One node that takes both inputs, each with one of two operations: 4 genotypes.
    pool = random_pool(TINY, 4, seed=0)
    assert len(set(pool)) == 4
    with pytest.raises(UserError, match="only 4 are different"):
        random_pool(TINY, 5, seed=0)
    with pytest.raises(UserError, match="pool of 0"):
        random_pool(TINY, 0, seed=0)


def test_isomorphic_draws_count_once() -> None:
    # With one operation and two nodes of one edge: sources (0 | 1) x (0 | 1 | 2) make 6, and the two twins
    # (0, 1) and (1, 0) are one network.
    space = SearchSpace(operations=("a",), num_nodes=2, cell_types=("normal",))
    assert len(random_pool(space, 5, seed=0, edges_per_node=1)) == 5
    with pytest.raises(UserError, match="only 5"):
        random_pool(space, 6, seed=0, edges_per_node=1)


def test_deviations_share_as_many_edges_as_asked() -> None:
    base = random_pool(SPACE, 1, seed=0)[0]
    wanted = [15, 12, 8, 12]
    pool = deviations_sharing(base, wanted, operations=SPACE.operations, seed=1)
    assert [genotype.shared_edges(base) for genotype in pool] == wanted
    assert len({genotype.canonical() for genotype in pool}) == 4
    assert pool == deviations_sharing(base, wanted, operations=SPACE.operations, seed=1)
    with pytest.raises(UserError, match="nearest found has 15"):
        deviations_sharing(base, [16], operations=SPACE.operations, seed=1)


def test_deviations_lie_at_the_distance_asked_for() -> None:
    base = random_pool(SPACE, 1, seed=0)[0]
    wanted = [0.1, 0.3, 0.5, 0.7, 1.0, 0.3]
    pool = deviations_at_distance(base, wanted, space=SPACE, seed=1)
    distances = [closed_form_distance(base, genotype) for genotype in pool]
    np.testing.assert_allclose(distances, wanted, atol=0.05)
    assert len({genotype.canonical() for genotype in pool}) == 6
    with pytest.raises(UserError, match=r"nearest found has 0\.088"):
        deviations_at_distance(base, [0.02], space=SPACE, seed=1)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_distance_is_the_closed_form(seed: int) -> None:
    base, other = random_pool(SPACE, 2, seed=seed)
    generator = np.random.default_rng(seed)
    near = random_deviation(base, num_edges=3, operations=SPACE.operations, generator=generator)
    for genotype in (other, near):
        expected = closed_form_distance(base, genotype)
        assert discrete_distance(base, genotype, SPACE) == pytest.approx(expected, abs=1e-5)
        assert discrete_distance(genotype, base, SPACE) == pytest.approx(expected, abs=1e-5)
    assert discrete_distance(base, base, SPACE) == pytest.approx(0.0, abs=1e-3)


def test_distance_of_nodes_with_different_numbers_of_edges_by_hand() -> None:
    # One of one edge against that one and another: (1, 0) against (1/2, 1/2).
    space = SearchSpace(operations=("a", "b"), num_nodes=1, cell_types=("normal",))
    one, two = Genotype(normal=((("a", 0),),)), Genotype(normal=((("a", 0), ("b", 1)),))
    mean_first, mean_second = 0.75, 0.25
    jsd = 0.5 * math.log2(1 / mean_first) + 0.25 * math.log2(0.5 / mean_first)
    jsd += 0.25 * math.log2(0.5 / mean_second)
    assert discrete_distance(one, two, space) == pytest.approx(math.sqrt(jsd), abs=1e-6)
    with pytest.raises(UserError, match="nodes"):
        discrete_distance(one, random_pool(SPACE, 1, seed=0)[0], space)


# Probability of the right class on two images, as in the tests of selection: A, then C, then B by hand.
TRACED = [(0.9, 0.3), (0.8, 0.3), (0.2, 0.9), (0.5, 0.5)]


def binary(right: tuple[float, ...]) -> np.ndarray:
    return np.stack([np.array(right), 1 - np.array(right)], axis=1)


def test_random_search_by_hand() -> None:
    pool = random_pool(TINY, 4, seed=0)
    seen = []

    def train(genotype: Genotype, index: int) -> np.ndarray:
        seen.append((genotype, index))
        return binary(TRACED[index])

    found = nes_random_search(train, [0, 0], pool=pool, num_members=2)
    assert seen == [(genotype, index) for index, genotype in enumerate(pool)]
    assert found.picked == (0, 2)
    assert found.members == (pool[0], pool[2])
    assert found.pool == tuple(pool)
    # Averages 0.55 and 0.60.
    assert found.val_nll == pytest.approx(-(math.log(0.55) + math.log(0.6)) / 2, abs=1e-6)
    np.testing.assert_allclose(found.val_probs, np.stack([binary(TRACED[0]), binary(TRACED[2])]), rtol=1e-6)


def test_nothing_is_trained_twice(tmp_path) -> None:
    pool = random_pool(TINY, 4, seed=0)
    trained = []

    def train(genotype: Genotype, index: int) -> np.ndarray:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(index)
        return binary(TRACED[index])

    def go_on(genotype: Genotype, index: int) -> np.ndarray:
        trained.append(index)
        return binary(TRACED[index])

    def never(genotype: Genotype, index: int) -> np.ndarray:
        raise AssertionError("trained again")

    with pytest.raises(KeyboardInterrupt):
        nes_random_search(train, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    found = nes_random_search(go_on, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    assert trained == [0, 1, 2, 3]
    again = nes_random_search(never, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    assert again.picked == found.picked == (0, 2)
    assert np.array_equal(again.val_probs, found.val_probs)


def test_predictions_for_other_images_are_refused(tmp_path) -> None:
    pool = random_pool(TINY, 2, seed=0)
    nes_random_search(
        lambda _, index: binary(TRACED[index]), [0, 0], pool=pool, num_members=1, folder=tmp_path
    )
    with pytest.raises(UserError, match="other validation images"):
        nes_random_search(
            lambda _, index: binary(TRACED[index]), [1, 0], pool=pool, num_members=1, folder=tmp_path
        )


def test_a_probability_just_above_one_is_survived() -> None:
    rounded = np.nextafter(np.float32(1), np.float32(2))
    assert forward_select([[rounded, 0.5], [0.2, 0.3]], 1) == [0]


def test_an_evaluation_interrupted_while_writing_is_done_again(tmp_path) -> None:
    genotype = random_pool(TINY, 1, seed=0)[0]
    calls = []

    def train(genotype: Genotype, index: int) -> np.ndarray:
        calls.append(index)
        return binary((0.5, 0.5))

    evaluations = Evaluations(train, [0, 0], folder=tmp_path)
    evaluations.val_probs(genotype, 7)
    (evaluations.folder_of(genotype, 7) / "genotype.json").unlink()
    evaluations.val_probs(genotype, 7)
    evaluations.val_probs(genotype, 7)
    assert calls == [7, 7]


@pytest.mark.parametrize(
    ("probs", "cause"),
    [
        (np.full((2, 2), np.nan), "must be finite"),
        (np.full((3, 2), 0.5), r"labels must have shape \(3,\)"),
        (np.ones((2, 2)), "must sum to 1"),
        (np.ones((2, 1)), "must lie in 0..0"),
    ],
)
def test_training_that_fails_is_named(probs: np.ndarray, cause: str) -> None:
    with pytest.raises(UserError, match=f"training of genotype 0 .*{cause}"):
        nes_random_search(lambda *_: probs, [0, 1], pool=random_pool(TINY, 2, seed=0), num_members=1)


def test_more_members_than_the_pool_holds_are_refused_before_training() -> None:
    def never(genotype: Genotype, index: int) -> np.ndarray:
        raise AssertionError("trained")

    for num_members in (0, 3):
        with pytest.raises(UserError, match="of a pool of 2"):
            nes_random_search(never, [0], pool=random_pool(TINY, 2, seed=0), num_members=num_members)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_forward_select_equals_greedy_selection_on_all_classes(seed: int, num_members: int) -> None:
    generator = np.random.default_rng(seed)
    members = generator.dirichlet(np.ones(4), size=(6, 9))
    labels = generator.integers(4, size=9)
    expected = greedy_selection(members, labels, num_members=num_members)
    assert forward_select(members[:, np.arange(9), labels], num_members) == expected
