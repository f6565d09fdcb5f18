"""Methods that make several networks of one long training, beside plain loops."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn

from dnas_ens.compare.methods.averaged_weights import _Averages, averaged_weights, evolved_network
from dnas_ens.compare.methods.comparison import STATISTICS_IMAGES, Comparison
from dnas_ens.compare.methods.long_training import Cycles, snapshots, train_long
from dnas_ens.compare.records import read_lines
from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.data import load_data
from dnas_ens.data.batches import Augmentation, epoch_indices
from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles.snapshot import CosineCycles
from dnas_ens.run.files import load_tensors
from dnas_ens.space.genotype import random_genotype
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.training.trainer import MemberTraining

EPOCHS, MEMBERS = 4, 2


@pytest.fixture
def comparison(tmp_path):
    space = SearchSpace()
    base, *members = (
        random_genotype(np.random.default_rng(seed), operations=space.operations, num_nodes=2).to_dict()
        for seed in (0, 1, 2)
    )
    found = {
        "base": {"genotype": base},
        "candidates": [{"genotype": member} for member in members],
        "selected": [0, 1],
        "report": {"cpu_seconds": 10.0},
    }
    # Its own members are not trained, so nothing has to match their cost.
    made = Comparison(
        folder=tmp_path,
        search=SearchConfig(),
        found=found,
        data=load_data("digits", limit_train=160),
        recipe=RetrainConfig(num_cells=1, channels=2, epochs=EPOCHS, batch_size=32),
        device=torch.device("cpu"),
    )
    made.total_seconds = made.largest_seconds = 0.0
    return made


def plain_loop(comparison, name, rate_at):
    """Weights after every step of eight epochs with a learning rate for each, and the training."""
    recipe = comparison.recipe_of(name, epochs=EPOCHS * MEMBERS)
    training = MemberTraining(comparison.base, comparison.data, recipe, index=0)
    weights = []

    def on_step():
        weights.append(copy.deepcopy(training.network.state_dict()))
        for group in training.optimizer.param_groups:
            group["lr"] = rate_at(len(weights))

    for _ in range(EPOCHS * MEMBERS):
        training.run_epoch(learning_rate=rate_at(len(weights)), on_step=on_step)
    return weights, training


def probs_of(comparison, state, split="test"):
    """Probabilities of a state whose BatchNorm statistics are computed from all training images, as augmented."""
    network = comparison.network()
    network.load_state_dict(state)
    normalise = Augmentation.for_data(comparison.data, augment=False).normalise
    augment = Augmentation.for_data(comparison.data, augment=True)
    train = comparison.data.train.drawn(STATISTICS_IMAGES)
    (index,) = epoch_indices(train, len(train), generator=torch.Generator().manual_seed(0))
    update_bn([augment(train.images[index], torch.Generator().manual_seed(0))], network)
    with torch.no_grad():
        return network.eval()(normalise(getattr(comparison.data, split).images)).softmax(-1).numpy()


def mixed(states, shares):
    total = {name: sum(share * state[name] for share, state in zip(shares, states, strict=True)) for name in states[0]}
    return {name: value if states[0][name].is_floating_point() else states[0][name] for name, value in total.items()}


def loss_on_judging_half(comparison, state):
    """NLL of a state on the half of val that choices are made on."""
    labels = comparison.data.val.labels.numpy()
    judging = alternating_halves(labels)[0]
    return -np.log(probs_of(comparison, state, "val")[judging, labels[judging]]).mean()


def test_averages_are_of_a_plain_loop_with_a_rate_that_falls_and_stays(comparison):
    rows = {row.name: row for row in averaged_weights(comparison)}
    steps = 160 // 32

    def rate_at(step):
        # The last quarter of eight epochs, with 0.4 of the learning rate.
        return 0.05 * (0.4 + 0.3 * (1 + math.cos(math.pi * min(step // steps, 6) / 6)))

    weights, _ = plain_loop(comparison, "averaged-weights", rate_at)
    first, second = weights[7 * steps - 1], weights[8 * steps - 1]
    ema = weights[0]
    for state in weights[1:]:
        ema = mixed([ema, state], [1 - 1 / steps, 1 / steps])
    expected = {"its last model alone": second, "its moving average (EMA)": ema}
    # Of two models; of one there is only the last.
    for name, shares in {
        "equal average of the last models of one training": [1 / 2, 1 / 2],
        "its linearly decaying average": [1 / 3, 2 / 3],
        "its exponentially decaying average": [0.9 / 1.9, 1 / 1.9],
    }.items():
        candidates = [second, mixed([first, second], shares)]
        losses = [loss_on_judging_half(comparison, state) for state in candidates]
        assert abs(losses[0] - losses[1]) > 1e-4, "too close to tell which is to be chosen"
        assert rows[name].detail == f"n={1 + int(np.argmin(losses))} of 2"
        expected[name] = candidates[int(np.argmin(losses))]
    for name, state in expected.items():
        np.testing.assert_allclose(rows[name].predictions.test_probs[0], probs_of(comparison, state), atol=2e-5)
    stops = [one for one in rows["equal average of the last models of one training"].options if one.spent[0] in "12"]
    assert [one.epochs for one in stops] == [7, 8]
    for option, state in zip(stops, (first, mixed([first, second], [0.5, 0.5])), strict=True):
        hits = probs_of(comparison, state).argmax(1) == comparison.data.test.labels.numpy()
        assert option.hits.mean() == pytest.approx(hits.mean())
    # The search took 10 seconds. A training that stops after seven of eight epochs costs seven eighths.
    (noted,) = read_lines(comparison.folder / "baselines" / "records.jsonl")
    training, making = noted["training_seconds"], noted["making"]
    assert training > 0
    for name, row in rows.items():
        assert row.cpu_seconds == pytest.approx(10 + training + making[name])
    for count, option in enumerate(stops, start=1):
        made = making[f"equal average of the first {count} of 2 kept"]
        assert option.cpu_seconds == pytest.approx(10 + training * (6 + count) / 8 + made)


def test_snapshots_are_of_a_plain_loop_with_the_papers_rate(comparison):
    row = next(iter(snapshots(comparison)))
    steps = EPOCHS * 160 // 32

    def rate_at(step):
        return 0.025 * (math.cos(math.pi * (step % steps) / steps) + 1)

    weights, training = plain_loop(comparison, "snapshots", rate_at)
    network = training.network.eval()
    normalise = training.augmentation.normalise
    for index in range(MEMBERS):
        network.load_state_dict(weights[(index + 1) * steps - 1])
        with torch.no_grad():
            probs = network(normalise(comparison.data.test.images)).softmax(-1)
        np.testing.assert_allclose(row.predictions.test_probs[index], probs, atol=2e-5)


@pytest.mark.parametrize("kind", ["cycles", "averages"])
def test_an_interrupted_training_goes_on_to_the_same_end(comparison, kind):
    def companion_of(training):
        schedule = CosineCycles(epochs=EPOCHS * MEMBERS, num_cycles=2, initial_learning_rate=0.05)
        return Cycles(training, schedule) if kind == "cycles" else _Averages(comparison, training)

    def interrupted(training):
        companion = companion_of(training)
        ordinary = companion.after_epoch

        def after_epoch(epochs_done):
            ordinary(epochs_done)
            # Between two checkpoints, and after the first model was kept.
            if epochs_done == 7:
                raise KeyboardInterrupt

        companion.after_epoch = after_epoch
        return companion

    with pytest.raises(KeyboardInterrupt):
        train_long(comparison, "broken", interrupted)
    resumed, companion, _ = train_long(comparison, "broken", companion_of)
    # The name decides the seeds; a folder of another comparison has no checkpoint.
    comparison.folder = comparison.folder / "elsewhere"
    straight, other, _ = train_long(comparison, "broken", companion_of)
    torch.testing.assert_close(resumed.network.state_dict(), straight.network.state_dict(), rtol=0, atol=0)
    mine, its = (each.state_dict() for each in (companion, other))
    kept = "snapshots" if kind == "cycles" else "states"
    assert len(its[kept]) == 2
    for found, expected in zip(mine[kept], its[kept], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_evolved_network_lies_between_two_and_is_no_worse_on_what_chose_it(comparison):
    row = next(iter(evolved_network(comparison)))
    networks = comparison.train("base-cell", [comparison.base] * MEMBERS)
    folder = comparison.folder / "baselines"
    states = [load_tensors(folder / "base-cell" / "members" / f"{i}/model.safetensors") for i in (0, 1)]
    share = read_lines(folder / "records.jsonl")[0]["coefficient"]
    assert 0 <= share <= 1
    np.testing.assert_allclose(
        row.predictions.test_probs[0], probs_of(comparison, mixed(states, [share, 1 - share])), atol=2e-5
    )
    assert row.cpu_seconds > 10.0 + sum(networks.seconds[:2])

    def loss(share):
        return loss_on_judging_half(comparison, mixed(states, [share, 1 - share]))

    assert loss(share) <= min(loss(0.0), loss(1.0), loss(0.5)) + 1e-5
