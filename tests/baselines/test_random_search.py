"""Pools of random cells and deviations, and NES-RS by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnas_ens.baselines import Evaluations, deviations_sharing, nes_random_search, random_pool
from dnas_ens.baselines.evaluations import forward_select
from dnas_ens.ensembles.selection import greedy_selection
from dnas_ens.errors import UserError
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace

SPACE = SearchSpace(operations=("none", "skip_connect", "sep_conv_3x3", "max_pool_3x3", "avg_pool_3x3"))
TINY = SearchSpace(operations=("a", "b"), num_nodes=1, cell_types=("normal",))
# Probability of the right class on two images, as in the tests of selection: A, then C, then B by hand.
TRACED = [(0.9, 0.3), (0.8, 0.3), (0.2, 0.9), (0.5, 0.5)]


def binary(right: tuple[float, ...]) -> np.ndarray:
    return np.stack([np.array(right), 1 - np.array(right)], axis=1)


def traced(_: Genotype, index: int) -> np.ndarray:
    return binary(TRACED[index])


def never(*_: object) -> np.ndarray:
    raise AssertionError("trained")


def test_a_random_pool_is_seeded_distinct_and_of_the_space() -> None:
    pool = random_pool(SPACE, 30, seed=4)
    assert pool == random_pool(SPACE, 30, seed=4)
    assert pool[:10] == random_pool(SPACE, 10, seed=4)
    assert pool != random_pool(SPACE, 30, seed=5)
    assert len({genotype.canonical_hash() for genotype in pool}) == 30
    for genotype in pool:
        assert (genotype.num_nodes, genotype.num_edges) == (4, 16)
        assert genotype.operations <= set(SPACE.operations) - {"none"}


@pytest.mark.parametrize(
    ("space", "edges_per_node", "size"),
    [
        # One node that takes both inputs, each with one of two operations: 4 genotypes.
        (TINY, 2, 4),
        # Sources (0 | 1) x (0 | 1 | 2) of one operation make 6; the twins (0, 1) and (1, 0) are one network.
        (SearchSpace(operations=("a",), num_nodes=2, cell_types=("normal",)), 1, 5),
    ],
)
def test_a_space_is_drawn_to_its_last_genotype(space: SearchSpace, edges_per_node: int, size: int) -> None:
    assert len(set(random_pool(space, size, seed=0, edges_per_node=edges_per_node))) == size
    with pytest.raises(UserError, match=f"only {size} are different"):
        random_pool(space, size + 1, seed=0, edges_per_node=edges_per_node)
    with pytest.raises(UserError, match="pool of 0"):
        random_pool(space, 0, seed=0)


def test_deviations_share_as_many_edges_as_asked() -> None:
    base = random_pool(SPACE, 1, seed=0)[0]
    wanted = [15, 12, 8, 12]
    pool = deviations_sharing(base, wanted, operations=SPACE.operations, seed=1)
    assert [genotype.shared_edges(base) for genotype in pool] == wanted
    assert len({genotype.canonical() for genotype in pool}) == 4
    assert pool == deviations_sharing(base, wanted, operations=SPACE.operations, seed=1)
    with pytest.raises(UserError, match="nearest found has 15"):
        deviations_sharing(base, [16], operations=SPACE.operations, seed=1)


def test_random_search_by_hand() -> None:
    pool = random_pool(TINY, 4, seed=0)
    seen = []

    def train(genotype: Genotype, index: int) -> np.ndarray:
        seen.append((genotype, index))
        return traced(genotype, index)

    found = nes_random_search(train, [0, 0], pool=pool, num_members=2)
    assert seen == [(genotype, index) for index, genotype in enumerate(pool)]
    assert (found.picked, found.members, found.pool) == ((0, 2), (pool[0], pool[2]), tuple(pool))
    # Averages 0.55 and 0.60.
    assert found.val_nll == pytest.approx(-(math.log(0.55) + math.log(0.6)) / 2, abs=1e-6)
    np.testing.assert_allclose(found.val_probs, np.stack([binary(TRACED[0]), binary(TRACED[2])]), rtol=1e-6)


def test_nothing_is_trained_twice(tmp_path) -> None:
    pool = random_pool(TINY, 4, seed=0)
    trained = []

    def train(genotype: Genotype, index: int) -> np.ndarray:
        trained.append(index)
        if trained == [0, 1, 2]:
            raise KeyboardInterrupt
        return traced(genotype, index)

    with pytest.raises(KeyboardInterrupt):
        nes_random_search(train, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    found = nes_random_search(train, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    assert trained == [0, 1, 2, 2, 3]
    again = nes_random_search(never, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    assert again.picked == found.picked == (0, 2)
    assert np.array_equal(again.val_probs, found.val_probs)
    with pytest.raises(UserError, match="other validation images"):
        nes_random_search(never, [1, 0], pool=pool, num_members=1, folder=tmp_path)
    # An evaluation that was interrupted while it was written is done again.
    evaluations = Evaluations(train, [0, 0], folder=tmp_path)
    (evaluations.folder_of(pool[3], 3) / "genotype.json").unlink()
    for _ in range(2):
        evaluations.val_probs(pool[3], 3)
    assert trained[5:] == [3]


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


@pytest.mark.parametrize("num_members", [0, 3])
def test_more_members_than_the_pool_holds_are_refused_before_training(num_members: int) -> None:
    with pytest.raises(UserError, match="of a pool of 2"):
        nes_random_search(never, [0], pool=random_pool(TINY, 2, seed=0), num_members=num_members)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_forward_select_equals_greedy_selection_on_all_classes(seed: int, num_members: int) -> None:
    generator = np.random.default_rng(seed)
    members = generator.dirichlet(np.ones(4), size=(6, 9))
    labels = generator.integers(4, size=9)
    expected = greedy_selection(members, labels, num_members=num_members)
    assert forward_select(members[:, np.arange(9), labels], num_members) == expected
    rounded = np.nextafter(np.float32(1), np.float32(2))
    assert forward_select([[rounded, 0.5], [0.2, 0.3]], 1) == [0]
