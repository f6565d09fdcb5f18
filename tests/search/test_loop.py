import contextlib
import dataclasses
import importlib

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from tiny import genotype, states_equal

import dnas_ens as de
from dnas_ens.config import CandidateConfig, RetrainConfig, SearchConfig
from dnas_ens.config.fields import to_dict, with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.data import ImageData, Split
from dnas_ens.errors import UserError
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import write_json
from dnas_ens.run.folder import RunFolder
from dnas_ens.run.metrics_log import MetricsLog
from dnas_ens.run.progress import CostMeter
from dnas_ens.search.candidates import draw_pool, rank, score, select
from dnas_ens.search.cost import estimate
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.run import conclude, run_search, train
from dnas_ens.search.schedules import Schedules
from dnas_ens.space.spaces import SPACES

#: Operations that cost little.
WEIGHTLESS = ("none", "skip_connect", "max_pool_3x3", "avg_pool_3x3")


@pytest.mark.parametrize(
    "fields",
    [
        {"relaxation": "softmax"},
        {"relaxation": "gumbel-softmax"},
        {"relaxation": "gumbel-softmax", "second_order": True},
        {"relaxation": "gumbel-hard"},
    ],
    ids=str,
)
def test_a_search_resumed_at_every_step_is_bit_equal(few_digits, tiny_search, fields, tmp_path):
    config = with_fields(tiny_search, **fields)
    straight = SearchLoop(config, few_digits)
    assert straight.steps_per_epoch > 1
    start = straight.family.hypernetwork.steps.detach().clone()
    scalars = [straight.run_epoch()]
    assert torch.equal(straight.family.hypernetwork.steps, start)  # warm-up moves the weights alone
    scalars += [straight.run_epoch() for _ in range(2)]
    stopped = SearchLoop(config, few_digits)

    # A new process after every step, in warm-up and after it, and after every epoch.
    def stop(num_images):
        if stopped.steps_done < stopped.steps_per_epoch:
            raise KeyboardInterrupt

    store, found = CheckpointStore(tmp_path), []
    while len(found) < 3:
        with contextlib.suppress(KeyboardInterrupt):
            found.append(stopped.run_epoch(stop))
        store.save(stopped.step + stopped.steps_done, stopped.state_dict())
        torch.manual_seed(999)  # the global stream must not matter
        stopped = SearchLoop(config, few_digits)
        stopped.load_state_dict(store.load_newest()[1])
    assert found == scalars
    assert states_equal(stopped.state_dict(), straight.state_dict())


def picture_data(num_images, size):
    images = torch.randint(256, (num_images, 1, size, size), dtype=torch.uint8)
    few = Split(images, torch.arange(num_images) % 2)
    return ImageData.from_splits("few", ("a", "b"), train=few, val=few, test=few, flip=False)


@pytest.mark.parametrize(
    ("num_images", "size", "fields"), [(4, 8, {}), (7, 1, {"passes": "separate", "form": "reference"})]
)
def test_fewer_images_than_drawn_members_are_searched(tiny_search, num_images, size, fields):
    result = run_search(with_fields(tiny_search, drawn_members=6, **fields), picture_data(num_images, size))
    assert len(result.genotypes) == 3
    with pytest.raises(UserError, match="3 training images, which the search halves"):
        run_search(tiny_search, picture_data(3, 8))


def test_a_preset_limits_its_own_data_set_alone(few_digits, monkeypatch):
    limits = []
    monkeypatch.setattr("dnas_ens.data.load_data", lambda data, *, limit_train, **_: limits.append(limit_train))
    monkeypatch.setattr(importlib.import_module("dnas_ens.search.run"), "run_search", lambda *_, **__: None)
    for data, given in ((few_digits, {}), (few_digits, {"limit_train": 50}), ("digits", {}), ("fashion-mnist", {})):
        de.search(data, preset="micro", **given)
    assert limits == [None, 50, None, 10_000]


@pytest.mark.parametrize(("epochs", "few"), [(1, True), (60, False)])
def test_a_search_of_few_steps_says_so(few_digits, tiny_search, monkeypatch, capsys, epochs, few):
    monkeypatch.setattr(importlib.import_module("dnas_ens.search.run"), "train", lambda *_, **__: CostMeter())
    config = with_fields(tiny_search, epochs=epochs, warmup_epochs=0)
    steps = epochs * SearchLoop(config, few_digits).steps_per_epoch
    assert (steps < 100) == few
    run_search(config, few_digits)
    told = capsys.readouterr().err
    assert f"the search has {steps:,} steps" in told
    assert ("hardly better than random ones" in told) == few


def test_schedules_reach_both_ends(tiny_search):
    config = with_fields(tiny_search, epochs=5, warmup_epochs=2, temperature=(1.0, 0.4))
    temperatures = [round(Schedules(config, epoch).temperature, 6) for epoch in range(6)]
    assert temperatures == [1.0, 1.0, 1.0, 0.7, 0.4, 0.4]
    # A single epoch of the architecture is the last.
    config = with_fields(config, epochs=3)
    assert [Schedules(config, epoch).temperature for epoch in range(4)] == [1.0, 1.0, 0.4, 0.4]


@pytest.mark.parametrize(
    "fields",
    [
        {"penalty": "js-predictive", "passes": "separate"},
        {"penalty": "js-pairwise+js-predictive", "likelihood": "ensemble"},
        {"penalty": "js-pairwise", "likelihood": "ensemble", "relaxation": "gumbel-hard"},
        {"penalty": "js-base", "second_order": True},
        {"penalty": "none", "hypernetwork": "mlp"},
        {"train_knot_positions": True, "auxiliary_skip": 1.0},
        {"relaxation": "gumbel-softmax", "drawn_members": 4},
        {"relaxation": "gumbel-hard", "drawn_members": None},
        {"fixed_lambda": 0.3},
    ],
    ids=str,
)
def test_every_choice_trains_weights_and_paths(few_digits, tiny_search, fields):
    config = with_fields(tiny_search, warmup_epochs=0, epochs=1, **fields)
    loop = SearchLoop(config, few_digits)
    parameters = {name: p for name, p in loop.family.hypernetwork.named_parameters() if p.requires_grad}
    assert ("gap_logits" in parameters) == ("train_knot_positions" in fields)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    scalars = loop.run_epoch()
    assert all(np.isfinite(value) for value in scalars.values())
    moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert "base" in moved
    assert len(moved) >= 2 + ("gap_logits" in parameters)


@pytest.mark.parametrize(("penalty", "fixed"), [("edge-overlap", False), ("js-base", False), ("js-pairwise", True)])
def test_a_given_base_is_the_path_start_only_where_lambda_means_distance(few_digits, tiny_search, penalty, fixed):
    base = genotype(space="efficient")
    given = with_fields(tiny_search, base="given.json", warmup_epochs=0, epochs=1)
    loop = SearchLoop(with_fields(given, penalty=penalty), few_digits, base=base)
    loop.run_epoch()
    assert ("base" not in dict(loop.family.hypernetwork.named_parameters())) is fixed
    assert loop.family.base_genotype() == base
    if fixed:
        assert loop.family.genotypes(loop.family.start_point()) == [base]


def test_the_penalty_steers_where_there_is_nothing_else_to_learn(few_digits, tiny_search):
    def measured(penalty):
        fields = {"epochs": 25, "warmup_epochs": 0, "architecture_learning_rate": 0.06, "members": 1}
        config = with_fields(tiny_search, penalty=penalty, operations=WEIGHTLESS, **fields)
        loop = SearchLoop(config, few_digits)
        train(loop)
        curve = conclude(loop, recipe=RetrainConfig(), cost=CostMeter()).curve
        lam, distance = np.array(curve.lam), np.array(curve.distance_to_base)
        return np.abs(lam - distance).mean(), np.mean(curve.distance_between)

    error, between = measured("js-pairwise")
    error_without, between_without = measured("none")
    assert error < 0.12 < error_without
    assert between > between_without + 0.15


def test_early_stop_counts_skips_of_the_base(few_digits, tiny_search):
    loop = SearchLoop(with_fields(tiny_search, max_skips=0), few_digits)
    with torch.no_grad():
        loop.family.hypernetwork.base[..., loop.family.space.operations.index("skip_connect")] = 5.0
    assert loop.should_stop()
    assert not SearchLoop(tiny_search, few_digits).should_stop()
    run_search(with_fields(tiny_search, max_skips=0, warmup_epochs=0, epochs=2, members=1), few_digits)


def test_a_search_does_not_stop_early_in_the_middle_of_an_epoch(few_digits, tiny_search, tmp_path, monkeypatch):
    config = with_fields(tiny_search, warmup_epochs=0, epochs=2)
    monkeypatch.setattr("dnas_ens.run.checkpoint.SECONDS_BETWEEN_STATES", 0.0)
    run_epoch, epochs = SearchLoop.run_epoch, []

    def interrupted(loop, on_step):
        def stop(num_images):
            on_step(num_images)
            if loop.epoch == 1:
                raise KeyboardInterrupt

        epochs.append(run_epoch(loop, stop))
        return epochs[-1]

    with RunFolder.create(tmp_path / "run", config=to_dict(config)) as run:
        monkeypatch.setattr(SearchLoop, "run_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_search(config, few_digits, run=run)
        monkeypatch.setattr(SearchLoop, "run_epoch", run_epoch)
        # As where the base holds too many skips for a moment.
        monkeypatch.setattr(SearchLoop, "should_stop", lambda loop: loop.within_an_epoch)
        run_search(config, few_digits, run=run, resume=True)
    lines = [line["epoch"] for line in MetricsLog(tmp_path / "run").read("search")]
    assert (len(epochs), lines) == (1, [1, 2])


def test_what_another_search_has_left_is_refused(few_digits, tiny_search, tmp_path):
    given, other = (genotype(seed, space="efficient") for seed in (0, 1))
    base = tmp_path / "base.json"
    write_json(base, given.to_dict())
    config = with_fields(tiny_search, base=base, epochs=2, warmup_epochs=0, members=1)
    star = with_fields(config, likelihood="none", star_steps=2)

    def told(field, **changes):
        with pytest.raises(UserError, match=f"is another one: search.{field}"):
            run_search(**{"config": config, "data": few_digits, "run": run, "resume": True} | changes)

    with RunFolder.create(tmp_path / "run", config=to_dict(config)) as run:
        loop = SearchLoop(config, few_digits, base=given)
        loop.should_stop = lambda: loop.epoch > 0
        train(loop, run=run)
        # A state: of a search with images instead of one by the star, and around another base.
        told(r"objective\.likelihood is .member. there and .none. here", config=star)
        told(r"hypernetwork\.base\..* is", base=other)
        found = run_search(config, few_digits, run=run, resume=True)
        # The same of a result.
        told(r"objective\.likelihood", config=star)
        told(r"hypernetwork\.base\..* is", base=other)
        assert run_search(config, few_digits, run=run, resume=True).genotypes == found.genotypes


@pytest.mark.parametrize("space", SPACES)
def test_chosen_members_are_different_and_greedy_on_the_scores(few_digits, tiny_search, space):
    tiny_search = with_fields(tiny_search, space=space)
    result = run_search(tiny_search, few_digits)
    assert {genotype.space for genotype in result.genotypes} == {space}
    canonical = {genotype.canonical() for genotype in result.genotypes}
    assert len(canonical) == len(result.genotypes) == 3
    # The first chosen is the best single candidate.
    scores = [candidate.supernet_val_nll for candidate in result.candidates]
    assert result.selected[0] == int(np.argmin(scores))
    assert result.sample(0.0) == result.base
    with pytest.raises(UserError, match="no direction 7"):
        result.sample(0.1, direction=7)
    # What a notebook shows.
    heading, *members = repr(result).splitlines()
    assert "3 members" in heading
    assert members[0].endswith(f"inherited weights {min(scores):.3f}")
    assert result._repr_html_().count("<tr>") == 4
    again = run_search(tiny_search, few_digits)
    assert again.to_dict()["candidates"] == result.to_dict()["candidates"]
    with pytest.raises(UserError, match="2 members were asked for"):
        run_search(with_fields(tiny_search, operations=("sep_conv_3x3",), num_nodes=1, members=2), few_digits)


def test_brief_training_improves_the_candidates(few_digits, tiny_search):
    scores = []
    for epochs in (0, 6):
        found = run_search(with_fields(tiny_search, space="darts", candidate_epochs=epochs, pool_size=3), few_digits)
        scores.append(np.mean([candidate.supernet_val_nll for candidate in found.candidates]))
    assert scores[1] < scores[0] - 0.05


@pytest.mark.parametrize("selection", ["greedy-replacement", "exhaustive"])
def test_the_ranking_goes_on_from_the_chosen_by_the_ensembles_nll(selection):
    rng = np.random.default_rng(3)
    probs, labels = rng.dirichlet(np.ones(3), size=(6, 20)), rng.integers(3, size=20)
    config = CandidateConfig(members=3, pool_size=6, selection=selection)
    selected = select(probs, labels, config)
    ranking = rank(probs, labels, selected)
    assert ranking[:3] == selected
    assert sorted(set(ranking)) == list(range(6))
    assert len(ranking) == 3 + 6 - len(set(selected))
    for size in range(3, len(ranking)):
        nlls = {
            candidate: log_loss(labels, probs[[*ranking[:size], candidate]].mean(axis=0), labels=range(3))
            for candidate in set(range(6)) - set(ranking[:size])
        }
        assert ranking[size] == min(nlls, key=nlls.get)
    assert rank(probs, labels, [5, 4, 3, 2, 1, 0]) == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("given", "scored"), [(None, 48), (20, 20), (1000, 359)])
def test_candidates_are_scored_on_no_more_images_than_asked_for(digits, few_digits, tiny_search, given, scored):
    splits = {"train": few_digits.train, "val": digits.val, "test": digits.test}
    data = ImageData.from_splits("more val", digits.classes, **splits, flip=False)
    loop = SearchLoop(with_fields(tiny_search, score_images=given), data)
    images = loop.scoring_images()
    assert len(images) == scored
    pool, probs = score(loop, draw_pool(loop)[:2], recipe=RetrainConfig())
    assert probs.shape == (2, scored, 10)
    probs = probs.astype(float)
    expected = [log_loss(images.labels, own / own.sum(-1, keepdims=True), labels=range(10)) for own in probs]
    assert [candidate.supernet_val_nll for candidate in pool] == pytest.approx(expected, rel=1e-5)


def test_candidates_without_scores_are_ranked_by_how_far_they_lie_apart(few_digits, tiny_search):
    found = run_search(with_fields(tiny_search, score_images=0), few_digits)
    assert {candidate.supernet_val_nll for candidate in found.candidates} == {None}
    assert "selected_val_nll" not in found.report
    pool, ranking = found.candidates, found.ranking
    assert sorted(ranking) == list(range(len(pool)))
    assert pool[ranking[0]].lam == max(candidate.lam for candidate in pool)
    for size in range(1, len(ranking)):
        most_shared = {
            index: max(pool[index].genotype.shared_edges(pool[taken].genotype) for taken in ranking[:size])
            for index in ranking[size:]
        }
        assert most_shared[ranking[size]] == min(most_shared.values())
    assert len(found.genotypes) == 3
    assert repr(found).splitlines()[1].endswith("inherited weights -")


def test_random_deviations_need_no_training(few_digits, tiny_search, tmp_path):
    base = genotype()
    write_json(tmp_path / "base.json", base.to_dict())
    config = with_fields(search_preset("smoke", "random", base=tmp_path / "base.json"), replaced_edges=2)
    result = run_search(config, few_digits)
    assert result.base == base
    assert result.ranked(7)[:5] == result.genotypes
    assert len(set(result.ranked(7))) == 7
    assert result.hypernetwork is None
    with pytest.raises(UserError, match="31 members were asked for, but the search holds 30 candidates"):
        result.ranked(31)
    assert all(genotype.num_edges == base.num_edges for genotype in result.genotypes)
    with pytest.raises(UserError, match="no hypernetwork"):
        result.sample(0.5)
    # The same from Python, of a file or of the genotype itself.
    for given in (tmp_path / "base.json", base):
        found = de.search(few_digits, regime="random", base=given, replaced_edges=2, device="cpu")
        assert found.genotypes == result.genotypes
    with pytest.raises(UserError, match="of the space darts; the search is in efficient"):
        run_search(with_fields(config, space="efficient"), few_digits)


def test_validation_is_measured_in_batches_of_all_classes_where_images_come_sorted(digits, tiny_search):
    # As in a folder, where batches of one class give meaningless BatchNorm statistics.
    labels = digits.val.labels.sort().values
    # The grey of an image is its class, so that it can be told in the supernet.
    images = (labels * 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    loop = SearchLoop(tiny_search, dataclasses.replace(digits, val=Split(images, labels)))
    classes = []
    loop.supernet.register_forward_pre_hook(lambda module, inputs: classes.append(len(inputs[0][:, 0, 0, 0].unique())))
    loop.measure()
    assert classes == [10, 10]


@pytest.mark.parametrize(
    "fields",
    [
        {"space": "darts", "num_cells": 5, "channels": 16},
        {"space": "darts", "channels": 4, "form": "reference"},
        {"num_cells": 5, "channels": 8},
        {"channels": 4, "form": "reference"},
        {"channels": 8, "relaxation": "gumbel-hard"},
        {"space": "darts", "channels": 8, "relaxation": "gumbel-hard"},
    ],
    ids=str,
)
def test_memory_estimate_against_what_autograd_keeps(digits, fields):
    config = with_fields(SearchConfig(), **fields)
    loop = SearchLoop(config, digits)
    kept = {}  # of tensors themselves, so that the storage of one is not counted for another

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(config.bilevel.batch_size, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    hard = config.objective.hard
    mixtures = loop.family.relaxed(loop.family.draw(1 if hard else 4, torch.Generator()), noise_seed=0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = loop.supernet(images, mixtures.detach(), hard=hard)
    assert logits.requires_grad
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20
    estimated = estimate(config, digits)
    # What one path keeps depends on its operations.
    assert measured <= estimated["memory_mib"] <= (3 if hard else 1.6) * measured
    assert estimated["supernet_parameters"] == sum(p.numel() for p in loop.supernet.parameters())
    assert estimated["steps"] == 20 * (len(loop.weight_images) // 64)
