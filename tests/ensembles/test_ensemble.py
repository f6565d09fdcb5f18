"""The ensemble module with real members of three kinds: a torchvision network, a small one, and our own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torchvision.models import resnet18

from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.ensemble import Ensemble, Preprocessing, load
from dnas_ens.errors import UserError
from dnas_ens.genotype import Genotype
from dnas_ens.nn.network import Network

PREPROCESSING = Preprocessing(image_size=8, num_channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CLASSES = ("ant", "bee", "cat")
CELL = ((("skip_connect", 0), ("sep_conv_3x3", 1)), (("max_pool_3x3", 1), ("skip_connect", 2)))


def small_network(num_classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(144, num_classes),
    )


def own_network(seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(
        Genotype(normal=CELL, reduction=CELL),
        num_cells=3,
        channels=2,
        in_channels=3,
        num_classes=3,
        auxiliary=True,
    )


def mixed_members(seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [resnet18(num_classes=3), small_network()]


def draw_split(num_images: int = 11, num_classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (num_images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(num_classes, (num_images,), generator=generator))


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return (images / 255 - mean) / std


@pytest.fixture
def ensemble() -> Ensemble:
    return Ensemble(
        mixed_members(), weights=[1.0, 3.0], temperature=1.7, classes=CLASSES, preprocessing=PREPROCESSING
    )


@pytest.fixture
def own_ensemble() -> Ensemble:
    return Ensemble([own_network(seed) for seed in range(3)], classes=CLASSES, preprocessing=PREPROCESSING)


def hand_average(ensemble: Ensemble, images: Tensor) -> Tensor:
    """Members' probabilities (M, B, K) without the ensemble's code."""
    ensemble.eval()
    with torch.no_grad():
        return torch.stack([member(images).double().softmax(1) for member in ensemble.members])


def test_probabilities_equal_the_average_by_hand(ensemble: Ensemble) -> None:
    images = torch.randn(4, 3, 8, 8)
    first, second = hand_average(ensemble, images)
    power = (0.25 * first + 0.75 * second) ** (1 / 1.7)
    expected = power / power.sum(dim=1, keepdim=True)
    torch.testing.assert_close(ensemble(images).double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        ensemble.member_probs(images).double(), torch.stack([first, second]), rtol=1e-5, atol=1e-7
    )


def test_equal_weights_and_no_temperature_by_default() -> None:
    ensemble = Ensemble(mixed_members())
    images = torch.randn(4, 3, 8, 8)
    expected = hand_average(ensemble, images).mean(dim=0)
    torch.testing.assert_close(ensemble(images).double(), expected, rtol=1e-5, atol=1e-7)
    assert ensemble.num_members == 2


def test_gradients_reach_every_member() -> None:
    ensemble = Ensemble(mixed_members())
    ensemble(torch.randn(4, 3, 8, 8))[:, 0].log().sum().backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())


def test_weights_and_temperature_are_state(ensemble: Ensemble) -> None:
    images = torch.randn(4, 3, 8, 8)
    other = Ensemble(mixed_members(seed=1))
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other.eval()(images), ensemble.eval()(images))
    assert {"weights", "temperature"} <= ensemble.state_dict().keys()
    assert ensemble.double().weights.dtype == torch.float64


def test_exports_as_one_graph(ensemble: Ensemble) -> None:
    images = torch.randn(4, 3, 8, 8)
    graph = torch.export.export(ensemble.eval(), (images,)).module()
    torch.testing.assert_close(graph(images), ensemble(images))


def test_predict_probs_in_batches(ensemble: Ensemble) -> None:
    split = draw_split()
    expected = hand_average(ensemble, normalised(split.images)).numpy()
    for source in (split, split.images, split.images.numpy(), normalised(split.images)):
        probs = ensemble.predict_probs(source, batch_size=4, device="cpu")
        assert probs.shape == (2, 11, 3)
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-6)


def test_predict_probs_leaves_the_members_as_they_were(ensemble: Ensemble) -> None:
    ensemble.train()
    ensemble.members[0].eval()
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    ensemble.predict_probs(draw_split())
    assert ensemble.members[1].training
    assert not ensemble.members[0].training
    assert all(torch.equal(before[name], value) for name, value in ensemble.state_dict().items())
    assert not any(parameter.is_inference() for parameter in ensemble.parameters())


def test_evaluate_equals_scikit_learn(ensemble: Ensemble) -> None:
    split = draw_split(40)
    values = ensemble.evaluate(split, batch_size=16)
    members = hand_average(ensemble, normalised(split.images)).numpy()
    average = 0.25 * members[0] + 0.75 * members[1]
    tempered = ensemble(normalised(split.images)).detach().double().numpy()
    labels, votes = split.labels.numpy(), members.argmax(axis=2)
    assert values["accuracy"] == accuracy_score(labels, average.argmax(axis=1))
    assert values["nll"] == pytest.approx(log_loss(labels, average, labels=range(3)), rel=1e-5)
    tempered /= tempered.sum(axis=1, keepdims=True)
    assert values["calibrated_nll"] == pytest.approx(log_loss(labels, tempered, labels=range(3)), rel=1e-5)
    assert values["disagreement"] == pytest.approx((votes[0] != votes[1]).mean(), rel=1e-12)
    assert {"brier", "ece15", "predictive_js", "average_member_nll", "oracle_nll"} <= values.keys()


def test_calibrated_nll_is_the_nll_without_a_temperature(own_ensemble: Ensemble) -> None:
    values = own_ensemble.evaluate(draw_split())
    assert values["calibrated_nll"] == values["nll"]


def test_predict_reads_image_files(ensemble: Ensemble, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    rows = ensemble.predict(paths, batch_size=2)
    images = normalised(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    members = hand_average(ensemble, images).numpy()
    average = 0.25 * members[0] + 0.75 * members[1]
    tempered = ensemble(images).detach().double().numpy()
    information = scipy_entropy(average, axis=1) - (
        0.25 * scipy_entropy(members[0], axis=1) + 0.75 * scipy_entropy(members[1], axis=1)
    )
    for index, row in enumerate(rows):
        label = int(tempered[index].argmax())
        assert row["path"] == str(paths[index])
        assert row["label"] == CLASSES[label]
        assert row["probability"] == pytest.approx(tempered[index].max(), rel=1e-4)
        assert row["entropy"] == pytest.approx(scipy_entropy(tempered[index]), rel=1e-4)
        assert row["mutual_information"] == pytest.approx(information[index], rel=1e-2, abs=1e-6)
        assert row["votes"] == sum(int(member[index].argmax()) == label for member in members)


def test_predict_fits_other_sizes_and_repeats_grey(ensemble: Ensemble, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.new("RGB", (40, 20), (100, 100, 100)).save(tmp_path / "wide.png")
    first, second = ensemble.predict([str(tmp_path / "grey.png"), tmp_path / "wide.png"])
    assert first["probability"] == pytest.approx(second["probability"], rel=1e-6)


def test_predict_answers_what_cannot_be_read(ensemble: Ensemble, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    for path in (tmp_path / "torn.png", tmp_path / "absent.png"):
        with pytest.raises(UserError, match=path.name):
            ensemble.predict([path])
    with pytest.raises(UserError, match="single path"):
        ensemble.predict(str(tmp_path / "absent.png"))
    with pytest.raises(UserError, match="preprocessing"):
        Ensemble(mixed_members()).predict([tmp_path / "absent.png"])
    assert ensemble.predict([]) == []


def test_save_and_load_external_members(ensemble: Ensemble, tmp_path: Path) -> None:
    ensemble.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", members=mixed_members(seed=9))
    split = draw_split()
    np.testing.assert_array_equal(loaded.predict_probs(split), ensemble.predict_probs(split))
    images = normalised(split.images)
    assert torch.equal(loaded(images), ensemble.eval()(images))
    assert (loaded.classes, loaded.preprocessing) == (CLASSES, PREPROCESSING)
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("weights", [None, [12.0, 4.0, 19.0], [1e-5, 7.0, 3.0]])
def test_own_members_are_rebuilt(weights: list[float] | None, tmp_path: Path) -> None:
    ensemble = Ensemble([own_network(seed) for seed in range(3)], weights=weights, temperature=0.9)
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path)
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(images), ensemble.eval()(images))
    assert torch.equal(loaded.weights, ensemble.weights)
    assert loaded.preprocessing is None
    saved = json.loads((tmp_path / "ensemble.json").read_text())
    assert [entry["file"] for entry in saved["members"]] == [
        f"members/{i}/model.safetensors" for i in range(3)
    ]
    assert saved["members"][1]["spec"] == ensemble.members[1].spec()  # type: ignore[operator]


def test_own_and_external_members_together(tmp_path: Path) -> None:
    ensemble = Ensemble([own_network(0), small_network()])
    ensemble.save(tmp_path)
    images = torch.randn(5, 3, 8, 8)
    expected = ensemble.eval()(images)
    assert torch.equal(load(tmp_path, members=[small_network()])(images), expected)
    assert torch.equal(load(tmp_path, members=[own_network(7), small_network()])(images), expected)


def test_a_hand_written_manifest_loads(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path)
    saved = json.loads((tmp_path / "ensemble.json").read_text())
    members = [{"file": entry["file"], "spec": entry["spec"]} for entry in saved["members"]]
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": members}))
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(load(tmp_path)(images), own_ensemble.eval()(images))


def test_an_earlier_ensemble_is_not_overwritten_unasked(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path)
    before = (tmp_path / "ensemble.json").read_bytes()
    other = Ensemble([own_network(8)])
    with pytest.raises(UserError, match="already"):
        other.save(tmp_path)
    assert (tmp_path / "ensemble.json").read_bytes() == before
    other.save(tmp_path, overwrite=True)
    assert load(tmp_path).num_members == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: [], "members"),
        (lambda saved: {**saved, "members": None}, "members"),
        (lambda saved: {**saved, "members": []}, "no members"),
        (lambda saved: {**saved, "members": [{"file": 3, "spec": {}}]}, "members"),
        (lambda saved: {**saved, "weights": [1.0]}, "weights"),
        (lambda saved: {**saved, "weights": "equal"}, "weights"),
        (lambda saved: {**saved, "weights": [0.0, 0.0, 0.0]}, "weights"),
        (lambda saved: {**saved, "temperature": "hot"}, "temperature"),
        (lambda saved: {**saved, "temperature": -1}, "temperature"),
        (lambda saved: {**saved, "classes": [1, 2, 3]}, "classes"),
        (lambda saved: {**saved, "std": [0.2]}, "preprocessing"),
        (lambda saved: {**saved, "std": [0.2, 0.2, "0.2"]}, "preprocessing"),
        (lambda saved: {**saved, "mean": None}, "preprocessing"),
    ],
)
def test_a_malformed_manifest_is_refused(
    own_ensemble: Ensemble, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    own_ensemble.save(tmp_path)
    manifest = tmp_path / "ensemble.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_cells": "three"},
        {"channels": None},
        {"genotype": {}},
        {"genotype": None},
        {"kind": "other"},
        {"x": 1},
    ],
)
def test_a_malformed_spec_is_refused(own_ensemble: Ensemble, tmp_path: Path, change: dict[str, Any]) -> None:
    own_ensemble.save(tmp_path)
    manifest = tmp_path / "ensemble.json"
    saved = json.loads(manifest.read_text())
    saved["members"][1]["spec"] |= change
    manifest.write_text(json.dumps(saved))
    with pytest.raises(UserError):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"members": NaN}', "\x00"])
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(UserError, match=r"ensemble\.json"):
        load(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no ensemble\.json"):
        load(tmp_path / "absent")


def test_files_outside_the_folder_are_refused(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path / "other")
    own_ensemble.save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "ensemble.json"
    saved = json.loads(manifest.read_text())
    outside = tmp_path / "other" / "members/0/model.safetensors"
    (tmp_path / "saved" / "link").symlink_to(outside)
    for file in (str(outside), "../other/members/0/model.safetensors", "link", "a\x00b"):
        saved["members"][0]["file"] = file
        manifest.write_text(json.dumps(saved))
        with pytest.raises(UserError, match="outside the folder"):
            load(tmp_path / "saved")


def test_a_damaged_member_is_refused(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path)
    path = tmp_path / "members/1/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load(tmp_path)


def test_a_damaged_member_without_a_checksum_is_refused(own_ensemble: Ensemble, tmp_path: Path) -> None:
    own_ensemble.save(tmp_path)
    manifest = tmp_path / "ensemble.json"
    saved = json.loads(manifest.read_text())
    del saved["members"][1]["sha256"]
    manifest.write_text(json.dumps(saved))
    path = tmp_path / "members/1/model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(tmp_path)


def test_modules_that_do_not_fit_are_refused(ensemble: Ensemble, tmp_path: Path) -> None:
    ensemble.save(tmp_path)
    with pytest.raises(UserError, match="2 of them external; 0 were given"):
        load(tmp_path)
    with pytest.raises(UserError, match="1 were given"):
        load(tmp_path, members=[small_network()])
    with pytest.raises(UserError, match="does not fit"):
        load(tmp_path, members=mixed_members()[::-1])
    with pytest.raises(UserError, match="does not fit"):
        load(tmp_path, members=[resnet18(num_classes=3), small_network(4)])


def test_no_members() -> None:
    with pytest.raises(UserError, match="no members"):
        Ensemble([])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_wrong_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights"):
        Ensemble(mixed_members(), weights=weights)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_temperature(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature"):
        Ensemble(mixed_members(), temperature=temperature)


def test_different_class_counts() -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(UserError, match="Member 1 has 4 classes, but the ensemble has 3"):
        Ensemble([small_network(3), small_network(4)])(images)
    with pytest.raises(UserError, match="Member 0 has 4 classes, but the ensemble has 3"):
        Ensemble([small_network(4)], classes=CLASSES)(images)


def test_members_that_return_no_logits() -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(UserError, match=r"Member 0 returns \(2, 4, 6, 6\)"):
        Ensemble([nn.Conv2d(3, 4, 3)])(images)


def test_probabilities_that_are_not_finite(own_ensemble: Ensemble) -> None:
    with torch.no_grad():
        own_ensemble.members[1].classifier.bias[0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(UserError, match="Member 1"):
        own_ensemble.evaluate(draw_split())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "1 channels"),
        (torch.zeros(2, 3, 9, 9, dtype=torch.uint8), "9x9"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        (torch.zeros(3, 8, 8), "shape"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.full((2, 3, 8, 8), float("inf")), "not finite"),
    ],
)
def test_wrong_images(ensemble: Ensemble, images: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ensemble.predict_probs(images)


def test_other_wrong_arguments(ensemble: Ensemble) -> None:
    with pytest.raises(UserError, match="normalised"):
        Ensemble(mixed_members()).predict_probs(draw_split())
    with pytest.raises(UserError, match="batch size"):
        ensemble.predict_probs(draw_split(), batch_size=0)
    with pytest.raises(UserError, match="tpu"):
        ensemble.predict_probs(draw_split(), device="tpu")
    with pytest.raises(UserError, match="Labels reach from 0 to"):
        ensemble.evaluate(draw_split(40, num_classes=9))


def test_preprocessing_survives_json() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(PREPROCESSING.to_dict()))) == PREPROCESSING


@pytest.mark.parametrize(
    "change",
    [{"image_size": 0}, {"image_size": 8.5}, {"channels": 2}, {"mean": [0.1]}, {"std": [0.2, 0.2, 0.0]}],
)
def test_impossible_preprocessing(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="preprocessing"):
        Preprocessing.from_dict({**PREPROCESSING.to_dict(), **change})


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, dnas_ens.ensembles as e; e.greedy_selection; dir(e); assert 'torch' not in sys.modules;"
        "e.Ensemble; assert 'torch' in sys.modules; assert all(hasattr(e, name) for name in e.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
