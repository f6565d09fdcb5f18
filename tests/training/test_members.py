import json
import multiprocessing
import shutil
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import genotype

from dnas_ens.config import RetrainConfig
from dnas_ens.data import Split
from dnas_ens.ensembles import Ensemble
from dnas_ens.errors import DivergedError, UserError
from dnas_ens.training.members import train_in_turns, train_member, train_members
from dnas_ens.training.trainer import MemberTraining

RECIPE = RetrainConfig(num_cells=1, channels=4, epochs=4, batch_size=16, drop_path=0.2, cutout=3, auxiliary_weight=0.4)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def note(folder, index):
    return json.loads((folder / f"members/{index}/member.json").read_text())


def logged(folder, index):
    lines = (folder / f"members/{index}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_resumed_training_is_bit_equal_to_an_uninterrupted_one(few_digits, tmp_path):
    straight = MemberTraining(genotype(), few_digits, RECIPE, index=1)
    expected, description = train_member(straight)
    begun = MemberTraining(genotype(), few_digits, RECIPE, index=1)

    run_epoch = begun.run_epoch

    def dies_in_third(progress=None):
        if begun.epoch == 2:
            raise KeyboardInterrupt
        return run_epoch(progress)

    begun.run_epoch = dies_in_third
    with pytest.raises(KeyboardInterrupt):
        train_member(begun, folder=tmp_path)
    torch.manual_seed(7)  # the global stream must not matter
    again = MemberTraining(genotype(), few_digits, RECIPE, index=1)
    network, resumed = train_member(again, folder=tmp_path)
    assert same(expected.state_dict(), network.state_dict())
    assert resumed["val_nll"] == description["val_nll"]
    assert [line["epoch"] for line in logged(tmp_path, 1)] == [1, 2, 3, 4]


def test_members_trained_in_turns_are_those_trained_alone(few_digits, tmp_path):
    recipe = replace(RECIPE, epochs=2)
    genotypes = [genotype(0), genotype(1), genotype(0)]
    alone = train_members(genotypes, few_digits, recipe)
    trainings = [MemberTraining(cells, few_digits, recipe, index=i) for i, cells in enumerate(genotypes)]
    started = time.process_time()
    train_in_turns(trainings, folder=tmp_path / "turns", num_members=3)
    taken = time.process_time() - started
    turns = train_members(genotypes, few_digits, recipe, folder=tmp_path / "turns")
    assert same(alone.state_dict(), turns.state_dict())
    # Members of one genotype differ by their seeds.
    assert not same(alone.members[0].state_dict(), alone.members[2].state_dict())
    # Every member's meter runs in its own turns alone.
    seconds = [note(tmp_path / "turns", index)["cpu_seconds"] for index in range(3)]
    assert 0.5 * taken < sum(seconds) <= taken
    assert max(seconds) < 0.8 * taken
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
