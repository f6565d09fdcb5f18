"""The star alone: what the penalties do without an image."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import states_equal

from dnas_ens.config.fields import with_fields
from dnas_ens.errors import UserError
from dnas_ens.search.cost import estimate
from dnas_ens.search.run import run_search
from dnas_ens.search.schedules import Schedules
from dnas_ens.search.star import StarLoop
from dnas_ens.space.known_cells import PLAIN_CNN, RESNET, given_base


class NoData:
    """Data that must not be looked at."""

    def __getattr__(self, name):
        raise AssertionError(f"the star alone reads {name}")


@pytest.fixture
def star(tiny_search):
    return with_fields(tiny_search, likelihood="none", star_steps=120)


def test_lambda_steers_without_any_image(star):
    found = run_search(star, NoData())
    curve = found.curve
    lam, distance = (np.array(values).reshape(3, -1) for values in (curve.lam, curve.distance_to_base))
    assert min(spearmanr(*path).statistic for path in zip(lam, distance, strict=True)) > 0.9
    assert np.abs(lam - distance).mean() < 0.1
    assert {candidate.supernet_val_nll for candidate in found.candidates} == {None}
    assert found.report.keys() == {"entropy", "wall_seconds", "cpu_seconds"}
    assert len(found.genotypes) == 3
    again, other = run_search(star, NoData()), run_search(with_fields(star, seed=1), NoData())
    assert again.to_dict()["candidates"] == found.to_dict()["candidates"]
    assert again.ranking == found.ranking
    assert other.genotypes != found.genotypes
    types, edges, operations = star.supernet.search_space.shape
    # The base and K - 1 steps on each of R paths, operation and edge logits of each.
    paths = star.hypernetwork.directions * (star.hypernetwork.num_knots - 1)
    parameters = (1 + paths) * types * edges * (operations + 1)
    assert estimate(star, NoData()) == {"hypernetwork_parameters": parameters, "steps": 120}


def test_a_known_cell_is_a_base_by_its_name(star, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = with_fields(star, base=Path("resnet"), num_cells=3, num_nodes=3)
    found = run_search(config, NoData())
    assert found.base == RESNET
    assert any(genotype != RESNET for genotype in found.genotypes)
    # A file of that name comes first.
    (tmp_path / "resnet").write_text(json.dumps(PLAIN_CNN.to_dict()))
    assert given_base("resnet") == PLAIN_CNN
    with pytest.raises(UserError, match="Cannot read the genotype resnet50"):
        given_base("resnet50")


def test_a_resumed_star_is_bit_equal_and_its_last_round_may_be_short(star):
    straight = StarLoop(star)
    assert (straight.num_epochs, straight.steps_per_epoch) == (3, 50)
    steps = []
    for _ in range(2):
        straight.run_epoch()
    resumed = StarLoop(star)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    last = straight.run_epoch(steps.append)
    torch.manual_seed(999)  # the global stream must not matter
    assert resumed.run_epoch() == last
    assert steps == [0] * 20
    assert straight.step == 120
    assert states_equal(resumed.state_dict(), straight.state_dict())


def test_the_schedules_run_over_the_steps(star):
    config = with_fields(star, temperature=(1.0, 0.4), penalty_weight=(1.0, 20.0))
    first, last = Schedules(config, 0), Schedules(config, 119)
    assert (first.temperature, first.penalty_weight) == (1.0, 1.0)
    assert (last.temperature, last.penalty_weight) == pytest.approx((0.4, 20.0))
