"""Averages of states against hand computation, and the running averages against their recurrences."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dnas_ens.ensembles.averaging import (
    ExponentialMovingAverage,
    PolyakAverage,
    StochasticWeightAverage,
    average_states,
    averaged_model,
    check_same_architecture,
    coefficients,
    recompute_batch_norm,
)
from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network
from dnas_ens.space.genotype import Genotype

OTHER_CELL = ((("skip_connect", 0), ("sep_conv_3x3", 1)), (("max_pool_3x3", 0), ("skip_connect", 2)))


def normed(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model(torch.randn(16, 3))  # moves the running statistics
    return model.eval()


def batches(num=3):
    generator = torch.Generator().manual_seed(9)
    inputs = [torch.randn(8, 3, generator=generator) for _ in range(num)]
    return [(each, torch.randint(2, (8,), generator=generator)) for each in inputs]


def forbidden():
    raise AssertionError("no pass over the data was needed")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Coefficients


def test_coefficients_by_hand():
    np.testing.assert_allclose(coefficients("equal", 4), [0.25] * 4, rtol=1e-15)
    np.testing.assert_allclose(coefficients("linear", 4), [0.1, 0.2, 0.3, 0.4], rtol=1e-15)
    np.testing.assert_allclose(coefficients("exponential", 3, decay=0.5), np.array([1, 2, 4]) / 7, rtol=1e-15)
    np.testing.assert_array_equal(coefficients("exponential", 7, decay=1.0), coefficients("equal", 7))


@given(
    kind=st.sampled_from(["equal", "linear", "exponential"]),
    num_models=st.integers(1, 300),
    decay=st.floats(1e-3, 1.0),
)
def test_coefficients_are_a_distribution_that_never_falls(kind, num_models, decay):
    shares = coefficients(kind, num_models, decay=decay)
    assert shares.shape == (num_models,)
    assert shares.sum() == pytest.approx(1.0, abs=1e-12)
    assert shares.min() >= 0
    assert (np.diff(shares) >= 0).all()
    if kind == "exponential" and decay < 0.999:
        ages = num_models - np.arange(1, num_models + 1)
        closed = decay**ages * (1 - decay) / (1 - decay**num_models)
        np.testing.assert_allclose(shares, closed, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize(
    ("kind", "num_models", "decay", "cause"),
    [
        ("cubic", 3, 0.5, "'cubic' is not a rule"),
        ("equal", 0, 0.5, "0 models"),
        ("exponential", 3, 0.0, "decay is 0.0"),
        ("exponential", 3, 1.5, "decay is 1.5"),
        ("exponential", 3, math.nan, "decay is nan"),
    ],
)
def test_impossible_coefficients(kind, num_models, decay, cause):
    with pytest.raises(UserError, match=cause):
        coefficients(kind, num_models, decay=decay)


# Averages of states


def test_average_equals_numpy():
    states = [normed(seed).state_dict() for seed in range(3)]
    averaged = average_states(states, [0.2, 0.5, 0.3])
    for name, value in averaged.items():
        if not name.endswith("num_batches_tracked"):
            parts = np.stack([state[name].double().numpy() for state in states])
            expected = np.tensordot([0.2, 0.5, 0.3], parts, axes=1).astype(np.float32)
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-8)
            assert value.dtype == torch.float32


HALF, EQUAL_INFINITIES = torch.float16, [0.0, -math.inf]


@pytest.mark.parametrize(
    ("values", "shares", "expected"),
    [
        ([[1.0, 4.0], [3.0, 0.0]], None, [2.0, 2.0]),
        # A negative coefficient extrapolates.
        ([[1.0], [3.0]], [-0.5, 1.5], [4.0]),
        ([EQUAL_INFINITIES] * 3, None, EQUAL_INFINITIES),
        # Integers are the last model's.
        ([3, 8], [0.9, 0.1], 8),
        ([True, False], [0.9, 0.1], False),
        # In half precision the sum 2048 + 1 + 1 would lose both ones, and 60000 + 60000 overflow.
        (
            [torch.tensor([60000.0, value], dtype=HALF) for value in (2048, 1, 1)],
            None,
            [60000.0, float(np.float16(2050 / 3))],
        ),
    ],
)
def test_averages_of_one_tensor(values, shares, expected):
    tensors = [torch.as_tensor(value) for value in values]
    averaged = average_states([{"w": tensor} for tensor in tensors], shares)["w"]
    assert averaged.dtype == tensors[0].dtype
    assert averaged.tolist() == expected


def test_extra_state_of_a_module_is_the_last_models():
    averaged = average_states([{"_extra_state": {"a": 1}}, {"_extra_state": {"a": 2}}])
    assert averaged == {"_extra_state": {"a": 2}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("kind", ["equal", "linear", "exponential"])
@pytest.mark.parametrize("num_models", [1, 3, 10])
def test_identical_models_average_to_themselves_exactly(dtype, kind, num_models):
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(1000, generator=generator) * 10 ** torch.linspace(-4, 4, 1000)).to(dtype)
    states = [{"w": weights.clone()} for _ in range(num_models)]
    averaged = average_states(states, coefficients(kind, num_models))["w"]
    assert averaged.dtype == dtype
    assert torch.equal(averaged, weights)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_coefficient_of_one_gives_the_model_itself(chosen):
    torch.manual_seed(4)
    states = [{"w": torch.randn(500, dtype=torch.float64)} for _ in range(3)]
    assert torch.equal(average_states(states, np.eye(3)[chosen])["w"], states[chosen]["w"])


def test_the_average_shares_no_memory_and_keeps_the_order_of_keys():
    model = normed(0)
    state = model.state_dict()
    averaged = average_states([dict(reversed(state.items())), state])
    assert list(averaged) == list(state)
    assert same(averaged, dict(state))
    for value in average_states([model]).values():
        value.zero_()
    assert same(model.state_dict(), normed(0).state_dict())


@pytest.mark.parametrize(
    ("shares", "cause"),
    [
        ([1.0], r"shape \(1,\) for 2 models"),
        ([[0.5, 0.5]], r"shape \(1, 2\) for 2 models"),
        ([0.5, 0.6], "sum to 1.1"),
        ([math.nan, 1.0], "sum to nan"),
        ([math.inf, 1.0], "sum to inf"),
    ],
)
def test_coefficients_that_do_not_fit(shares, cause):
    with pytest.raises(UserError, match=cause):
        average_states([normed(0), normed(1)], shares)


def test_a_diverged_model_is_named_by_its_tensor_or_left_out():
    good = dict(normed(0).named_parameters())
    broken = {**good, "3.bias": torch.tensor([0.0, math.nan])}
    with pytest.raises(UserError, match=r"tensor 3\.bias is not a number: that of model 1"):
        average_states([good, broken])
    assert same(average_states([good, broken], [1.0, 0.0]), good)


# Other architectures


def state_with(**changes):
    state = {"a": torch.zeros(2), "b": torch.zeros(3, 4), "n": torch.tensor(1)}
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


class Own(nn.Sequential):
    """Another class with the same tensors."""


@pytest.mark.parametrize(
    ("models", "cause"),
    [
        ([], "no models"),
        ([state_with(a=None, b=torch.zeros(1))], "Model 2 lacks the tensor a that model 0 has"),
        ([state_with(extra=torch.zeros(1))], "Model 0 lacks the tensor extra that model 2 has"),
        (
            [state_with(b=torch.zeros(4, 3), n=None)],
            r"b has shape \(4, 3\) in model 2 and \(3, 4\) in model 0",
        ),
        ([state_with(n=torch.ones(1))], r"n has shape \(1,\) in model 2 and \(\) in model 0"),
        (
            [state_with(b=torch.zeros(3, 4).double())],
            r"b has dtype torch\.float64 in model 2 and torch\.float32",
        ),
        ([state_with(n=torch.tensor(1, dtype=torch.int32))], "The tensor n has dtype"),
        ([state_with(b={"not": "a tensor"})], "The tensor b has shape None in model 2"),
        ([normed(0), Own(*normed(1))], "Model 1 is a Own, but model 0 is a Sequential"),
    ],
)
def test_what_differs_first_is_named(models, cause):
    if len(models) == 1:
        models = [state_with(), state_with(), *models]
    with pytest.raises(UserError, match=cause):
        average_states(models)


def test_networks_of_other_genotypes_are_refused(own_network):
    first = own_network(0)
    genotype = Genotype(normal=first.genotype.normal, reduction=OTHER_CELL)
    other = Network(genotype, first.stack, auxiliary=True)
    # The tensors alone do not tell them apart: an edge has another source.
    check_same_architecture([first.state_dict(), other.state_dict()])
    with pytest.raises(UserError, match="Model 1 has another genotype than model 0"):
        average_states([first, other])
    assert same(average_states([first, own_network(0)]), dict(first.state_dict()))


# BatchNorm


def test_recomputed_statistics_equal_a_pass_by_hand():
    model = normed(0)
    model[1].momentum = 0.3
    assert recompute_batch_norm(model, batches())
    features = [model[0](inputs).detach().double() for inputs, _ in batches()]
    mean = torch.stack([part.mean(dim=0) for part in features]).mean(dim=0)
    variance = torch.stack([part.var(dim=0, correction=1) for part in features]).mean(dim=0)
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 3
    assert model[1].momentum == 0.3
    # The weights stay.
    assert torch.equal(model[0].weight, normed(0)[0].weight)


def test_recomputing_restores_every_modules_own_mode():
    model = normed(0).train()
    model[1].eval()
    recompute_batch_norm(model, batches())
    assert [module.training for module in model] == [True, False, True, True]


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_models_without_running_statistics_need_no_pass(norm):
    assert not recompute_batch_norm(nn.Sequential(nn.Linear(3, 2), norm), forbidden)


def test_no_batches_leave_the_statistics_alone():
    model = normed(0)
    with pytest.raises(UserError, match="no batches for BatchNorm"):
        recompute_batch_norm(model, batches(0))
    assert same(model.state_dict(), normed(0).state_dict())


def test_averaged_model_has_averaged_weights_and_statistics_of_its_own():
    scratch, models = normed(7), [normed(0), normed(1)]
    averaged = averaged_model(scratch, models, [0.25, 0.75], batches())
    for name, value in averaged.named_parameters():
        parts = [dict(model.named_parameters())[name].detach() for model in models]
        torch.testing.assert_close(value.detach(), 0.25 * parts[0] + 0.75 * parts[1])
    again = copy.deepcopy(averaged)
    recompute_batch_norm(again, batches())
    assert same(again.state_dict(), averaged.state_dict())
    assert not averaged.training
    assert same(scratch.state_dict(), normed(7).state_dict())


def test_averaged_model_refuses_states_of_another_architecture():
    with pytest.raises(UserError, match="Model 0 is a Sequential, but the given module is a Linear"):
        averaged_model(nn.Linear(3, 2), [normed(0), normed(1)], None, batches())
    with pytest.raises(UserError, match="Model 0 lacks the tensor weight that the given module has"):
        averaged_model(nn.Linear(3, 2), [normed(0).state_dict()], None, batches())


# Running averages

KINDS = {
    "Polyak": (PolyakAverage, {}),
    "EMA": (ExponentialMovingAverage, {"decay": 0.8}),
    "EMA without decay": (ExponentialMovingAverage, {"decay": 0.0}),
    "SWA": (StochasticWeightAverage, {"start_epoch": 1}),
    "SWA from 2": (StochasticWeightAverage, {"start_epoch": 2}),
    "SWA of cycles": (StochasticWeightAverage, {"start_epoch": 1, "cycle": 2}),
    "SWA of one": (StochasticWeightAverage, {"start_epoch": 5, "cycle": 3}),
}


def trained(name, *, epochs=5, steps=3):
    """A running average of a plain training, its model, and the model's weights after every step."""
    kind, options = KINDS[name]
    model = normed(3)
    average = kind(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    weights = []
    for epoch in range(epochs):
        model.train()
        for inputs, labels in batches(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            average.after_step(model)
            weights.append(model[0].weight.detach().double().clone())
        average.after_epoch(model, epoch + 1)
    return average, model, torch.stack(weights)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("Polyak", range(15)),
        ("EMA", range(15)),
        ("EMA without decay", range(15)),
        ("SWA", [2, 5, 8, 11, 14]),
        ("SWA from 2", [5, 8, 11, 14]),
        ("SWA of cycles", [2, 8, 14]),
        ("SWA of one", [14]),
    ],
)
def test_running_averages_are_their_recurrences(name, taken):
    average, model, weights = trained(name)
    kept = weights[list(taken)]
    expected = kept.mean(dim=0)
    if "EMA" in name:
        expected, decay = kept[0], KINDS[name][1]["decay"]
        for step in kept[1:]:
            expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.module[0].weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert average.n_averaged == len(kept)
    # The trained model itself goes on as it was.
    assert torch.equal(model[0].weight.detach().double(), weights[-1])


@pytest.mark.parametrize("name", ["Polyak", "SWA"])
def test_finished_recomputes_the_statistics_and_keeps_averaging(name):
    average, _, _ = trained(name)
    before = copy.deepcopy(average.state_dict())
    finished = average.finished(batches())
    by_hand = copy.deepcopy(average.module)
    recompute_batch_norm(by_hand, batches())
    assert same(finished.state_dict(), by_hand.state_dict())
    assert not torch.equal(finished[1].running_mean, average.module[1].running_mean)
    assert not finished.training
    assert same(average.state_dict(), before)


@pytest.mark.parametrize("name", ["Polyak", "EMA"])
def test_a_model_that_stays_is_its_own_average(name):
    model = normed(0)
    average = KINDS[name][0](model, **KINDS[name][1])
    for _ in range(7):
        average.after_step(model)
    assert same(average.module.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["Polyak", "EMA", "SWA"])
def test_a_saved_running_average_goes_on_bit_equal(name):
    kind, options = KINDS[name]
    steps = [normed(seed) for seed in range(6)]
    straight, resumed = kind(steps[0], **options), kind(steps[5], **options)
    for epoch, step in enumerate(steps, start=1):
        if epoch == 4:
            resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
        for average in (straight, resumed) if epoch > 3 else (straight,):
            average.after_step(step)
            average.after_epoch(step, epoch)
    assert same(straight.state_dict(), resumed.state_dict())
    assert straight.n_averaged == 6


def test_what_a_running_average_refuses():
    model = nn.Linear(3, 2)
    with pytest.raises(UserError, match="has seen no model"):
        StochasticWeightAverage(model, start_epoch=9).finished(batches())
    average = PolyakAverage(model)
    with pytest.raises(UserError, match="trained model is a Sequential, but the averaged model is a Linear"):
        average.after_step(normed(0))
    with pytest.raises(UserError, match=r"tensor weight has shape \(2, 4\) in the trained model"):
        average.after_step(nn.Linear(4, 2))
    for decay in (1.0, math.nan):
        with pytest.raises(UserError, match=f"decay is {decay}"):
            ExponentialMovingAverage(model, decay=decay)
    with pytest.raises(UserError, match="after epoch -1"):
        StochasticWeightAverage(model, start_epoch=-1)
    with pytest.raises(UserError, match="cycles of 0"):
        StochasticWeightAverage(model, start_epoch=1, cycle=0)
