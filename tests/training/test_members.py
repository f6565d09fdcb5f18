import json
import math
import multiprocessing
import shutil
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import genotype, same

from dnas_ens.config import RetrainConfig
from dnas_ens.data import Split
from dnas_ens.ensembles import Ensemble
from dnas_ens.errors import DivergedError, UserError
from dnas_ens.metrics.calibration import calibrated_nll, fit_temperature
from dnas_ens.nn.network import Network
from dnas_ens.run import checkpoint
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import load_tensors
from dnas_ens.training.members import plan_members, train_in_turns, train_member, train_members
from dnas_ens.training.step import TrainingStep
from dnas_ens.training.trainer import MemberTraining, Parent

RECIPE = RetrainConfig(num_cells=1, channels=4, epochs=4, batch_size=16, drop_path=0.2, cutout=3, auxiliary_weight=0.4)


def note(folder, index):
    return json.loads((folder / f"members/{index}/member.json").read_text())


def logged(folder, index):
    lines = (folder / f"members/{index}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_member_that_was_killed_between_its_last_state_and_its_files_says_the_same(few_digits, tmp_path):
    _, description = train_member(MemberTraining(genotype(), few_digits, RECIPE, index=1), folder=tmp_path)
    assert description["train_loss"] > 0
    # The state after the last epoch is there.
    _, again = train_member(MemberTraining(genotype(), few_digits, RECIPE, index=1), folder=tmp_path)
    measured = {"wall_seconds", "cpu_seconds"}
    assert {key: again[key] for key in again if key not in measured} == {
        key: description[key] for key in description if key not in measured
    }


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("step", [1, 5, 11, 12, 13])
def test_a_training_interrupted_between_two_steps_goes_on_there(few_digits, tmp_path, monkeypatch, step, goes_on):
    weights = MemberTraining(genotype(), few_digits, RECIPE, index=7).network.state_dict()
    parent = Parent(0, lambda: weights) if goes_on else None
    expected, description = train_member(MemberTraining(genotype(), few_digits, RECIPE, index=1, parent=parent))
    begun = MemberTraining(genotype(), few_digits, RECIPE, index=1, parent=parent)
    steps = begun.steps_per_epoch
    taken, call = 0, TrainingStep.__call__

    def counted(self, *tensors):
        nonlocal taken
        taken += 1
        if taken == step + 1:
            raise KeyboardInterrupt
        return call(self, *tensors)

    monkeypatch.setattr(TrainingStep, "__call__", counted)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_STATES", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train_member(begun, folder=tmp_path)
    assert CheckpointStore(tmp_path / "checkpoints", name="member-1").load_newest()[0] == step
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_STATES", 60.0)
    torch.manual_seed(7)  # the global stream must not matter
    again = MemberTraining(genotype(), few_digits, RECIPE, index=1, parent=parent)
    network, resumed = train_member(again, folder=tmp_path)
    assert taken == 1 + RECIPE.epochs * steps
    assert same(expected.state_dict(), network.state_dict())
    assert (resumed["val_nll"], resumed["train_loss"]) == (description["val_nll"], description["train_loss"])
    assert [line["epoch"] for line in logged(tmp_path, 1)] == [1, 2, 3, 4]


class SlowTraining(MemberTraining):
    """A training that works for some time in each of its steps."""

    seconds = 0.1

    def targets(self, images, index):
        until = time.process_time() + self.seconds
        while time.process_time() < until:
            pass
        return super().targets(images, index)


def test_members_trained_in_turns_are_those_trained_alone(few_digits, tmp_path):
    recipe = replace(RECIPE, epochs=2)
    genotypes = [genotype(0), genotype(1), genotype(0)]
    alone = train_members(genotypes, few_digits, recipe)
    chains = [[partial(MemberTraining, cells, few_digits, recipe, index=i)] for i, cells in enumerate(genotypes)]
    chains[0] = [partial(SlowTraining, genotypes[0], few_digits, recipe, index=0)]
    train_in_turns(chains, folder=tmp_path / "turns", num_members=3)
    turns = train_members(genotypes, few_digits, recipe, folder=tmp_path / "turns")
    assert same(alone.state_dict(), turns.state_dict())
    # Members of one genotype differ by their seeds.
    assert not same(alone.members[0].state_dict(), alone.members[2].state_dict())
    # The meter of a member runs in its own turns alone: what the first one's steps take is the first one's.
    seconds = [note(tmp_path / "turns", index)["cpu_seconds"] for index in range(3)]
    assert seconds[0] >= SlowTraining.seconds * 2 * math.ceil(96 / 16) > max(seconds[1:])
    assert [line["epoch"] for line in logged(tmp_path / "turns", 2)] == [1, 2]


def test_members_trained_side_by_side_are_the_same_and_leave_the_data_alone(few_digits, tmp_path):
    genotypes, recipe = [genotype(0), genotype(1)], replace(RECIPE, epochs=1)
    labels = few_digits.val.labels.numpy()
    alone = train_members(genotypes, few_digits, recipe, folder=tmp_path / "alone")
    together = train_members(genotypes, few_digits, recipe, folder=tmp_path / "together", workers=2)
    assert same(alone.state_dict(), together.state_dict())
    assert note(tmp_path / "together", 1)["index"] == 1
    assert multiprocessing.active_children() == []
    # Else the memory of arrays that look at it would have been freed, and reading them is undefined.
    assert not few_digits.val.labels.is_shared()
    assert few_digits.val.labels.numpy().ctypes.data == labels.ctypes.data


@pytest.mark.gpu
def test_members_side_by_side_on_a_gpu(few_digits, tmp_path):
    recipe = replace(RECIPE, epochs=2, precision="float32", layout="contiguous")
    genotypes = [genotype(0), genotype(1), genotype(0)]
    for name, workers, graph in (("alone", 1, "off"), ("side", 2, "off"), ("graphs", 3, "on")):
        folder = tmp_path / name
        way = {"device": "cuda", "folder": folder, "workers": workers}
        train_members(genotypes, few_digits, replace(recipe, cuda_graph=graph), **way)
        nlls = [note(folder, index)["val_nll"] for index in range(3)]
        if name == "alone":
            expected = nlls
        assert nlls == pytest.approx(expected, rel=0.05)


def test_training_learns_and_the_ensemble_is_the_average(few_digits, tmp_path):
    recipe = RetrainConfig(num_cells=1, channels=4, epochs=10, batch_size=16)
    ensemble = train_members([genotype(0), genotype(1)], few_digits, recipe, folder=tmp_path)
    probs = ensemble.predict_probs(few_digits.val)
    labels = few_digits.val.labels.numpy()
    assert (probs.mean(0).argmax(-1) == labels).mean() > 0.6
    stored, lines = note(tmp_path, 0), logged(tmp_path, 0)
    # Members are measured at the quarters.
    assert [line["epoch"] for line in lines if "val_nll" in line] == [3, 5, 8, 10]
    assert lines[-1]["val_nll"] == stored["val_nll"]
    nll = F.nll_loss(torch.tensor(probs[0]).log(), few_digits.val.labels)
    assert stored["val_nll"] == pytest.approx(float(nll), rel=1e-4)
    assert stored["parameters"] == sum(p.numel() for p in ensemble.members[0].parameters())
    assert float(ensemble.temperature) != 1.0


def test_what_is_finished_is_kept_and_what_is_not_the_same_is_refused(few_digits, tmp_path):
    genotypes = [genotype(0), genotype(1)]

    def train(genotypes=genotypes, data=few_digits, **changes):
        return train_members(genotypes, data, replace(RECIPE, **changes), folder=tmp_path)

    train(genotypes[:1])
    weights = (tmp_path / "members/0/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    trained = train()
    assert (tmp_path / "members/0/model.safetensors").read_bytes() == weights
    manifest = tmp_path / "ensemble.json"
    written = manifest.read_bytes()
    # Labels of val decide the temperature; with others there would be another one.
    again = train(data=replace(few_digits, val=Split(few_digits.val.images, few_digits.val.labels.flip(0))))
    assert manifest.read_bytes() == written
    assert same(trained.state_dict(), again.state_dict())
    # Of fewer members, or with one that is trained again, it is another ensemble.
    assert len(train(genotypes[:1]).members) == 1
    shutil.rmtree(tmp_path / "members/1")
    train()
    assert manifest.read_bytes() == written
    for asked, cause in (
        ({"seed": 1}, r"is another one: recipe\.seed is 0 there and 1 here"),
        ({"genotypes": [genotype(2)]}, r"is another one: spec\.genotype\.reduction is"),
        # Not part of the fingerprint.
        ({"data": replace(few_digits, flip=not few_digits.flip)}, "is another one: flip is false there and true here"),
    ):
        with pytest.raises(UserError, match=cause):
            train(**asked)
    damaged = tmp_path / "members/1/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match="SHA-256 differs"):
        train()
    # While a member is trained again there is no ensemble to load.
    shutil.rmtree(tmp_path / "members")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(DivergedError):
        train(learning_rate=1e18, gradient_clip=1e30)
    with pytest.raises(UserError, match="holds no ensemble"):
        Ensemble.load(tmp_path)


def test_validation_does_not_count_as_training_cost(few_digits):
    training = MemberTraining(genotype(), few_digits, RECIPE, index=0)
    val_probs = training.val_probs

    def slowly():
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        return val_probs()

    training.val_probs = slowly
    started = time.process_time()
    _, description = train_member(training)
    assert description["cpu_seconds"] < time.process_time() - started - 4 * 0.2


def test_cycles_go_on_from_one_another_and_the_last_ones_join(few_digits, tmp_path):
    recipe = replace(RECIPE, epochs=2, cycles=2, cycle_epochs=1, cycle_learning_rate=0.02)
    genotypes = [genotype(0), genotype(1)]
    train_members(genotypes, few_digits, recipe, folder=tmp_path / "a")
    in_memory = train_members(genotypes, few_digits, recipe)

    # Witness: each network trained by hand from the weights of the one before it.
    networks, start = [], {}
    for number in range(6):
        cycle = number % 3
        own = replace(RECIPE, epochs=1 if cycle else 2, learning_rate=0.02 if cycle else RECIPE.learning_rate)
        training = MemberTraining(genotypes[number // 3], few_digits, own, index=number)
        if cycle:
            training.network.load_state_dict(start)
            training._drop_path_now = lambda: RECIPE.drop_path
        for _ in range(own.epochs):
            training.run_epoch()
        training.end()
        start = {name: tensor.clone() for name, tensor in training.network.state_dict().items()}
        networks.append(training)
    stored = json.loads((tmp_path / "a/ensemble.json").read_text())
    numbers = [int(member["file"].split("/")[1]) for member in stored["members"]]
    for number, training in enumerate(networks):
        kept = Network.from_spec(note(tmp_path / "a", number)["spec"])
        kept.load_state_dict(load_tensors(tmp_path / f"a/members/{number}/model.safetensors"))
        assert same(kept.state_dict(), training.network.state_dict())
    # The last k of each, by the calibrated NLL on val over all k.
    labels = few_digits.val.labels.numpy()
    options = [[number for number in range(6) if number % 3 >= 3 - count] for count in (1, 2, 3)]
    losses = []
    for option in options:
        averaged = np.mean([networks[number].val_probs() for number in option], axis=0)
        losses.append(calibrated_nll(averaged, labels, fit_temperature(averaged, labels)))
    assert numbers == options[int(np.argmin(losses))]
    loaded = Ensemble.load(tmp_path / "a")
    assert same(in_memory.state_dict(), loaded.state_dict())
    assert stored["num_trained"] == 6


def test_branches_all_begin_from_the_base():
    recipe = replace(RECIPE, epochs=1, cycles=2, cycle_epochs=1, branches=True)
    chains = plan_members([genotype(0), genotype(1)], recipe)
    assert [[plan.parent for plan in chain] for chain in chains] == [[None, 0, 0], [None, 3, 3]]
    chains = plan_members([genotype(0), genotype(1)], replace(recipe, branches=False))
    assert [[plan.parent for plan in chain] for chain in chains] == [[None, 0, 1], [None, 3, 4]]


def test_an_interrupted_cycle_goes_on_to_the_same_networks(few_digits, tmp_path):
    recipe = replace(RECIPE, epochs=1, cycles=1, cycle_epochs=3)
    expected = train_members([genotype(0)], few_digits, recipe, folder=tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/members/1")
    newest = CheckpointStore(tmp_path / "cut/checkpoints", name="member-1").steps()[-1]
    for state in (tmp_path / "cut/checkpoints").glob(f"member-1-{newest:08d}.*"):
        state.unlink()
    again = train_members([genotype(0)], few_digits, recipe, folder=tmp_path / "cut")
    assert same(expected.state_dict(), again.state_dict())
    assert [line["epoch"] for line in logged(tmp_path / "cut", 1)] == [3]
