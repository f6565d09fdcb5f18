"""Pools of random cells, NES-RS and NES-RE by hand; seeds, resuming, bad input."""

import json
import math
from collections import Counter
from operator import itemgetter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnas_ens.baselines import (
    Evaluations,
    EvolutionConfig,
    RegularisedEvolution,
    deviations_sharing,
    mutate,
    nes_random_search,
    nes_regularised_evolution,
    random_pool,
)
from dnas_ens.errors import UserError
from dnas_ens.run.files import load_tensors, read_json
from dnas_ens.space.genotype import CELL_TYPES, Genotype, random_genotype
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import SPACES

OPERATIONS = ("skip_connect", "sep_conv_3x3", "max_pool_3x3")
SPACE = SearchSpace(operations=OPERATIONS, num_nodes=2)
LARGE = SearchSpace(operations=("none", *OPERATIONS, "avg_pool_3x3"))
TINY = SearchSpace(operations=("a", "b"), num_nodes=1, cell_types=("normal",))
LABELS = [0] * 6
# Probability of the right class on two images, as in the tests of selection: A, then C, then B by hand.
TRACED = [(0.9, 0.3), (0.8, 0.3), (0.2, 0.9), (0.5, 0.5)]


def binary(*right):
    return np.stack([np.array(right), 1 - np.array(right)], axis=1)


def never(*_):
    raise AssertionError("trained")


@pytest.mark.parametrize(
    ("space", "num_edges"),
    [(LARGE, {16}), (SearchSpace(name="efficient", operations=LARGE.operations), {*range(8, 15)})],
)
def test_a_random_pool_is_seeded_distinct_and_of_the_space(space, num_edges):
    pool = random_pool(space, 30, seed=4)
    assert pool == random_pool(space, 30, seed=4)
    assert pool[:10] == random_pool(space, 10, seed=4)
    assert pool != random_pool(space, 30, seed=5)
    assert len({genotype.canonical_hash() for genotype in pool}) == 30
    for genotype in pool:
        assert (genotype.space, genotype.num_nodes) == (space.name, 4)
        assert genotype.num_edges in num_edges
        assert genotype.operations <= set(space.operations) - {"none"}


def test_a_space_is_drawn_to_its_last_genotype():
    # Sources (0 | 1) x (0 | 1 | 2) of one operation make 6; the twins (0, 1) and (1, 0) are one network.
    twins = SearchSpace(operations=("a",), num_nodes=2, cell_types=("normal",))
    # One node that takes both inputs, each with one of two operations: 4 genotypes. The second node of a cell of one
    # input takes the first node, with or without the input: 2.
    chain = SearchSpace(name="efficient", operations=("a",), num_nodes=2, cell_types=("normal",))
    for space, edges_per_node, size in ((TINY, 2, 4), (twins, 1, 5), (chain, 2, 2)):
        assert len(set(random_pool(space, size, seed=0, edges_per_node=edges_per_node))) == size
        with pytest.raises(UserError, match=f"only {size} are different"):
            random_pool(space, size + 1, seed=0, edges_per_node=edges_per_node)
    with pytest.raises(UserError, match="pool of 0"):
        random_pool(TINY, 0, seed=0)


def test_deviations_share_as_many_edges_as_asked():
    base = random_pool(LARGE, 1, seed=0)[0]
    wanted = [15, 12, 8, 12]
    pool = deviations_sharing(base, wanted, operations=LARGE.operations, seed=1)
    assert [genotype.shared_edges(base) for genotype in pool] == wanted
    assert len({genotype.canonical() for genotype in pool}) == 4
    assert pool == deviations_sharing(base, wanted, operations=LARGE.operations, seed=1)
    with pytest.raises(UserError, match="nearest found has 15"):
        deviations_sharing(base, [16], operations=LARGE.operations, seed=1)


def test_random_search_by_hand_trains_nothing_twice(tmp_path):
    pool = random_pool(TINY, 4, seed=0)
    trained = []

    def train(genotype, index):
        trained.append(index)
        if trained == [0, 1, 2]:
            raise KeyboardInterrupt
        assert genotype == pool[index]
        return binary(*TRACED[index])

    with pytest.raises(KeyboardInterrupt):
        nes_random_search(train, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    found = nes_random_search(train, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    assert trained == [0, 1, 2, 2, 3]
    assert (found.picked, found.members, found.pool) == ((0, 2), (pool[0], pool[2]), tuple(pool))
    # Averages 0.55 and 0.60.
    assert found.val_nll == pytest.approx(-(math.log(0.55) + math.log(0.6)) / 2, abs=1e-6)
    np.testing.assert_allclose(found.val_probs, np.stack([binary(*TRACED[0]), binary(*TRACED[2])]), rtol=1e-6)
    again = nes_random_search(never, [0, 0], pool=pool, num_members=2, folder=tmp_path)
    assert again.picked == found.picked
    assert np.array_equal(again.val_probs, found.val_probs)
    with pytest.raises(UserError, match="other validation images"):
        nes_random_search(never, [1, 0], pool=pool, num_members=1, folder=tmp_path)
    # An evaluation that was interrupted while it was written is done again.
    evaluations = Evaluations(train, [0, 0], folder=tmp_path)
    (evaluations.folder_of(pool[3], 3) / "genotype.json").unlink()
    for _ in range(2):
        evaluations.val_probs(pool[3], 3)
    assert trained[5:] == [3]


def test_training_that_fails_is_named_and_too_many_members_before_it():
    pool = random_pool(TINY, 2, seed=0)
    for probs, cause in ((np.full((2, 2), np.nan), "finite"), (np.full((3, 2), 0.5), r"shape \(3,\)")):
        with pytest.raises(UserError, match=f"training of genotype 0 .*{cause}"):
            nes_random_search(lambda *_, probs=probs: probs, [0, 1], pool=pool, num_members=1)
    for num_members in (0, 3):
        with pytest.raises(UserError, match="of a pool of 2"):
            nes_random_search(never, [0], pool=pool, num_members=num_members)


def by_operations(genotype, index):
    """More separable convolutions, more probability for the right class; each index a little different."""
    count = sum(name == "sep_conv_3x3" for cell_type in genotype.cell_types for name, _ in genotype.edges(cell_type))
    noise = np.random.default_rng(index).uniform(-0.05, 0.05, size=6)
    return binary(*np.clip(0.2 + 0.08 * count + noise, 0.01, 0.99))


def evolution(*right, initial=None, **fields):
    """An evolution whose training gives probabilities by the index, or ``by_operations`` where there are none."""
    labels = [0] * len(right[0]) if right else LABELS
    train = (lambda genotype, index: binary(*right[index])) if right else by_operations
    return RegularisedEvolution(train, labels, space=SPACE, config=EvolutionConfig(**fields), initial=initial)


def edits(parent, child):
    """The edges of the parent that the child has replaced, with what by."""
    found = []
    for cell_type in parent.cell_types:
        for before, after in zip(parent.cell(cell_type), child.cell(cell_type), strict=True):
            found += [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    return found


@given(
    st.integers(0),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([("normal",), CELL_TYPES]),
    st.sampled_from(sorted(SPACES)),
)
def test_a_mutant_is_valid_and_one_edit_away(seed, num_nodes, edges_per_node, cell_types, space):
    generator = np.random.default_rng(seed)
    sizes = {"num_nodes": num_nodes, "edges_per_node": edges_per_node, "cell_types": cell_types, "space": space}
    parent = random_genotype(generator, operations=OPERATIONS, **sizes)
    child = mutate(parent, operations=("none", *OPERATIONS), generator=generator)
    # The constructor validates; through JSON, so that nothing is taken over unchecked.
    assert Genotype.from_dict(child.to_dict()) == child
    if child.num_edges == parent.num_edges:
        [((operation, source), (new_operation, new_source))] = edits(parent, child)
        assert (operation == new_operation) != (source == new_source)
    else:
        assert space == "efficient"
        nodes = [
            (set(b), set(a)) for kind in cell_types for b, a in zip(parent.cell(kind), child.cell(kind), strict=True)
        ]
        assert sum(len(before ^ after) for before, after in nodes) == 1
        assert all(1 <= len(after) <= max(2, len(before)) for before, after in nodes)
    assert child.operations <= set(OPERATIONS)
    assert child.canonical() != parent.canonical()


def test_every_neighbour_is_reached_with_the_rates_by_hand():
    # One node of inputs 0 and 1 cannot change a source; node 1 can, to the one source that is free.
    parent = Genotype(normal=((("a", 0), ("b", 1)), (("a", 0), ("a", 2))))
    generator, draws = np.random.default_rng(0), 4000
    counts = Counter(mutate(parent, operations=("a", "b"), generator=generator).normal for _ in range(draws))
    # Half the draws change an operation, 1/8 each; half a source, 1/4 each.
    shares = {
        ((("b", 0), ("b", 1)), (("a", 0), ("a", 2))): 1 / 8,
        ((("a", 0), ("a", 1)), (("a", 0), ("a", 2))): 1 / 8,
        ((("a", 0), ("b", 1)), (("b", 0), ("a", 2))): 1 / 8,
        ((("a", 0), ("b", 1)), (("a", 0), ("b", 2))): 1 / 8,
        ((("a", 0), ("b", 1)), (("a", 1), ("a", 2))): 1 / 4,
        ((("a", 0), ("b", 1)), (("a", 0), ("a", 1))): 1 / 4,
    }
    assert counts.keys() == shares.keys()
    for mutant, share in shares.items():
        # Within five standard deviations.
        assert abs(counts[mutant] - share * draws) < 5 * (draws * share * (1 - share)) ** 0.5


def test_an_evolution_reaches_the_whole_space_of_one_input():
    # Node 0 has one edge; node 1 one of two, or both, in any operations: 2 * (2 + 2 + 4) cells, all from any other.
    generator, todo, found = np.random.default_rng(0), [Genotype(normal=((("a", 0),),) * 2, space="efficient")], set()
    while todo:
        parent = todo.pop()
        if parent not in found:
            found.add(parent)
            children = {mutate(parent, operations=("a", "b"), generator=generator) for _ in range(60)}
            sort = [[tuple(sorted(node, key=itemgetter(1))) for node in child.normal] for child in children]
            todo += [Genotype(normal=tuple(nodes), space="efficient") for nodes in sort]
    assert len(found) == 16


def test_a_renumbering_is_no_mutation():
    # Nodes 2 and 3 are twins, so moving node 4's edge from one to the other changes nothing.
    twins = ((("a", 0), ("a", 1)), (("a", 0), ("a", 1)), (("a", 0), ("a", 1), ("a", 2)))
    generator = np.random.default_rng(0)
    children = {mutate(Genotype(normal=twins), operations=("a",), generator=generator) for _ in range(50)}
    assert Genotype(normal=(*twins[:2], (("a", 0), ("a", 1), ("a", 3)))) not in children
    # Node 3 may take node 2 in place of either input; node 4 may take node 3 in place of either input.
    assert len(children) == 4
    with pytest.raises(UserError, match="No edge"):
        mutate(Genotype(normal=twins[:1]), operations=("a", "none"), generator=generator)


def test_ageing_by_hand():
    # P = 3, one parent candidate, so the parent is the fittest of those alive.
    # Alive 0 1 2 (0.5, 0.9, 0.6): 1 has the child 3. Alive 1 2 3 (0.9, 0.6, 0.7): 1 has 4. Now 1, the fittest
    # ever, has died of age: alive 2 3 4 (0.6, 0.7, 0.4): 3 has 5. Alive 3 4 5 (0.7, 0.4, 0.8): 5 has 6.
    right = (0.5, 0.9, 0.6, 0.7, 0.4, 0.8, 0.3)
    evolving = evolution(*[(value,) for value in right], population_size=3, num_parents=1)
    with pytest.raises(UserError, match="Nothing has been trained"):
        evolving.select(1)
    steps = [(evolving.step().parent, evolving.population) for _ in range(7)]
    parents = (None, None, None, 1, 1, 3, 5)
    populations = [0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]
    assert steps == list(zip(parents, populations, strict=True))
    for individual in evolving.history[3:]:
        assert len(edits(evolving.history[individual.parent].genotype, individual.genotype)) == 1
        assert individual.val_nll == pytest.approx(-math.log(right[individual.index]), abs=1e-6)
    # The dead stay in the pool: 1 and 5 are the best two of all.
    found = evolving.select(2)
    assert (found.picked, found.parents) == ((1, 5), parents)
    assert evolving.select(2, num_evaluations=5).picked == (1, 3)


def test_parents_are_chosen_for_their_ensemble_by_hand():
    # Two images. ForwardSelect picks A (0.9, 0.3) first, then C (0.2, 0.9): averages (0.55, 0.60), product 0.33,
    # against B (0.8, 0.3) with (0.85, 0.30), 0.255, though B alone is fitter than C (0.24 against 0.18).
    right = ((0.9, 0.3), (0.8, 0.3), (0.2, 0.9), (0.1, 0.1))
    parents = []
    for seed in range(40):
        evolving = evolution(*right, population_size=3, num_parents=2, seed=seed)
        evolving.run(4)
        parents.append(evolving.history[3].parent)
    # Drawn uniformly from {A, C}.
    assert set(parents) == {0, 2}
    assert abs(parents.count(0) - 20) <= 12


@pytest.mark.parametrize(("size", "wins"), [(1, [300, 300, 300]), (2, [600, 300, 0]), (3, [900, 0, 0])])
def test_tournament_by_hand(size, wins):
    # P = 3 with fitness 0.9 > 0.6 > 0.5. Of two drawn at random the fitter wins: 0 in two of three pairs, 1 in
    # one, 2 never. A tournament of one is a uniform draw; one of three always goes to 0.
    evolving = evolution((0.9,), (0.6,), (0.5,), population_size=3, num_parents=1, tournament_size=size)
    evolving.run(3)
    generator = np.random.default_rng(0)
    drawn = Counter(evolving.choose_parent(generator) for _ in range(900))
    np.testing.assert_allclose([drawn[index] for index in range(3)], wins, atol=60)
    assert set(drawn) == {index for index, count in enumerate(wins) if count}


def test_the_first_population_is_given_or_the_beginning_of_the_random_pool():
    initial = random_pool(SPACE, 2, seed=11)
    for first, seed, expected in ((None, 6, random_pool(SPACE, 9, seed=6)[:2]), (initial, 0, initial)):
        evolving = evolution(population_size=2, num_parents=1, seed=seed, initial=first)
        evolving.run(3)
        assert [individual.genotype for individual in evolving.history[:2]] == expected
    with pytest.raises(UserError, match="has 1 genotypes"):
        evolution(population_size=2, num_parents=1, initial=initial[:1])


def test_an_interrupted_evolution_goes_on_where_it_stopped(tmp_path):
    config = EvolutionConfig(population_size=3, num_parents=2, tournament_size=3, seed=2)
    arguments = {"space": SPACE, "config": config, "num_evaluations": 9, "num_members": 3}
    whole = nes_regularised_evolution(by_operations, LABELS, **arguments)
    trained = []

    def evolve(limit=99, **changes):
        def train(genotype, index):
            if len(trained) == limit:
                raise KeyboardInterrupt
            trained.append(index)
            return by_operations(genotype, index)

        return nes_regularised_evolution(train, LABELS, folder=tmp_path, **{**arguments, **changes})

    for limit in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            evolve(limit)
    # The state is behind the last evaluation, as after a kill between the two writes.
    state = read_json(tmp_path / "evolution.json")
    (tmp_path / "evolution.json").write_text(json.dumps({**state, "history": state["history"][:-1]}))
    resumed = evolve()
    assert trained == list(range(9))
    assert (resumed.pool, resumed.picked, resumed.parents) == (whole.pool, whole.picked, whole.parents)
    assert np.array_equal(resumed.val_probs, whole.val_probs)
    # The state says where everything is.
    for index, entry in enumerate(json.loads((tmp_path / "evolution.json").read_text())["history"]):
        assert Genotype.from_dict(entry["genotype"]) == whole.pool[index]
        assert (entry["seed"], entry["parent"]) == ([2, index], whole.parents[index])
        probs = load_tensors(tmp_path / entry["val_probs"])["val_probs"].numpy()
        np.testing.assert_allclose(probs, by_operations(whole.pool[index], index), rtol=1e-6)
    # A longer budget goes on, a shorter one is what it was.
    assert evolve(num_evaluations=11).pool[:9] == whole.pool
    assert trained == list(range(11))
    shorter = evolve()
    assert (shorter.picked, len(shorter.pool)) == (whole.picked, 9)


def test_a_folder_of_another_evolution_is_refused(tmp_path):
    def begin(labels=LABELS, space=SPACE, **fields):
        config = EvolutionConfig(**{"population_size": 2, "num_parents": 1, **fields})
        RegularisedEvolution(by_operations, labels, space=space, config=config, folder=tmp_path).run(3)

    begin()
    for changes, cause in (
        ({"seed": 1}, "another seed"),
        ({"space": SearchSpace(operations=(*OPERATIONS, "avg_pool_3x3"), num_nodes=2)}, "another space"),
        ({"labels": [0, 0, 0, 0, 0, 1]}, "other validation images"),
    ):
        with pytest.raises(UserError, match=cause):
            begin(**changes)
    (tmp_path / "evolution.json").write_text('{"settings": [], "history": [{}]}')
    with pytest.raises(UserError, match="not the state of an evolution"):
        begin()


def test_impossible_numbers():
    for population, parents, tournament in ((0, 0, None), (3, 4, None), (3, 2, 1), (3, 2, 4)):
        with pytest.raises(UserError, match="not possible"):
            EvolutionConfig(population_size=population, num_parents=parents, tournament_size=tournament)
    config = EvolutionConfig(population_size=3, num_parents=1)
    for evaluations, members in ((2, 1), (3, 4), (3, 0)):
        budget = {"num_evaluations": evaluations, "num_members": members}
        with pytest.raises(UserError, match="evaluations are too few"):
            nes_regularised_evolution(by_operations, LABELS, space=SPACE, config=config, **budget)
