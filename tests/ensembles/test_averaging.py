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


@given(st.sampled_from(["equal", "linear", "exponential"]), st.integers(1, 300), st.floats(1e-3, 0.999))
def test_coefficients_in_closed_form(kind, n, decay):
    ages = n - np.arange(1, n + 1)
    closed = {
        "equal": np.full(n, 1 / n),
        "linear": 2 * np.arange(1, n + 1) / (n * (n + 1)),
        "exponential": decay**ages * (1 - decay) / (1 - decay**n),
    }[kind]
    shares = coefficients(kind, n, decay=decay)
    assert shares.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(shares, closed, rtol=1e-9, atol=1e-300)
    np.testing.assert_array_equal(coefficients("exponential", n, decay=1.0), coefficients("equal", n))


def test_average_equals_numpy():
    states = [normed(seed).state_dict() for seed in range(3)]
    # The order of keys is the last model's.
    averaged = average_states([dict(reversed(states[0].items())), *states[1:]], [0.2, 0.5, 0.3])
    assert list(averaged) == list(states[2])
    for name, value in averaged.items():
        if not name.endswith("num_batches_tracked"):
            parts = np.stack([state[name].double().numpy() for state in states])
            expected = np.tensordot([0.2, 0.5, 0.3], parts, axes=1).astype(np.float32)
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-8)
            assert value.dtype == torch.float32
    # The average shares no memory with the model.
    model = normed(0)
    for value in average_states([model]).values():
        value.zero_()
    assert same(model.state_dict(), states[0])


HALF, EQUAL_INFINITIES = torch.float16, [0.0, -math.inf]


@pytest.mark.parametrize(
    ("values", "shares", "expected"),
    [
        # A negative coefficient extrapolates; one of 1 gives the model itself.
        ([[1.0], [3.0]], [-0.5, 1.5], [4.0]),
        ([[0.1], [0.3], [0.7]], [0.0, 1.0, 0.0], [float(np.float32(0.3))]),
        ([EQUAL_INFINITIES] * 3, None, EQUAL_INFINITIES),
        # Integers are the last model's.
        ([3, 8], [0.9, 0.1], 8),
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
    averaged = average_states([{"w": tensor, "_extra_state": {"a": 2}} for tensor in tensors], shares)
    assert averaged["w"].dtype == tensors[0].dtype
    assert averaged["w"].tolist() == expected
    assert averaged["_extra_state"] == {"a": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex64])
@pytest.mark.parametrize(("kind", "num_models"), [("equal", 3), ("exponential", 10)])
def test_identical_models_average_to_themselves_exactly(dtype, kind, num_models):
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(1000, generator=generator) * 10 ** torch.linspace(-4, 4, 1000)).to(dtype)
    averaged = average_states([{"w": weights.clone()} for _ in range(num_models)], coefficients(kind, num_models))
    assert averaged["w"].dtype == dtype
    assert torch.equal(averaged["w"], weights)


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
        ([state_with(b=torch.zeros(4, 3), n=None)], r"b has shape \(4, 3\) in model 2 and \(3, 4\) in model 0"),
        ([state_with(b=torch.zeros(3, 4).double())], r"b has dtype torch\.float64 in model 2 and torch\.float32"),
        ([state_with(b={"not": "a tensor"})], "b has shape None in model 2"),
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
    # The tensors alone do not tell them apart: an edge has another source.
    other = Network(Genotype(normal=first.genotype.normal, reduction=OTHER_CELL), first.stack, auxiliary=True)
    assert average_states([first.state_dict(), other.state_dict()]).keys() == first.state_dict().keys()
    with pytest.raises(UserError, match="Model 1 has another genotype than model 0"):
        average_states([first, other])
    assert same(average_states([first, own_network(0)]), dict(first.state_dict()))


def test_recomputed_statistics_equal_a_pass_by_hand(own_network):
    # Of the network that predicts, not of one that drops at random; every module keeps its own mode.
    model = normed(0).insert(0, nn.Dropout()).train()
    model[2].eval().momentum = 0.3
    before = model[1].weight.clone()
    assert recompute_batch_norm(model, batches())
    features = [model[1](inputs).detach().double() for inputs, _ in batches()]
    mean = torch.stack([part.mean(dim=0) for part in features]).mean(dim=0)
    variance = torch.stack([part.var(dim=0, correction=1) for part in features]).mean(dim=0)
    torch.testing.assert_close(model[2].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[2].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert (model[2].num_batches_tracked, model[2].momentum) == (3, 0.3)
    assert [module.training for module in model] == [True, True, False, True, True]
    assert torch.equal(model[1].weight, before)
    # What no batch reaches keeps its statistics.
    model = own_network(0)
    kept = [buffer for name, buffer in model.named_buffers() if "auxiliary" in name and "running" in name]
    assert kept
    for buffer in kept:
        buffer.fill_(7.0)
    recompute_batch_norm(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4))])
    assert all(bool((buffer == 7.0).all()) for buffer in kept)


@pytest.mark.parametrize("norm", [nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_models_without_running_statistics_need_no_pass(norm):
    assert not recompute_batch_norm(nn.Sequential(nn.Linear(3, 2), norm), forbidden)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("no batches", UserError), ("one image", UserError), ("the disk is gone", OSError)],
)
def test_a_pass_that_fails_changes_nothing(fault, expected):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.3)).train()
    before = copy.deepcopy(model.state_dict())

    def failing():
        if fault != "no batches":
            yield torch.ones(4, 2), torch.zeros(4)
        if fault == "one image":
            yield torch.ones(1, 2), torch.zeros(1)
        if expected is OSError:
            raise OSError(fault)

    with pytest.raises(expected, match=fault):
        recompute_batch_norm(model, failing)
    assert model[1].momentum == 0.3
    assert all(module.training for module in model.modules())
    assert same(model.state_dict(), before)


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
    with pytest.raises(UserError, match="Model 0 is a Sequential, but the given module is a Linear"):
        averaged_model(nn.Linear(3, 2), models, None, batches())


KINDS = {
    "Polyak": (PolyakAverage, {}),
    "EMA": (ExponentialMovingAverage, {"decay": 0.8}),
    "SWA": (StochasticWeightAverage, {"start_epoch": 1}),
    "SWA of cycles": (StochasticWeightAverage, {"start_epoch": 2, "cycle": 2}),
}


@pytest.mark.parametrize(
    ("name", "taken"),
    [("Polyak", range(15)), ("EMA", range(15)), ("SWA", [2, 5, 8, 11, 14]), ("SWA of cycles", [5, 11])],
)
def test_running_averages_are_their_recurrences_and_go_on_bit_equal(name, taken):
    kind, options = KINDS[name]
    model = normed(3)
    average, resumed, weights = kind(model, **options), kind(normed(5), **options), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for epoch in range(1, 6):
        if epoch == 4:
            resumed.load_state_dict(copy.deepcopy(average.state_dict()))
        running = (average, resumed) if epoch > 3 else (average,)
        model.train()
        for inputs, labels in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            weights.append(model[0].weight.detach().double().clone())
            for each in running:
                each.after_step(model)
        for each in running:
            each.after_epoch(model, epoch)
    assert same(average.state_dict(), resumed.state_dict())
    # The trained model itself goes on as it was.
    assert torch.equal(model[0].weight.detach().double(), weights[-1])
    kept = torch.stack([weights[step] for step in taken])
    expected = kept.mean(dim=0)
    if name == "EMA":
        expected = kept[0]
        for step in kept[1:]:
            expected = 0.8 * expected + 0.2 * step
    torch.testing.assert_close(average.module[0].weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert average.n_averaged == len(kept)
    # The finished model has statistics of its own, and the averaging can go on.
    before = copy.deepcopy(average.state_dict())
    finished, by_hand = average.finished(batches()), copy.deepcopy(average.module)
    recompute_batch_norm(by_hand, batches())
    assert same(finished.state_dict(), by_hand.state_dict())
    assert not torch.equal(finished[1].running_mean, average.module[1].running_mean)
    assert not finished.training
    assert same(average.state_dict(), before)


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda: coefficients("cubic", 3), "'cubic' is not a rule"),
        (lambda: coefficients("equal", 0), "0 models"),
        (lambda: coefficients("exponential", 3, decay=0.0), "decay is 0.0"),
        (lambda: coefficients("exponential", 3, decay=math.nan), "decay is nan"),
        (lambda: average_states([normed(0), normed(1)], [1.0]), r"shape \(1,\) for 2 models"),
        (lambda: average_states([normed(0), normed(1)], [0.5, 0.6]), "sum to 1.1"),
        (lambda: average_states([normed(0), normed(1)], [math.nan, 1.0]), "sum to nan"),
        (lambda: StochasticWeightAverage(normed(0), start_epoch=9).finished(batches()), "has seen no model"),
        (lambda: PolyakAverage(nn.Linear(3, 2)).after_step(normed(0)), "trained model is a Sequential"),
        (lambda: ExponentialMovingAverage(normed(0), decay=1.0), "decay is 1.0"),
        (lambda: StochasticWeightAverage(normed(0), start_epoch=-1), "after epoch -1"),
        (lambda: StochasticWeightAverage(normed(0), start_epoch=1, cycle=0), "cycles of 0"),
    ],
)
def test_mistakes_are_named(call, cause):
    with pytest.raises(UserError, match=cause):
        call()


def test_a_diverged_model_is_named_by_its_tensor_or_left_out():
    good = dict(normed(0).named_parameters())
    broken = {**good, "3.bias": torch.tensor([0.0, math.nan])}
    with pytest.raises(UserError, match=r"tensor 3\.bias is not a number: that of model 1"):
        average_states([good, broken])
    assert same(average_states([good, broken], [1.0, 0.0]), good)
