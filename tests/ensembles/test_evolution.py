"""Evolved coefficients against a grid and against combinations made by hand; interruptions; guarantees."""

import copy
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.nn import functional as F

from dnas_ens.ensembles.evolution import EvolutionSettings, evolve_interpolation, evolve_simplex
from dnas_ens.errors import UserError
from dnas_ens.nn.reference_models import reference_model

SHORT = EvolutionSettings(population_size=8, generations=3)


def blobs(seed, num_images):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_images,), generator=generator)
    centres = torch.tensor([[0.0, 1.0], [1.0, -0.5], [-1.0, -0.5]])
    return centres[labels] + 0.7 * torch.randn(num_images, 2, generator=generator), labels


TRAINING, VAL = blobs(1, 96), blobs(2, 60)


def in_batches(data, size=32):
    return lambda: zip(data[0].split(size), data[1].split(size), strict=True)


TRAINING_BATCHES, VAL_BATCHES = in_batches(TRAINING), in_batches(VAL)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def fitted(seed, steps=12):
    """A network trained briefly, from one initialisation with an order of its own."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(TRAINING[1]), (12,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(TRAINING[0][chosen]), TRAINING[1][chosen]).backward()
        optimizer.step()
    return model.state_dict()


STATES = [fitted(seed) for seed in (1, 2, 3)]


def by_hand(shares, limit=None):
    """Probabilities on val of averaged weights: the sum and the batches' statistics written out."""
    model = network()
    averaged = {}
    for name in STATES[0]:
        own = shares if isinstance(shares, list) else shares[name.split(".")[0]]
        averaged[name] = sum(c * state[name].double() for c, state in zip(own, STATES, strict=False))
    model.load_state_dict(averaged)
    means, variances = [], []
    with torch.no_grad():
        for inputs, _ in list(TRAINING_BATCHES())[:limit]:
            hidden = model[0](inputs)
            means.append(hidden.mean(dim=0))
            variances.append(hidden.var(dim=0))
        model[1].running_mean.copy_(torch.stack(means).mean(dim=0))
        model[1].running_var.copy_(torch.stack(variances).mean(dim=0))
        return model.eval()(VAL[0]).double().softmax(dim=1).numpy()


def scores(probs):
    return log_loss(VAL[1], probs), accuracy_score(VAL[1], probs.argmax(axis=1))


def interpolate(**arguments):
    options = {"settings": SHORT, **arguments}
    return evolve_interpolation(network(), STATES[0], STATES[1], TRAINING_BATCHES, VAL_BATCHES, **options)


def test_the_curve_and_the_starts_against_combinations_by_hand():
    found = interpolate(bounds=(-0.5, 1.5), curve_points=5)
    positions = [candidate.coefficients[0, 0] for candidate in found.curve]
    assert positions == [-0.5, 0.0, 0.5, 1.0, 1.5]
    for candidate in found.curve:
        e = candidate.coefficients[0, 0]
        assert candidate.coefficients.tolist() == [[e, 1.0 - e]]
        expected = scores(by_hand([e, 1.0 - e]))
        assert (candidate.val_nll, candidate.val_accuracy) == pytest.approx(expected, abs=1e-5)
    assert [start.coefficients.tolist() for start in found.starts] == [[[1, 0]], [[0, 1]], [[0.5, 0.5]]]
    assert [start.val_nll for start in found.starts] == [found.curve[i].val_nll for i in (3, 1, 2)]
    mean = (by_hand([1.0, 0.0]) + by_hand([0.0, 1.0])) / 2
    assert (found.ensemble_val_nll, found.ensemble_val_accuracy) == pytest.approx(scores(mean), abs=1e-5)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.5, 1.5)])
def test_the_coefficient_of_two_networks_against_a_grid(bounds):
    grid = np.linspace(*bounds, 101)
    losses = [scores(by_hand([e, 1.0 - e]))[0] for e in grid]
    settings = EvolutionSettings(population_size=8, generations=10)
    found = interpolate(bounds=bounds, curve_points=0, settings=settings)
    assert found.curve == ()
    assert found.best.val_nll <= min(losses) + 1e-4
    assert found.coefficient == pytest.approx(grid[int(np.argmin(losses))], abs=0.03)
    assert bounds[0] <= found.coefficient <= bounds[1]


def test_by_accuracy_against_a_grid():
    reached = [scores(by_hand([e, 1.0 - e]))[1] for e in np.linspace(0.0, 1.0, 101)]
    settings = EvolutionSettings(criterion="accuracy", population_size=12, generations=10)
    found = interpolate(curve_points=0, settings=settings)
    assert found.best.val_accuracy >= max(reached) - 1.01 / len(VAL[1])
    assert found.best.val_accuracy >= max(start.val_accuracy for start in found.starts)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("criterion", ["nll", "accuracy"])
def test_the_simplex_of_three_networks(per_layer, criterion):
    settings = EvolutionSettings(criterion=criterion, population_size=10, generations=3)
    found = evolve_simplex(network(), STATES, TRAINING_BATCHES, VAL_BATCHES, per_layer=per_layer, settings=settings)
    assert found.groups == (("0", "1", "3") if per_layer else ("network",))
    shares = found.best.coefficients
    assert shares.shape == (len(found.groups), 3)
    assert shares.min() >= 0.0
    assert shares.sum(axis=1) == pytest.approx(1.0, abs=1e-9)
    rows = dict(zip(found.groups, shares.tolist(), strict=True)) if per_layer else shares[0].tolist()
    assert (found.best.val_nll, found.best.val_accuracy) == pytest.approx(scores(by_hand(rows)), abs=1e-5)
    assert len(found.starts) == 4
    assert found.starts[3].coefficients == pytest.approx(1 / 3)
    if criterion == "nll":
        assert found.best.val_nll <= min(start.val_nll for start in found.starts)
    else:
        assert found.best.val_accuracy >= max(start.val_accuracy for start in found.starts)
    # Points of a generation at most; a combination that comes twice is evaluated once.
    assert 10 <= found.evaluations <= 10 * 4


def test_the_state_is_that_of_the_best_candidate_and_nothing_given_changes():
    model = network(7).train()
    before = copy.deepcopy((model.state_dict(), STATES))
    found = evolve_simplex(model, STATES, TRAINING_BATCHES, VAL_BATCHES, settings=SHORT)
    rebuilt = network(8).eval()
    rebuilt.load_state_dict(found.state)
    with torch.no_grad():
        probs = rebuilt(VAL[0]).double().softmax(dim=1).numpy()
    assert scores(probs) == pytest.approx((found.best.val_nll, found.best.val_accuracy), abs=1e-6)
    assert model.training
    for kept, now in zip([before[0], *before[1]], [model.state_dict(), *STATES], strict=True):
        assert all(torch.equal(kept[name], now[name]) for name in kept)


def test_modules_will_do_for_states():
    modules = [network(), network()]
    for module, state in zip(modules, STATES, strict=False):
        module.load_state_dict(state)
    found = evolve_simplex(network(), modules, TRAINING_BATCHES, VAL_BATCHES, settings=SHORT)
    expected = evolve_simplex(network(), STATES[:2], TRAINING_BATCHES, VAL_BATCHES, settings=SHORT)
    assert found.best.val_nll == expected.best.val_nll


def test_batch_norm_statistics_from_a_limited_number_of_batches():
    settings = EvolutionSettings(population_size=8, generations=1, batch_norm_batches=1)
    found = interpolate(curve_points=0, settings=settings)
    assert found.starts[2].val_nll == pytest.approx(scores(by_hand([0.5, 0.5], limit=1))[0], abs=1e-5)
    assert found.starts[2].val_nll != interpolate(curve_points=0).starts[2].val_nll


def test_a_seed_repeats_itself_and_equal_networks_average_to_themselves():
    first, second = (interpolate(curve_points=0) for _ in range(2))
    assert first.coefficient == second.coefficient
    assert first.evaluations == second.evaluations
    same = evolve_simplex(network(), [STATES[0]] * 3, TRAINING_BATCHES, VAL_BATCHES, settings=SHORT)
    assert {same.best.val_nll, *(start.val_nll for start in same.starts)} == {same.starts[0].val_nll}
    alone = evolve_simplex(network(), STATES[:1], TRAINING_BATCHES, VAL_BATCHES, settings=SHORT)
    assert alone.best.coefficients.tolist() == [[1.0]]


def counted(source, stop_at=None):
    """Batches that count their passes and are interrupted at one of them."""
    passes = 0

    def batches():
        nonlocal passes
        passes += 1
        if passes == stop_at:
            raise KeyboardInterrupt
        return source()

    return batches, lambda: passes


def test_an_interrupted_evolution_goes_on_where_it_was(tmp_path):
    file = tmp_path / "evolution.json"

    def evolve(val_batches, settings=SHORT, name=file):
        return evolve_simplex(
            network(), STATES, TRAINING_BATCHES, val_batches, per_layer=True, settings=settings, file=name
        )

    reference = evolve(VAL_BATCHES, name=None)
    interrupted, _ = counted(VAL_BATCHES, stop_at=20)
    with pytest.raises(KeyboardInterrupt):
        evolve(interrupted)
    # Three passes were the ensemble's, 16 were candidates.
    assert len(json.loads(file.read_text())["candidates"]) == 16
    going_on, passes = counted(VAL_BATCHES)
    resumed = evolve(going_on)
    assert passes() == 3 + reference.evaluations - 16
    assert resumed.best.coefficients.tolist() == reference.best.coefficients.tolist()
    assert resumed.best.val_nll == reference.best.val_nll
    assert resumed.evaluations == reference.evaluations
    finished, passes = counted(VAL_BATCHES)
    evolve(finished)
    assert passes() == 3
    longer = EvolutionSettings(population_size=8, generations=5)
    assert evolve(VAL_BATCHES, longer).best.val_nll <= reference.best.val_nll


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "evolution.json"
    interpolate(file=file, curve_points=3)
    with pytest.raises(UserError, match="other networks"):
        evolve_simplex(network(), STATES, TRAINING_BATCHES, VAL_BATCHES, settings=SHORT, file=file)
    with pytest.raises(UserError, match="other networks"):
        interpolate(file=file, settings=EvolutionSettings(population_size=8, batch_norm_batches=2))
    relabelled = [(inputs, 2 - labels) for inputs, labels in VAL_BATCHES()]
    with pytest.raises(UserError, match="other networks or data"):
        evolve_interpolation(network(), STATES[0], STATES[1], TRAINING_BATCHES, relabelled, settings=SHORT, file=file)
    file.write_text('{"loss": 1}')
    with pytest.raises(UserError, match="not the file of an evolution"):
        interpolate(file=file)


def test_layers_are_submodules_not_top_level_names():
    model = reference_model("resnet8", 1, 3, 8)
    other = reference_model("resnet8", 1, 3, 8)
    batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))]
    settings = EvolutionSettings(population_size=5, generations=1)
    found = evolve_simplex(model, [model, other], batches, batches, per_layer=True, settings=settings)
    expected = [name for name, module in model.named_modules() if module.state_dict() and not [*module.children()]]
    assert sorted(found.groups) == sorted(expected)
    assert found.best.coefficients.shape == (len(expected), 2)


def test_an_extrapolation_that_overflows_is_survived():
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    large = {name: 3e37 * value.sign() for name, value in model.state_dict().items()}
    batches = TRAINING_BATCHES, VAL_BATCHES
    bounds = (-20.0, 20.0)
    found = evolve_interpolation(
        model, large, model.state_dict(), *batches, bounds=bounds, curve_points=2, settings=SHORT
    )
    for end in (found.curve[0], found.curve[-1]):
        assert (end.val_nll, end.val_accuracy) == (pytest.approx(-np.log(1e-12)), 0.0)
    assert found.best.val_nll <= found.starts[1].val_nll < 3.0


BROKEN = {name: value * float("nan") if value.is_floating_point() else value for name, value in STATES[0].items()}
OTHER = nn.Sequential(nn.Linear(2, 5)).state_dict()


def simplex(states=STATES, training_batches=TRAINING_BATCHES, val_batches=VAL_BATCHES):
    return evolve_simplex(network(), states, training_batches, val_batches)


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda: interpolate(bounds=(0.2, 1.0)), r"range of e is 0\.2 to 1\.0"),
        (lambda: interpolate(curve_points=-1), "-1 points"),
        (lambda: EvolutionSettings(criterion="brier"), "'brier'"),
        (lambda: EvolutionSettings(population_size=4), "population of 4"),
        (lambda: EvolutionSettings(generations=0), "0 generations"),
        (lambda: EvolutionSettings(batch_norm_batches=0), "0 batches"),
        (lambda: simplex([]), "no models"),
        (lambda: simplex(val_batches=list), "no batches for validation"),
        (lambda: simplex(training_batches=list), "no batches for BatchNorm"),
        (lambda: simplex([STATES[0], OTHER]), "tensor"),
        (lambda: simplex([STATES[0], BROKEN]), "is not a number"),
    ],
)
def test_mistakes_are_named(call, cause):
    with pytest.raises(UserError, match=cause):
        call()
