import json

import pytest

from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.config.fields import to_dict, with_fields
from dnas_ens.config.file import override
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.errors import UserError
from dnas_ens.space.search_space import SearchSpace, stack_cell_types


@pytest.mark.parametrize("preset", ["smoke", "micro", "fast", "paper"])
@pytest.mark.parametrize("regime", ["star", "optimal", "edges", "random", "hypernet", "js"])
def test_every_preset_and_regime_survives_json(preset, regime, tmp_path):
    config = search_preset(preset, regime, base=tmp_path / "base.json")
    stored = json.loads(json.dumps(to_dict(config)))
    assert override(SearchConfig(), stored) == config
    assert override(
        RetrainConfig(), json.loads(json.dumps(to_dict(retrain_preset(preset))))
    ) == retrain_preset(preset)


def test_regimes_are_the_published_ones():
    star, optimal = search_preset(), search_preset("smoke", "optimal")
    assert (star.objective.penalty, star.hypernetwork.directions) == ("js-pairwise", star.candidates.members)
    assert (optimal.objective.penalty, optimal.objective.fixed_lambda) == ("none", 0.0)
    hypernet = search_preset("smoke", "hypernet", base="b.json")
    assert hypernet.hypernetwork.directions == 1
    assert (hypernet.hypernetwork.num_knots, hypernet.hypernetwork.max_lambda) == (5, 4.0)
    assert hypernet.objective.penalty == "edge-overlap"
    assert search_preset("smoke", "js").objective.penalty == "js-base"


@pytest.mark.parametrize("regime", ["edges", "random", "hypernet"])
def test_regimes_that_compare_need_a_base(regime):
    with pytest.raises(UserError) as caught:
        search_preset("smoke", regime)
    assert "--base" in caught.value.remedy


@pytest.mark.parametrize(
    ("fields", "cause", "remedy"),
    [
        ({"members": 9, "pool_size": 4}, "9 members are more than the 4 candidates", "--pool-size"),
        ({"max_lambda": 1.5}, "--max-lambda is 1.5", "1 or less"),
        ({"batch_size": 30}, "4 drawn members do not divide a batch of 30", "multiple of 4"),
        ({"warmup_epochs": 20}, "20 warm-up epochs leave none of 20", "--warmup-epochs"),
        ({"epochs": 0}, "--epochs is 0", "above 0"),
        ({"temperature": (1.0, 0.0)}, "temperature of 0", "above 0"),
        ({"base_smoothing": 0.0}, "--base-smoothing is 0.0", "between 0 and 1"),
        ({"num_knots": 1}, "--num-knots is 1", "2 or more"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_impossible_settings_say_why_and_what_to_do(fields, cause, remedy):
    with pytest.raises(UserError) as caught:
        with_fields(SearchConfig(), **fields)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


def test_fields_are_found_by_their_own_name():
    config = with_fields(SearchConfig(), channels=4, epochs=9, seed=3)
    assert (config.supernet.channels, config.bilevel.epochs, config.seed) == (4, 9, 3)
    with pytest.raises(UserError) as caught:
        with_fields(SearchConfig(), chanels=4)
    assert "Did you mean channels?" in caught.value.remedy
    with pytest.raises(UserError, match=r"drop-path is 1\.0"):
        with_fields(RetrainConfig(), drop_path=1.0)


def test_unknown_preset_and_regime():
    with pytest.raises(UserError, match="Unknown preset 'huge'"):
        search_preset("huge")
    with pytest.raises(UserError, match="Unknown regime 'moon'"):
        search_preset("smoke", "moon")
    with pytest.raises(UserError, match="Unknown preset 'huge'"):
        retrain_preset("huge")


def test_space_has_the_papers_14_edges_in_order():
    space = SearchSpace()
    assert space.shape == (2, 14, 7)
    assert space.edges[:5] == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    assert [space.edges[i][0] for s in space.node_slices for i in range(s.start, s.stop)] == [
        node for node in range(4) for _ in range(node + 2)
    ]
    assert SearchSpace.for_stack(1, operations=space.operations, num_nodes=4).cell_types == ("reduction",)
    for bad in ({"operations": ("none",)}, {"operations": ("a", "a")}, {"num_nodes": 0}):
        with pytest.raises(UserError):
            SearchSpace(**bad)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (SearchConfig(), {"gradient_clip": -1.0}),
        (SearchConfig(), {"momentum": 5.0}),
        (SearchConfig(), {"weight_decay": -1e-4}),
        (SearchConfig(), {"min_learning_rate": -0.1}),
        (SearchConfig(), {"learning_rate": float("nan")}),
        (SearchConfig(), {"learning_rate": float("inf")}),
        (SearchConfig(), {"penalty_weight": (1.0, float("inf"))}),
        (SearchConfig(), {"commitment": (-1.0, 0.0)}),
        (SearchConfig(), {"candidate_epochs": -1}),
        (RetrainConfig(), {"gradient_clip": 0.0}),
        (RetrainConfig(), {"momentum": 1.0}),
        (RetrainConfig(), {"weight_decay": float("nan")}),
        (RetrainConfig(), {"cutout": -1}),
        (RetrainConfig(), {"auxiliary_weight": -0.4}),
    ],
    ids=str,
)
def test_numbers_without_a_meaning_are_refused_by_flag(config, fields):
    (name,) = fields
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        with_fields(config, **fields)


@pytest.mark.parametrize("num_cells", [0, 10**7])
def test_stacks_that_nobody_means_are_refused(num_cells):
    with pytest.raises(UserError, match=f"A stack of {num_cells} cells"):
        stack_cell_types(num_cells)
