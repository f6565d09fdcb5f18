import json
import multiprocessing
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dnas_ens import retrain
from dnas_ens.config import RetrainConfig
from dnas_ens.data import ImageData, Split
from dnas_ens.ensembles import Ensemble
from dnas_ens.errors import DivergedError, UserError
from dnas_ens.space.genotype import random_genotype
from dnas_ens.space.search_space import DARTS_OPERATIONS
from dnas_ens.training.members import train_in_turns, train_member, train_members
from dnas_ens.training.trainer import MemberTraining

RECIPE = RetrainConfig(
    num_cells=1, channels=4, epochs=4, batch_size=16, drop_path=0.2, cutout=3, auxiliary_weight=0.4
)


def genotype(seed=0):
    return random_genotype(
        np.random.default_rng(seed), operations=DARTS_OPERATIONS, num_nodes=2, cell_types=("reduction",)
    )


def test_resumed_training_is_bit_equal_to_an_uninterrupted_one(few_digits, tmp_path):
    straight = MemberTraining(genotype(), few_digits, RECIPE, index=1)
    expected, description = train_member(straight)
    begun = MemberTraining(genotype(), few_digits, RECIPE, index=1)

    class StoppedError(RuntimeError):
        pass

    run_epoch = begun.run_epoch

    def dies_in_third(progress=None):
        if begun.epoch == 2:
            raise StoppedError
        return run_epoch(progress)

    begun.run_epoch = dies_in_third
    with pytest.raises(StoppedError):
        train_member(begun, folder=tmp_path)
    torch.manual_seed(7)  # the global stream must not matter
    again = MemberTraining(genotype(), few_digits, RECIPE, index=1)
    network, resumed = train_member(again, folder=tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(expected.state_dict().values(), network.state_dict().values(), strict=True)
    )
    assert resumed["val_nll"] == description["val_nll"]
    lines = [json.loads(line) for line in (tmp_path / "members/1/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]


def test_members_trained_in_turns_are_those_trained_alone(few_digits, tmp_path):
    recipe = replace(RECIPE, epochs=2)
    genotypes = [genotype(0), genotype(1), genotype(0)]
    alone = train_members(genotypes, few_digits, recipe, folder=tmp_path / "alone")
    trainings = [MemberTraining(cells, few_digits, recipe, index=i) for i, cells in enumerate(genotypes)]
    started = time.process_time()
    train_in_turns(trainings, folder=tmp_path / "turns", num_members=3)
    taken = time.process_time() - started
    turns = train_members(genotypes, few_digits, recipe, folder=tmp_path / "turns")
    for expected, found in zip(alone.state_dict().items(), turns.state_dict().items(), strict=True):
        assert expected[0] == found[0]
        assert torch.equal(expected[1], found[1])
    # Every member's meter runs in its own turns alone.
    seconds = [
        json.loads((tmp_path / f"turns/members/{index}/member.json").read_text())["cpu_seconds"]
        for index in range(3)
    ]
    assert 0.5 * taken < sum(seconds) <= taken
    assert max(seconds) < 0.8 * taken
    logged = (tmp_path / "turns/members/2/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in logged] == [1, 2]


def test_arrays_that_look_at_the_data_outlive_side_by_side_training(few_digits, tmp_path):
    labels = few_digits.val.labels.numpy()
    expected = labels.copy()
    train_members(
        [genotype(0), genotype(1)], few_digits, replace(RECIPE, epochs=1), folder=tmp_path, workers=2
    )
    # Else their memory would have been freed: reading it is undefined, so that is what has to be seen first.
    assert not few_digits.val.labels.is_shared()
    assert few_digits.val.labels.numpy().ctypes.data == labels.ctypes.data
    assert np.array_equal(labels, expected)


@pytest.mark.gpu
def test_members_side_by_side_on_a_gpu(few_digits, tmp_path):
    recipe = replace(RECIPE, epochs=2, precision="float32", layout="contiguous")
    genotypes = [genotype(0), genotype(1), genotype(0)]
    for name, workers, graph in (("alone", 1, "off"), ("side", 2, "off"), ("graphs", 3, "on")):
        folder = tmp_path / name
        train_members(
            genotypes,
            few_digits,
            replace(recipe, cuda_graph=graph),
            device="cuda",
            folder=folder,
            workers=workers,
        )
        nlls = [json.loads((folder / f"members/{i}/member.json").read_text())["val_nll"] for i in range(3)]
        if name == "alone":
            expected = nlls
        assert nlls == pytest.approx(expected, rel=0.05)


def test_members_of_one_genotype_differ_by_their_seeds(few_digits):
    ensemble = retrain([genotype()] * 2, few_digits, config=RECIPE, device="cpu", epochs=1)
    first, second = (member.state_dict() for member in ensemble.members)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    again = retrain([genotype()] * 2, few_digits, config=RECIPE, device="cpu", epochs=1)
    repeated = again.members[1].state_dict()
    assert all(torch.equal(second[name], repeated[name]) for name in second)


def test_training_learns_and_the_ensemble_is_the_average(few_digits, tmp_path):
    recipe = RetrainConfig(num_cells=1, channels=6, epochs=12, batch_size=16)
    ensemble = train_members([genotype(0), genotype(1)], few_digits, recipe, folder=tmp_path)
    probs = ensemble.predict_probs(few_digits.val)
    labels = few_digits.val.labels.numpy()
    assert (probs.mean(0).argmax(-1) == labels).mean() > 0.6
    stored = json.loads((tmp_path / "members/0/member.json").read_text())
    nll = F.nll_loss(torch.tensor(probs[0]).log(), few_digits.val.labels)
    assert stored["val_nll"] == pytest.approx(float(nll), rel=1e-4)
    assert stored["parameters"] == sum(p.numel() for p in ensemble.members[0].parameters())
    assert float(ensemble.temperature) != 1.0


def test_finished_members_are_kept_and_others_are_refused(few_digits, tmp_path):
    train_members([genotype(0)], few_digits, RECIPE, folder=tmp_path)
    weights = (tmp_path / "members/0/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    train_members([genotype(0), genotype(1)], few_digits, RECIPE, folder=tmp_path)
    assert (tmp_path / "members/0/model.safetensors").read_bytes() == weights
    assert (tmp_path / "members/1/model.safetensors").exists()
    with pytest.raises(UserError, match=r"is another one: spec\.genotype\.reduction is"):
        train_members([genotype(2)], few_digits, RECIPE, folder=tmp_path)


def test_a_finished_ensemble_is_returned_without_a_look_at_val(few_digits, tmp_path):
    genotypes = [genotype(0), genotype(1)]
    trained = train_members(genotypes, few_digits, RECIPE, folder=tmp_path)
    manifest = tmp_path / "ensemble.json"
    written = manifest.read_bytes()
    # Labels of val decide the temperature; with others there would be another one.
    shuffled = Split(few_digits.val.images, few_digits.val.labels.flip(0))
    elsewhere = replace(few_digits, val=shuffled)
    again = train_members(genotypes, elsewhere, RECIPE, folder=tmp_path)
    assert manifest.read_bytes() == written
    assert float(again.temperature) == float(trained.temperature)
    for expected, found in zip(trained.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, found)
    with pytest.raises(UserError, match=r"is another one: recipe\.seed is 0 there and 1 here"):
        train_members(genotypes, few_digits, replace(RECIPE, seed=1), folder=tmp_path)
    # Of fewer members, or with one that is trained again, it is another ensemble.
    assert len(train_members(genotypes[:1], few_digits, RECIPE, folder=tmp_path).members) == 1
    train_members(genotypes, few_digits, RECIPE, folder=tmp_path)
    assert manifest.read_bytes() == written
    weights = tmp_path / "members/1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match="SHA-256 differs"):
        train_members(genotypes, few_digits, RECIPE, folder=tmp_path)
    shutil.rmtree(tmp_path / "members/1")
    train_members(genotypes, few_digits, RECIPE, folder=tmp_path)
    assert manifest.read_bytes() == written


def test_an_ensemble_whose_member_is_being_trained_does_not_load(few_digits, tmp_path):
    train_members([genotype(0)], few_digits, RECIPE, folder=tmp_path)
    shutil.rmtree(tmp_path / "members/0")
    shutil.rmtree(tmp_path / "checkpoints")
    wild = replace(RECIPE, learning_rate=1e18, gradient_clip=1e30)
    with pytest.raises(DivergedError):
        train_members([genotype(0)], few_digits, wild, folder=tmp_path)
    with pytest.raises(UserError, match="holds no ensemble"):
        Ensemble.load(tmp_path)


@pytest.mark.parametrize(
    ("epochs", "measured"),
    [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (6, [2, 3, 5, 6]), (9, [3, 5, 7, 9])],
)
def test_members_are_measured_on_val_at_the_quarters(few_digits, tmp_path, epochs, measured):
    train_members([genotype()], few_digits, replace(RECIPE, epochs=epochs), folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "members/0/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "val_nll" in line] == measured
    assert lines[-1]["val_nll"] == json.loads((tmp_path / "members/0/member.json").read_text())["val_nll"]


def test_looking_at_val_is_no_cost_of_training(few_digits):
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


def test_test_images_are_never_read(few_digits):
    shuffled = Split(images=few_digits.test.images.flip(0), labels=few_digits.test.labels.flip(0))
    blind = ImageData.from_splits(
        "blind", few_digits.classes, train=few_digits.train, val=few_digits.val, test=shuffled, flip=False
    )
    ours, theirs = (
        train_members([genotype()], data, RECIPE).members[0].state_dict() for data in (few_digits, blind)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_diverged_training_says_so(few_digits):
    wild = RetrainConfig(
        num_cells=1, channels=4, epochs=3, batch_size=16, learning_rate=1e18, gradient_clip=1e30
    )
    with pytest.raises(
        DivergedError, match=r"gradient of step \d+ in epoch \d of member 0 is not finite; \S+ is not"
    ):
        train_members([genotype()], few_digits, wild)


def test_members_trained_side_by_side_are_the_same_members(few_digits, tmp_path):
    genotypes = [genotype(seed) for seed in range(3)]
    alone = train_members(genotypes, few_digits, RECIPE, folder=tmp_path / "alone")
    together = train_members(genotypes, few_digits, RECIPE, folder=tmp_path / "together", workers=2)
    for ours, theirs in zip(alone.state_dict().items(), together.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1]), ours[0]
    assert json.loads((tmp_path / "together/members/2/member.json").read_text())["index"] == 2
    assert multiprocessing.active_children() == []
