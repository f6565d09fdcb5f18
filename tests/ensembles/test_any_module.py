"""What users bring: members in any precision and on any device, ensembles in ensembles, loaders."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.ensembles.weighting import fit_weights
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import fit_temperature
from dnas_ens.metrics.scores import nll
from dnas_ens.training.prediction import predict_batches, predict_members

PIXELS = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PREPROCESSING = Preprocessing(image_size=8, num_channels=3, mean=(0.5,) * 3, std=(np.float64(0.25),) * 3)
IMAGES = (PIXELS / 255 - 0.5) / 0.25
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
SPLIT = Split(images=PIXELS, labels=LABELS)
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3)
LISTED = list(LOADER)


def softmax_by_hand(logits):
    raised = (logits.double() - logits.double().max(dim=1, keepdim=True).values).exp()
    return raised / raised.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_members_keep_their_precision_and_probabilities_their_sum(dtype, mixed_members, tmp_path):
    members = [member.eval().to(dtype) for member in mixed_members()]
    ensemble = Ensemble(members, preprocessing=PREPROCESSING).eval()
    expected = torch.stack([softmax_by_hand(member(IMAGES.to(dtype))) for member in members])
    torch.testing.assert_close(ensemble.member_probs(IMAGES).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ensemble(IMAGES).double(), expected.mean(dim=0), rtol=1e-5, atol=1e-5)
    probs = ensemble.predict_probs(IMAGES)
    np.testing.assert_allclose(probs.sum(axis=2), 1.0, atol=1e-5)
    found = ensemble.evaluate(SPLIT)
    assert found["nll"] == pytest.approx(nll(probs.mean(axis=0).astype(float), LABELS.numpy()), abs=1e-3)
    # The precision comes back from a file.
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path, members=mixed_members(seed=1))
    for name, value in ensemble.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded(IMAGES), ensemble(IMAGES))


def test_members_of_different_precision(mixed_members):
    first, second = (member.eval() for member in mixed_members())
    alone = [softmax_by_hand(member(IMAGES)) for member in (first, second)]
    together = Ensemble([first.double(), second.to(torch.bfloat16)]).eval().member_probs(IMAGES)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], alone[1], rtol=0.05, atol=0.02)


def test_an_ensemble_is_on_the_device_of_its_members(mixed_members):
    # The meta device computes shapes alone, and refuses tensors of another device as a GPU does.
    ensemble = Ensemble([member.to("meta") for member in mixed_members()])
    assert ensemble.weights.device.type == ensemble.temperature.device.type == "meta"
    assert (ensemble(IMAGES).device.type, ensemble(IMAGES).shape) == ("meta", (6, 3))


@pytest.mark.gpu
def test_members_on_two_devices(mixed_members):
    first, second = (member.eval() for member in mixed_members())
    expected = torch.stack([softmax_by_hand(member(IMAGES)) for member in (first, second)])
    found = Ensemble([first.cuda(), second]).eval().predict_probs(IMAGES)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)


def test_an_ensemble_within_an_ensemble_is_not_softmaxed_again(mixed_members):
    inner = Ensemble(mixed_members(), weights=[0.3, 0.7], temperature=1.5).eval()
    torch.testing.assert_close(Ensemble([inner]).eval()(IMAGES), inner(IMAGES))
    probs, labels = predict_members([inner, *inner.members], LOADER)
    np.testing.assert_allclose(probs[0], inner(IMAGES).detach().numpy(), atol=1e-6)
    assert labels.tolist() == LABELS.tolist()


def test_batches_are_loaders_lists_and_functions_but_no_generators(small_network):
    model = small_network()
    expected = predict_batches(model, lambda: LISTED)
    for batches in (LOADER, LISTED):
        np.testing.assert_array_equal(predict_batches(model, batches)[0], expected[0])
    with pytest.raises(UserError, match="only once"):
        predict_batches(model, iter(LISTED))
    assert Ensemble(iter([model])).num_members == 1


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
        probs = np.stack([softmax_by_hand(member(IMAGES)).numpy() for member in found.members])
    weights = fit_weights(probs, labels).weights
    np.testing.assert_allclose(found.fit_weights(data), weights, atol=1e-3)
    np.testing.assert_allclose(found.weights.numpy(), weights, atol=1e-3)
    averaged = np.tensordot(weights, probs, axes=1)
    temperature = found.calibrate(data)
    assert temperature == pytest.approx(fit_temperature(averaged, labels), rel=0.01)
    assert float(found.temperature) == pytest.approx(temperature)
    values, tempered = found.evaluate(data), averaged ** (1 / temperature)
    assert values["nll"] == pytest.approx(nll(averaged, labels), rel=1e-3)
    assert values["calibrated_nll"] == pytest.approx(nll(tempered / tempered.sum(1, keepdims=True), labels), rel=1e-3)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([], "no batches for evaluation"),
        (iter(LISTED), "only once"),
        ([(IMAGES, LABELS, LABELS)], "a tuple of 3"),
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
