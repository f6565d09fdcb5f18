"""The ensemble module with real members of three kinds: a torchvision network, a small one, and our own."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.utils.data import DataLoader

from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.errors import UserError
from dnas_ens.training.prediction import predict_batches

WEIGHTS = 0.25, 0.75


def draw_split(num_images=11, num_classes=3):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (num_images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(num_classes, (num_images,), generator=generator))


def by_hand(ensemble, pixels):
    """Members' probabilities (M, B, K), their average and the tempered one, without the ensemble's code."""
    known = ensemble.eval().preprocessing
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (known.mean, known.std))
    inputs = (pixels / 255 - mean) / std
    with torch.no_grad():
        members = torch.stack([member(inputs).double().softmax(1) for member in ensemble.members]).numpy()
    average = np.tensordot(WEIGHTS, members, axes=1)
    tempered = average ** (1 / 1.7)
    return inputs, members, average, tempered / tempered.sum(axis=1, keepdims=True)


def test_probabilities_equal_the_average_by_hand(ensemble, mixed_members):
    inputs, members, _, tempered = by_hand(ensemble, draw_split().images)
    np.testing.assert_allclose(ensemble(inputs).detach(), tempered, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ensemble.member_probs(inputs).detach(), members, rtol=1e-5, atol=1e-7)
    graph = torch.export.export(ensemble, (inputs,)).module()
    torch.testing.assert_close(graph(inputs), ensemble(inputs))
    # Weights and temperature are state.
    other = Ensemble(mixed_members(seed=1))
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other.eval()(inputs), ensemble(inputs))
    # By default the weights are equal and there is no temperature.
    plain = Ensemble(ensemble.members)
    np.testing.assert_allclose(plain(inputs).detach(), members.mean(axis=0), rtol=1e-5, atol=1e-7)
    plain(inputs)[:, 0].log().sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    assert ensemble.double().weights.dtype == torch.float64


def test_predict_probs_in_batches_leaves_the_members_as_they_were(ensemble):
    split = draw_split()
    inputs, members, _, _ = by_hand(ensemble, split.images)
    ensemble.train()
    ensemble.members[0].eval()
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    for source in (split, split.images, split.images.numpy(), inputs):
        probs = ensemble.predict_probs(source, batch_size=4, device="cpu")
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs, members, rtol=1e-4, atol=1e-6)
    assert [member.training for member in ensemble.members] == [False, True]
    assert all(torch.equal(before[name], value) for name, value in ensemble.state_dict().items())
    assert not any(parameter.is_inference() for parameter in ensemble.parameters())


def test_evaluate_equals_scikit_learn(ensemble):
    split = draw_split(40)
    values, labels = ensemble.evaluate(split, batch_size=16), split.labels.numpy()
    _, members, average, tempered = by_hand(ensemble, split.images)
    votes = members.argmax(axis=2)
    assert values["accuracy"] == accuracy_score(labels, average.argmax(axis=1))
    assert values["nll"] == pytest.approx(log_loss(labels, average, labels=range(3)), rel=1e-5)
    assert values["calibrated_nll"] == pytest.approx(log_loss(labels, tempered, labels=range(3)), rel=1e-5)
    assert values["disagreement"] == pytest.approx((votes[0] != votes[1]).mean(), rel=1e-12)
    assert {"brier", "ece15", "predictive_js", "average_member_nll", "oracle_nll"} <= values.keys()


def test_predict_reads_image_files(ensemble, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    _, members, average, tempered = by_hand(ensemble, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    information = scipy_entropy(average, axis=1) - np.tensordot(WEIGHTS, scipy_entropy(members, axis=2), axes=1)
    for index, row in enumerate(ensemble.predict(paths, batch_size=2)):
        label = int(tempered[index].argmax())
        assert (row["path"], row["label"]) == (str(paths[index]), ensemble.classes[label])
        assert row["probability"] == pytest.approx(tempered[index].max(), rel=1e-4)
        assert row["entropy"] == pytest.approx(scipy_entropy(tempered[index]), rel=1e-4)
        assert row["mutual_information"] == pytest.approx(information[index], rel=1e-2, abs=1e-6)
        assert row["votes"] == (members[:, index].argmax(axis=1) == label).sum()
    ensemble.classes = None
    assert {row["label"] for row in ensemble.predict(paths)} <= {"0", "1", "2"}
    # Other sizes are fitted, and grey is repeated.
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.new("RGB", (40, 20), (100, 100, 100)).save(tmp_path / "wide.png")
    first, second = ensemble.predict([str(tmp_path / "grey.png"), tmp_path / "wide.png"])
    assert first["probability"] == pytest.approx(second["probability"], rel=1e-6)


def test_predict_answers_what_cannot_be_read(ensemble, tmp_path, mixed_members):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    plain = Ensemble(mixed_members())
    for chosen, given, cause in (
        (ensemble, [tmp_path / "torn.png"], "torn.png"),
        (ensemble, [tmp_path / "absent.png"], "absent.png"),
        (ensemble, str(tmp_path / "torn.png"), "single path"),
        (plain, [tmp_path / "torn.png"], "preprocessing"),
    ):
        with pytest.raises(UserError, match=cause):
            chosen.predict(given)
    assert ensemble.predict([]) == []


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [({"weights": weights}, "weights") for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], "ab")]
    + [({"temperature": value}, "temperature") for value in (0.0, float("nan"), float("inf"))]
    + [
        ({"weights": [[1.0]]}, "weights have shape"),
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


def test_members_that_do_not_fit_are_named(small_network):
    images = torch.randn(2, 3, 8, 8)
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    for members, options, cause in (
        ([small_network(3), small_network(4)], {}, "Member 1 has 4 classes, but the ensemble has 3"),
        ([small_network(4)], {"classes": ("ant", "bee", "cat")}, "Member 0 has 4 classes, but the ensemble has 3"),
        ([nn.Conv2d(3, 4, 3)], {}, r"Member 0 returns \(2, 4, 6, 6\)"),
        ([small_network(), grey], {}, r"Member 1 does not take inputs of shape \(2, 3, 8, 8\)"),
    ):
        with pytest.raises(UserError, match=cause):
            Ensemble(members, **options)(images)
    for model, cause in ((grey, "The model does not take inputs"), (nn.Conv2d(3, 4, 3), "instead of logits")):
        with pytest.raises(UserError, match=cause):
            predict_batches(model, [(images, torch.zeros(2, dtype=torch.int64))])


def test_wrong_images_labels_and_devices(ensemble, own_ensemble, mixed_members):
    split = draw_split()
    with torch.no_grad():
        own_ensemble.members[1].classifier.bias[0] = float("nan")
    for call, cause in (
        (lambda: Ensemble(mixed_members()).predict_probs(split), "normalised"),
        (lambda: ensemble.predict_probs(DataLoader(split.images)), "A DataLoader was given where images"),
        (lambda: ensemble.predict_probs(split, batch_size=0), "batch size"),
        (lambda: ensemble.predict_probs(split, device="tpu"), "tpu"),
        (lambda: ensemble.evaluate(draw_split(40, num_classes=9)), "Labels reach from 0 to"),
        (lambda: own_ensemble.evaluate(split), "Member 1 .* not finite"),
    ):
        with pytest.raises(UserError, match=cause):
            call()


def test_what_is_printed_is_short_and_a_notebook_shows_a_table(ensemble, small_network):
    assert "2 members: 1 ResNet, 1 Sequential" in repr(ensemble)
    ensemble.classes = ("a<b", "c")
    root = ElementTree.fromstring(f"<div>{ensemble._repr_html_()}</div>")
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert [(row[1], row[3]) for row in rows[1:]] == [("ResNet", "0.250"), ("Sequential", "0.750")]
    assert "2 classes: a<b, c" in "".join(root.itertext())
    assert len(repr(Ensemble([small_network()] * 30))) < 200
