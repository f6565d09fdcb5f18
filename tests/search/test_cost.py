"""What a search is predicted to cost: the work is what a search does; no test asserts a measured time."""

from collections import Counter

import pytest

from dnas_ens.config import RetrainConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.nn.network import Network
from dnas_ens.search.cost import SearchCost, search_cost
from dnas_ens.search.penalties import PenaltySteps
from dnas_ens.search.run import run_search
from dnas_ens.search.steps import SearchSteps

KINDS = {
    "weights": (SearchSteps, "weight_step"),
    "architecture": (SearchSteps, "architecture_step"),
    "joint": (SearchSteps, "joint_step"),
    "penalties": (PenaltySteps, "penalty_step"),
}


@pytest.fixture
def done(monkeypatch):
    """Counts the steps of each kind and the images that discrete networks see."""
    counts = Counter()
    for kind, (owner, name) in KINDS.items():
        original = getattr(owner, name)

        def counted(self, *arguments, kind=kind, original=original):
            counts[kind] += 1
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, counted)
    forward = Network.forward

    def seen(self, images):
        counts["images"] += len(images)
        return forward(self, images)

    monkeypatch.setattr(Network, "forward", seen)
    return counts


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"relaxation": "gumbel-hard", "drawn_members": None, "score_images": 20},
        {"score_images": 0, "warmup_epochs": 0},
        {"likelihood": "none", "star_steps": 60},
    ],
    ids=str,
)
def test_the_work_that_is_counted_is_the_work_of_a_search(few_digits, tiny_search, done, fields):
    config = with_fields(tiny_search, **fields)
    recipe = RetrainConfig(num_cells=1, channels=2, epochs=3, batch_size=16)
    predicted = search_cost(config, recipe, few_digits)
    assert predicted.member_steps == 3 * 6
    assert predicted.seconds.keys() == {"member", *predicted.counts}
    assert min(predicted.seconds.values()) > 0
    done.clear()
    found = run_search(config, few_digits)
    steps = {kind: done[kind] for kind in KINDS if done[kind]}
    assert steps == {kind: count for kind, count in predicted.counts.items() if kind != "scoring"}
    if "scoring" in predicted.counts:
        images = len(found.candidates) * (
            (96 if config.objective.hard else 48) + (config.candidates.score_images or 40)
        )
        assert done["images"] == images
        assert predicted.counts["scoring"] >= len(found.candidates)
    else:
        assert not done["images"]


def test_trainings_are_seconds_over_seconds():
    cost = SearchCost(
        counts={"weights": 10, "scoring": 4}, seconds={"weights": 0.5, "scoring": 2.0, "member": 0.1}, member_steps=50
    )
    assert cost.search_seconds == pytest.approx(13.0)
    assert str(cost) == "2.6 trainings of a member, as a few measured steps predict"
    cheap = SearchCost(counts={"penalties": 1}, seconds={"penalties": 0.1, "member": 0.1}, member_steps=50)
    assert str(cheap).startswith("0.02 trainings")
