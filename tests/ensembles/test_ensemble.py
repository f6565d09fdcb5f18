"""The ensemble module with real members of three kinds: a torchvision network, a small one, and our own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.errors import UserError

MakeMembers = Callable[..., Sequence[nn.Module]]


def draw_split(num_images: int = 11, num_classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (num_images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(num_classes, (num_images,), generator=generator))


def normalised(ensemble: Ensemble, images: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (ensemble.preprocessing.mean, ensemble.preprocessing.std)
    )
    return (images / 255 - mean) / std


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


def test_equal_weights_and_no_temperature_by_default(mixed_members: MakeMembers) -> None:
    ensemble = Ensemble(mixed_members())
    images = torch.randn(4, 3, 8, 8)
    expected = hand_average(ensemble, images).mean(dim=0)
    torch.testing.assert_close(ensemble(images).double(), expected, rtol=1e-5, atol=1e-7)
    assert ensemble.num_members == 2


def test_gradients_reach_every_member(mixed_members: MakeMembers) -> None:
    ensemble = Ensemble(mixed_members())
    ensemble(torch.randn(4, 3, 8, 8))[:, 0].log().sum().backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())


def test_weights_and_temperature_are_state(ensemble: Ensemble, mixed_members: MakeMembers) -> None:
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
    expected = hand_average(ensemble, normalised(ensemble, split.images)).numpy()
    for source in (split, split.images, split.images.numpy(), normalised(ensemble, split.images)):
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
    members = hand_average(ensemble, normalised(ensemble, split.images)).numpy()
    average = 0.25 * members[0] + 0.75 * members[1]
    tempered = ensemble(normalised(ensemble, split.images)).detach().double().numpy()
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
    images = normalised(ensemble, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    members = hand_average(ensemble, images).numpy()
    average = 0.25 * members[0] + 0.75 * members[1]
    tempered = ensemble(images).detach().double().numpy()
    information = scipy_entropy(average, axis=1) - (
        0.25 * scipy_entropy(members[0], axis=1) + 0.75 * scipy_entropy(members[1], axis=1)
    )
    for index, row in enumerate(rows):
        label = int(tempered[index].argmax())
        assert row["path"] == str(paths[index])
        assert row["label"] == ensemble.classes[label]
        assert row["probability"] == pytest.approx(tempered[index].max(), rel=1e-4)
        assert row["entropy"] == pytest.approx(scipy_entropy(tempered[index]), rel=1e-4)
        assert row["mutual_information"] == pytest.approx(information[index], rel=1e-2, abs=1e-6)
        assert row["votes"] == sum(int(member[index].argmax()) == label for member in members)


def test_predict_fits_other_sizes_and_repeats_grey(ensemble: Ensemble, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.new("RGB", (40, 20), (100, 100, 100)).save(tmp_path / "wide.png")
    first, second = ensemble.predict([str(tmp_path / "grey.png"), tmp_path / "wide.png"])
    assert first["probability"] == pytest.approx(second["probability"], rel=1e-6)


def test_predict_answers_what_cannot_be_read(
    ensemble: Ensemble, tmp_path: Path, mixed_members: MakeMembers
) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    for path in (tmp_path / "torn.png", tmp_path / "absent.png"):
        with pytest.raises(UserError, match=path.name):
            ensemble.predict([path])
    with pytest.raises(UserError, match="single path"):
        ensemble.predict(str(tmp_path / "absent.png"))
    with pytest.raises(UserError, match="preprocessing"):
        Ensemble(mixed_members()).predict([tmp_path / "absent.png"])
    assert ensemble.predict([]) == []


def test_no_members() -> None:
    with pytest.raises(UserError, match="no members"):
        Ensemble([])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_wrong_weights(weights: list[float], mixed_members: MakeMembers) -> None:
    with pytest.raises(UserError, match="weights"):
        Ensemble(mixed_members(), weights=weights)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_temperature(temperature: float, mixed_members: MakeMembers) -> None:
    with pytest.raises(UserError, match="temperature"):
        Ensemble(mixed_members(), temperature=temperature)


def test_different_class_counts(small_network: Callable[..., nn.Module]) -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(UserError, match="Member 1 has 4 classes, but the ensemble has 3"):
        Ensemble([small_network(3), small_network(4)])(images)
    with pytest.raises(UserError, match="Member 0 has 4 classes, but the ensemble has 3"):
        Ensemble([small_network(4)], classes=("ant", "bee", "cat"))(images)


def test_members_that_return_no_logits() -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(UserError, match=r"Member 0 returns \(2, 4, 6, 6\)"):
        Ensemble([nn.Conv2d(3, 4, 3)])(images)


def test_probabilities_that_are_not_finite(own_ensemble: Ensemble) -> None:
    with torch.no_grad():
        own_ensemble.members[1].classifier.bias[0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(UserError, match="Member 1"):
        own_ensemble.evaluate(draw_split())


def test_other_wrong_arguments(ensemble: Ensemble, mixed_members: MakeMembers) -> None:
    with pytest.raises(UserError, match="normalised"):
        Ensemble(mixed_members()).predict_probs(draw_split())
    with pytest.raises(UserError, match="batch size"):
        ensemble.predict_probs(draw_split(), batch_size=0)
    with pytest.raises(UserError, match="tpu"):
        ensemble.predict_probs(draw_split(), device="tpu")
    with pytest.raises(UserError, match="Labels reach from 0 to"):
        ensemble.evaluate(draw_split(40, num_classes=9))


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, dnas_ens.ensembles as e; e.greedy_selection; dir(e); assert 'torch' not in sys.modules;"
        "e.Ensemble; assert 'torch' in sys.modules; assert all(hasattr(e, name) for name in e.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
