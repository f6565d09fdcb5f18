"""Curves, soups and loss barriers against closed forms and direct evaluation."""

import copy
import functools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from dnas_ens.ensembles.averaging import average_states, coefficients, recompute_batch_norm
from dnas_ens.ensembles.soups import (
    BarrierCheck,
    averaging_curve,
    evaluate_on_val,
    greedy_soup,
    loss_barrier,
    uniform_soup,
)
from dnas_ens.errors import UserError


class Product(nn.Module):
    """Logits (u v x / 2, -u v x / 2): two signs of (u, v) are one function, with a barrier between them."""

    def __init__(self, u, v):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (u, v))

    def forward(self, inputs):
        half = self.u * self.v * inputs[:, 0] / 2
        return torch.stack([half, -half], dim=1)


class Logit(nn.Module):
    """Logits (w / 2, -w / 2) whatever the input: the NLL of class 0 is ln(1 + e^-w), convex in w."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, inputs):
        half = self.w.expand(len(inputs)) / 2
        return torch.stack([half, -half], dim=1)


def ones():
    """Three inputs 1 of class 0, in two batches."""
    yield torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    yield torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)


def thirds():
    """Two of class 0 and one of class 1: the best logit is ln 2."""
    yield torch.ones(3, 1, dtype=torch.float64), torch.tensor([0, 0, 1])


def thirds_nll(w):
    return (2 * math.log1p(math.exp(-w)) + math.log1p(math.exp(w))) / 3


def forbidden():
    raise AssertionError("no pass over the training data was needed")


def normed(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model(torch.randn(16, 2))
    return model.eval()


def moons(seed, num=4):
    generator = torch.Generator().manual_seed(seed)
    points = [torch.randn(16, 2, generator=generator) for _ in range(num)]
    return [(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long()) for inputs in points]


def averaged_by_hand(stages, shares=None):
    model = normed(8)
    model.load_state_dict(average_states(stages, shares))
    recompute_batch_norm(model, moons(0))
    return model


def scored(model, batches):
    """NLL and accuracy with scikit-learn."""
    model.eval()
    with torch.no_grad():
        probs = torch.cat([model(inputs).double().softmax(1) for inputs, _ in batches]).numpy()
    labels = torch.cat([labels for _, labels in batches]).numpy()
    return log_loss(labels, probs, labels=range(2)), accuracy_score(labels, probs.argmax(1))


# Evaluation


def test_evaluation_equals_scikit_learn_and_keeps_the_modes():
    model = normed(0).train()
    model[1].eval()
    values = evaluate_on_val(model, moons(5))
    assert [module.training for module in model] == [True, False, True, True]
    assert values == pytest.approx(scored(model, moons(5)), rel=1e-9)


def test_evaluation_of_nothing_and_of_diverged_models():
    with pytest.raises(UserError, match="no batches for validation"):
        evaluate_on_val(normed(0), [])
    with pytest.raises(UserError, match="not finite"):
        evaluate_on_val(Logit(math.nan), ones)


# The curve over n


@pytest.mark.parametrize("kind", ["equal", "linear", "exponential"])
@pytest.mark.parametrize("recompute_singles", [False, True])
def test_curve_equals_averages_by_hand(kind, recompute_singles):
    scratch, stages = normed(9), [normed(seed) for seed in range(4)]
    states = [stage.state_dict() for stage in stages]
    options = {"decay": 0.5, "recompute_singles": recompute_singles}
    points = averaging_curve(scratch, states, kind, moons(0), moons(1), **options)
    assert [(point.num_models, point.index) for point in points] == [(1, 3), (2, 2), (3, 1), (4, 0)]
    for point in points:
        single = copy.deepcopy(stages[point.index])
        if recompute_singles:
            recompute_batch_norm(single, moons(0))
        assert (point.single_nll, point.single_accuracy) == pytest.approx(scored(single, moons(1)), rel=1e-6)
        shares = coefficients(kind, point.num_models, decay=0.5)
        average = scored(averaged_by_hand(stages[point.index :], shares), moons(1))
        assert (point.average_nll, point.average_accuracy) == pytest.approx(average, rel=1e-6)
        assert point.barrier is None
    if recompute_singles:
        assert points[0].single_nll == points[0].average_nll
    assert torch.equal(scratch[1].running_mean, normed(9)[1].running_mean)


def test_curve_in_closed_form():
    # The last n of w = 1, 2, 3, 4 average to 4, 3.5, 3, 2.5.
    points = averaging_curve(Logit(0.0), [Logit(w) for w in (1.0, 2.0, 3.0, 4.0)], "equal", forbidden, thirds)
    assert [point.single_nll for point in points] == pytest.approx([thirds_nll(w) for w in (4, 3, 2, 1)])
    assert [point.average_nll for point in points] == pytest.approx([thirds_nll(w) for w in (4, 3.5, 3, 2.5)])


def test_identical_models_have_flat_equal_curves_and_are_all_in_a_soup():
    same = [normed(0)] * 4
    points = averaging_curve(normed(1), same, "linear", moons(0), moons(1), barrier_check=BarrierCheck())
    assert {point.average_nll for point in points} == {points[0].single_nll}
    assert {point.average_accuracy for point in points} == {points[0].single_accuracy}
    assert [point.barrier for point in points] == [None, 0.0, 0.0, 0.0]
    for make in (uniform_soup, greedy_soup):
        soup = make(normed(1), same, moons(0), moons(1))
        assert soup.ingredients == (0, 1, 2, 3)
        assert soup.val_nll == points[0].single_nll


def test_curve_checks_barriers_on_request():
    states = [Product(-3.0, -3.0), Product(3.0, 3.0), Product(3.0, 3.1)]
    check = {"barrier_check": BarrierCheck()}
    with pytest.warns(UserWarning, match="between model 2 and model 0 is") as warned:
        points = averaging_curve(Product(0.0, 0.0), states, "equal", forbidden, ones, **check)
    assert len(warned) == 1
    assert points[2].barrier > 0.05 > points[1].barrier


def test_bad_input_is_refused_before_any_pass():
    logit = Logit(0.0)
    with pytest.raises(UserError, match="not a rule"):
        averaging_curve(logit, [logit], "cubic", forbidden, forbidden)
    with pytest.raises(UserError, match="Model 0 is a Logit, but the given module is a Product"):
        averaging_curve(Product(0.0, 0.0), [logit], "equal", forbidden, forbidden)
    mixed = [logit.state_dict(), Product(0.0, 0.0).state_dict()]
    for make in (uniform_soup, greedy_soup, functools.partial(averaging_curve, kind="equal")):
        data = {"batches": forbidden, "val_batches": forbidden}
        with pytest.raises(UserError, match="no models"):
            make(logit, [], **data)
        with pytest.raises(UserError, match="Model 1 lacks the tensor w"):
            make(logit, mixed, **data)
    with pytest.raises(UserError, match="2 points has none"):
        BarrierCheck(num_points=2)


# Loss barriers


def test_barrier_in_closed_form():
    # At share a the product is (1 - 2a)^2 * 9, so that NLL(a) = ln(1 + e^-9(1-2a)^2): the peak is ln 2.
    with pytest.warns(UserWarning, match=r"between the first model and the second model is 0\.693 nats"):
        found = loss_barrier(Product(0.0, 0.0), Product(3.0, 3.0), Product(-3.0, -3.0), forbidden, ones)
    np.testing.assert_allclose(found.positions, np.linspace(0, 1, 11))
    np.testing.assert_allclose(found.nll, np.log1p(np.exp(-9 * (1 - 2 * found.positions) ** 2)), rtol=1e-9)
    assert found.barrier == pytest.approx(math.log(2) - math.log1p(math.exp(-9)), rel=1e-9)
    assert found.accuracy.tolist() == [1.0] * 11


def test_barrier_is_measured_against_the_line_between_unequal_ends():
    # NLL is sampled, the chord is not flat: compare with a plain loop.
    check = BarrierCheck(num_points=5, threshold=0.0)
    ends = Product(3.0, 3.0), Product(-1.0, -0.5)
    with pytest.warns(UserWarning, match="not linearly connected"):
        found = loss_barrier(Product(0.0, 0.0), *ends, forbidden, ones, check=check)
    losses = [math.log1p(math.exp(-(3 - 4 * a) * (3 - 3.5 * a))) for a in (0, 0.25, 0.5, 0.75, 1)]
    excess = np.array(losses) - np.linspace(losses[0], losses[-1], 5)
    assert found.barrier == pytest.approx(excess.max(), rel=1e-9)


@given(first=st.floats(-5, 5), second=st.floats(-5, 5))
@settings(max_examples=25)
def test_a_convex_loss_has_no_barrier(first, second):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = loss_barrier(Logit(0.0), Logit(first), Logit(second), forbidden, thirds)
    assert found.nll[0] == pytest.approx(thirds_nll(first), abs=1e-12)
    assert found.nll[-1] == pytest.approx(thirds_nll(second), abs=1e-12)
    assert 0.0 <= found.barrier < 1e-12


def test_statistics_are_recomputed_at_every_point():
    stages = [normed(0), normed(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = loss_barrier(normed(9), *stages, moons(0), moons(1), check=BarrierCheck(num_points=3))
    for share, value in zip((0.0, 0.5, 1.0), found.nll, strict=True):
        model = averaged_by_hand(stages, [1 - share, share])
        assert value == pytest.approx(scored(model, moons(1))[0], rel=1e-6)


# Soups


def test_uniform_soup_is_the_equal_average():
    stages = [normed(seed) for seed in range(3)]
    soup = uniform_soup(normed(9), stages, moons(0), moons(1))
    expected = averaged_by_hand(stages)
    assert soup.ingredients == (0, 1, 2)
    assert soup.barriers == {}
    assert (soup.val_nll, soup.val_accuracy) == pytest.approx(scored(expected, moons(1)), rel=1e-6)
    for name, value in soup.model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])


def test_greedy_soup_traced_by_hand():
    # The optimum is ln 2 = 0.693. In order of NLL: 0.8 (2), 0.5 (0), -0.2 (3), 3.0 (1). 0.8 alone; with 0.5
    # the mean 0.65 is closer; with -0.2 the mean 0.367 is worse: left out; with 3.0 the mean 1.43 is too.
    values = [0.5, 3.0, 0.8, -0.2]
    assert sorted(range(4), key=lambda i: thirds_nll(values[i])) == [2, 0, 3, 1]
    soup = greedy_soup(Logit(0.0), [Logit(value) for value in values], forbidden, thirds)
    assert soup.ingredients == (2, 0)
    assert soup.model.w.item() == pytest.approx(0.65, rel=1e-12)
    assert soup.val_nll == pytest.approx(thirds_nll(0.65), rel=1e-12)
    assert soup.val_accuracy == pytest.approx(2 / 3)


@given(values=st.lists(st.floats(-4, 4), min_size=1, max_size=6))
@settings(max_examples=40)
def test_greedy_soup_is_never_worse_than_the_best_single_model(values):
    soup = greedy_soup(Logit(0.0), [Logit(value) for value in values], forbidden, thirds)
    singles = [thirds_nll(value) for value in values]
    assert soup.val_nll <= min(singles) + 1e-12
    assert singles[soup.ingredients[0]] == pytest.approx(min(singles), abs=1e-12)
    assert len(set(soup.ingredients)) == len(soup.ingredients)
    assert soup.model.w.item() == pytest.approx(np.mean([values[i] for i in soup.ingredients]), abs=1e-12)


@pytest.mark.parametrize("recompute_singles", [False, True])
def test_soup_with_batch_norm_is_never_worse_than_the_best_single_model(recompute_singles):
    stages = [normed(seed) for seed in range(4)]
    soup = greedy_soup(normed(9), stages, moons(0), moons(1), recompute_singles=recompute_singles)
    if recompute_singles:
        for stage in stages:
            recompute_batch_norm(stage, moons(0))
    singles = [scored(stage, moons(1))[0] for stage in stages]
    assert soup.ingredients[0] == int(np.argmin(singles))
    assert soup.val_nll <= min(singles) * (1 + 1e-9)
    assert soup.val_nll == pytest.approx(scored(soup.model, moons(1))[0], rel=1e-6)
    assert not soup.model.training


@pytest.mark.parametrize("make", [uniform_soup, greedy_soup])
def test_soups_check_barriers_on_request(make):
    # Model 1 is the best single one; model 0 is the same function with other signs.
    states = [Product(-3.0, -3.0), Product(3.0, 3.1), Product(3.0, 2.9)]
    with pytest.warns(UserWarning, match="between model 1 and model 0 is") as warned:
        soup = make(Product(0.0, 0.0), states, forbidden, ones, barrier_check=BarrierCheck())
    assert len(warned) == 1
    assert soup.barriers.keys() == {0, 2}
    assert soup.barriers[0] > 0.05 > soup.barriers[2]
