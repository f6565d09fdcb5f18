"""Networks that hold more than parameters: weights computed from others, kept activations, wrappers, locks."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from dnas_ens.ensembles.averaging import ExponentialMovingAverage, PolyakAverage, average_states, averaged_model
from dnas_ens.ensembles.ensemble import Ensemble, load
from dnas_ens.ensembles.evolution import EvolutionSettings, evolve_simplex
from dnas_ens.ensembles.snapshot import CosineCycles, SnapshotRecorder
from dnas_ens.ensembles.soups import greedy_soup
from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network
from dnas_ens.training.prediction import predict_batches

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(size, 3, 8, 8, generator=GENERATOR), torch.arange(size) % 3) for size in (8, 8, 4)]
IMAGES = BATCHES[0][0]
SCHEDULE = CosineCycles(epochs=4, num_cycles=2, initial_learning_rate=0.1)


def keeping(module):
    """Keep what passes, as code that looks at activations does."""
    module.seen = []
    module.register_forward_hook(lambda module, _, output: module.seen.append(output))
    return module


def pruned(module):
    # The same at every call: which weights are left is not averaged.
    return prune.custom_from_mask(module, "weight", torch.arange(module.weight.numel()).view_as(module.weight) % 2)


def compiled(module):
    return torch.compile(module, backend="eager")


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "pruning": pruned,
    "kept activations": keeping,
    "compiled": compiled,
}


def build(kind, seed=0):
    torch.manual_seed(seed)
    conv = KINDS[kind](nn.Conv2d(3, 4, 3))
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def filled(kind, state):
    """A network made anew from a state: nothing here copies a module."""
    model = build(kind, seed=9)
    model.load_state_dict(copy.deepcopy(state))
    return model.eval()


def step(model, optimizer, index):
    images, labels = BATCHES[index % len(BATCHES)]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_are_the_network_of_their_time(kind):
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = SnapshotRecorder(model, optimizer, SCHEDULE, steps_per_epoch=1)
    seen = []
    for index in range(4):
        step(model, optimizer, index)
        if recorder.step():
            seen.append(model.eval()(IMAGES).detach())
    predict_batches(model, BATCHES)
    probs = Ensemble(list(recorder.members())).predict_probs(IMAGES)
    torch.testing.assert_close(torch.from_numpy(probs), torch.stack(seen).softmax(2), rtol=1e-5, atol=1e-6)
    assert not torch.equal(seen[0], seen[1])
    # On its own: training it changes neither the model nor another snapshot.
    member = recorder.member(0)
    step(member, torch.optim.SGD(member.parameters(), lr=1.0), 0)
    torch.testing.assert_close(model.eval()(IMAGES), seen[1])
    torch.testing.assert_close(recorder.member(0)(IMAGES), seen[0])


@pytest.mark.parametrize("kind", KINDS)
def test_averages_soups_and_evolutions(kind):
    model = build(kind)
    model(IMAGES).sum().backward()
    running = ExponentialMovingAverage(model, decay=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stages = []
    for index in range(3):
        step(model, optimizer, index)
        running.after_step(model)
        running(IMAGES).sum().backward()
        stages.append(filled(kind, model.state_dict()))
        stages[-1](IMAGES).sum().backward()
    parameters = [dict(stage.named_parameters()) for stage in stages]
    average, finished = averaged_model(model, stages, None, BATCHES), running.finished(BATCHES)
    for found, shares in ((average, [1 / 3] * 3), (finished, [0.49, 0.21, 0.3])):
        for name, value in found.named_parameters():
            expected = sum(share * each[name].detach() for share, each in zip(shares, parameters, strict=True))
            torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found(IMAGES), filled(kind, found.state_dict())(IMAGES))
    soup = greedy_soup(model, stages, BATCHES, BATCHES, recompute_singles=False)
    settings = EvolutionSettings(population_size=5, generations=1)
    evolved = evolve_simplex(model, stages, BATCHES, BATCHES, settings=settings)
    for state, loss in ((soup.model.state_dict(), soup.val_nll), (evolved.state, evolved.best.val_nll)):
        probs, labels = predict_batches(filled(kind, state), BATCHES)
        assert -torch.from_numpy(probs)[torch.arange(20), labels].log().mean() == pytest.approx(loss, rel=1e-5)


def test_a_parametrised_network_has_the_class_that_it_was_built_as():
    # Each parametrised module gets a class of its own.
    first, second = (parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(2))
    assert average_states([first, second]).keys() == first.state_dict().keys()
    with pytest.raises(UserError, match="Model 1 is a Bilinear, but model 0 is a Linear"):
        average_states([first, parametrizations.weight_norm(nn.Bilinear(3, 3, 2))])


def test_what_can_not_be_copied_is_refused_before_the_training():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Identity())
    model = copy.deepcopy(plain)
    model[2].lock = threading.Lock()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for attempt in (
        lambda: SnapshotRecorder(model, optimizer, SCHEDULE, steps_per_epoch=1),
        lambda: PolyakAverage(model),
        lambda: evolve_simplex(model, [model], BATCHES, BATCHES),
        lambda: greedy_soup(model, [model], BATCHES, BATCHES, recompute_singles=False),
    ):
        with pytest.raises(UserError, match=r"The Sequential cannot be copied \(.*lock.*\)") as caught:
            attempt()
        assert "__deepcopy__" in caught.value.remedy
    # Its weights can be, into a module that is copied.
    average = averaged_model(plain, [model.state_dict()], None, BATCHES)
    torch.testing.assert_close(average(IMAGES), model(IMAGES))


def small(norm=True):
    second = nn.BatchNorm2d(4) if norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 4, 3), second, nn.Flatten(), nn.Linear(144, 3))


def averages_as_parts(model):
    for index in (0, 3):
        part = model[index]
        model[index] = AveragedModel(part)
        model[index].update_parameters(part)
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "EMA": ExponentialMovingAverage,
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "averages as parts": averages_as_parts,
}


@pytest.mark.parametrize(
    ("saved", "given"),
    [(name, "plain") for name in WRAPPERS]
    + [("plain", name) for name in WRAPPERS if name != "plain"]
    + [("EMA", "compiled DataParallel")],
)
def test_a_file_of_any_form_of_a_module_fills_any_other(saved, given, tmp_path):
    member = small()
    member(IMAGES)
    expected = member.eval()(IMAGES)
    Ensemble([WRAPPERS[saved](member)]).save(tmp_path)
    fresh = WRAPPERS[given](small())
    counts = {name: int(value) for name, value in fresh.named_buffers() if name.endswith("n_averaged")}
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path, members=[fresh]).members[0](IMAGES), expected)
    for name, value in fresh.named_buffers():
        assert name not in counts or int(value) == counts[name]
    with pytest.raises(UserError, match="does not fit its member"):
        load(tmp_path, members=[WRAPPERS[given](small(norm=False))])


def test_wrapped_networks_of_ours_are_rebuilt(tmp_path, own_network):
    member = own_network(0).eval()
    expected = member(IMAGES)
    Ensemble([WRAPPERS["EMA"](member), WRAPPERS["compiled"](member)]).save(tmp_path)
    for loaded in load(tmp_path).members:
        assert type(loaded) is Network
        torch.testing.assert_close(loaded(IMAGES), expected)
