"""Regularised evolution: ageing, tournament and parent candidates by hand; seeds, resuming, bad input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.baselines.evolution_state import EvolutionConfig
from dnas_ens.baselines.random_search import random_pool
from dnas_ens.baselines.regularised_evolution import RegularisedEvolution, nes_regularised_evolution
from dnas_ens.errors import UserError
from dnas_ens.run.files import load_tensors
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace

SPACE = SearchSpace(operations=("skip_connect", "sep_conv_3x3", "max_pool_3x3"), num_nodes=2)


def binary(*right: float) -> np.ndarray:
    return np.stack([np.array(right), 1 - np.array(right)], axis=1)


class Traced:
    """A training whose result depends on the index alone, and that notes its calls."""

    def __init__(self, *right: tuple[float, ...]) -> None:
        self.right, self.calls = right, []

    def __call__(self, genotype: Genotype, index: int) -> np.ndarray:
        self.calls.append((genotype, index))
        return binary(*self.right[index])


def by_operations(genotype: Genotype, index: int) -> np.ndarray:
    """More separable convolutions, more probability for the right class; each index a little different."""
    count = sum(
        name == "sep_conv_3x3" for cell_type in genotype.cell_types for name, _ in genotype.edges(cell_type)
    )
    noise = np.random.default_rng(index).uniform(-0.05, 0.05, size=6)
    return binary(*np.clip(0.2 + 0.08 * count + noise, 0.01, 0.99))


def edits(parent: Genotype, child: Genotype) -> int:
    return sum(
        one != other
        for cell_type in parent.cell_types
        for one, other in zip(parent.edges(cell_type), child.edges(cell_type), strict=True)
    )


def test_ageing_by_hand() -> None:
    # P = 3, one parent candidate, so the parent is the fittest of those alive.
    # Alive 0 1 2 (0.5, 0.9, 0.6): 1 has the child 3. Alive 1 2 3 (0.9, 0.6, 0.7): 1 has 4. Now 1, the fittest
    # ever, has died of age: alive 2 3 4 (0.6, 0.7, 0.4): 3 has 5. Alive 3 4 5 (0.7, 0.4, 0.8): 5 has 6.
    train = Traced((0.5,), (0.9,), (0.6,), (0.7,), (0.4,), (0.8,), (0.3,))
    config = EvolutionConfig(population_size=3, num_parents=1, seed=0)
    evolution = RegularisedEvolution(train, [0], space=SPACE, config=config)
    populations, parents = [], []
    for _ in range(7):
        parents.append(evolution.step().parent)
        populations.append(evolution.population)
    assert parents == [None, None, None, 1, 1, 3, 5]
    assert populations == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert [index for _, index in train.calls] == list(range(7))
    for individual in evolution.history[3:]:
        assert edits(evolution.history[individual.parent].genotype, individual.genotype) == 1
        right = train.right[individual.index][0]
        assert individual.val_nll == pytest.approx(-math.log(right), abs=1e-6)
    # The dead stay in the pool: 1 and 5 are the best two of all.
    found = evolution.select(2)
    assert found.picked == (1, 5)
    assert found.parents == (None, None, None, 1, 1, 3, 5)
    assert evolution.select(2, num_evaluations=5).picked == (1, 3)


def test_parents_are_chosen_for_their_ensemble_by_hand() -> None:
    # Two images. ForwardSelect picks A (0.9, 0.3) first, then C (0.2, 0.9): averages (0.55, 0.60), product 0.33,
    # against B (0.8, 0.3) with (0.85, 0.30), 0.255, though B alone is fitter than C (0.24 against 0.18).
    train = Traced((0.9, 0.3), (0.8, 0.3), (0.2, 0.9), *[(0.1, 0.1)] * 40)
    parents = []
    for seed in range(40):
        config = EvolutionConfig(population_size=3, num_parents=2, seed=seed)
        evolution = RegularisedEvolution(train, [0, 0], space=SPACE, config=config)
        evolution.run(4)
        parents.append(evolution.history[3].parent)
    # Drawn uniformly from {A, C}; within four standard deviations of one half.
    assert set(parents) == {0, 2}
    assert abs(parents.count(0) - 20) <= 12


def test_tournament_by_hand() -> None:
    # P = 3 with fitness 0.9 > 0.6 > 0.5. Of two drawn at random the fitter wins: 0 in two of three pairs, 1 in
    # one, 2 never. A tournament of one is a uniform draw; one of three always goes to 0.
    train = Traced((0.9,), (0.6,), (0.5,))
    wins = {}
    for size in (1, 2, 3):
        config = EvolutionConfig(population_size=3, num_parents=1, tournament_size=size)
        evolution = RegularisedEvolution(train, [0], space=SPACE, config=config)
        evolution.run(3)
        generator = np.random.default_rng(0)
        drawn = [evolution.choose_parent(generator) for _ in range(900)]
        wins[size] = [drawn.count(index) for index in range(3)]
    np.testing.assert_allclose(wins[1], [300, 300, 300], atol=60)
    np.testing.assert_allclose(wins[2], [600, 300, 0], atol=60)
    assert wins[2][2] == 0
    assert wins[3] == [900, 0, 0]


def test_the_first_population_is_the_beginning_of_the_random_pool() -> None:
    config = EvolutionConfig(population_size=4, num_parents=2, seed=6)
    evolution = RegularisedEvolution(by_operations, [0] * 6, space=SPACE, config=config)
    evolution.run(6)
    first = [individual.genotype for individual in evolution.history[:4]]
    assert first == random_pool(SPACE, 9, seed=6)[:4]


def test_a_given_first_population() -> None:
    initial = random_pool(SPACE, 2, seed=11)
    config = EvolutionConfig(population_size=2, num_parents=1)
    evolution = RegularisedEvolution(by_operations, [0] * 6, space=SPACE, config=config, initial=initial)
    evolution.run(3)
    assert [individual.genotype for individual in evolution.history[:2]] == initial
    for wrong in (initial[:1], []):
        with pytest.raises(UserError, match=f"has {len(wrong)} genotypes"):
            RegularisedEvolution(by_operations, [0] * 6, space=SPACE, config=config, initial=wrong)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 5), st.data())
def test_every_child_is_one_edit_from_someone_alive(seed: int, size: int, data: st.DataObject) -> None:
    num_parents = data.draw(st.integers(1, size))
    config = EvolutionConfig(population_size=size, num_parents=num_parents, seed=seed)
    evolution = RegularisedEvolution(by_operations, [0] * 6, space=SPACE, config=config)
    evolution.run(size + 6)
    for individual in evolution.history[size:]:
        assert individual.index - size <= individual.parent < individual.index
        assert edits(evolution.history[individual.parent].genotype, individual.genotype) == 1


def test_evolution_finds_better_cells_than_it_began_with() -> None:
    config = EvolutionConfig(population_size=6, num_parents=2, seed=0)
    evolution = RegularisedEvolution(by_operations, [0] * 6, space=SPACE, config=config)
    evolution.run(60)
    losses = [individual.val_nll for individual in evolution.history]
    assert np.mean(losses[-6:]) < np.min(losses[:6])


def test_a_seed_decides_everything() -> None:
    def course(seed: int) -> list[Genotype]:
        config = EvolutionConfig(population_size=4, num_parents=2, seed=seed)
        evolution = RegularisedEvolution(by_operations, [0] * 6, space=SPACE, config=config)
        evolution.run(12)
        return [individual.genotype for individual in evolution.history]

    assert course(1) == course(1)
    assert course(1) != course(2)


def test_an_interrupted_evolution_goes_on_where_it_stopped(tmp_path) -> None:
    config = EvolutionConfig(population_size=3, num_parents=2, tournament_size=3, seed=2)
    arguments = {"space": SPACE, "config": config, "num_evaluations": 9, "num_members": 3}
    whole = nes_regularised_evolution(by_operations, [0] * 6, **arguments)
    trained = []

    def interrupted_after(limit: int):
        def train(genotype: Genotype, index: int) -> np.ndarray:
            if len(trained) == limit:
                raise KeyboardInterrupt
            trained.append(index)
            return by_operations(genotype, index)

        return train

    for limit in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            nes_regularised_evolution(interrupted_after(limit), [0] * 6, folder=tmp_path, **arguments)
    # The state is behind the last evaluation, as after a kill between the two writes.
    state = json.loads((tmp_path / "evolution.json").read_text())
    (tmp_path / "evolution.json").write_text(json.dumps({**state, "history": state["history"][:-1]}))
    resumed = nes_regularised_evolution(interrupted_after(99), [0] * 6, folder=tmp_path, **arguments)
    assert trained == list(range(9))
    assert resumed.pool == whole.pool
    assert resumed.picked == whole.picked
    assert resumed.parents == whole.parents
    assert np.array_equal(resumed.val_probs, whole.val_probs)
    # A longer budget goes on, a shorter one is what it was.
    longer = nes_regularised_evolution(
        interrupted_after(99), [0] * 6, folder=tmp_path, **{**arguments, "num_evaluations": 11}
    )
    assert longer.pool[:9] == whole.pool
    assert trained == list(range(11))
    shorter = nes_regularised_evolution(interrupted_after(99), [0] * 6, folder=tmp_path, **arguments)
    assert shorter.picked == whole.picked
    assert len(shorter.pool) == 9


def test_the_state_says_where_everything_lies(tmp_path) -> None:
    config = EvolutionConfig(population_size=2, num_parents=1, seed=5)
    evolution = RegularisedEvolution(by_operations, [0] * 6, space=SPACE, config=config, folder=tmp_path)
    evolution.run(4)
    state = json.loads((tmp_path / "evolution.json").read_text())
    assert state["settings"]["seed"] == 5
    assert state["settings"]["space"]["num_nodes"] == 2
    for entry, individual in zip(state["history"], evolution.history, strict=True):
        assert Genotype.from_dict(entry["genotype"]) == individual.genotype
        assert entry["seed"] == [5, individual.index]
        assert entry["parent"] == individual.parent
        probs = load_tensors(tmp_path / entry["val_probs"])["val_probs"].numpy()
        np.testing.assert_allclose(probs, by_operations(individual.genotype, individual.index), rtol=1e-6)
        folder = evolution.evaluations.folder_of(individual.genotype, individual.index)
        assert folder == (tmp_path / entry["val_probs"]).parent


def test_a_folder_of_another_evolution_is_refused(tmp_path) -> None:
    def begin(labels: list[int], space: SearchSpace = SPACE, **fields: int) -> None:
        config = EvolutionConfig(**{"population_size": 2, "num_parents": 1, **fields})
        evolution = RegularisedEvolution(by_operations, labels, space=space, config=config, folder=tmp_path)
        evolution.run(3)

    begin([0] * 6)
    with pytest.raises(UserError, match="another num_parents"):
        begin([0] * 6, num_parents=2)
    with pytest.raises(UserError, match="another seed"):
        begin([0] * 6, seed=1)
    with pytest.raises(UserError, match="another space"):
        begin([0] * 6, space=SearchSpace(operations=(*SPACE.operations, "avg_pool_3x3"), num_nodes=2))
    with pytest.raises(UserError, match="other validation images"):
        begin([0, 0, 0, 0, 0, 1])
    (tmp_path / "evolution.json").write_text('{"settings": [], "history": [{}]}')
    with pytest.raises(UserError, match="no state of an evolution"):
        begin([0] * 6)


@pytest.mark.parametrize(
    "fields",
    [
        {"population_size": 0, "num_parents": 0},
        {"population_size": 3, "num_parents": 4},
        {"population_size": 3, "num_parents": 2, "tournament_size": 1},
        {"population_size": 3, "num_parents": 2, "tournament_size": 4},
    ],
)
def test_impossible_numbers(fields: dict[str, int]) -> None:
    with pytest.raises(UserError, match="not possible"):
        EvolutionConfig(**fields)


def test_budgets_that_are_too_small() -> None:
    config = EvolutionConfig(population_size=3, num_parents=1)
    for num_evaluations, num_members in ((2, 1), (3, 4), (3, 0)):
        with pytest.raises(UserError, match="evaluations are too few"):
            nes_regularised_evolution(
                by_operations,
                [0] * 6,
                space=SPACE,
                config=config,
                num_evaluations=num_evaluations,
                num_members=num_members,
            )
    evolution = RegularisedEvolution(by_operations, [0] * 6, space=SPACE, config=config)
    with pytest.raises(UserError, match="Nothing has been trained"):
        evolution.select(1)
