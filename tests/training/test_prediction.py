"""What classifiers return, what batches are, and BatchNorm statistics, against NumPy in double precision."""

import dataclasses
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnas_ens.ensembles.averaging import recompute_batch_norm
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.soups import evaluate_on_val
from dnas_ens.errors import UserError
from dnas_ens.training.prediction import as_pair, predict_batches, predict_members

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(20, 3, 4, 4, generator=GENERATOR)
LABELS = torch.arange(20) % 3
#: The last batch is smaller.
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


def classifier(*last, num_classes=3, scale=20.0):
    """A linear classifier of confident predictions, with something behind it."""
    torch.manual_seed(1)
    linear = nn.Linear(48, num_classes)
    linear.weight.data.mul_(scale)
    return nn.Sequential(nn.Flatten(), linear, *last).eval()


def numpy_softmax(model, images=IMAGES):
    """Probabilities by the linear layer alone."""
    weight, bias = (part.detach().double().numpy() for part in (model[1].weight, model[1].bias))
    logits = images.double().flatten(1).numpy() @ weight.T + bias
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


EXPECTED = numpy_softmax(classifier())


class Returning(nn.Module):
    """Anything made from the logits of a classifier."""

    def __init__(self, make):
        super().__init__()
        self.network, self.make = classifier(), make

    def forward(self, images):
        return self.make(self.network(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_softmax_of_the_members_own_is_the_only_one(dtype):
    # Few confident predictions: their sum is the farther from 1 the more classes share it.
    member = classifier(nn.Softmax(1), num_classes=10, scale=1.0).to(dtype)
    ensemble = Ensemble([member])
    with pytest.warns(UserWarning, match="Member 0 returns class probabilities") as told:
        probs = ensemble.predict_probs(IMAGES)[0]
    assert len(told) == 1
    expected = numpy_softmax(classifier(num_classes=10, scale=1.0))
    np.testing.assert_allclose(probs, expected, atol=4 * torch.finfo(dtype).eps + 1e-6)
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(probs, ensemble.predict_probs(IMAGES)[0])
    assert ensemble.outputs == ["probs"]


def test_members_of_every_kind_said_or_found():
    # Log-probabilities are logits like any others; a convolution as classifier returns (B, K, 1, 1).
    members = [
        classifier(nn.Softmax(1)),
        classifier(),
        classifier(nn.LogSoftmax(1)),
        Returning(lambda z: z[:, :, None, None]),
        Ensemble([classifier()]),
    ]
    said = Ensemble(members, outputs=["probs", "logits", "logits", "logits", None])
    with pytest.warns(UserWarning, match="Member 0"):
        found = Ensemble(members).predict_probs(IMAGES)
    with pytest.warns(UserWarning, match="Member 0") as told:
        functions, labels = predict_members(members, LOADER)
    assert len(told) == 1
    np.testing.assert_array_equal(labels, LABELS)
    for probs in (*found, *said.predict_probs(IMAGES), *functions):
        np.testing.assert_allclose(probs, EXPECTED, atol=1e-5)
    without_parameters, _ = predict_batches(nn.Flatten(), [(IMAGES[:, :, 0, 0], LABELS)])
    np.testing.assert_allclose(without_parameters, IMAGES[:, :, 0, 0].double().softmax(1))
    with pytest.warns(UserWarning, match="The model returns class probabilities"):
        nll, _ = evaluate_on_val(members[0], LOADER)
    assert nll == pytest.approx(-np.log(np.clip(EXPECTED[np.arange(20), LABELS], 1e-12, 1.0)).mean(), rel=1e-4)


def test_what_is_said_must_be_so():
    with pytest.raises(UserError, match="Member 0 should return probabilities") as caught:
        Ensemble([classifier()], outputs="probs").predict_probs(IMAGES)
    assert 'outputs="logits"' in caught.value.remedy
    # Two numbers that add up to 1 by chance, told to be logits.
    member = Returning(lambda logits: torch.tensor([[0.25, 0.75]]).expand(len(logits), 2))
    probs = Ensemble([member], outputs="logits").predict_probs(IMAGES)[0]
    np.testing.assert_allclose(probs[:, 0], 1 / (1 + np.exp(0.5)), rtol=1e-6)


@pytest.mark.parametrize("outputs", ["softmax", ["probs"], [["probs"], "logits"]])
def test_other_words_and_what_are_no_batches_are_refused(outputs):
    with pytest.raises(UserError, match="outputs"):
        Ensemble([classifier(), classifier()], outputs=outputs)
    with pytest.raises(UserError, match="outputs"):
        predict_batches(classifier(), LOADER, outputs=outputs)
    with pytest.raises(UserError, match="A int was given where batches are wanted"):
        predict_batches(classifier(), 3)
    with pytest.raises(UserError, match="a Dataset goes into a DataLoader"):
        predict_batches(classifier(), TensorDataset(IMAGES, LABELS))


def test_a_decision_waits_for_values():
    ensemble = Ensemble([classifier(nn.Softmax(1))]).eval()
    assert ensemble(IMAGES[:2] * torch.nan).isnan().all()
    ensemble(IMAGES[:0])
    assert ensemble.outputs == [None]
    with pytest.warns(UserWarning, match="probabilities"):
        np.testing.assert_allclose(ensemble(IMAGES).detach(), EXPECTED, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outputs", [None, ["probs", "logits"]])
def test_a_graph_is_right_about_both(outputs):
    ensemble = Ensemble([classifier(nn.Softmax(1)), classifier()], outputs=outputs).eval()
    batch = {"images": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(ensemble, (IMAGES[:7],), dynamic_shapes=batch).module()
    for graph in (exported, torch.compile(ensemble, backend="eager", fullgraph=True)):
        np.testing.assert_allclose(graph(IMAGES).detach(), EXPECTED, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("last", [(), (nn.Softmax(1),)], ids=["logits", "probabilities"])
def test_gradients_of_a_graph_are_finite(last):
    # A classifier that begins at zero, as in fine-tuning: its outputs sum to 0.
    member = classifier(*last, scale=0.0)
    nn.init.zeros_(member[1].bias)
    torch.compile(Ensemble([member]), backend="eager", fullgraph=True)(IMAGES)[:, 0].log().sum().backward()
    # The gradient of ln p_0 at equal probabilities: 1 - 1/3 for its own logit and -1/3 for the others.
    np.testing.assert_allclose(member[1].bias.grad, 20 * np.array([2 / 3, -1 / 3, -1 / 3]), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda z: (z, z), r"a tuple of 2 \(Tensor \(8, 3\), Tensor \(8, 3\)\)"),
        (lambda z: {"out": z, "aux": z}, "a dict with the keys out, aux"),
        (lambda z: namedtuple("Inception", "logits aux_logits")(z, None), "a Inception of 2"),
        (lambda z: dataclasses.make_dataclass("Classified", ["logits"])(z), "a Classified"),
        (lambda z: None, "a NoneType"),
        (lambda z: z[:, :, None], r"\(8, 3, 1\)"),
        (lambda z: z.reshape(4, 6), r"\(4, 6\) for 8 images"),
        (lambda z: z.sum(), r"\(\) for 8 images"),
    ],
)
def test_other_forms(make, named):
    with pytest.raises(UserError, match=f"Member 0 returns {named}.* instead of logits") as caught:
        predict_members([Returning(make)], LOADER)
    assert "module that returns the logits" in caught.value.remedy
    assert (".logits" in caught.value.remedy) == hasattr(make(torch.ones(8, 3)), "logits")


@pytest.mark.parametrize("make", [lambda z: z[:, 0], lambda z: z[:, :1, None, None]])
def test_one_number_an_image(make):
    with pytest.raises(UserError, match="returns one number an image") as caught:
        Ensemble([Returning(make)]).predict_probs(IMAGES)
    assert "torch.cat([torch.zeros_like(z), z], dim=1)" in caught.value.remedy


def bright(*shape, sizes):
    """Batches of images that differ in brightness, as photos do, of given sizes."""
    generator = torch.Generator().manual_seed(sum(sizes))
    images = torch.randn(sum(sizes), *shape, generator=generator)
    images += 3 * torch.randn(sum(sizes), shape[0], *(1 for _ in shape[1:]), generator=generator)
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(sizes)]


def by_hand(batches):
    """Mean over all images, mean unbiased variance of the batches by their images, and the batches normalised."""
    axes = (0, *range(2, batches[0].ndim))
    variances = [batch.var(axis=axes, ddof=1) for batch in batches]
    normalised = [
        (batch - batch.mean(axis=axes, keepdims=True)) / np.sqrt(batch.var(axis=axes, keepdims=True) + 1e-5)
        for batch in batches
    ]
    mean = np.concatenate(batches).mean(axis=axes)
    return mean, np.average(variances, axis=0, weights=[len(batch) for batch in batches]), normalised


@pytest.mark.parametrize(
    ("norm", "shape", "sizes", "momentum"),
    [
        (nn.BatchNorm1d, (3,), (16, 3), None),
        (nn.BatchNorm1d, (3, 5), (2, 31, 5), 0.1),
        (nn.BatchNorm2d, (3, 4, 5), (2, 31, 5), 0.1),
        (nn.BatchNorm3d, (3, 2, 3, 4), (16, 3), 0.1),
    ],
)
def test_two_layers_under_dropout(norm, shape, sizes, momentum):
    batches = bright(*shape, sizes=sizes)
    first, second = norm(3, momentum=momentum), norm(3, momentum=momentum)
    assert recompute_batch_norm(nn.Sequential(nn.Dropout(), first, nn.ReLU(), nn.Dropout(), second), batches)
    values = [inputs.double().numpy() for inputs, _ in batches]
    for layer in (first, second):
        mean, variance, values = by_hand(values)
        np.testing.assert_allclose(layer.running_mean, mean, atol=2e-5)
        np.testing.assert_allclose(layer.running_var, variance, rtol=1e-4)
        assert (layer.momentum, int(layer.num_batches_tracked)) == (momentum, len(sizes))
        assert not layer._forward_pre_hooks
        values = [np.maximum(each, 0.0) for each in values]


def test_a_single_image_at_the_end():
    # Of one image there is no spread between images: it must not halve the variance.
    batches = bright(3, 8, 8, sizes=(256, 1))
    model = nn.Sequential(nn.BatchNorm2d(3))
    recompute_batch_norm(model, batches)
    images = torch.cat([inputs for inputs, _ in batches]).double().numpy()
    np.testing.assert_allclose(model[0].running_mean, images.mean(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(model[0].running_var, images.var(axis=(0, 2, 3)), rtol=0.02)


def test_batches_of_one_size_are_averaged_to_the_bit_as_torch_does_of_a_compiled_network_too():
    batches = bright(3, 8, 8, sizes=(7,) * 9)
    ours, theirs = (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in "ab")
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours.train(), backend="eager")
    # Compiled in the mode that statistics are computed in, before they are.
    compiled(batches[0][0])
    recompute_batch_norm(compiled, batches)
    torch.optim.swa_utils.update_bn(batches, theirs)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_a_layer_that_is_used_twice_sees_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, inputs):
            return self.norm(inputs) + self.norm(10 * inputs)

    batches, model = bright(3, sizes=(16, 4)), Twice()
    recompute_batch_norm(model, batches)
    mean, variance, _ = by_hand([scale * inputs.double().numpy() for inputs, _ in batches for scale in (1, 10)])
    np.testing.assert_allclose(model.norm.running_mean, mean, atol=1e-4)
    np.testing.assert_allclose(model.norm.running_var, variance, rtol=1e-4)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_predictions_and_statistics_from_dicts(kind):
    assert as_pair(kind({"image": IMAGES, "y": LABELS, "index": torch.arange(20)})) == (IMAGES, LABELS)
    dicts = [kind({"pixel_values": inputs, "labels": labels, "id": "a"}) for inputs, labels in LOADER]
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3))
    for batches in (LOADER, dicts):
        recompute_batch_norm(model, batches)
    probs, labels = predict_batches(model, dicts)
    np.testing.assert_array_equal(probs, predict_batches(model, LOADER)[0])
    np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ((IMAGES, LABELS, torch.arange(20)), "a tuple of 3"),
        (IMAGES[:2], "a Tensor of shape"),
        ({"images": IMAGES}, "a dict with the keys images"),
        ({"images": IMAGES, "img": IMAGES, "y": LABELS}, "a dict with the keys images, img, y"),
        ({"x": IMAGES, "label": "cat"}, "a dict"),
        ((IMAGES[0], 3), "a tuple of 2 (Tensor (3, 4, 4), int)"),
        ((IMAGES.numpy(), LABELS), "a tuple of 2 (ndarray, Tensor (20,))"),
        ("images", "a str"),
    ],
)
def test_other_batches_are_named(batch, named):
    for use in (
        lambda: predict_batches(classifier(), [batch]),
        lambda: Ensemble([classifier()]).evaluate([batch]),
        lambda: recompute_batch_norm(nn.BatchNorm2d(3), [batch]),
    ):
        with pytest.raises(UserError, match="A batch is") as caught:
            use()
        assert named in caught.value.cause
        assert "Give batches of two tensors" in caught.value.remedy


@pytest.mark.parametrize("labels", [LABELS.float(), LABELS[:, None], LABELS[1:]])
def test_labels_that_are_no_class_indices(labels):
    for use in (predict_batches, lambda model, batches: Ensemble([model]).calibrate(batches)):
        with pytest.raises(UserError, match="labels of 20 images are"):
            use(classifier(), [(IMAGES, labels)])
