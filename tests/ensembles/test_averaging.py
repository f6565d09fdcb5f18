"""Averages of states against hand computation, and the running averages against their recurrences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

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


def normed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model(torch.randn(16, 3))  # moves the running statistics
    return model.eval()


def batches(num: int = 3):
    generator = torch.Generator().manual_seed(9)
    data = [
        (torch.randn(8, 3, generator=generator), torch.randint(2, (8,), generator=generator))
        for _ in range(num)
    ]
    return lambda: iter(data)


def forbidden():
    raise AssertionError("no pass over the data was needed")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Coefficients


def test_coefficients_by_hand() -> None:
    np.testing.assert_allclose(coefficients("equal", 4), [0.25] * 4, rtol=1e-15)
    np.testing.assert_allclose(coefficients("linear", 4), [0.1, 0.2, 0.3, 0.4], rtol=1e-15)
    np.testing.assert_allclose(coefficients("exponential", 3, decay=0.5), np.array([1, 2, 4]) / 7, rtol=1e-15)


@given(
    kind=st.sampled_from(["equal", "linear", "exponential"]),
    num_models=st.integers(1, 300),
    decay=st.floats(1e-3, 1.0),
)
def test_coefficients_are_a_distribution_that_never_falls(kind, num_models, decay) -> None:
    shares = coefficients(kind, num_models, decay=decay)
    assert shares.shape == (num_models,)
    assert shares.sum() == pytest.approx(1.0, abs=1e-12)
    assert shares.min() >= 0
    assert (np.diff(shares) >= 0).all()
    ages = num_models - np.arange(1, num_models + 1)
    if kind == "exponential" and decay < 0.999:
        closed = decay**ages * (1 - decay) / (1 - decay**num_models)
        np.testing.assert_allclose(shares, closed, rtol=1e-9, atol=1e-300)


def test_no_decay_is_the_equal_rule() -> None:
    np.testing.assert_array_equal(coefficients("exponential", 7, decay=1.0), coefficients("equal", 7))


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
def test_impossible_coefficients(kind, num_models, decay, cause) -> None:
    with pytest.raises(UserError, match=cause):
        coefficients(kind, num_models, decay=decay)


# Averages of states


def test_average_equals_numpy() -> None:
    models = [normed(seed) for seed in range(3)]
    shares = [0.2, 0.5, 0.3]
    averaged = average_states([model.state_dict() for model in models], shares)
    for name, value in averaged.items():
        parts = [model.state_dict()[name].numpy() for model in models]
        if name.endswith("num_batches_tracked"):
            continue
        expected = sum(
            share * part.astype(np.float64) for share, part in zip(shares, parts, strict=True)
        ).astype(np.float32)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-8)
        assert value.dtype == torch.float32


def test_equal_shares_by_default() -> None:
    averaged = average_states([{"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([3.0, 0.0])}])
    assert averaged["w"].tolist() == [2.0, 2.0]


def test_integer_buffers_are_the_last_models() -> None:
    states = [{"n": torch.tensor(3), "mask": torch.tensor([True])} for _ in range(2)]
    states[1] = {"n": torch.tensor(8), "mask": torch.tensor([False])}
    averaged = average_states(states, [0.9, 0.1])
    assert averaged["n"] == 8
    assert averaged["n"].dtype == torch.int64
    assert averaged["mask"].tolist() == [False]


def test_extra_state_of_a_module_is_the_last_models() -> None:
    averaged = average_states([{"_extra_state": {"a": 1}}, {"_extra_state": {"a": 2}}])
    assert averaged == {"_extra_state": {"a": 2}}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("kind", ["equal", "linear", "exponential"])
@pytest.mark.parametrize("num_models", [1, 3, 10])
def test_identical_models_average_to_themselves_exactly(dtype, kind, num_models) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(1000, generator=generator) * 10 ** torch.linspace(-4, 4, 1000)).to(dtype)
    averaged = average_states(
        [{"w": weights.clone()} for _ in range(num_models)], coefficients(kind, num_models)
    )
    assert averaged["w"].dtype == dtype
    assert torch.equal(averaged["w"], weights)


def test_equal_infinities_stay() -> None:
    mask = torch.tensor([0.0, -math.inf])
    averaged = average_states([{"mask": mask}, {"mask": mask.clone()}, {"mask": mask.clone()}])
    assert torch.equal(averaged["mask"], mask)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_coefficient_of_one_gives_the_model_itself(chosen: int) -> None:
    torch.manual_seed(4)
    states = [{"w": torch.randn(500, dtype=torch.float64)} for _ in range(3)]
    averaged = average_states(states, np.eye(3)[chosen])
    assert torch.equal(averaged["w"], states[chosen]["w"])


def test_negative_coefficients_extrapolate() -> None:
    averaged = average_states([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}], [-0.5, 1.5])
    assert averaged["w"].tolist() == [4.0]


def test_half_precision_is_averaged_in_double_precision() -> None:
    # In half precision the sum 2048 + 1 + 1 would lose both ones, and 60000 + 60000 overflow.
    averaged = average_states(
        [{"w": torch.tensor([60000.0, value], dtype=torch.float16)} for value in (2048, 1, 1)]
    )
    assert averaged["w"].tolist() == [60000.0, float(np.float16(2050 / 3))]


def test_the_average_shares_no_memory_with_the_models() -> None:
    model = normed(0)
    averaged = average_states([model])
    for value in averaged.values():
        value.zero_()
    assert not same(model.state_dict(), averaged)
    assert same(model.state_dict(), normed(0).state_dict())


def test_order_of_the_keys_does_not_matter() -> None:
    first = normed(0).state_dict()
    averaged = average_states([dict(reversed(first.items())), first])
    assert list(averaged) == list(first)
    assert same(averaged, dict(first))


def test_nothing_to_average() -> None:
    with pytest.raises(UserError, match="no models"):
        average_states([])


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
def test_coefficients_that_do_not_fit(shares, cause) -> None:
    with pytest.raises(UserError, match=cause):
        average_states([normed(0), normed(1)], shares)


def test_a_diverged_model_is_named_by_its_tensor() -> None:
    broken = {**normed(1).state_dict(), "3.bias": torch.tensor([0.0, math.nan])}
    with pytest.raises(UserError, match=r"tensor 3\.bias is not a number"):
        average_states([normed(0).state_dict(), broken])


def test_a_diverged_model_with_coefficient_zero_is_left_out() -> None:
    broken = {name: torch.full_like(value, math.nan) for name, value in normed(1).named_parameters()}
    averaged = average_states([dict(normed(0).named_parameters()), broken], [1.0, 0.0])
    assert same(averaged, dict(normed(0).named_parameters()))


# Refusals across architectures


def state_with(**changes) -> dict[str, torch.Tensor]:
    state = {"a": torch.zeros(2), "b": torch.zeros(3, 4), "n": torch.tensor(1)}
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        (state_with(a=None, b=torch.zeros(1)), "Model 2 lacks the tensor a that model 0 has"),
        (state_with(extra=torch.zeros(1)), "Model 0 lacks the tensor extra that model 2 has"),
        (
            state_with(b=torch.zeros(4, 3), n=None),
            r"The tensor b has shape \(4, 3\) in model 2 and \(3, 4\) in model 0",
        ),
        (
            state_with(b=torch.zeros(3, 4).double()),
            r"The tensor b has dtype torch\.float64 in model 2 and torch\.float32 in model 0",
        ),
        (state_with(n=torch.tensor(1, dtype=torch.int32)), "The tensor n has dtype"),
        (state_with(b={"not": "a tensor"}), "The tensor b has shape None in model 2"),
    ],
)
def test_the_first_tensor_that_differs_is_named(other, cause) -> None:
    with pytest.raises(UserError, match=cause):
        average_states([state_with(), state_with(), other])


def test_modules_of_other_classes_are_refused() -> None:
    class Own(nn.Sequential):
        pass

    with pytest.raises(UserError, match="Model 1 is a Own, but model 0 is a Sequential"):
        average_states([normed(0), Own(*normed(1))])


def test_networks_of_other_genotypes_are_refused(own_network: Callable[[int], Network]) -> None:
    first = own_network(0)
    other = Network(Genotype(normal=first.genotype.normal, reduction=OTHER_CELL), first.stack, auxiliary=True)
    # The tensors alone do not tell them apart: an edge has another source.
    check_same_architecture([first.state_dict(), other.state_dict()])
    with pytest.raises(UserError, match="Model 1 has another genotype than model 0"):
        average_states([first, other])
    assert same(average_states([first, own_network(0)]), dict(first.state_dict()))


# BatchNorm


def test_recomputed_statistics_equal_a_pass_by_hand() -> None:
    model = normed(0)
    model[1].momentum = 0.3
    assert recompute_batch_norm(model, batches())
    features = [model[0](inputs).detach().double() for inputs, _ in batches()()]
    mean = torch.stack([part.mean(dim=0) for part in features]).mean(dim=0)
    variance = torch.stack([part.var(dim=0, correction=1) for part in features]).mean(dim=0)
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 3
    assert model[1].momentum == 0.3
    # The weights stay.
    assert torch.equal(model[0].weight, normed(0)[0].weight)


def test_recomputing_restores_every_modules_own_mode() -> None:
    model = normed(0).train()
    model[1].eval()
    recompute_batch_norm(model, batches())
    assert [module.training for module in model] == [True, False, True, True]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 2),
        nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
    ],
)
def test_models_without_running_statistics_need_no_pass(model: nn.Module) -> None:
    assert not recompute_batch_norm(model, forbidden)


def test_no_batches_leave_the_statistics_alone() -> None:
    model = normed(0)
    with pytest.raises(UserError, match="no batches for BatchNorm"):
        recompute_batch_norm(model, batches(0))
    assert same(model.state_dict(), normed(0).state_dict())


def test_averaged_model_has_averaged_weights_and_statistics_of_its_own() -> None:
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


def test_averaged_model_refuses_states_of_another_architecture() -> None:
    with pytest.raises(UserError, match="Model 0 is a Sequential, but the given module is a Linear"):
        averaged_model(nn.Linear(3, 2), [normed(0), normed(1)], None, batches())
    states = [normed(0).state_dict(), normed(1).state_dict()]
    with pytest.raises(UserError, match="Model 0 lacks the tensor weight that the given module has"):
        averaged_model(nn.Linear(3, 2), states, None, batches())


# Running averages


def trained(average, *, epochs: int = 5, steps: int = 3):
    """Run a plain training loop and return the model and its weights after every step."""
    model = average.source
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    weights = []
    for epoch in range(epochs):
        model.train()
        for inputs, labels in batches(steps)():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            average.after_step(model)
            weights.append(model[0].weight.detach().double().clone())
        average.after_epoch(model, epoch + 1)
    return model, torch.stack(weights)


def started(kind, **options):
    model = normed(3)
    average = kind(model, **options)
    object.__setattr__(average, "source", model)
    return average


def test_polyak_is_the_mean_of_every_step() -> None:
    average = started(PolyakAverage)
    model, weights = trained(average)
    finished = average.finished(batches())
    torch.testing.assert_close(
        finished[0].weight.detach().double(), weights.mean(dim=0), rtol=1e-5, atol=1e-6
    )
    assert average.n_averaged == 15
    assert not finished.training
    # The trained model itself goes on as it was.
    assert torch.equal(model[0].weight.detach().double(), weights[-1])


def test_ema_is_its_recurrence() -> None:
    average = started(ExponentialMovingAverage, decay=0.8)
    _, weights = trained(average)
    expected = weights[0]
    for step in weights[1:]:
        expected = 0.8 * expected + 0.2 * step
    torch.testing.assert_close(average.module[0].weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_ema_without_decay_is_the_last_model() -> None:
    average = started(ExponentialMovingAverage, decay=0.0)
    model, _ = trained(average)
    assert torch.equal(average.module[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("start_epoch", "cycle", "taken"),
    [(1, 1, [1, 2, 3, 4, 5]), (2, 1, [2, 3, 4, 5]), (1, 2, [1, 3, 5]), (5, 3, [5])],
)
def test_swa_is_the_mean_of_the_cycles_ends(start_epoch, cycle, taken) -> None:
    average = started(StochasticWeightAverage, start_epoch=start_epoch, cycle=cycle)
    _, weights = trained(average)
    expected = weights[[3 * epoch - 1 for epoch in taken]].mean(dim=0)
    torch.testing.assert_close(average.module[0].weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert average.n_averaged == len(taken)


def test_finished_recomputes_the_statistics_and_keeps_averaging() -> None:
    average = started(StochasticWeightAverage, start_epoch=1)
    trained(average)
    before = copy.deepcopy(average.state_dict())
    finished = average.finished(batches())
    by_hand = copy.deepcopy(average.module)
    recompute_batch_norm(by_hand, batches())
    assert same(finished.state_dict(), by_hand.state_dict())
    assert not torch.equal(finished[1].running_mean, average.module[1].running_mean)
    assert same(average.state_dict(), before)


@pytest.mark.parametrize("kind", [PolyakAverage, ExponentialMovingAverage])
def test_a_model_that_stays_is_its_own_average(kind) -> None:
    model = normed(0)
    average = kind(model)
    for _ in range(7):
        average.after_step(model)
    assert same(average.module.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PolyakAverage, {}),
        (ExponentialMovingAverage, {"decay": 0.9}),
        (StochasticWeightAverage, {"start_epoch": 1}),
    ],
)
def test_a_saved_running_average_goes_on_bit_equal(kind, options) -> None:
    steps = [normed(seed) for seed in range(6)]
    straight, resumed = kind(steps[0], **options), kind(steps[5], **options)
    for epoch, step in enumerate(steps[:3], start=1):
        straight.after_step(step)
        straight.after_epoch(step, epoch)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for average in (straight, resumed):
        for epoch, step in enumerate(steps[3:], start=4):
            average.after_step(step)
            average.after_epoch(step, epoch)
    assert same(straight.state_dict(), resumed.state_dict())
    assert straight.n_averaged == 6


def test_a_running_average_that_saw_nothing() -> None:
    average = started(StochasticWeightAverage, start_epoch=9)
    trained(average)
    with pytest.raises(UserError, match="has seen no model"):
        average.finished(batches())


def test_a_running_average_refuses_another_architecture() -> None:
    average = PolyakAverage(nn.Linear(3, 2))
    with pytest.raises(
        UserError, match="The trained model is a Sequential, but the averaged model is a Linear"
    ):
        average.after_step(normed(0))
    with pytest.raises(UserError, match=r"tensor weight has shape \(2, 4\) in the trained model"):
        average.after_step(nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda model: ExponentialMovingAverage(model, decay=1.0), "decay is 1.0"),
        (lambda model: ExponentialMovingAverage(model, decay=math.nan), "decay is nan"),
        (lambda model: StochasticWeightAverage(model, start_epoch=-1), "after epoch -1"),
        (lambda model: StochasticWeightAverage(model, start_epoch=1, cycle=0), "cycles of 0"),
    ],
)
def test_impossible_running_averages(make, cause) -> None:
    with pytest.raises(UserError, match=cause):
        make(nn.Linear(3, 2))
