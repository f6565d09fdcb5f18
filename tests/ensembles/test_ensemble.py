"""The ensemble module with real members of three kinds: a torchvision network, a small one, and our own."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.errors import UserError


def draw_split(num_images=11, num_classes=3):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (num_images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(num_classes, (num_images,), generator=generator))


def normalised(ensemble, images):
    known = ensemble.preprocessing
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (known.mean, known.std))
    return (images / 255 - mean) / std


def hand_average(ensemble, images):
    """Members' probabilities (M, B, K) without the ensemble's code."""
    ensemble.eval()
    with torch.no_grad():
        return torch.stack([member(images).double().softmax(1) for member in ensemble.members])


def test_probabilities_equal_the_average_by_hand(ensemble):
    images = torch.randn(4, 3, 8, 8)
    first, second = hand_average(ensemble, images)
    power = (0.25 * first + 0.75 * second) ** (1 / 1.7)
    expected = power / power.sum(dim=1, keepdim=True)
    torch.testing.assert_close(ensemble(images).double(), expected, rtol=1e-5, atol=1e-7)
    members = ensemble.member_probs(images).double()
    torch.testing.assert_close(members, torch.stack([first, second]), rtol=1e-5, atol=1e-7)


def test_equal_weights_and_no_temperature_by_default(mixed_members):
    ensemble = Ensemble(mixed_members())
    images = torch.randn(4, 3, 8, 8)
    expected = hand_average(ensemble, images).mean(dim=0)
    torch.testing.assert_close(ensemble(images).double(), expected, rtol=1e-5, atol=1e-7)
    assert ensemble.num_members == 2
    ensemble(images)[:, 0].log().sum().backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())


def test_weights_and_temperature_are_state(ensemble, mixed_members):
    images = torch.randn(4, 3, 8, 8)
    other = Ensemble(mixed_members(seed=1))
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other.eval()(images), ensemble.eval()(images))
    assert {"weights", "temperature"} <= ensemble.state_dict().keys()
    assert ensemble.double().weights.dtype == torch.float64


def test_exports_as_one_graph(ensemble):
    images = torch.randn(4, 3, 8, 8)
    graph = torch.export.export(ensemble.eval(), (images,)).module()
    torch.testing.assert_close(graph(images), ensemble(images))


def test_predict_probs_in_batches_leaves_the_members_as_they_were(ensemble):
    split = draw_split()
    expected = hand_average(ensemble, normalised(ensemble, split.images)).numpy()
    ensemble.train()
    ensemble.members[0].eval()
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    for source in (split, split.images, split.images.numpy(), normalised(ensemble, split.images)):
        probs = ensemble.predict_probs(source, batch_size=4, device="cpu")
        assert probs.shape == (2, 11, 3)
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-6)
    assert [member.training for member in ensemble.members] == [False, True]
    assert all(torch.equal(before[name], value) for name, value in ensemble.state_dict().items())
    assert not any(parameter.is_inference() for parameter in ensemble.parameters())


def test_evaluate_equals_scikit_learn(ensemble):
    split = draw_split(40)
    values = ensemble.evaluate(split, batch_size=16)
    images, labels = normalised(ensemble, split.images), split.labels.numpy()
    members = hand_average(ensemble, images).numpy()
    average = np.tensordot([0.25, 0.75], members, axes=1)
    tempered = ensemble(images).detach().double().numpy()
    tempered /= tempered.sum(axis=1, keepdims=True)
    votes = members.argmax(axis=2)
    assert values["accuracy"] == accuracy_score(labels, average.argmax(axis=1))
    assert values["nll"] == pytest.approx(log_loss(labels, average, labels=range(3)), rel=1e-5)
    assert values["calibrated_nll"] == pytest.approx(log_loss(labels, tempered, labels=range(3)), rel=1e-5)
    assert values["disagreement"] == pytest.approx((votes[0] != votes[1]).mean(), rel=1e-12)
    assert {"brier", "ece15", "predictive_js", "average_member_nll", "oracle_nll"} <= values.keys()
    without = Ensemble(ensemble.members, preprocessing=ensemble.preprocessing).evaluate(split)
    assert without["calibrated_nll"] == without["nll"]


def test_predict_reads_image_files(ensemble, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    images = normalised(ensemble, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    members = hand_average(ensemble, images).numpy()
    average = np.tensordot([0.25, 0.75], members, axes=1)
    tempered = ensemble(images).detach().double().numpy()
    information = scipy_entropy(average, axis=1) - np.tensordot([0.25, 0.75], scipy_entropy(members, axis=2), axes=1)
    for index, row in enumerate(ensemble.predict(paths, batch_size=2)):
        label = int(tempered[index].argmax())
        assert (row["path"], row["label"]) == (str(paths[index]), ensemble.classes[label])
        assert row["probability"] == pytest.approx(tempered[index].max(), rel=1e-4)
        assert row["entropy"] == pytest.approx(scipy_entropy(tempered[index]), rel=1e-4)
        assert row["mutual_information"] == pytest.approx(information[index], rel=1e-2, abs=1e-6)
        assert row["votes"] == (members[:, index].argmax(axis=1) == label).sum()
    ensemble.classes = None
    assert {row["label"] for row in ensemble.predict(paths)} <= {"0", "1", "2"}


def test_predict_fits_other_sizes_and_repeats_grey(ensemble, tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.new("RGB", (40, 20), (100, 100, 100)).save(tmp_path / "wide.png")
    first, second = ensemble.predict([str(tmp_path / "grey.png"), tmp_path / "wide.png"])
    assert first["probability"] == pytest.approx(second["probability"], rel=1e-6)


def test_predict_answers_what_cannot_be_read(ensemble, tmp_path, mixed_members):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    for path in (tmp_path / "torn.png", tmp_path / "absent.png"):
        with pytest.raises(UserError, match=path.name):
            ensemble.predict([path])
    with pytest.raises(UserError, match="single path"):
        ensemble.predict(str(tmp_path / "absent.png"))
    with pytest.raises(UserError, match="preprocessing"):
        Ensemble(mixed_members()).predict([tmp_path / "absent.png"])
    assert ensemble.predict([]) == []


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        *(
            ({"weights": weights}, "weights")
            for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0] * 3, [[1.0]], "ab")
        ),
        *(({"temperature": value}, "temperature") for value in (0.0, -1.0, float("nan"), float("inf"))),
        ({"classes": [0, 1, 2]}, "The classes are"),
        ({"classes": "abc"}, "The classes are"),
        ({"outputs": ["probs"]}, "The outputs of 2 members are"),
        ({"outputs": "scores"}, "outputs"),
        ({"members": []}, "no members"),
        ({"members": nn.Linear(2, 3)}, "One Linear was given"),
        ({"members": [nn.Linear(2, 3), 3]}, "A member is a int"),
    ],
)
def test_what_cannot_be_an_ensemble(arguments, cause, small_network):
    with pytest.raises(UserError, match=cause):
        Ensemble(**{"members": [small_network(), small_network()], **arguments})


def test_members_of_other_classes_or_none(small_network):
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(UserError, match="Member 1 has 4 classes, but the ensemble has 3"):
        Ensemble([small_network(3), small_network(4)])(images)
    with pytest.raises(UserError, match="Member 0 has 4 classes, but the ensemble has 3"):
        Ensemble([small_network(4)], classes=("ant", "bee", "cat"))(images)
    with pytest.raises(UserError, match=r"Member 0 returns \(2, 4, 6, 6\)"):
        Ensemble([nn.Conv2d(3, 4, 3)])(images)


def test_wrong_images_labels_and_devices(ensemble, own_ensemble, mixed_members):
    with pytest.raises(UserError, match="normalised"):
        Ensemble(mixed_members()).predict_probs(draw_split())
    with pytest.raises(UserError, match="batch size"):
        ensemble.predict_probs(draw_split(), batch_size=0)
    with pytest.raises(UserError, match="tpu"):
        ensemble.predict_probs(draw_split(), device="tpu")
    with pytest.raises(UserError, match="Labels reach from 0 to"):
        ensemble.evaluate(draw_split(40, num_classes=9))
    with torch.no_grad():
        own_ensemble.members[1].classifier.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"Member 1 .* not finite"):
        own_ensemble.evaluate(draw_split())


def test_what_is_printed_is_short_and_a_notebook_shows_a_table(ensemble, own_ensemble, small_network):
    parameters = sum(parameter.numel() for parameter in ensemble.parameters())
    assert repr(ensemble).splitlines() == [
        "Ensemble(2 members: 1 ResNet, 1 Sequential)",
        f"  {parameters:,} parameters on cpu",
        "  3 classes: ant, bee, cat",
        "  weights 0.25, 0.75; temperature 1.7",
    ]
    assert "3 Network" in repr(own_ensemble)
    ensemble.classes = ("a<b", "c")
    root = ElementTree.fromstring(f"<div>{ensemble._repr_html_()}</div>")
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert rows[0] == ["member", "kind", "parameters", "weight"]
    assert [(row[1], row[3]) for row in rows[1:]] == [("ResNet", "0.250"), ("Sequential", "0.750")]
    assert "2 classes: a<b, c" in "".join(root.itertext())
    many = Ensemble([small_network()] * 30)
    assert "classes without names" in repr(many)
    assert len(repr(many)) < 200
