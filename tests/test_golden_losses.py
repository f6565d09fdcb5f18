"""Losses of short seeded runs as they were when this file was last changed: a change of them is a decision.

They come from the code itself, so they witness nothing but that it computes what it did. Rounding differs between
processors and thread counts, by far less than the tolerance in so few steps.
"""

import pytest
from tiny import genotype

from dnas_ens.config import RetrainConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.star import StarLoop
from dnas_ens.training.trainer import MemberTraining

SEARCHES = {
    "softmax": [2.36154, 2.34455, 2.75671],
    "gumbel-hard": [2.41095, 2.37892, 2.66992],
}


@pytest.mark.parametrize("relaxation", SEARCHES)
def test_a_search(few_digits, tiny_search, relaxation):
    loop = SearchLoop(with_fields(tiny_search, relaxation=relaxation), few_digits)
    scalars = [loop.run_epoch() for _ in range(2)]
    found = [scalars[0]["train_loss"], scalars[1]["train_loss"], scalars[1]["architecture_loss"]]
    assert found == pytest.approx(SEARCHES[relaxation], rel=1e-3)


def test_the_star_alone(tiny_search):
    loop = StarLoop(with_fields(tiny_search, likelihood="none", star_steps=50))
    found = loop.run_epoch()
    assert [found["penalty"], found["architecture_loss"]] == pytest.approx([0.0247138, 0.510229], rel=1e-3)


def test_a_training(few_digits):
    recipe = RetrainConfig(num_cells=2, channels=4, epochs=2, batch_size=16, drop_path=0.2, cutout=3)
    training = MemberTraining(genotype(), few_digits, recipe, index=1)
    found = [training.run_epoch()["train_loss"] for _ in range(2)]
    assert found == pytest.approx([2.34301, 2.13370], rel=1e-3)
