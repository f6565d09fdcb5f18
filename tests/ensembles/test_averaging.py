"""Averages of weights, curves, soups and loss barriers against closed forms, numpy and scikit-learn."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from tiny import same
from torch import nn

from dnas_ens.ensembles.averaging import (
    ExponentialMovingAverage,
    PolyakAverage,
    StochasticWeightAverage,
    average_states,
    coefficients,
    recompute_batch_norm,
)
from dnas_ens.ensembles.soups import BarrierCheck, averaging_curve, greedy_soup, loss_barrier, uniform_soup
from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network
from dnas_ens.space.genotype import Genotype

OTHER_CELL = ((("skip_connect", 0), ("sep_conv_3x3", 1)), (("max_pool_3x3", 0), ("skip_connect", 2)))


def normed(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model(torch.randn(16, 2))  # moves the running statistics
    return model.eval()


def batches(seed=0, num=4):
    generator = torch.Generator().manual_seed(seed)
    points = [torch.randn(16, 2, generator=generator) for _ in range(num)]
    return [(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long()) for inputs in points]


def averaged_by_hand(stages, shares=None):
    model = normed(8)
    model.load_state_dict(average_states(stages, shares))
    recompute_batch_norm(model, batches())
    return model


def forbidden():
    raise AssertionError("no pass over the data was needed")


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
    for value in average_states(states[:1]).values():
        value.zero_()
    assert same(states[0], normed(0).state_dict())


@pytest.mark.parametrize(
    ("values", "shares", "expected"),
    [
        # A negative coefficient extrapolates; one of 1 gives the model itself.
        ([[1.0], [3.0]], [-0.5, 1.5], [4.0]),
        ([[0.1], [0.3], [0.7]], [0.0, 1.0, 0.0], [float(np.float32(0.3))]),
        ([[1.5 + 2j], [0.5 + 0j]], None, [1 + 1j]),
        ([[0.0, -math.inf]] * 3, None, [0.0, -math.inf]),
        # Integers are the last model's.
        ([3, 8], [0.9, 0.1], 8),
        # In half precision the sum 2048 + 1 + 1 would lose both ones, and 60000 + 60000 overflow.
        ([torch.tensor([6e4, value]).half() for value in (2048, 1, 1)], None, [6e4, float(np.float16(2050 / 3))]),
    ],
)
def test_averages_of_one_tensor(values, shares, expected):
    tensors = [torch.as_tensor(value) for value in values]
    averaged = average_states([{"w": tensor, "_extra_state": {"a": 2}} for tensor in tensors], shares)
    assert averaged["w"].dtype == tensors[0].dtype
    assert averaged["w"].tolist() == expected
    assert averaged["_extra_state"] == {"a": 2}


def state_with(**changes):
    state = {"a": torch.zeros(2), "b": torch.zeros(3, 4), "n": torch.tensor(1)}
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("models", "cause"),
    [
        ([], "no models"),
        ([state_with(a=None, b=torch.zeros(1))], "Model 2 lacks the tensor a that model 0 has"),
        ([state_with(extra=torch.zeros(1))], "Model 0 lacks the tensor extra that model 2 has"),
        ([state_with(b=torch.zeros(4, 3), n=None)], r"b has shape \(4, 3\) in model 2 and \(3, 4\) in model 0"),
        ([state_with(b=torch.zeros(3, 4).double())], r"b has dtype torch\.float64 in model 2 and torch\.float32"),
        ([state_with(b={"not": "a tensor"})], "b has shape None in model 2"),
        ([normed(0), nn.Linear(2, 8)], "Model 1 is a Linear, but model 0 is a Sequential"),
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
    average_states([first.state_dict(), other.state_dict()])
    with pytest.raises(UserError, match="Model 1 has another genotype than model 0"):
        average_states([first, other])


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
    assert (model[2].num_batches_tracked, model[2].momentum) == (4, 0.3)
    assert [module.training for module in model] == [True, True, False, True, True]
    assert torch.equal(model[1].weight, before)
    assert not recompute_batch_norm(nn.BatchNorm1d(2, track_running_stats=False), forbidden)
    # What no batch reaches keeps its statistics.
    model = own_network(0)
    before = [b.fill_(7.0).clone() for name, b in model.named_buffers() if "auxiliary" in name and "running" in name]
    recompute_batch_norm(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4))])
    after = [b for name, b in model.named_buffers() if "auxiliary" in name and "running" in name]
    assert before
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("fault", "expected"), [("no batches", UserError), ("one image", UserError), ("the disk is gone", OSError)]
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


@pytest.mark.parametrize(
    ("kind", "options", "taken"),
    [
        (PolyakAverage, {}, range(15)),
        (ExponentialMovingAverage, {"decay": 0.8}, range(15)),
        (StochasticWeightAverage, {"start_epoch": 1}, [2, 5, 8, 11, 14]),
        (StochasticWeightAverage, {"start_epoch": 2, "cycle": 2}, [5, 11]),
    ],
)
def test_running_averages_are_their_recurrences_and_go_on_bit_equal(kind, options, taken):
    model = normed(3).train()
    average, resumed, weights = kind(model, **options), kind(normed(5), **options), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(15):
        if step == 9:
            resumed.load_state_dict(copy.deepcopy(average.state_dict()))
        inputs, labels = batches(num=3)[step % 3]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        weights.append(model[0].weight.detach().double().clone())
        for running in (average, resumed) if step >= 9 else (average,):
            running.after_step(model)
            if step % 3 == 2:
                running.after_epoch(model, step // 3 + 1)
    assert same(average.state_dict(), resumed.state_dict())
    # The trained model itself goes on as it was.
    assert torch.equal(model[0].weight.detach().double(), weights[-1])
    kept = [weights[step] for step in taken]
    expected = torch.stack(kept).mean(dim=0)
    if kind is ExponentialMovingAverage:
        expected = functools.reduce(lambda before, weight: 0.8 * before + 0.2 * weight, kept)
    torch.testing.assert_close(average.module[0].weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert average.n_averaged == len(kept)
    # The finished model has statistics of its own, and the averaging can go on.
    before = copy.deepcopy(average.state_dict())
    finished, by_hand = average.finished(batches()), copy.deepcopy(average.module)
    recompute_batch_norm(by_hand, batches())
    assert same(finished.state_dict(), by_hand.state_dict())
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
        (lambda: PolyakAverage(nn.Linear(2, 3)).after_step(normed(0)), "trained model is a Sequential"),
        (lambda: ExponentialMovingAverage(normed(0), decay=1.0), "decay is 1.0"),
        (lambda: StochasticWeightAverage(normed(0), start_epoch=-1), "after epoch -1"),
        (lambda: StochasticWeightAverage(normed(0), start_epoch=1, cycle=0), "cycles of 0"),
    ],
)
def test_mistakes_are_named(call, cause):
    with pytest.raises(UserError, match=cause):
        call()


class Product(nn.Module):
    """Logits (u v x / 2, -u v x / 2): two signs of (u, v) are one function, with a barrier between them.

    With v = 1 and x = 1 the NLL of class 0 is ln(1 + e^-u), convex in u.
    """

    def __init__(self, u=0.0, v=1.0):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (u, v))

    def forward(self, inputs):
        half = self.u * self.v * inputs[:, 0] / 2
        return torch.stack([half, -half], dim=1)


def ones():
    """Three inputs 1 of class 0, in two batches."""
    for count in (2, 1):
        yield torch.ones(count, 1, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)


def thirds():
    """Two of class 0 and one of class 1: the best logit is ln 2."""
    yield torch.ones(3, 1, dtype=torch.float64), torch.tensor([0, 0, 1])


def thirds_nll(w):
    return (2 * math.log1p(math.exp(-w)) + math.log1p(math.exp(w))) / 3


def scored(model, batches):
    """NLL and accuracy with scikit-learn."""
    with torch.no_grad():
        probs = torch.cat([model.eval()(inputs).double().softmax(1) for inputs, _ in batches]).numpy()
    labels = torch.cat([labels for _, labels in batches]).numpy()
    return log_loss(labels, probs, labels=range(2)), accuracy_score(labels, probs.argmax(1))


@pytest.mark.parametrize(("kind", "recompute_singles"), [("linear", False), ("exponential", True)])
def test_curve_equals_averages_by_hand(kind, recompute_singles):
    scratch, stages = normed(9), [normed(seed) for seed in range(4)]
    states = [stage.state_dict() for stage in stages]
    options = {"decay": 0.5, "recompute_singles": recompute_singles}
    points = averaging_curve(scratch, states, kind, batches(0), batches(1), **options)
    assert [(point.num_models, point.index) for point in points] == [(1, 3), (2, 2), (3, 1), (4, 0)]
    for point in points:
        single = copy.deepcopy(stages[point.index])
        if recompute_singles:
            recompute_batch_norm(single, batches(0))
        assert (point.single_nll, point.single_accuracy) == pytest.approx(scored(single, batches(1)), rel=1e-6)
        shares = coefficients(kind, point.num_models, decay=0.5)
        average = scored(averaged_by_hand(stages[point.index :], shares), batches(1))
        assert (point.average_nll, point.average_accuracy) == pytest.approx(average, rel=1e-6)
        assert point.barrier is None
    assert torch.equal(scratch[1].running_mean, normed(9)[1].running_mean)


def test_identical_models_have_flat_equal_curves_and_are_all_in_a_soup():
    # With dropout, which must not draw while the statistics are recomputed.
    same = [normed(0).insert(0, nn.Dropout())] * 4
    draws = torch.get_rng_state()
    points = averaging_curve(same[0], same, "linear", batches(0), batches(1), barrier_check=BarrierCheck())
    assert torch.equal(torch.get_rng_state(), draws)
    assert {point.average_nll for point in points} == {points[0].single_nll}
    assert {point.average_accuracy for point in points} == {points[0].single_accuracy}
    assert [point.barrier for point in points] == [None, 0.0, 0.0, 0.0]
    for make in (uniform_soup, greedy_soup):
        soup = make(same[0], same, batches(0), batches(1))
        assert soup.ingredients == (0, 1, 2, 3)
        assert soup.val_nll == points[0].single_nll


def test_bad_input_is_refused_before_any_pass():
    model, data = Product(), {"batches": forbidden, "val_batches": forbidden}
    mixed = [model.state_dict(), normed(0).state_dict()]
    for make in (uniform_soup, greedy_soup, functools.partial(averaging_curve, kind="equal")):
        for models, cause in (
            ([], "no models"),
            (mixed, "Model 1 lacks the tensor u"),
            ([normed(0)], "Model 0 is a Sequential, but the given module is a Product"),
        ):
            with pytest.raises(UserError, match=cause):
                make(model, models, **data)
    with pytest.raises(UserError, match="not a rule"):
        averaging_curve(model, [model], "cubic", **data)
    with pytest.raises(UserError, match="2 points has none"):
        BarrierCheck(num_points=2)
    with pytest.raises(UserError, match="no batches for validation"):
        uniform_soup(model, [model], forbidden, [])


def test_a_diverged_model_is_named():
    models = [normed(seed) for seed in range(3)]
    with torch.no_grad():
        models[1][3].weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"Model 1's logits .* not finite"):
        greedy_soup(models[0], models, batches(0), batches(1), recompute_singles=False)
    with pytest.raises(UserError, match=r"tensor 3\.weight is not a number: that of model 1"):
        uniform_soup(models[0], models, batches(0), batches(1))
    # With a coefficient of 0 it is left out.
    assert same(average_states(models, [1.0, 0.0, 0.0]), dict(models[0].state_dict()))


def test_barrier_in_closed_form():
    # At share a the product is (1 - 2a)^2 * 9, so that NLL(a) = ln(1 + e^-9(1-2a)^2): the peak is ln 2.
    with pytest.warns(UserWarning, match=r"between the first model and the second model is 0\.693 nats"):
        found = loss_barrier(Product(), Product(3.0, 3.0), Product(-3.0, -3.0), forbidden, ones)
    np.testing.assert_allclose(found.positions, np.linspace(0, 1, 11))
    np.testing.assert_allclose(found.nll, np.log1p(np.exp(-9 * (1 - 2 * found.positions) ** 2)), rtol=1e-9)
    assert found.barrier == pytest.approx(math.log(2) - math.log1p(math.exp(-9)), rel=1e-9)
    assert found.accuracy.tolist() == [1.0] * 11
    # Between unequal ends it is measured against the line that joins their losses.
    ends, check = (Product(3.0, 3.0), Product(-1.0, -0.5)), BarrierCheck(num_points=5, threshold=0.0)
    with pytest.warns(UserWarning, match="not linearly connected"):
        found = loss_barrier(Product(), *ends, forbidden, ones, check=check)
    losses = [math.log1p(math.exp(-(3 - 4 * a) * (3 - 3.5 * a))) for a in (0, 0.25, 0.5, 0.75, 1)]
    excess = np.array(losses) - np.linspace(losses[0], losses[-1], 5)
    assert found.barrier == pytest.approx(excess.max(), rel=1e-9)


# Values that differ by rounding alone have no order.
@given(values=st.lists(st.floats(-4, 4).map(lambda value: round(value, 3)), min_size=1, max_size=6))
@settings(max_examples=40)
def test_greedy_soup_equals_a_naive_loop(values):
    order = sorted(range(len(values)), key=lambda index: thirds_nll(values[index]))
    picked = order[:1]
    for index in order[1:]:
        with_it = np.mean([values[each] for each in [*picked, index]])
        # Where both are the same but for rounding, either is right.
        if abs(thirds_nll(with_it) - thirds_nll(np.mean([values[each] for each in picked]))) < 1e-9:
            return
        if thirds_nll(with_it) < thirds_nll(np.mean([values[each] for each in picked])):
            picked.append(index)
    soup = greedy_soup(Product(), [Product(value) for value in values], forbidden, thirds)
    mean = np.mean([values[index] for index in picked])
    assert soup.ingredients == tuple(picked)
    assert soup.model.u.item() == pytest.approx(mean, abs=1e-12)
    assert soup.val_nll == pytest.approx(thirds_nll(mean), abs=1e-12)
    assert soup.val_accuracy == pytest.approx(2 / 3 if mean > 0 else 1 / 3) or abs(mean) < 1e-12


@pytest.mark.parametrize("recompute_singles", [False, True])
def test_soups_with_batch_norm_against_scikit_learn(recompute_singles):
    stages = [normed(seed) for seed in range(4)]
    uniform = uniform_soup(normed(9), stages, batches(0), batches(1))
    assert (uniform.ingredients, uniform.barriers) == ((0, 1, 2, 3), {})
    assert same(uniform.model.state_dict(), averaged_by_hand(stages).state_dict())
    greedy = greedy_soup(normed(9), stages, batches(0), batches(1), recompute_singles=recompute_singles)
    for soup in (uniform, greedy):
        assert not soup.model.training
        assert (soup.val_nll, soup.val_accuracy) == pytest.approx(scored(soup.model, batches(1)), rel=1e-6)
    if recompute_singles:
        for stage in stages:
            recompute_batch_norm(stage, batches(0))
    singles = [scored(stage, batches(1))[0] for stage in stages]
    assert greedy.ingredients[0] == int(np.argmin(singles))
    assert greedy.val_nll <= min(singles) * (1 + 1e-9)


@pytest.mark.parametrize("make", [uniform_soup, greedy_soup, functools.partial(averaging_curve, kind="equal")])
def test_barriers_are_checked_on_request(make):
    # Model 1 is the best single one; model 0 is the same function with other signs.
    states = [Product(-3.0, -3.0), Product(3.0, 3.1), Product(3.0, 2.9)]
    with pytest.warns(UserWarning, match=r"between model \d and model 0 is") as warned:
        found = make(Product(), states, batches=forbidden, val_batches=ones, barrier_check=BarrierCheck())
    assert len(warned) == 1
    if isinstance(found, list):
        assert found[2].barrier > 0.05 > found[1].barrier
    else:
        assert found.barriers.keys() == {0, 2}
        assert found.barriers[0] > 0.05 > found.barriers[2]
