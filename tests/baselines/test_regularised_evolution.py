"""Regularised evolution: mutation, ageing, tournament and parent candidates by hand; seeds, resuming, bad input."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.baselines import (
    EvolutionConfig,
    RegularisedEvolution,
    mutate,
    nes_regularised_evolution,
    random_pool,
)
from dnas_ens.errors import UserError
from dnas_ens.run.files import load_tensors
from dnas_ens.space.genotype import CELL_TYPES, Genotype, random_genotype
from dnas_ens.space.search_space import SearchSpace

OPERATIONS = ("skip_connect", "sep_conv_3x3", "max_pool_3x3")
SPACE = SearchSpace(operations=OPERATIONS, num_nodes=2)
LABELS = [0] * 6


def binary(*right: float) -> np.ndarray:
    return np.stack([np.array(right), 1 - np.array(right)], axis=1)


def by_operations(genotype: Genotype, index: int) -> np.ndarray:
    """More separable convolutions, more probability for the right class; each index a little different."""
    count = sum(name == "sep_conv_3x3" for cell_type in genotype.cell_types for name, _ in genotype.edges(cell_type))
    noise = np.random.default_rng(index).uniform(-0.05, 0.05, size=6)
    return binary(*np.clip(0.2 + 0.08 * count + noise, 0.01, 0.99))


def evolution(*right: tuple[float, ...], initial=None, folder=None, **fields) -> RegularisedEvolution:
    """An evolution whose training gives probabilities by the index, or ``by_operations`` where there are none."""
    labels = [0] * len(right[0]) if right else LABELS
    train = (lambda genotype, index: binary(*right[index])) if right else by_operations
    config = EvolutionConfig(**fields)
    return RegularisedEvolution(train, labels, space=SPACE, config=config, initial=initial, folder=folder)


def slots(genotype: Genotype) -> dict[tuple[str, int, int], tuple[str, int]]:
    return {
        (cell_type, node, position): edge
        for cell_type in genotype.cell_types
        for node, edges in enumerate(genotype.cell(cell_type))
        for position, edge in enumerate(edges)
    }


def edits(parent: Genotype, child: Genotype) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    before, after = slots(parent), slots(child)
    assert before.keys() == after.keys()
    return [(before[slot], after[slot]) for slot in before if before[slot] != after[slot]]


class TestMutation:
    @given(
        st.integers(0, 2**32 - 1),
        st.integers(1, 5),
        st.integers(1, 3),
        st.sampled_from([("normal",), ("reduction",), CELL_TYPES]),
        st.integers(2, 3),
    )
    def test_a_mutant_is_valid_and_one_edit_away(
        self, seed, num_nodes, edges_per_node, cell_types, num_operations
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
        [((operation, source), (new_operation, new_source))] = edits(parent, child)
        assert (operation == new_operation) != (source == new_source)
        assert child.operations <= set(operations)
        assert child.canonical() != parent.canonical()

    def test_every_neighbour_is_reached_with_the_rates_by_hand(self) -> None:
        # One node of inputs 0 and 1 cannot change a source; node 1 can, to the one source that is free.
        parent = Genotype(normal=((("a", 0), ("b", 1)), (("a", 0), ("a", 2))))
        generator, draws = np.random.default_rng(0), 4000
        counts = Counter(mutate(parent, operations=("a", "b"), generator=generator) for _ in range(draws))
        # Half the draws change an operation, 1/8 each; half a source, 1/4 each.
        shares = {
            ((("b", 0), ("b", 1)), (("a", 0), ("a", 2))): 1 / 8,
            ((("a", 0), ("a", 1)), (("a", 0), ("a", 2))): 1 / 8,
            ((("a", 0), ("b", 1)), (("b", 0), ("a", 2))): 1 / 8,
            ((("a", 0), ("b", 1)), (("a", 0), ("b", 2))): 1 / 8,
            ((("a", 0), ("b", 1)), (("a", 1), ("a", 2))): 1 / 4,
            ((("a", 0), ("b", 1)), (("a", 0), ("a", 1))): 1 / 4,
        }
        assert {mutant.normal for mutant in counts} == shares.keys()
        for mutant, count in counts.items():
            share = shares[mutant.normal]
            # Within five standard deviations.
            assert abs(count - share * draws) < 5 * (draws * share * (1 - share)) ** 0.5

    def test_a_renumbering_is_no_mutation(self) -> None:
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

    def test_nothing_to_change(self) -> None:
        parent = Genotype(normal=((("a", 0), ("a", 1)),))
        with pytest.raises(UserError, match="No edge"):
            mutate(parent, operations=("a", "none"), generator=np.random.default_rng(0))


def test_ageing_by_hand() -> None:
    # P = 3, one parent candidate, so the parent is the fittest of those alive.
    # Alive 0 1 2 (0.5, 0.9, 0.6): 1 has the child 3. Alive 1 2 3 (0.9, 0.6, 0.7): 1 has 4. Now 1, the fittest
    # ever, has died of age: alive 2 3 4 (0.6, 0.7, 0.4): 3 has 5. Alive 3 4 5 (0.7, 0.4, 0.8): 5 has 6.
    right = (0.5, 0.9, 0.6, 0.7, 0.4, 0.8, 0.3)
    evolving = evolution(*[(value,) for value in right], population_size=3, num_parents=1)
    populations, parents = [], []
    for _ in range(7):
        parents.append(evolving.step().parent)
        populations.append(evolving.population)
    assert parents == [None, None, None, 1, 1, 3, 5]
    assert populations == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    for individual in evolving.history[3:]:
        assert len(edits(evolving.history[individual.parent].genotype, individual.genotype)) == 1
        assert individual.val_nll == pytest.approx(-math.log(right[individual.index]), abs=1e-6)
    # The dead stay in the pool: 1 and 5 are the best two of all.
    found = evolving.select(2)
    assert (found.picked, found.parents) == ((1, 5), tuple(parents))
    assert evolving.select(2, num_evaluations=5).picked == (1, 3)


def test_parents_are_chosen_for_their_ensemble_by_hand() -> None:
    # Two images. ForwardSelect picks A (0.9, 0.3) first, then C (0.2, 0.9): averages (0.55, 0.60), product 0.33,
    # against B (0.8, 0.3) with (0.85, 0.30), 0.255, though B alone is fitter than C (0.24 against 0.18).
    right = ((0.9, 0.3), (0.8, 0.3), (0.2, 0.9), (0.1, 0.1))
    parents = []
    for seed in range(40):
        evolving = evolution(*right, population_size=3, num_parents=2, seed=seed)
        evolving.run(4)
        parents.append(evolving.history[3].parent)
    # Drawn uniformly from {A, C}; within four standard deviations of one half.
    assert set(parents) == {0, 2}
    assert abs(parents.count(0) - 20) <= 12


@pytest.mark.parametrize(("size", "wins"), [(1, [300, 300, 300]), (2, [600, 300, 0]), (3, [900, 0, 0])])
def test_tournament_by_hand(size: int, wins: list[int]) -> None:
    # P = 3 with fitness 0.9 > 0.6 > 0.5. Of two drawn at random the fitter wins: 0 in two of three pairs, 1 in
    # one, 2 never. A tournament of one is a uniform draw; one of three always goes to 0.
    evolving = evolution((0.9,), (0.6,), (0.5,), population_size=3, num_parents=1, tournament_size=size)
    evolving.run(3)
    generator = np.random.default_rng(0)
    drawn = Counter(evolving.choose_parent(generator) for _ in range(900))
    np.testing.assert_allclose([drawn[index] for index in range(3)], wins, atol=60)
    assert set(drawn) == {index for index, count in enumerate(wins) if count}


def test_the_first_population_is_given_or_the_beginning_of_the_random_pool() -> None:
    drawn = evolution(population_size=4, num_parents=2, seed=6)
    drawn.run(5)
    assert [individual.genotype for individual in drawn.history[:4]] == random_pool(SPACE, 9, seed=6)[:4]
    initial = random_pool(SPACE, 2, seed=11)
    given_ = evolution(population_size=2, num_parents=1, initial=initial)
    given_.run(3)
    assert [individual.genotype for individual in given_.history[:2]] == initial
    for wrong in (initial[:1], []):
        with pytest.raises(UserError, match=f"has {len(wrong)} genotypes"):
            evolution(population_size=2, num_parents=1, initial=wrong)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 5), st.data())
def test_every_child_is_one_edit_from_someone_alive(seed: int, size: int, data: st.DataObject) -> None:
    evolving = evolution(population_size=size, num_parents=data.draw(st.integers(1, size)), seed=seed)
    evolving.run(size + 6)
    for individual in evolving.history[size:]:
        assert individual.index - size <= individual.parent < individual.index
        assert len(edits(evolving.history[individual.parent].genotype, individual.genotype)) == 1


def test_evolution_finds_better_cells_and_a_seed_decides_everything() -> None:
    def course(seed: int) -> list[tuple[Genotype, float]]:
        evolving = evolution(population_size=6, num_parents=2, seed=seed)
        evolving.run(60)
        return [(individual.genotype, individual.val_nll) for individual in evolving.history]

    found = course(0)
    assert found == course(0)
    assert found != course(1)
    losses = [loss for _, loss in found]
    assert np.mean(losses[-6:]) < np.min(losses[:6])


def test_an_interrupted_evolution_goes_on_where_it_stopped(tmp_path) -> None:
    config = EvolutionConfig(population_size=3, num_parents=2, tournament_size=3, seed=2)
    arguments = {"space": SPACE, "config": config, "num_evaluations": 9, "num_members": 3}
    whole = nes_regularised_evolution(by_operations, LABELS, **arguments)
    trained = []

    def evolve(limit: int = 99, **changes: int):
        def train(genotype: Genotype, index: int) -> np.ndarray:
            if len(trained) == limit:
                raise KeyboardInterrupt
            trained.append(index)
            return by_operations(genotype, index)

        return nes_regularised_evolution(train, LABELS, folder=tmp_path, **{**arguments, **changes})

    for limit in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            evolve(limit)
    # The state is behind the last evaluation, as after a kill between the two writes.
    state = json.loads((tmp_path / "evolution.json").read_text())
    (tmp_path / "evolution.json").write_text(json.dumps({**state, "history": state["history"][:-1]}))
    resumed = evolve()
    assert trained == list(range(9))
    assert (resumed.pool, resumed.picked, resumed.parents) == (whole.pool, whole.picked, whole.parents)
    assert np.array_equal(resumed.val_probs, whole.val_probs)
    # A longer budget goes on, a shorter one is what it was.
    assert evolve(num_evaluations=11).pool[:9] == whole.pool
    assert trained == list(range(11))
    shorter = evolve()
    assert (shorter.picked, len(shorter.pool)) == (whole.picked, 9)


def test_the_state_says_where_everything_is(tmp_path) -> None:
    evolving = evolution(population_size=2, num_parents=1, seed=5, folder=tmp_path)
    evolving.run(4)
    state = json.loads((tmp_path / "evolution.json").read_text())
    assert (state["settings"]["seed"], state["settings"]["space"]["num_nodes"]) == (5, 2)
    for entry, individual in zip(state["history"], evolving.history, strict=True):
        assert Genotype.from_dict(entry["genotype"]) == individual.genotype
        assert (entry["seed"], entry["parent"]) == ([5, individual.index], individual.parent)
        probs = load_tensors(tmp_path / entry["val_probs"])["val_probs"].numpy()
        np.testing.assert_allclose(probs, by_operations(individual.genotype, individual.index), rtol=1e-6)
        folder = evolving.evaluations.folder_of(individual.genotype, individual.index)
        assert folder == (tmp_path / entry["val_probs"]).parent


def test_a_folder_of_another_evolution_is_refused(tmp_path) -> None:
    def begin(labels: list[int] = LABELS, space: SearchSpace = SPACE, **fields: int) -> None:
        config = EvolutionConfig(**{"population_size": 2, "num_parents": 1, **fields})
        RegularisedEvolution(by_operations, labels, space=space, config=config, folder=tmp_path).run(3)

    begin()
    other_space = SearchSpace(operations=(*OPERATIONS, "avg_pool_3x3"), num_nodes=2)
    for changes, cause in (
        ({"num_parents": 2}, "another num_parents"),
        ({"seed": 1}, "another seed"),
        ({"space": other_space}, "another space"),
        ({"labels": [0, 0, 0, 0, 0, 1]}, "other validation images"),
    ):
        with pytest.raises(UserError, match=cause):
            begin(**changes)
    (tmp_path / "evolution.json").write_text('{"settings": [], "history": [{}]}')
    with pytest.raises(UserError, match="not the state of an evolution"):
        begin()


@pytest.mark.parametrize(("population", "parents", "tournament"), [(0, 0, None), (3, 4, None), (3, 2, 1), (3, 2, 4)])
def test_impossible_numbers(population: int, parents: int, tournament: int | None) -> None:
    with pytest.raises(UserError, match="not possible"):
        EvolutionConfig(population_size=population, num_parents=parents, tournament_size=tournament)


@pytest.mark.parametrize(("num_evaluations", "num_members"), [(2, 1), (3, 4), (3, 0)])
def test_budgets_that_are_too_small(num_evaluations: int, num_members: int) -> None:
    config = EvolutionConfig(population_size=3, num_parents=1)
    budget = {"num_evaluations": num_evaluations, "num_members": num_members}
    with pytest.raises(UserError, match="evaluations are too few"):
        nes_regularised_evolution(by_operations, LABELS, space=SPACE, config=config, **budget)
    with pytest.raises(UserError, match="Nothing has been trained"):
        evolution(population_size=3, num_parents=1).select(1)
