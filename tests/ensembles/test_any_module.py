"""What users bring: members in any precision and on any device, ensembles in ensembles, loaders, dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.averaging import averaged_model, recompute_batch_norm
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.evolution import EvolutionSettings, evolve_simplex
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.ensembles.snapshot import CosineCycles, SnapshotRecorder
from dnas_ens.ensembles.soups import greedy_soup, loss_barrier
from dnas_ens.ensembles.weighting import fit_weights
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import fit_temperature
from dnas_ens.metrics.scores import nll
from dnas_ens.training.prediction import predict_batches, predict_members

MakeMembers = Callable[..., Sequence[nn.Module]]
PIXELS = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PREPROCESSING = Preprocessing(image_size=8, num_channels=3, mean=(0.5,) * 3, std=(np.float64(0.25),) * 3)
IMAGES = (PIXELS / 255 - 0.5) / 0.25
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
SPLIT = Split(images=PIXELS, labels=LABELS)
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3)
LISTED = list(LOADER)


def softmax_by_hand(logits: Tensor) -> Tensor:
    raised = (logits.double() - logits.double().max(dim=1, keepdim=True).values).exp()
    return raised / raised.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_members_keep_their_precision_and_probabilities_their_sum(
    dtype: torch.dtype, mixed_members: MakeMembers
) -> None:
    members = [member.eval().to(dtype) for member in mixed_members()]
    ensemble = Ensemble(members, preprocessing=PREPROCESSING).eval()
    expected = torch.stack([softmax_by_hand(member(IMAGES.to(dtype))) for member in members])
    torch.testing.assert_close(ensemble.member_probs(IMAGES).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ensemble(IMAGES).double(), expected.mean(dim=0), rtol=1e-5, atol=1e-5)
    probs = ensemble.predict_probs(IMAGES)
    np.testing.assert_allclose(probs.sum(axis=2), 1.0, atol=1e-5)
    found = ensemble.evaluate(SPLIT)
    assert found["nll"] == pytest.approx(nll(probs.mean(axis=0).astype(float), LABELS.numpy()), abs=1e-3)


def test_members_of_different_precision(mixed_members: MakeMembers) -> None:
    first, second = (member.eval() for member in mixed_members())
    alone = [softmax_by_hand(member(IMAGES)) for member in (first, second)]
    together = Ensemble([first.double(), second.to(torch.bfloat16)]).eval().member_probs(IMAGES)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], alone[1], rtol=0.05, atol=0.02)


def test_an_ensemble_stands_where_its_members_do(mixed_members: MakeMembers) -> None:
    # The meta device computes shapes alone, and refuses what lies on another one as a GPU does.
    ensemble = Ensemble([member.to("meta") for member in mixed_members()])
    assert ensemble.weights.device.type == ensemble.temperature.device.type == "meta"
    assert ensemble(IMAGES).device.type == "meta"
    assert ensemble(IMAGES).shape == (6, 3)


@pytest.mark.gpu
def test_members_on_two_devices(mixed_members: MakeMembers) -> None:
    first, second = (member.eval() for member in mixed_members())
    expected = torch.stack([softmax_by_hand(member(IMAGES)) for member in (first, second)])
    found = Ensemble([first.cuda(), second]).eval().predict_probs(IMAGES)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)


def test_an_ensemble_within_an_ensemble_is_not_softmaxed_again(mixed_members: MakeMembers) -> None:
    inner = Ensemble(mixed_members(), weights=[0.3, 0.7], temperature=1.5).eval()
    outer = Ensemble([inner]).eval()
    torch.testing.assert_close(outer(IMAGES), inner(IMAGES))
    probs, labels = predict_members([inner, *inner.members], LOADER)
    np.testing.assert_allclose(probs[0], inner(IMAGES).detach().numpy(), atol=1e-6)
    assert labels.tolist() == LABELS.tolist()


def test_members_that_want_other_images_are_named(small_network: Callable[..., nn.Module]) -> None:
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(UserError, match=r"Member 1 does not take inputs of shape \(6, 3, 8, 8\)"):
        Ensemble([small_network(), grey])(IMAGES)
    larger = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    with pytest.raises(UserError, match="The model does not take inputs"):
        predict_batches(larger, LOADER)


def test_a_model_that_returns_maps_is_refused() -> None:
    with pytest.raises(UserError, match=r"returns \(3, 4, 8, 8\) instead of logits"):
        predict_batches(nn.Conv2d(3, 4, 1), LOADER)


def test_batches_are_loaders_lists_and_functions_but_no_generators(
    small_network: Callable[..., nn.Module],
) -> None:
    model = small_network()
    expected = predict_batches(model, lambda: LISTED)
    for batches in (LOADER, LISTED):
        np.testing.assert_array_equal(predict_batches(model, batches)[0], expected[0])
    with pytest.raises(UserError, match="only once"):
        predict_batches(model, iter(LISTED))


def test_what_cannot_be_an_ensemble(small_network: Callable[..., nn.Module]) -> None:
    network = small_network()
    with pytest.raises(UserError, match="One Sequential was given"):
        Ensemble(network)
    with pytest.raises(UserError, match="A member is a int"):
        Ensemble([network, 3])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"have shape \(1, 1\)"):
        Ensemble([network], weights=[[1.0]])  # type: ignore[list-item]
    with pytest.raises(UserError, match="The classes are"):
        Ensemble([network], classes=[0, 1, 2])  # type: ignore[list-item]
    with pytest.raises(UserError, match="A DataLoader was given where images"):
        Ensemble([network]).predict_probs(LOADER)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="A ImageFolder was given where batches"):
        Ensemble([network]).evaluate(type("ImageFolder", (), {})())  # type: ignore[arg-type]
    assert Ensemble(iter([network])).num_members == 1


def test_temperature_and_weights_are_fitted_in_place(mixed_members: MakeMembers) -> None:
    ensemble = Ensemble(mixed_members(), preprocessing=PREPROCESSING).eval()
    probs = ensemble.predict_probs(SPLIT).astype(float)
    weights = ensemble.fit_weights(SPLIT)
    np.testing.assert_allclose(ensemble.weights.numpy(), weights, atol=1e-6)
    # No weights on a fine grid are better.
    grid = [np.tensordot([share, 1 - share], probs, axes=1) for share in np.linspace(0, 1, 201)]
    chosen = np.tensordot(weights, probs, axes=1)
    assert nll(chosen, LABELS.numpy()) <= min(nll(each, LABELS.numpy()) for each in grid) + 1e-6
    before = ensemble.evaluate(SPLIT)
    temperature = ensemble.calibrate(SPLIT)
    assert float(ensemble.temperature) == pytest.approx(temperature)
    after = ensemble.evaluate(SPLIT)
    assert after["nll"] == pytest.approx(before["nll"])
    assert after["calibrated_nll"] <= before["nll"] + 1e-9
    for other in (0.9 * temperature, 1.1 * temperature):
        raised = chosen ** (1 / np.clip(other, 0.05, 20))
        assert after["calibrated_nll"] <= nll(raised / raised.sum(1, keepdims=True), LABELS.numpy()) + 1e-6


def without_names(batches: DataLoader) -> list[dict[str, Tensor]]:
    return [{"x": images, "y": labels} for images, labels in batches]


@pytest.mark.parametrize(
    "data",
    [
        LOADER,
        LISTED,
        lambda: iter(LISTED),
        without_names(LOADER),
        # In another order, whose images are not those of a split's labels.
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4),
        Split(IMAGES, LABELS),
        Split(IMAGES.double(), LABELS),
        [(IMAGES, LABELS.to(torch.uint8))],
    ],
    ids=["loader", "list", "function", "dicts", "shuffled", "uint8", "floats", "doubles", "small labels"],
)
def test_labelled_images_in_any_form(data: Any, mixed_members: MakeMembers) -> None:
    members = mixed_members()
    expected, found = (Ensemble(members, preprocessing=PREPROCESSING).eval() for _ in range(2))
    with torch.no_grad():
        probs = np.stack([softmax_by_hand(member(IMAGES)).numpy() for member in expected.members])
    weights = fit_weights(probs, LABELS.numpy()).weights
    np.testing.assert_allclose(found.fit_weights(data), weights, atol=1e-3)
    averaged = np.tensordot(weights, probs, axes=1)
    assert found.calibrate(data) == pytest.approx(fit_temperature(averaged, LABELS.numpy()), rel=0.01)
    assert found.evaluate(data)["nll"] == pytest.approx(nll(averaged, LABELS.numpy()), rel=1e-3)


def test_mistakes_of_batches_are_named(small_network: Callable[..., nn.Module]) -> None:
    ensemble = Ensemble([small_network()])
    for data, named in (
        ([], "no batches for evaluation"),
        (iter(LISTED), "only once"),
        ([(IMAGES, LABELS, LABELS)], "a tuple of 3"),
        ([(PIXELS, LABELS)], "uint8 images must be normalised"),
        ([(IMAGES * torch.nan, LABELS)], "not finite"),
        ([(IMAGES, LABELS + 1)], "Labels reach from 1 to 3"),
        (TensorDataset(IMAGES, LABELS), "a tuple of 2"),
    ):
        for use in (ensemble.evaluate, ensemble.calibrate, ensemble.fit_weights):
            with pytest.raises(UserError, match=named):
                use(data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_precision_comes_back(
    dtype: torch.dtype, small_network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    saved = Ensemble([small_network().to(dtype)]).eval()
    saved.save(tmp_path)
    loaded = Ensemble.load(tmp_path, members=[small_network()])
    for name, value in saved.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded(IMAGES), saved(IMAGES))


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    class Noted(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"epoch": 3}

    with pytest.raises(UserError, match=r"Member 0 keeps something in 1\._extra_state"):
        Ensemble([nn.Sequential(nn.Flatten(), Noted(192, 3))]).save(tmp_path)


class TestBatchNormWithDropout:
    """Statistics are those of the network that predicts, not of one that drops at random."""

    def test_a_model_has_no_barrier_to_itself(self, small_network: Callable[..., nn.Module]) -> None:
        model = small_network()
        # Dropout in front of the BatchNorm, where it changes what that sees.
        model.insert(1, nn.Dropout())  # type: ignore[operator]
        state = torch.get_rng_state()
        # No loader, which draws a seed of its own at every pass.
        line = loss_barrier(model, model, copy.deepcopy(model), LISTED, LISTED)
        assert line.barrier == 0.0
        assert torch.equal(torch.get_rng_state(), state)

    def test_statistics_equal_numpy(self, small_network: Callable[..., nn.Module]) -> None:
        model = small_network()
        model.insert(0, nn.Dropout())  # type: ignore[operator]
        assert recompute_batch_norm(model, LOADER)
        seen = model[1](IMAGES).detach().numpy()  # type: ignore[index]
        halves = seen[:3], seen[3:]
        mean = np.mean([half.mean(axis=(0, 2, 3)) for half in halves], axis=0)
        variance = np.mean([half.var(axis=(0, 2, 3), ddof=1) for half in halves], axis=0)
        norm = model[2]  # type: ignore[index]
        np.testing.assert_allclose(norm.running_mean, mean, atol=1e-6)
        np.testing.assert_allclose(norm.running_var, variance, rtol=1e-5)

    @pytest.mark.parametrize("fault", ["one image", "an error of the loader"])
    def test_a_pass_that_fails_changes_nothing(self, fault: str) -> None:
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

    def test_what_no_batch_reaches_keeps_its_statistics(
        self, own_network: Callable[[int], nn.Module]
    ) -> None:
        model = own_network(0)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if "auxiliary" in name and "running" in name:
                    buffer.fill_(7.0)
        recompute_batch_norm(model, LOADER)
        kept = [b for name, b in model.named_buffers() if "auxiliary" in name and "running" in name]
        assert kept
        assert all(bool((buffer == 7.0).all()) for buffer in kept)

    def test_an_evolution_says_what_its_state_reaches(self, small_network: Callable[..., nn.Module]) -> None:
        torch.manual_seed(1)
        model, others = small_network(), [small_network() for _ in range(2)]
        model.insert(0, nn.Dropout())  # type: ignore[operator]
        for other in others:
            other.insert(0, nn.Dropout())  # type: ignore[operator]
        settings = EvolutionSettings(population_size=5, generations=2)
        first, second = (evolve_simplex(model, others, LOADER, LOADER, settings=settings) for _ in range(2))
        np.testing.assert_array_equal(first.best.coefficients, second.best.coefficients)
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(first.state)
        probs, labels = predict_batches(loaded, LOADER)
        assert nll(probs, labels) == pytest.approx(first.best.val_nll, abs=1e-6)


def test_a_diverged_model_of_a_soup_is_named(small_network: Callable[..., nn.Module]) -> None:
    models = [small_network() for _ in range(3)]
    with torch.no_grad():
        models[1][5].weight.fill_(float("nan"))  # type: ignore[index]
    with pytest.raises(UserError, match="Model 1's logits"):
        greedy_soup(models[0], models, LOADER, LOADER, recompute_singles=False)
    with pytest.raises(UserError, match="of model 1 is not finite"):
        averaged_model(models[0], models, None, LOADER)


def test_snapshots_are_those_of_the_call() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = CosineCycles(epochs=4, num_cycles=4, initial_learning_rate=0.1)
    recorder = SnapshotRecorder(model, optimizer, schedule, steps_per_epoch=1)
    made = None
    for epoch in range(4):
        with torch.no_grad():
            model.weight.fill_(float(epoch))
        recorder.step()
        if epoch == 2:
            made = recorder.members()
    assert made is not None
    assert [member.weight.item() for member in made] == [0.0, 1.0, 2.0]  # type: ignore[arg-type]
