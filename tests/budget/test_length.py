"""How long a network is trained: as the time pays for, and until it knows its images."""

import copy
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from tiny import genotype, same

from dnas_ens.budget.choice import cross_fitted_loss
from dnas_ens.budget.forecast import END_GAP, LOOKS, saturated_after
from dnas_ens.budget.length import LANDING, Length
from dnas_ens.config import RetrainConfig
from dnas_ens.data import ImageData
from dnas_ens.training.trainer import MemberTraining


def test_a_training_is_shortened_to_what_the_time_pays_for():
    clock = [0.0]
    training = SimpleNamespace(
        epoch=0, total_epochs=50, recipe=SimpleNamespace(epochs=50), val=range(30), train_split=range(70)
    )
    hold = Length(training, ends=98.0, clock=lambda: clock[0])
    for taken in (4.0, 10.0, 10.0, 10.0):
        clock[0] += taken
        training.epoch += 1
        hold({})
    # 64 of 98 s are left, an epoch takes 10, and val a seventh of one: six more.
    assert training.total_epochs == 4 + 6
    # Epochs that become faster lengthen it again: five of 6 s on average.
    training.epoch, clock[0] = 6, 34.0
    hold({})
    assert training.total_epochs == 6 + 10
    # Another process keeps that until it knows better.
    again = Length(training, ends=98.0, clock=lambda: clock[0])
    training.epoch, clock[0] = 7, 40.0
    again({})
    assert training.total_epochs == 6 + 10
    training.epoch, clock[0] = 8, 50.0
    again({})
    assert training.total_epochs == 8 + 4
    clock[0] = 99.0
    training.epoch = 9
    hold({})
    assert training.total_epochs == 9


def test_a_gap_that_grows_by_equal_steps_says_when_it_is_wide_enough():
    for epochs in (1, 8, 40, 100):
        assert saturated_after(epochs, epochs * 0.01) == pytest.approx(END_GAP / 0.01)
    # A training loss above that on val, as with strong augmentation, says nothing of an end.
    assert saturated_after(8, -0.1) == math.inf


def gap(training):
    """What `Length` looks at: the network in evaluation mode on all of val and as many training images."""
    network, losses = copy.deepcopy(training.network).eval(), []
    for split in (training.val, training.train_split):
        places = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: len(training.val)]
        with torch.no_grad():
            probs = network(training.augmentation.normalise(split.images[places])).softmax(1)
        losses.append(cross_fitted_loss(probs.numpy()[None], split.labels[places].numpy()))
    return losses[0] - losses[1]


def trained(training, length, *, epochs=None, seen=None):
    while training.epoch < training.total_epochs and training.epoch != epochs:
        scalars = training.run_epoch()
        length(scalars)
        if seen is not None:
            seen[training.epoch] = gap(training)
    return training


@pytest.mark.parametrize(("worth", "stop"), [(0.0, "between looks"), (2.5, "after the looks"), (0.0, "at its end")])
def test_a_network_is_trained_until_it_knows_its_images(few_digits, worth, stop):
    # Images that never change are soon known.
    recipe = RetrainConfig(num_cells=1, channels=16, batch_size=16, augment=False, epochs=48)

    def begun():
        return MemberTraining(genotype(), few_digits, recipe, index=0)

    seen = {}
    training = begun()
    trained(training, Length(training, worth=worth, at_most=48), seen=seen)
    looks = [math.ceil(48 * share - worth) for share in LOOKS]
    expected = [saturated_after(worth + look, seen[look]) for look in looks]
    assert training.looks == pytest.approx(expected)
    landed = (1 + LANDING) * (worth + looks[-1])
    assert training.epoch == round(max(landed, min(48, statistics.median(expected))) - worth) < 48
    # The cosine ends where the training does.
    assert 0.25 < training.learning_rate / recipe.learning_rate < 0.26

    # Interrupted it becomes as long, by the same rates.
    stopped = begun()
    at = {"between looks": looks[1], "after the looks": looks[2] + 1, "at its end": training.epoch}[stop]
    trained(stopped, Length(stopped, worth=worth, at_most=48), epochs=at)
    again = begun()
    again.load_state_dict(copy.deepcopy(stopped.state_dict()))
    trained(again, Length(again, worth=worth, at_most=48))
    assert again.epoch == training.epoch
    assert same(again.network.state_dict(), training.network.state_dict())


@pytest.mark.parametrize(("ends", "looked"), [(12, 0), (30, 3)])
def test_a_network_that_ends_before_the_last_look_is_not_looked_at(few_digits, ends, looked):
    training = MemberTraining(genotype(0), few_digits, RetrainConfig(num_cells=1, channels=4, epochs=48), index=0)
    # An epoch a second; the looks are after 8, 12 and 16.
    length = Length(training, at_most=48, ends=ends, clock=lambda: float(training.epoch))
    trained(training, length)
    assert len(training.looks) == looked
    assert training.epoch <= ends


def test_what_looks_have_said_holds_where_there_are_no_more(few_digits):
    recipe = RetrainConfig(num_cells=1, channels=2, batch_size=16, epochs=48)
    training = MemberTraining(genotype(), few_digits, recipe, index=0)
    state = training.state_dict() | {"looks": [20.0, 30.0, 25.0], "total_epochs": 25, "epoch": 17}
    training.load_state_dict(state)
    length = Length(training, at_most=48, looks=False)
    assert trained(training, length, epochs=20).total_epochs == 25
    assert training.looks == [20.0, 30.0, 25.0]


def test_a_network_that_still_learns_becomes_as_long_as_planned(few_digits):
    recipe = RetrainConfig(num_cells=1, channels=2, batch_size=16, learning_rate=1e-4, epochs=9)
    training = MemberTraining(genotype(), few_digits, recipe, index=0)
    assert trained(training, Length(training, at_most=9)).epoch == 9
    # One that goes on from what is long already is not looked at.
    on = MemberTraining(genotype(), few_digits, recipe, index=0)
    assert trained(on, Length(on, worth=30.0, at_most=48)).epoch == 9
    assert on.looks == []


def test_no_more_of_val_is_looked_at_than_is_trained_on(few_digits, monkeypatch):
    recipe = RetrainConfig(num_cells=1, channels=2, batch_size=8, epochs=6)
    parts = few_digits.named_splits() | {"train": few_digits.train.subset(range(16))}
    few = ImageData.from_splits("fewer", few_digits.classes, **parts, flip=False)
    training = MemberTraining(genotype(), few, recipe, index=0)
    seen = []
    monkeypatch.setattr(
        "dnas_ens.budget.length.cross_fitted_loss", lambda probs, labels: seen.append(probs.shape) or 2.0
    )
    trained(training, Length(training, at_most=6))
    assert seen == [(1, 16, 10)] * 4
