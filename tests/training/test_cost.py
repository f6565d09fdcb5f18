"""What trainings are predicted to take; no test asserts a measured time."""

import itertools

import pytest
import torch

from dnas_ens.config import RetrainConfig
from dnas_ens.search.cost import random_members
from dnas_ens.training.cost import Estimate, Fanout, Pace, Paces, estimate_members, fanned_out, longest_queue

PACE = Pace(setup=0.5, epoch=2.0, epoch_cpu=1.5, image=0.01, memory_mib=100.0, began=0.0)


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_the_longest_queue_is_when_the_last_task_of_a_simulation_ends(slots):
    seconds = [3, 1, 4, 1, 5, 9, 2, 6]
    # Second by second: who is free takes the next task.
    waiting, left = list(seconds), [0] * slots
    for now in itertools.count():
        left = [max(0, each - 1) for each in left] if now else left
        while waiting and 0 in left:
            left[left.index(0)] = waiting.pop(0)
        if not waiting and not any(left):
            break
    assert longest_queue(seconds, slots) == now


def test_five_trainings_on_two_places_take_three_and_are_loaded_one_after_another():
    paces = Paces(of={"a": PACE, "b": PACE}, start=4.0, slots=2)
    taken = fanned_out(paces, [3] * 5, 100, gpu=False)
    # It begins, three epochs, and val four times; then every network predicts val once.
    assert taken.wall == pytest.approx(4 + 3 * (0.5 + 3 * 2 + 4 * 1) + 5 * 1)
    assert taken.cpu == pytest.approx(5 * 3 * 1.5)
    assert taken.memory_mib == 200
    on_gpu = fanned_out(paces, [3] * 5, 100, gpu=True)
    assert on_gpu.cpu == pytest.approx(5 * 10.5)


def test_what_is_done_in_turn_adds_up_and_costs_what_the_machine_costs():
    both = Estimate(wall=1800.0, cpu=3000.0, memory_mib=10.0) + Estimate(wall=1800.0, cpu=600.0, memory_mib=300.0)
    assert both.facts(price=2.5) == {
        "time": "1:00:00",
        "CPU-hours": "1",
        "memory of trainings, MiB": "300",
        "price": "2.50",
    }
    assert Estimate(wall=60.0, cpu=36.0, gpu=True).facts() == {"time": "1:00", "GPU-hours": "0.01"}


def test_a_trial_is_short_keeps_nothing_and_leaves_random_numbers_alone(few_digits, tiny_search, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = RetrainConfig(num_cells=1, channels=2, epochs=1_000_000, batch_size=24)
    before = torch.get_rng_state()
    genotypes = random_members(tiny_search, 3)
    found = estimate_members(
        genotypes, few_digits, recipe, Fanout(workers=1, engine="local", device=torch.device("cpu"))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []
    # A million epochs of some milliseconds each were not trained.
    assert found.wall > 3 * 1000
    assert found.memory_mib > 50
