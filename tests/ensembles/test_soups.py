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
from dnas_ens.ensembles.soups import BarrierCheck, averaging_curve, greedy_soup, loss_barrier, uniform_soup
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
    for count in (2, 1):
        yield torch.ones(count, 1, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)


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
    with torch.no_grad():
        probs = torch.cat([model.eval()(inputs).double().softmax(1) for inputs, _ in batches]).numpy()
    labels = torch.cat([labels for _, labels in batches]).numpy()
    return log_loss(labels, probs, labels=range(2)), accuracy_score(labels, probs.argmax(1))


@pytest.mark.parametrize(("kind", "recompute_singles"), [("linear", False), ("exponential", True)])
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
    assert torch.equal(scratch[1].running_mean, normed(9)[1].running_mean)


def test_curve_in_closed_form():
    # The last n of w = 1, 2, 3, 4 average to 4, 3.5, 3, 2.5.
    points = averaging_curve(Logit(0.0), [Logit(w) for w in (1.0, 2.0, 3.0, 4.0)], "equal", forbidden, thirds)
    assert [point.single_nll for point in points] == pytest.approx([thirds_nll(w) for w in (4, 3, 2, 1)])
    assert [point.average_nll for point in points] == pytest.approx([thirds_nll(w) for w in (4, 3.5, 3, 2.5)])


def test_identical_models_have_flat_equal_curves_and_are_all_in_a_soup():
    # With dropout, which must not draw while the statistics are recomputed.
    same = [normed(0).insert(0, nn.Dropout())] * 4
    draws = torch.get_rng_state()
    points = averaging_curve(same[0], same, "linear", moons(0), moons(1), barrier_check=BarrierCheck())
    assert torch.equal(torch.get_rng_state(), draws)
    assert {point.average_nll for point in points} == {points[0].single_nll}
    assert {point.average_accuracy for point in points} == {points[0].single_accuracy}
    assert [point.barrier for point in points] == [None, 0.0, 0.0, 0.0]
    for make in (uniform_soup, greedy_soup):
        soup = make(same[0], same, moons(0), moons(1))
        assert soup.ingredients == (0, 1, 2, 3)
        assert soup.val_nll == points[0].single_nll


def test_bad_input_is_refused_before_any_pass():
    logit = Logit(0.0)
    with pytest.raises(UserError, match="not a rule"):
        averaging_curve(logit, [logit], "cubic", forbidden, forbidden)
    with pytest.raises(UserError, match="Model 0 is a Logit, but the given module is a Product"):
        averaging_curve(Product(0.0, 0.0), [logit], "equal", forbidden, forbidden)
    mixed = [logit.state_dict(), Product(0.0, 0.0).state_dict()]
    for make in (uniform_soup, greedy_soup, functools.partial(averaging_curve, kind="equal")):
        for models, cause in (([], "no models"), (mixed, "Model 1 lacks the tensor w")):
            with pytest.raises(UserError, match=cause):
                make(logit, models, batches=forbidden, val_batches=forbidden)
    with pytest.raises(UserError, match="2 points has none"):
        BarrierCheck(num_points=2)
    with pytest.raises(UserError, match="no batches for validation"):
        uniform_soup(logit, [logit], forbidden, [])


def test_a_diverged_model_is_named():
    models = [normed(seed) for seed in range(3)]
    with torch.no_grad():
        models[1][3].weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"Model 1's logits .* not finite"):
        greedy_soup(models[0], models, moons(0), moons(1), recompute_singles=False)
    with pytest.raises(UserError, match="of model 1 is not finite"):
        uniform_soup(models[0], models, moons(0), moons(1))


def test_barrier_in_closed_form():
    # At share a the product is (1 - 2a)^2 * 9, so that NLL(a) = ln(1 + e^-9(1-2a)^2): the peak is ln 2.
    with pytest.warns(UserWarning, match=r"between the first model and the second model is 0\.693 nats"):
        found = loss_barrier(Product(0.0, 0.0), Product(3.0, 3.0), Product(-3.0, -3.0), forbidden, ones)
    np.testing.assert_allclose(found.positions, np.linspace(0, 1, 11))
    np.testing.assert_allclose(found.nll, np.log1p(np.exp(-9 * (1 - 2 * found.positions) ** 2)), rtol=1e-9)
    assert found.barrier == pytest.approx(math.log(2) - math.log1p(math.exp(-9)), rel=1e-9)
    assert found.accuracy.tolist() == [1.0] * 11
    # Between unequal ends it is measured against the line that joins their losses.
    ends, check = (Product(3.0, 3.0), Product(-1.0, -0.5)), BarrierCheck(num_points=5, threshold=0.0)
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


@pytest.mark.filterwarnings("ignore:The loss barrier")
def test_statistics_are_recomputed_at_every_point():
    stages = [normed(0), normed(1)]
    found = loss_barrier(normed(9), *stages, moons(0), moons(1), check=BarrierCheck(num_points=3))
    for share, value in zip((0.0, 0.5, 1.0), found.nll, strict=True):
        model = averaged_by_hand(stages, [1 - share, share])
        assert value == pytest.approx(scored(model, moons(1))[0], rel=1e-6)


def test_uniform_soup_is_the_equal_average():
    stages = [normed(seed) for seed in range(3)]
    soup = uniform_soup(normed(9), stages, moons(0), moons(1))
    expected = averaged_by_hand(stages)
    assert (soup.ingredients, soup.barriers) == ((0, 1, 2), {})
    assert (soup.val_nll, soup.val_accuracy) == pytest.approx(scored(expected, moons(1)), rel=1e-6)
    for name, value in soup.model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])


@given(values=st.lists(st.floats(-4, 4), min_size=1, max_size=6))
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
    soup = greedy_soup(Logit(0.0), [Logit(value) for value in values], forbidden, thirds)
    mean = np.mean([values[index] for index in picked])
    assert soup.ingredients == tuple(picked)
    assert soup.model.w.item() == pytest.approx(mean, abs=1e-12)
    assert soup.val_nll == pytest.approx(thirds_nll(mean), abs=1e-12)
    assert soup.val_accuracy == pytest.approx(2 / 3 if mean > 0 else 1 / 3) or abs(mean) < 1e-12


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


@pytest.mark.parametrize("make", [uniform_soup, greedy_soup, functools.partial(averaging_curve, kind="equal")])
def test_barriers_are_checked_on_request(make):
    # Model 1 is the best single one; model 0 is the same function with other signs.
    states = [Product(-3.0, -3.0), Product(3.0, 3.1), Product(3.0, 2.9)]
    with pytest.warns(UserWarning, match=r"between model \d and model 0 is") as warned:
        found = make(Product(0.0, 0.0), states, batches=forbidden, val_batches=ones, barrier_check=BarrierCheck())
    assert len(warned) == 1
    if isinstance(found, list):
        assert found[2].barrier > 0.05 > found[1].barrier
    else:
        assert found.barriers.keys() == {0, 2}
        assert found.barriers[0] > 0.05 > found.barriers[2]
