"""The configuration: presets and regimes, fields set by name and from JSON, numbers without a meaning refused."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from sample_config import Bilevel, Search
from tiny import genotype

from dnas_ens.config import DataConfig, RetrainConfig, SearchConfig
from dnas_ens.config.fields import override, to_dict, with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.data import load_data
from dnas_ens.errors import UserError
from dnas_ens.training.trainer import MemberTraining


@pytest.mark.parametrize("preset", ["smoke", "micro", "fast", "paper"])
def test_every_preset_and_regime_survives_json(preset):
    recipe = retrain_preset(preset)
    assert override(RetrainConfig(), json.loads(json.dumps(to_dict(recipe)))) == recipe
    for regime in ("star", "optimal", "edges", "random", "hypernet", "js"):
        config = search_preset(preset, regime, base=Path("base.json"))
        assert override(SearchConfig(), json.loads(json.dumps(to_dict(config)))) == config


def test_regimes_are_the_published_ones():
    star, optimal, js = (search_preset("smoke", regime) for regime in ("star", "optimal", "js"))
    hypernet = search_preset("smoke", "hypernet", base="b.json")
    assert (star.objective.penalty, star.hypernetwork.directions) == ("js-pairwise", star.candidates.members)
    assert (optimal.objective.penalty, optimal.objective.fixed_lambda) == ("none", 0.0)
    assert (js.objective.penalty, hypernet.objective.penalty) == ("js-base", "edge-overlap")
    knots = hypernet.hypernetwork
    assert (knots.directions, knots.num_knots, knots.max_lambda) == (1, 5, 4.0)
    assert (star.supernet.space, star.supernet.num_channels) == ("efficient", 16)
    for config in (optimal, js, hypernet, search_preset("smoke", space="darts")):
        assert (config.supernet.search_space.shape, config.supernet.num_channels) == ((2, 14, 7), 8)
    assert search_preset("fast", "optimal").supernet.num_channels == 16
    # The published ones do without this project's own terms.
    for objective in (optimal.objective, js.objective, hypernet.objective):
        assert objective.commitment == objective.operation_balance == (0.0, 0.0)
    assert star.objective.commitment[1] > 0
    # Cheap steps are searched by hard paths, heavy ones by soft ones with operations in balance.
    assert (star.objective.relaxation, star.objective.operation_balance[1]) == ("gumbel-hard", 0.0)
    darts = search_preset("smoke", space="darts").objective
    assert (darts.relaxation, darts.operation_balance[1]) == ("softmax", 5.0)


def test_weight_decay_is_that_of_a_prior_for_so_many_images(few_digits):
    decays = [RetrainConfig().for_images(count).weight_decay for count in (1, 200, 2000, 10_000, 50_000)]
    assert decays == pytest.approx([0.01, 0.01, 0.004, 0.0008, 0.0003])
    assert RetrainConfig(weight_decay=0.0).for_images(2000).weight_decay == 0.0
    assert retrain_preset("paper", "darts").for_images(2000).weight_decay == 3e-4
    training = MemberTraining(genotype(), few_digits, RetrainConfig(num_cells=1, channels=4), index=0)
    assert training.identity()["recipe"]["weight_decay"] == pytest.approx(min(0.01, 8 / len(few_digits.train)))
    assert training.optimizer.param_groups[0]["weight_decay"] == training.recipe.weight_decay


@pytest.mark.parametrize(
    ("call", "cause", "remedy"),
    [
        (lambda: search_preset("smoke", "edges"), "compares with a given base", "--base"),
        (lambda: search_preset("huge"), "Unknown preset 'huge'", "smoke, micro, fast, paper"),
        (lambda: search_preset("smoke", "moon"), "Unknown regime 'moon'", "star, optimal"),
    ],
)
def test_presets_and_regimes_that_cannot_be(call, cause, remedy):
    with pytest.raises(UserError) as caught:
        call()
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("config", "fields", "cause", "remedy"),
    [
        (SearchConfig(), {"members": 9, "pool_size": 4}, "9 members are more than the 4 cand", "--pool-size"),
        (SearchConfig(), {"max_lambda": 1.5}, "--max-lambda is 1.5", "1 or less"),
        (SearchConfig(), {"batch_size": 30}, "4 drawn members do not divide a batch of 30", "multiple of 4"),
        (SearchConfig(), {"warmup_epochs": 20}, "20 warm-up epochs leave none of 20", "--warmup-epochs"),
        (SearchConfig(), {"layout": "contiguous"}, "channels_last", "--form reference"),
        (SearchConfig(), {"second_order": True, "cuda_graph": "on"}, "cannot be replayed", "--cuda-graph"),
        (SearchConfig(), {"relaxation": "gumbel-hard", "cuda_graph": "on"}, "cannot be replayed", "--cuda-graph"),
        (SearchConfig(), {"relaxation": "gumbel-hard", "second_order": True}, "no second order", "--second-order"),
        (SearchConfig(), {"relaxation": "gumbel-hard", "drawn_members": 7}, "7 drawn members do not", "multiple of 7"),
        (SearchConfig(), {"likelihood": "none", "penalty": "js-predictive"}, "nothing to compare", "js-pairwise"),
        # The default search draws one member along hard paths.
        (search_preset(), {"penalty": "js-predictive"}, "would train the weights to disagree", "--relaxation softmax"),
        (search_preset(), {"likelihood": "ensemble"}, "One member is drawn for a step", "--drawn-members 4"),
        (SearchConfig(), {"likelihood": "none", "candidate_epochs": 9}, "no weights", "--candidate-epochs"),
        (SearchConfig(), {"score_images": -1}, "--score-images is -1", "0 or more"),
        (SearchConfig(), {"drawn_members": 0}, "--drawn-members is 0", "1 or more"),
        (SearchConfig(), {"epochs": 0}, "--epochs is 0", "above 0"),
        (SearchConfig(), {"temperature": (1.0, 0.0)}, "temperature of 0", "above 0"),
        (SearchConfig(), {"num_knots": 1}, "--num-knots is 1", "2 or more"),
        (SearchConfig(), {"gradient_clip": -1.0}, "--gradient-clip is -1.0", "above 0"),
        (SearchConfig(), {"momentum": 5.0}, "--momentum is 5.0", "such a value"),
        (SearchConfig(), {"learning_rate": INFINITE}, "--learning-rate is inf", "a finite number"),
        (SearchConfig(), {"penalty_weight": (1.0, INFINITE)}, "--penalty-weight is (1.0, inf)", "a finite"),
        (RetrainConfig(), {"drop_path": 1.0}, "--drop-path is 1.0", "such a value"),
        (RetrainConfig(), {"cutout": -1}, "--cutout is -1", "0 or more"),
        (SearchConfig(), {"partial_channels": 2}, "of the space efficient", "give --space darts"),
        (SearchConfig(), {"space": "dense"}, 'space is "dense"', '"efficient", "darts"'),
        (SearchConfig(), {"relaxation": "normalised"}, 'relaxation is "normalised"', '"softmax"'),
        (SearchConfig(), {"epochs": "10"}, 'epochs is "10"', "a whole number"),
        (RetrainConfig(), {"cutout": 2.5}, "cutout is 2.5", "a whole number"),
        (SearchConfig(), {"stem_stride": 0}, "--stem-stride is 0", "above 0"),
        (SearchConfig(), {"chanels": 4}, "no field 'chanels'", "Did you mean channels?"),
        (RetrainConfig(), {"xyzzy": 4}, "no field 'xyzzy'", "There are num_cells, channels"),
    ],
    ids=str,
)
def test_impossible_settings_say_why_and_what_to_do(config, fields, cause, remedy):
    with pytest.raises(UserError) as caught:
        with_fields(config, **fields)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


def test_what_a_file_names_is_replaced():
    default = Search(seed=4, bilevel=Bilevel(second_order=True))
    values = {"data_root": "x/y", "limit": None, "operations": ["a", "b"], "pairs": [["a", 1], ["b", 2]]}
    loaded = override(default, {**values, "penalty": "none", "bilevel": {"epochs": 9, "temperature": [2, 1.5]}})
    assert loaded == Search(
        seed=4,
        data_root=Path("x/y"),
        operations=("a", "b"),
        pairs=(("a", 1), ("b", 2)),
        penalty="none",
        bilevel=Bilevel(epochs=9, temperature=(2.0, 1.5), second_order=True),
    )
    # 2 reads as 2.0 where a number with decimals is meant, so that the stored configuration is the same.
    assert [type(value) for value in loaded.bilevel.temperature] == [float, float]
    assert override(default, {}) == default
    config = with_fields(SearchConfig(), channels=4, epochs=9, gradient_clip=INFINITE)
    assert (config.supernet.channels, config.bilevel.epochs) == (4, 9)
    # NumPy's own, whole sections, and dictionaries, which stay as they are.
    values = {
        "epochs": np.int64(9),
        "learning_rate": np.float32(0.5),
        "augment": np.False_,
        "precision": np.str_("auto"),
    }
    config = with_fields(SearchConfig(), **values)
    found = config.bilevel
    assert (found.epochs, found.learning_rate, found.augment, found.precision) == (9, 0.5, False, "auto")
    assert [type(value) for value in (found.epochs, found.learning_rate, found.augment)] == [int, float, bool]
    assert with_fields(SearchConfig(), bilevel=found, channels=4).bilevel == found
    given = {"momentum": 0.5}
    found = with_fields(SearchConfig(), bilevel=given, epochs=9).bilevel
    assert (found.momentum, found.epochs, given) == (0.5, 9, {"momentum": 0.5})


@pytest.mark.parametrize(
    ("values", "cause", "remedy"),
    [
        ({"sed": 1}, "Unknown field sed in the configuration.", "Did you mean seed?"),
        ({"bilevel": {"epoch": 1}}, "Unknown field bilevel.epoch in", "Did you mean bilevel.epochs?"),
        ({"seed": "x"}, 'seed is "x" in', "Make it a whole number."),
        ({"seed": True}, "seed is true in", "Make it a whole number."),
        ({"limit": "x"}, 'limit is "x" in', "Make it a whole number or null."),
        ({"data_root": 3}, "data_root is 3 in", "Make it a path or null."),
        ({"penalty": "jss"}, 'penalty is "jss" in', 'Make it one of "js", "none".'),
        ({"operations": "skip"}, 'operations is "skip" in', "Make it a list, each item a string."),
        ({"operations": ["a", 1]}, "operations[1] is 1 in", "Make it a string."),
        ({"pairs": [["a"]]}, 'pairs[0] is ["a"] in', "Make it a list of 2: a string, a whole number."),
        ({"bilevel": 3}, "bilevel is 3 in", "Make it an object of fields."),
        ({"bilevel": {"second_order": 1}}, "bilevel.second_order is 1 in", "Make it true or false."),
        ({"bilevel": {"learning_rate": "x"}}, 'bilevel.learning_rate is "x" in', "Make it a number."),
        ({"bilevel": {"temperature": [1]}}, "bilevel.temperature is [1] in", "Make it a list of 2: a number"),
        ({"bilevel": {"epochs": 0}}, "--epochs is 0.", "Give --epochs 1 or more."),
        ([1], "the whole is [1] in", "Make it an object of fields."),
    ],
)
def test_a_field_that_does_not_fit_is_named(values, cause, remedy):
    with pytest.raises(UserError) as caught:
        override(Search(), values)
    assert caught.value.cause.startswith(cause)
    assert caught.value.remedy.startswith(remedy)


def test_how_data_are_read_is_all_handed_on():
    known = set(inspect.signature(load_data).parameters)
    assert set(SearchConfig().data.how_to_load()) == known - {"data", "download"}
    assert SearchConfig(data=DataConfig(split_seed=7)).data.how_to_load()["seed"] == 7
