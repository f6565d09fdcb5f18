import dataclasses
import zipfile

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from dnas_ens.data.dataset import Split
from dnas_ens.ensembles import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.errors import UserError
from dnas_ens.evaluate import evaluate
from dnas_ens.evaluate.predictions import Predictions, with_training_costs
from dnas_ens.run.files import write_json

ARRAYS = ("val_probs", "test_probs", "val_labels", "test_labels")
LISTS = ("parameters", "flops", "inference_seconds", "train_cpu_seconds", "train_gpu_seconds")


def predictions(num_members=3, seed=0, **fields):
    return tiny.predictions(num_members, 8, seed=seed, **fields)


def costed(num_members=3, seed=0):
    costs = {name: [10 * index + i for i in range(num_members)] for index, name in enumerate(LISTS)}
    costs |= {"search_cpu_seconds": 3.5, "search_gpu_seconds": 0.0, "device": "a processor, 2 threads"}
    return predictions(num_members, seed, **costs)


def fields_of(given):
    return {name: value for name, value in vars(given).items() if name not in ARRAYS}


def test_round_trip(tmp_path):
    given, file = costed(), tmp_path / "p.npz"
    given.save(file)
    loaded = Predictions.load(file)
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(loaded, name), getattr(given, name), rtol=1e-6)
    assert fields_of(loaded) == fields_of(given)
    # A file of before costs were kept.
    given = predictions(parameters=[10, 20, 30])
    old = {name: np.array(getattr(given, name)) for name in (*ARRAYS, "classes", "weights", "parameters")}
    np.savez_compressed(file, **{**old, "val_labels": old["val_labels"].astype(np.uint8)})
    loaded = Predictions.load(file)
    assert fields_of(loaded) == fields_of(given)
    assert loaded.val_labels.dtype == np.int64


def test_some_members_and_members_of_both():
    first, second = costed(), costed(2, seed=1)
    chosen = first.of_members([2, 0], [3.0, 1.0])
    assert chosen.flops == [12, 10]
    for found, probs in zip(chosen.averaged(), (first.val_probs, first.test_probs), strict=True):
        np.testing.assert_allclose(found, 0.75 * probs[2] + 0.25 * probs[0])
    both = first.with_members_of(second)
    np.testing.assert_array_equal(both.test_probs, [*first.test_probs, *second.test_probs])
    assert both.train_cpu_seconds == [30, 31, 32, 30, 31]
    assert both.weights == pytest.approx([0.2] * 5)
    assert first.with_members_of(predictions()).flops == ()
    with pytest.raises(ValueError, match="test_labels"):
        first.with_members_of(dataclasses.replace(second, test_labels=second.test_labels[::-1]))


def test_training_costs_of_a_folder(tmp_path):
    given = predictions(2)
    members = [{"file": f"members/{number}/model.safetensors", "spec": {}} for number in range(3)]
    write_json(tmp_path / "ensemble.json", {"members": members[:2]})
    write_json(tmp_path / "members/0/member.json", {"cpu_seconds": 2.0})
    assert with_training_costs(given, tmp_path).train_cpu_seconds == ()
    write_json(tmp_path / "members/1/member.json", {"cpu_seconds": 4.0, "gpu_seconds": 9.0})
    alone = with_training_costs(given, tmp_path)
    assert (alone.train_cpu_seconds, alone.train_gpu_seconds) == ([2.0, 4.0], [0.0, 9.0])
    assert alone.search_cpu_seconds is None
    for report, seconds in (({"cpu_seconds": 7.0}, 7.0), ({}, 0.0)):
        write_json(tmp_path / "genotypes.json", {"report": report})
        assert with_training_costs(given, tmp_path).search_cpu_seconds == seconds
    # What was trained and not chosen counts with the search.
    write_json(tmp_path / "members/2/member.json", {"cpu_seconds": 8.0})
    write_json(tmp_path / "ensemble.json", {"members": [members[0], members[2]], "num_trained": 3})
    chosen = with_training_costs(given, tmp_path)
    assert (chosen.train_cpu_seconds, chosen.search_cpu_seconds) == ([2.0, 8.0], 4.0)


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        ("val_probs", lambda p: p * 2, "no probabilities"),
        ("test_probs", lambda p: p[:, :, :3], "test_probs has shape"),
        ("val_labels", lambda labels: labels + 3, "val_labels names class"),
        ("val_labels", lambda labels: labels / 2, "val_labels of float64"),
        ("weights", lambda w: [np.nan] * len(w), "weights are"),
        ("flops", lambda f: [1], "flops has 1 entries"),
    ],
)
def test_what_is_no_prediction_is_refused(tmp_path, name, alter, message):
    predictions().save(tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as stored:
        arrays = {**stored, name: np.asarray(alter(stored[name]))}
    np.savez_compressed(tmp_path / "p.npz", **arrays)
    for file, told in (("p.npz", message), ("absent.npz", "absent")):
        with pytest.raises(UserError, match=told):
            Predictions.load(tmp_path / file)


def test_any_damage_is_told_in_a_line(tmp_path):
    file = tmp_path / "p.npz"
    costed().save(file)
    good, whole = file.read_bytes(), Predictions.load(file)
    generator, refused = np.random.default_rng(1), 0
    for _ in range(120):
        damaged = bytearray(good)
        damaged[generator.integers(len(good))] ^= 1 << generator.integers(8)
        file.write_bytes(damaged if generator.random() < 0.8 else damaged[: generator.integers(len(good))])
        try:
            # What is not refused is in a field that nobody reads, such as a time of the archive.
            np.testing.assert_array_equal(Predictions.load(file).test_probs, whole.test_probs)
        except UserError as error:
            refused += str(file) in error.cause
    assert refused > 60
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("val_probs.npy", b"\x93NUMPY\x09\x00" + bytes(64))
    with pytest.raises(UserError, match="header of version"):
        Predictions.load(file)
    # A header takes no memory before it is checked.
    header = np.lib.format.header_data_from_array_1_0(np.zeros(1))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("val_probs.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {**header, "shape": (2**39,)})
        entry.write(bytes(64))
    with pytest.raises(UserError, match="claims the shape"):
        Predictions.load(file)


def test_other_data_than_a_data_set_is_pointed_to_the_ensembles_own_evaluation():
    ensemble = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(12, 3))])
    split = Split(torch.randn(6, 3, 2, 2), torch.arange(6) % 3)
    with pytest.raises(UserError, match="A Split was given") as caught:
        evaluate(ensemble, split)
    assert "ensemble.evaluate" in caught.value.remedy
    assert ensemble.evaluate(split)["nll"] > 0.0


@pytest.mark.parametrize(
    ("num_classes", "classes", "cause"),
    [
        (10, tuple("0123456798"), "Class 8 of the ensemble is '9', that of the data is '8'"),
        (3, tuple("abc"), "has 3 classes, the data have 10"),
        (3, None, "has 3 classes, the data have 10"),
    ],
)
def test_data_of_other_classes_are_refused(few_digits, num_classes, classes, cause):
    members = [nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))]
    with pytest.raises(UserError, match=cause):
        evaluate(Ensemble(members, classes=classes, preprocessing=Preprocessing.of(few_digits)), few_digits)
