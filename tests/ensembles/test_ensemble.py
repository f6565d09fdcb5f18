"""The ensemble module with whatever members, images and batches users bring."""

import dataclasses
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnas_ens.data import load_data, read_image
from dnas_ens.data.dataset import Split
from dnas_ens.data.trunk import Trunk
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing, check_images
from dnas_ens.ensembles.weighting import fit_weights
from dnas_ens.errors import UserError
from dnas_ens.evaluate import evaluate
from dnas_ens.metrics.calibration import fit_temperature
from dnas_ens.training.prediction import predict_batches

WEIGHTS = 0.25, 0.75
PREPROCESSING = Preprocessing(image_size=8, num_channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, np.float64(0.3)))
PIXELS = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(pixels):
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.25, 0.3]]).view(2, 3, 1, 1)
    return (pixels / 255 - mean) / std


IMAGES = normalised(PIXELS)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3)
LISTED = list(LOADER)


def draw_split(num_images=11, num_classes=3):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (num_images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(num_classes, (num_images,), generator=generator))


def by_hand(ensemble, pixels):
    """Members' probabilities (M, B, K), their average and the tempered one, without the ensemble's code."""
    inputs = normalised(pixels)
    with torch.no_grad():
        members = torch.stack([member(inputs).double().softmax(1) for member in ensemble.eval().members]).numpy()
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


def test_predict_reads_image_files(ensemble, tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    _, members, average, tempered = by_hand(ensemble, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    information = scipy_entropy(average, axis=1) - np.tensordot(WEIGHTS, scipy_entropy(members, axis=2), axes=1)
    for index, row in enumerate(ensemble.predict((path for path in paths), batch_size=2)):
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
        (ensemble, [Image.new("RGB", (8, 8))], "An? Image was given where the path"),
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
    assert [row[3].text for row in root.iter("tr")] == ["weight", "0.250", "0.750"]
    assert "2 classes: a<b, c" in "".join(root.itertext())
    assert len(repr(Ensemble([small_network()] * 30))) < 200


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.bfloat16)])
def test_members_keep_their_precision_and_probabilities_their_sum(dtypes, mixed_members, tmp_path):
    members = [member.eval().to(dtype) for member, dtype in zip(mixed_members(), dtypes, strict=True)]
    ensemble = Ensemble(members, preprocessing=PREPROCESSING).eval()
    pairs = zip(members, dtypes, strict=True)
    expected = torch.stack([member(IMAGES.to(dtype)).double().softmax(1) for member, dtype in pairs])
    torch.testing.assert_close(ensemble.member_probs(IMAGES).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ensemble(IMAGES).double(), expected.mean(dim=0), rtol=1e-5, atol=1e-5)
    probs = ensemble.predict_probs(IMAGES)
    np.testing.assert_allclose(probs.sum(axis=2), 1.0, atol=1e-5)
    nll = log_loss(LABELS, probs.mean(axis=0))
    assert ensemble.evaluate(Split(PIXELS, LABELS))["nll"] == pytest.approx(nll, abs=1e-3)
    # The precision comes back from a file.
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path, members=mixed_members(seed=1))
    for name, value in ensemble.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded(IMAGES), ensemble(IMAGES))


def test_an_ensemble_is_on_the_device_of_its_members(mixed_members):
    # The meta device computes shapes alone, and refuses tensors of another device as a GPU does.
    ensemble = Ensemble([member.to("meta") for member in mixed_members()])
    assert ensemble.weights.device.type == ensemble.temperature.device.type == "meta"
    assert (ensemble(IMAGES).device.type, ensemble(IMAGES).shape) == ("meta", (6, 3))


class WithoutDoubles(torch.Tensor):
    """As on Apple's GPUs, where only a copy on the CPU has double precision."""

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_weights_are_widened_on_the_cpu(few_digits, tmp_path):
    ensemble = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(64, 10))], preprocessing=Preprocessing.of(few_digits))
    ensemble.weights = ensemble.weights.as_subclass(WithoutDoubles)
    ensemble.save(tmp_path)
    measured = evaluate(ensemble, few_digits, device="cpu")["rows"][-1]["nll"]
    assert ensemble.evaluate(few_digits.test)["nll"] == pytest.approx(measured, rel=1e-5)


@pytest.mark.gpu
def test_members_on_two_devices(mixed_members):
    first, second = (member.eval() for member in mixed_members())
    expected = torch.stack([member(IMAGES).double().softmax(1) for member in (first, second)])
    found = Ensemble([first.cuda(), second]).eval().predict_probs(IMAGES)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "data",
    [
        LOADER,
        lambda: iter(LISTED),
        [{"x": images, "y": labels} for images, labels in LISTED],
        # In another order, whose images are not those of a split's labels.
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4),
        Split(IMAGES.double(), LABELS),
        [(IMAGES, LABELS.to(torch.uint8))],
    ],
    ids=["loader", "function", "dicts", "shuffled", "uint8", "doubles", "small labels"],
)
def test_weights_and_temperature_are_fitted_on_labelled_images_in_any_form(data, mixed_members):
    found = Ensemble(mixed_members(), preprocessing=PREPROCESSING).eval()
    labels = LABELS.numpy()
    with torch.no_grad():
        probs = np.stack([member(IMAGES).double().softmax(1).numpy() for member in found.members])
    weights = fit_weights(probs, labels).weights
    np.testing.assert_allclose(found.fit_weights(data), weights, atol=1e-3)
    np.testing.assert_allclose(found.weights.numpy(), weights, atol=1e-3)
    averaged = np.tensordot(weights, probs, axes=1)
    temperature = found.calibrate(data)
    assert temperature == pytest.approx(fit_temperature(averaged, labels), rel=0.01)
    assert float(found.temperature) == pytest.approx(temperature)
    values, tempered = found.evaluate(data), averaged ** (1 / temperature)
    assert values["nll"] == pytest.approx(log_loss(labels, averaged), rel=1e-3)
    tempered /= tempered.sum(1, keepdims=True)
    assert values["calibrated_nll"] == pytest.approx(log_loss(labels, tempered), rel=1e-3)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([], "no batches for evaluation"),
        (iter(LISTED), "only once"),
        ([(PIXELS, LABELS)], "uint8 images must be normalised"),
        ([(IMAGES * torch.nan, LABELS)], "not finite"),
        ([(IMAGES, LABELS + 1)], "Labels reach from 1 to 3"),
        (TensorDataset(IMAGES, LABELS), "a tuple of 2"),
        (type("ImageFolder", (), {})(), "A ImageFolder was given where batches"),
    ],
)
def test_mistakes_of_batches_are_named(data, named, small_network):
    ensemble = Ensemble([small_network()])
    for use in (ensemble.evaluate, ensemble.calibrate, ensemble.fit_weights):
        with pytest.raises(UserError, match=named):
            use(data)


def test_preprocessing_survives_json_if_it_is_possible():
    for given in (PREPROCESSING, dataclasses.replace(PREPROCESSING, deep_bits=12, deep_colour=True)):
        assert Preprocessing.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    # As an earlier version wrote it, which took all deep greys for 16 bits.
    earlier = {name: value for name, value in PREPROCESSING.to_dict().items() if name != "deep_bits"}
    assert Preprocessing.from_dict(earlier).deep_bits == 16
    del earlier["deep_colour"]
    assert not Preprocessing.from_dict(earlier).deep_colour
    impossible = [{"image_size": 0}, {"channels": 2}, {"mean": [0.1]}, {"std": [0.2, 0.2, 0.0]}]
    for change in [*impossible, *({"deep_bits": bits} for bits in (7, 17, 12.0)), {"deep_colour": None}]:
        with pytest.raises(UserError, match="preprocessing"):
            Preprocessing.from_dict({**PREPROCESSING.to_dict(), **change})


def test_a_file_of_12_bits_is_read_as_it_was_for_training(tmp_path):
    generator = np.random.default_rng(0)
    # One class is dark: by itself it would seem to be of fewer bits.
    for name, highest in (("a", 4096), ("b", 500)):
        (tmp_path / name).mkdir()
        for index in range(5):
            values = generator.integers(0, highest, (8, 8)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{index}.png")
    data = load_data(tmp_path)
    bits = Preprocessing.of(data).deep_bits
    assert bits == 12
    files = [read_image(path, num_channels=1, image_size=8, deep_bits=bits) for path in tmp_path.glob("*/*.png")]
    trained = {image.numpy().tobytes() for split in data.named_splits().values() for image in split.images}
    assert {image.numpy().tobytes() for image in files} == trained


def test_mirrored_arrays_are_taken_as_they_are(ensemble):
    mirrored = ensemble.predict_probs(PIXELS.numpy()[..., ::-1])
    np.testing.assert_array_equal(mirrored, ensemble.predict_probs(PIXELS.flip(-1)))


def test_float_pictures_are_not_for_a_trunk():
    trunk = Trunk("resnet18", image_size=64)
    shifts = {"mean": (0.0,) * trunk.num_channels, "std": (1.0,) * trunk.num_channels}
    preprocessing = Preprocessing(image_size=64, num_channels=3, **shifts, trunk=trunk)
    check_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), preprocessing)
    with pytest.raises(UserError, match="which takes uint8"):
        check_images(torch.zeros(2, 3, 64, 64), preprocessing)


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
def test_wrong_images(images, message):
    with pytest.raises(UserError, match=message):
        check_images(images, PREPROCESSING)
