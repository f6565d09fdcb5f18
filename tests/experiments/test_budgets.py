"""What a rival's splits cost, and which one it takes."""

import itertools
from types import SimpleNamespace

import budgets as study
import numpy as np
import pytest
import torch

from dnas_ens.errors import UserError


class Priced:
    """Trains nothing; an epoch takes a second for each 16 channels."""

    def __init__(self, budget, trainings):
        self.regime = SimpleNamespace(budgets=(budget,), trainings=trainings)
        self.recipe = SimpleNamespace(channels=16)
        self.trained_seconds = 0.0

    def trained(self, _genotype, epochs, channels):
        for cycle in itertools.count():
            seconds = (max(1, epochs // 5) if cycle else epochs) * channels / 16
            self.trained_seconds += seconds
            yield study.Trained(seconds=seconds, val=np.zeros((1, 2)), test=np.zeros((1, 2)))


def test_a_grid_holds_every_split_that_the_budget_pays_for_and_trains_little_more():
    bench = Priced(100, ((20, 16, 5), (20, 32, 5)))
    grid = study.splits(bench, itertools.repeat(None), fixed=10.0)
    by_name = {split.spent: split for split in grid}
    assert len(by_name) == len(grid)
    # K networks with H cycles of 4 epochs cost K (20 + 4 H).
    for count, cycles in itertools.product(range(1, 6), range(7)):
        name = f"{count} × 20" + (f" + {cycles} × 4" if cycles else "")
        cost = 10 + count * (20 + 4 * cycles)
        if cost <= 100:
            assert by_name[name].seconds == cost
            assert len(by_name[name].networks) == count * (cycles + 1)
    assert len(by_name["last 2 of 3 × 20 + 2 × 4"].networks) == 6
    assert by_name["2 × 20, C=32"].seconds == 90
    assert "3 × 20, C=32" not in by_name
    # Each family is trained once, and hardly beyond the budget.
    assert bench.trained_seconds <= 2 * 1.5 * (study.DEARER * 100 - 10)


def test_what_is_known_to_cost_too_much_is_not_trained():
    bench = Priced(100, ((200, 16, 2), (20, 16, 1)))
    grid = study.splits(bench, itertools.repeat(None), seconds_per_epoch=1.0)
    assert all("200" not in split.spent for split in grid)
    assert study.splits(Priced(100, ((20, 16, 1),)), itertools.repeat(None), fixed=120.5) == []


def record(method, *entries):
    names = ("spent", "cpu_seconds", "val_nll")
    return {
        "method": method,
        "budgets": [10, 30],
        "splits": [dict(zip(names, entry, strict=True)) for entry in entries],
    }


def test_a_rival_takes_one_split_with_all_seeds():
    first = record("plain CNN", ("a", 9, 0.5), ("b", 8, 0.3), ("c", 25, 0.2), ("lucky", 9, 0.1))
    second = record("plain CNN", ("b", 11, 0.7), ("a", 10, 0.4), ("c", 36, 0.3))
    # b is best with the first seed, a on average; lucky was trained with one seed alone; c costs 30.5 on average.
    assert study.taken([first, second], 0) == [0, 1]
    assert study.taken([first, second], 1) == [0, 1]
    second["splits"][2]["cpu_seconds"] = 35
    assert study.taken([first, second], 1) == [2, 2]
    assert study.taken([record("plain CNN", ("a", 40, 0.5))], 1) is None
    assert study.taken([record(study.OURS, ("x", 9, 0.9), ("y", 28, 0.8))] * 2, 1) == [1, 1]


def test_methods_are_compared_on_the_seeds_that_all_have():
    def made(method, seed, regime="r"):
        return {**record(method), "regime": regime, "seed": seed}

    records = [made(study.OURS, seed) for seed in (3, 1, 2)] + [made("plain CNN", seed) for seed in (2, 3, 4)]
    found = study.compared([*records, made("ResNet", 1, regime="another")], "r")
    assert list(found) == [study.OURS, "plain CNN"]
    assert all([each["seed"] for each in of_method] == [2, 3] for of_method in found.values())
    assert study.compared(records, "none") == {}


def test_seeds_of_digits_have_the_same_test_images():
    one, other = (study.REGIMES["digits-200"].load(seed) for seed in (1, 2))
    assert len(one.train) == 200
    assert torch.equal(one.test.images, other.test.images)
    assert not torch.equal(one.train.images, other.train.images)


def test_options_that_cannot_be_are_refused():
    for fields, cause in (
        ({"regimes": ("cifar",)}, "There is no regime"),
        ({"methods": ("ours",)}, "There is no method"),
    ):
        with pytest.raises(UserError, match=cause):
            study.Study(**fields)
