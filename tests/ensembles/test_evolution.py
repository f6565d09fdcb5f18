"""Evolved coefficients against a grid and against combinations made by hand; interruptions; guarantees."""

import copy
import json
import math

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
    inputs = centres[labels] + 0.7 * torch.randn(num_images, 2, generator=generator)
    return (inputs, labels), lambda: zip(inputs.split(32), labels.split(32), strict=True)


(TRAINING, TRAINING_BATCHES), (VAL, VAL_BATCHES) = blobs(1, 96), blobs(2, 60)


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
    with torch.no_grad():
        hidden = torch.stack([model[0](inputs) for inputs, _ in list(TRAINING_BATCHES())[:limit]])
        model[1].running_mean.copy_(hidden.mean(dim=1).mean(dim=0))
        model[1].running_var.copy_(hidden.var(dim=1).mean(dim=0))
        return model.eval()(VAL[0]).double().softmax(dim=1).numpy()


def scores(probs):
    return log_loss(VAL[1], probs), accuracy_score(VAL[1], probs.argmax(axis=1))


def interpolate(**arguments):
    options = {"settings": SHORT, "curve_points": 0, **arguments}
    return evolve_interpolation(network(), STATES[0], STATES[1], TRAINING_BATCHES, VAL_BATCHES, **options)


def simplex(states=STATES, training_batches=TRAINING_BATCHES, val_batches=VAL_BATCHES, **arguments):
    return evolve_simplex(network(), states, training_batches, val_batches, **{"settings": SHORT, **arguments})


def test_the_curve_and_the_starts_against_combinations_by_hand():
    found = interpolate(bounds=(-0.5, 1.5), curve_points=5)
    assert [candidate.coefficients[0, 0] for candidate in found.curve] == [-0.5, 0.0, 0.5, 1.0, 1.5]
    for candidate in found.curve:
        e = candidate.coefficients[0, 0]
        assert candidate.coefficients.tolist() == [[e, 1.0 - e]]
        expected = scores(by_hand([e, 1.0 - e]))
        assert (candidate.val_nll, candidate.val_accuracy) == pytest.approx(expected, abs=1e-5)
    assert [start.coefficients.tolist() for start in found.starts] == [[[1, 0]], [[0, 1]], [[0.5, 0.5]]]
    assert [start.val_nll for start in found.starts] == [found.curve[i].val_nll for i in (3, 1, 2)]
    mean = (by_hand([1.0, 0.0]) + by_hand([0.0, 1.0])) / 2
    assert (found.ensemble_val_nll, found.ensemble_val_accuracy) == pytest.approx(scores(mean), abs=1e-5)
    # The statistics may be of a limited number of batches.
    settings = EvolutionSettings(population_size=8, generations=1, batch_norm_batches=1)
    limited = interpolate(settings=settings).starts[2]
    assert limited.val_nll == pytest.approx(scores(by_hand([0.5, 0.5], limit=1))[0], abs=1e-5)
    assert limited.val_nll != found.starts[2].val_nll


@pytest.mark.parametrize(("criterion", "bounds"), [("nll", (0.0, 1.0)), ("nll", (-0.5, 1.5)), ("accuracy", (0.0, 1.0))])
def test_the_coefficient_of_two_networks_against_a_grid(criterion, bounds):
    grid = np.linspace(*bounds, 101)
    losses, accuracies = np.array([scores(by_hand([e, 1.0 - e])) for e in grid]).T
    settings = EvolutionSettings(criterion=criterion, population_size=10, generations=10)
    found = interpolate(bounds=bounds, settings=settings)
    assert found.curve == ()
    assert bounds[0] <= found.coefficient <= bounds[1]
    if criterion == "accuracy":
        assert found.best.val_accuracy >= max(accuracies) - 1.01 / len(VAL[1])
    else:
        assert found.best.val_nll <= min(losses) + 1e-4
        assert found.coefficient == pytest.approx(grid[int(np.argmin(losses))], abs=0.03)


@pytest.mark.parametrize(("criterion", "per_layer"), [("nll", True), ("nll", False), ("accuracy", True)])
def test_the_simplex_of_three_networks(per_layer, criterion):
    settings = EvolutionSettings(criterion=criterion, population_size=10, generations=3)
    found = simplex(per_layer=per_layer, settings=settings)
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
    # With dropout, which must not draw while the statistics are recomputed. Modules will do for states.
    model, modules = network(7).insert(0, nn.Dropout()).train(), [network() for _ in STATES]
    for module, state in zip(modules, STATES, strict=True):
        module.load_state_dict(state)
        module.insert(0, nn.Dropout())
    before = copy.deepcopy([each.state_dict() for each in (model, *modules)])
    found = evolve_simplex(model, modules, TRAINING_BATCHES, VAL_BATCHES, settings=SHORT)
    assert found.best.val_nll == simplex().best.val_nll
    assert simplex(STATES[:1]).best.coefficients.tolist() == [[1.0]]
    rebuilt = network(8).insert(0, nn.Dropout()).eval()
    rebuilt.load_state_dict(found.state)
    with torch.no_grad():
        probs = rebuilt(VAL[0]).double().softmax(dim=1).numpy()
    assert scores(probs) == pytest.approx((found.best.val_nll, found.best.val_accuracy), abs=1e-6)
    assert model.training
    for kept, now in zip(before, (model, *modules), strict=True):
        assert all(torch.equal(value, now.state_dict()[name]) for name, value in kept.items())


def test_an_interrupted_evolution_goes_on_where_it_was(tmp_path):
    passes, stop_at, file = 0, 20, tmp_path / "evolution.json"

    def counted():
        nonlocal passes
        passes += 1
        if passes == stop_at:
            raise KeyboardInterrupt
        return VAL_BATCHES()

    def evolve(file=file, **arguments):
        return simplex(val_batches=counted, per_layer=True, file=file, **arguments)

    with pytest.raises(KeyboardInterrupt):
        evolve()
    # Three passes were the ensemble's, 16 were candidates.
    assert len(json.loads(file.read_text())["candidates"]) == 16
    reference = simplex(per_layer=True)
    passes, stop_at = 0, None
    resumed = evolve()
    assert passes == 3 + reference.evaluations - 16
    assert resumed.best.coefficients.tolist() == reference.best.coefficients.tolist()
    assert (resumed.best.val_nll, resumed.evaluations) == (reference.best.val_nll, reference.evaluations)
    evolve()
    assert passes == 3 + reference.evaluations - 16 + 3
    longer = EvolutionSettings(population_size=8, generations=5)
    assert evolve(settings=longer).best.val_nll <= reference.best.val_nll


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "evolution.json"
    simplex(file=file)
    relabelled = [(inputs, 2 - labels) for inputs, labels in VAL_BATCHES()]
    fewer = EvolutionSettings(population_size=8, batch_norm_batches=2)
    for changes in ({"states": STATES[:2]}, {"val_batches": relabelled}, {"settings": fewer}):
        with pytest.raises(UserError, match="other networks or data"):
            simplex(file=file, **changes)
    file.write_text('{"loss": 1}')
    with pytest.raises(UserError, match="not the file of an evolution"):
        simplex(file=file)


def test_layers_are_submodules_not_top_level_names():
    model, other = (reference_model("resnet8", 1, 3, 8) for _ in range(2))
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
    ends, options = (large, model.state_dict()), {"bounds": (-20.0, 20.0), "curve_points": 2, "settings": SHORT}
    found = evolve_interpolation(model, *ends, TRAINING_BATCHES, VAL_BATCHES, **options)
    for end in (found.curve[0], found.curve[-1]):
        assert (end.val_nll, end.val_accuracy) == (pytest.approx(-np.log(1e-12)), 0.0)
    assert found.best.val_nll <= found.starts[1].val_nll < 3.0


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
        (lambda: simplex([STATES[0], {**STATES[0], "0.bias": torch.full((6,), math.nan)}]), "not a number"),
    ],
)
def test_mistakes_are_named(call, cause):
    with pytest.raises(UserError, match=cause):
        call()
