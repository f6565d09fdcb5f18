"""What users bring: members in any precision and on any device, ensembles in ensembles, loaders, dropout."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.averaging import averaged_model, recompute_batch_norm
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.evolution import EvolutionSettings, evolve_simplex
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.ensembles.soups import greedy_soup, loss_barrier
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_members_keep_their_precision_and_probabilities_their_sum(dtype, mixed_members):
    members = [member.eval().to(dtype) for member in mixed_members()]
    ensemble = Ensemble(members, preprocessing=PREPROCESSING).eval()
    expected = torch.stack([softmax_by_hand(member(IMAGES.to(dtype))) for member in members])
    torch.testing.assert_close(ensemble.member_probs(IMAGES).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ensemble(IMAGES).double(), expected.mean(dim=0), rtol=1e-5, atol=1e-5)
    probs = ensemble.predict_probs(IMAGES)
    np.testing.assert_allclose(probs.sum(axis=2), 1.0, atol=1e-5)
    found = ensemble.evaluate(SPLIT)
    assert found["nll"] == pytest.approx(nll(probs.mean(axis=0).astype(float), LABELS.numpy()), abs=1e-3)


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
    assert ensemble(IMAGES).device.type == "meta"
    assert ensemble(IMAGES).shape == (6, 3)


@pytest.mark.gpu
def test_members_on_two_devices(mixed_members):
    first, second = (member.eval() for member in mixed_members())
    expected = torch.stack([softmax_by_hand(member(IMAGES)) for member in (first, second)])
    found = Ensemble([first.cuda(), second]).eval().predict_probs(IMAGES)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)


def test_an_ensemble_within_an_ensemble_is_not_softmaxed_again(mixed_members):
    inner = Ensemble(mixed_members(), weights=[0.3, 0.7], temperature=1.5).eval()
    outer = Ensemble([inner]).eval()
    torch.testing.assert_close(outer(IMAGES), inner(IMAGES))
    probs, labels = predict_members([inner, *inner.members], LOADER)
    np.testing.assert_allclose(probs[0], inner(IMAGES).detach().numpy(), atol=1e-6)
    assert labels.tolist() == LABELS.tolist()


def test_members_that_want_other_images_or_return_maps_are_named(small_network):
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(UserError, match=r"Member 1 does not take inputs of shape \(6, 3, 8, 8\)"):
        Ensemble([small_network(), grey])(IMAGES)
    larger = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    with pytest.raises(UserError, match="The model does not take inputs"):
        predict_batches(larger, LOADER)
    with pytest.raises(UserError, match=r"returns \(3, 4, 8, 8\) instead of logits"):
        predict_batches(nn.Conv2d(3, 4, 1), LOADER)


def test_batches_are_loaders_lists_and_functions_but_no_generators(small_network):
    model = small_network()
    expected = predict_batches(model, lambda: LISTED)
    for batches in (LOADER, LISTED):
        np.testing.assert_array_equal(predict_batches(model, batches)[0], expected[0])
    with pytest.raises(UserError, match="only once"):
        predict_batches(model, iter(LISTED))
    assert Ensemble(iter([model])).num_members == 1


def test_temperature_and_weights_are_fitted_in_place(mixed_members):
    ensemble = Ensemble(mixed_members(), preprocessing=PREPROCESSING).eval()
    labels, probs = LABELS.numpy(), ensemble.predict_probs(SPLIT).astype(float)
    weights = ensemble.fit_weights(SPLIT)
    np.testing.assert_allclose(ensemble.weights.numpy(), weights, atol=1e-6)
    # No weights on a fine grid are better.
    grid = [np.tensordot([share, 1 - share], probs, axes=1) for share in np.linspace(0, 1, 201)]
    chosen = np.tensordot(weights, probs, axes=1)
    assert nll(chosen, labels) <= min(nll(each, labels) for each in grid) + 1e-6
    before = ensemble.evaluate(SPLIT)
    temperature = ensemble.calibrate(SPLIT)
    assert float(ensemble.temperature) == pytest.approx(temperature)
    after = ensemble.evaluate(SPLIT)
    assert after["nll"] == pytest.approx(before["nll"])
    assert after["calibrated_nll"] <= before["nll"] + 1e-9
    for other in (0.9 * temperature, 1.1 * temperature):
        raised = chosen ** (1 / np.clip(other, 0.05, 20))
        assert after["calibrated_nll"] <= nll(raised / raised.sum(1, keepdims=True), labels) + 1e-6


@pytest.mark.parametrize(
    "data",
    [
        LOADER,
        LISTED,
        lambda: iter(LISTED),
        [{"x": images, "y": labels} for images, labels in LISTED],
        # In another order, whose images are not those of a split's labels.
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4),
        Split(IMAGES, LABELS),
        Split(IMAGES.double(), LABELS),
        [(IMAGES, LABELS.to(torch.uint8))],
    ],
    ids=["loader", "list", "function", "dicts", "shuffled", "uint8", "floats", "doubles", "small labels"],
)
def test_labelled_images_in_any_form(data, mixed_members):
    members = mixed_members()
    expected, found = (Ensemble(members, preprocessing=PREPROCESSING).eval() for _ in range(2))
    with torch.no_grad():
        probs = np.stack([softmax_by_hand(member(IMAGES)).numpy() for member in expected.members])
    weights = fit_weights(probs, LABELS.numpy()).weights
    np.testing.assert_allclose(found.fit_weights(data), weights, atol=1e-3)
    averaged = np.tensordot(weights, probs, axes=1)
    assert found.calibrate(data) == pytest.approx(fit_temperature(averaged, LABELS.numpy()), rel=0.01)
    assert found.evaluate(data)["nll"] == pytest.approx(nll(averaged, LABELS.numpy()), rel=1e-3)


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
    with pytest.raises(UserError, match="A DataLoader was given where images"):
        ensemble.predict_probs(LOADER)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_precision_comes_back(dtype, small_network, tmp_path):
    saved = Ensemble([small_network().to(dtype)]).eval()
    saved.save(tmp_path)
    loaded = Ensemble.load(tmp_path, members=[small_network()])
    for name, value in saved.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded(IMAGES), saved(IMAGES))


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"epoch": 3}

    with pytest.raises(UserError, match=r"Member 0 keeps something in 1\._extra_state"):
        Ensemble([nn.Sequential(nn.Flatten(), Noted(192, 3))]).save(tmp_path)


def test_a_diverged_model_of_a_soup_is_named(small_network):
    models = [small_network() for _ in range(3)]
    with torch.no_grad():
        models[1][5].weight.fill_(float("nan"))
    with pytest.raises(UserError, match="Model 1's logits"):
        greedy_soup(models[0], models, LOADER, LOADER, recompute_singles=False)
    with pytest.raises(UserError, match="of model 1 is not finite"):
        averaged_model(models[0], models, None, LOADER)


class TestBatchNormWithDropout:
    """Statistics are those of the network that predicts, not of one that drops at random."""

    @pytest.fixture
    def dropping(self, small_network):
        """Build a network with dropout in front of the BatchNorm, where it changes what that sees."""
        return lambda: small_network().insert(0, nn.Dropout())

    def test_a_model_has_no_barrier_to_itself(self, dropping):
        model = dropping()
        state = torch.get_rng_state()
        # No loader, which draws a seed of its own at every pass.
        line = loss_barrier(model, model, copy.deepcopy(model), LISTED, LISTED)
        assert line.barrier == 0.0
        assert torch.equal(torch.get_rng_state(), state)

    def test_statistics_equal_numpy(self, dropping):
        model = dropping()
        assert recompute_batch_norm(model, LOADER)
        seen = model[1](IMAGES).detach().numpy()
        halves = seen[:3], seen[3:]
        mean = np.mean([half.mean(axis=(0, 2, 3)) for half in halves], axis=0)
        variance = np.mean([half.var(axis=(0, 2, 3), ddof=1) for half in halves], axis=0)
        np.testing.assert_allclose(model[2].running_mean, mean, atol=1e-6)
        np.testing.assert_allclose(model[2].running_var, variance, rtol=1e-5)

    @pytest.mark.parametrize("fault", ["one image", "an error of the loader"])
    def test_a_pass_that_fails_changes_nothing(self, fault):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.3)).train()
        before = copy.deepcopy(model.state_dict())

        def batches():
            yield torch.ones(4, 2), torch.zeros(4)
            if fault == "one image":
                yield torch.ones(1, 2), torch.zeros(1)
            raise OSError("the disk is gone")

        expected = UserError if fault == "one image" else OSError
        with pytest.raises(expected, match=r"one image|disk"):
            recompute_batch_norm(model, batches)
        assert model[1].momentum == 0.3
        assert all(module.training for module in model.modules())
        for name, value in before.items():
            assert torch.equal(model.state_dict()[name], value)

    def test_what_no_batch_reaches_keeps_its_statistics(self, own_network):
        model = own_network(0)
        kept = [b for name, b in model.named_buffers() if "auxiliary" in name and "running" in name]
        assert kept
        for buffer in kept:
            buffer.fill_(7.0)
        recompute_batch_norm(model, LOADER)
        assert all(bool((buffer == 7.0).all()) for buffer in kept)

    def test_an_evolution_says_what_its_state_reaches(self, dropping):
        torch.manual_seed(1)
        model, *others = (dropping() for _ in range(3))
        settings = EvolutionSettings(population_size=5, generations=2)
        first, second = (evolve_simplex(model, others, LOADER, LOADER, settings=settings) for _ in range(2))
        np.testing.assert_array_equal(first.best.coefficients, second.best.coefficients)
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(first.state)
        probs, labels = predict_batches(loaded, LOADER)
        assert nll(probs, labels) == pytest.approx(first.best.val_nll, abs=1e-6)
