"""Networks that hold more than parameters: weights computed from others, kept activations, wrappers, locks."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from dnas_ens.ensembles.averaging import (
    ExponentialMovingAverage,
    PolyakAverage,
    StochasticWeightAverage,
    average_states,
    averaged_model,
    clone,
)
from dnas_ens.ensembles.ensemble import Ensemble, load
from dnas_ens.ensembles.evolution import EvolutionSettings, evolve_simplex
from dnas_ens.ensembles.snapshot import CosineCycles, SnapshotRecorder
from dnas_ens.ensembles.soups import averaging_curve, greedy_soup, uniform_soup
from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network
from dnas_ens.training.prediction import predict_batches

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(size, 3, 8, 8, generator=GENERATOR), torch.arange(size) % 3) for size in (8, 8, 4)]
IMAGES = BATCHES[0][0]


class Keeping(nn.Module):
    """Keeps what passes, as code that looks at activations does."""

    def __init__(self):
        super().__init__()
        self.seen = {"inputs": []}

    def forward(self, inputs):
        self.seen["inputs"] = [inputs]
        return inputs


def with_old(norm):
    def apply(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(module)

    return apply


def pruned(module):
    # The same at every call: which weights are left is not averaged.
    mask = torch.arange(module.weight.numel()).view_as(module.weight) % 2
    return prune.custom_from_mask(module, "weight", mask)


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": with_old(nn.utils.weight_norm),
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": with_old(nn.utils.spectral_norm),
    "orthogonal": parametrizations.orthogonal,
    "pruning": pruned,
    "kept activations": lambda module: nn.Sequential(module, Keeping()),
    "compiled": lambda module: torch.compile(module, backend="eager"),
}


def build(kind, seed=0):
    torch.manual_seed(seed)
    conv = KINDS[kind](nn.Conv2d(3, 4, 3))
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def step(model, optimizer, index):
    images, labels = BATCHES[index % len(BATCHES)]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()


def trained(kind, num_steps=3):
    """Networks of one training, each made anew from its state: nothing here copies a module."""
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stages = []
    for index in range(num_steps):
        step(model, optimizer, index)
        stages.append(build(kind, seed=index + 1))
        stages[-1].load_state_dict(copy.deepcopy(model.state_dict()))
        stages[-1](IMAGES).sum().backward()
        stages[-1].eval()
    return stages


def filled(kind, state):
    """A network made anew from a state."""
    model = build(kind, seed=9)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
class TestWeightsComputedFromOthers:
    def test_snapshots_are_the_network_of_their_time(self, kind):
        model = build(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = CosineCycles(epochs=4, num_cycles=2, initial_learning_rate=0.1)
        recorder = SnapshotRecorder(model, optimizer, schedule, steps_per_epoch=1)
        seen = []
        for index in range(4):
            step(model, optimizer, index)
            if recorder.step():
                seen.append(model.eval()(IMAGES).detach())
        predict_batches(model, BATCHES)
        for member, expected in zip(recorder.members(), seen, strict=True):
            torch.testing.assert_close(member(IMAGES), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(seen[0], seen[1])
        # On its own: training it changes neither the model nor another snapshot.
        member = recorder.member(0)
        step(member, torch.optim.SGD(member.parameters(), lr=1.0), 0)
        torch.testing.assert_close(model.eval()(IMAGES), seen[1])
        torch.testing.assert_close(recorder.member(0)(IMAGES), seen[0])
        probs = Ensemble(list(recorder.members())).predict_probs(IMAGES)
        torch.testing.assert_close(torch.from_numpy(probs), torch.stack(seen).softmax(2))

    @pytest.mark.parametrize(
        ("average", "options", "shares"),
        [
            (PolyakAverage, {}, [1 / 3] * 3),
            (ExponentialMovingAverage, {"decay": 0.7}, [0.49, 0.21, 0.3]),
            (StochasticWeightAverage, {"start_epoch": 0}, [1 / 3] * 3),
        ],
    )
    def test_running_averages(self, kind, average, options, shares):
        model = build(kind)
        model(IMAGES).sum().backward()
        running = average(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        weights = []
        for index in range(3):
            step(model, optimizer, index)
            running.after_step(model)
            running.after_epoch(model, index + 1)
            running(IMAGES).sum().backward()
            weights.append({name: value.detach().clone() for name, value in model.named_parameters()})
        finished = running.finished(BATCHES)
        for name, value in finished.named_parameters():
            expected = sum(share * each[name] for share, each in zip(shares, weights, strict=True))
            torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-6)
        again = filled(kind, finished.state_dict())
        torch.testing.assert_close(finished(IMAGES), again(IMAGES))

    def test_averages_soups_and_evolutions(self, kind):
        stages, model = trained(kind), build(kind)
        model(IMAGES).sum().backward()
        average = averaged_model(model, stages, None, BATCHES)
        parameters = [dict(stage.named_parameters()) for stage in stages]
        for name, value in average.named_parameters():
            expected = torch.stack([each[name] for each in parameters]).double().mean(dim=0)
            torch.testing.assert_close(value.double(), expected)
        torch.testing.assert_close(average(IMAGES), filled(kind, average.state_dict())(IMAGES))
        uniform = uniform_soup(model, stages, BATCHES, BATCHES).model
        torch.testing.assert_close(uniform(IMAGES), average(IMAGES))
        soup = greedy_soup(model, stages, BATCHES, BATCHES, recompute_singles=False)
        assert len(averaging_curve(model, stages, "equal", BATCHES, BATCHES)) == 3
        assert predict_batches(filled(kind, soup.model.state_dict()), BATCHES)[0].shape == (20, 3)
        settings = EvolutionSettings(population_size=5, generations=1)
        evolved = evolve_simplex(model, stages, BATCHES, BATCHES, settings=settings)
        probs, labels = predict_batches(filled(kind, evolved.state), BATCHES)
        assert -torch.from_numpy(probs)[torch.arange(20), labels].log().mean() == pytest.approx(
            evolved.best.val_nll, rel=1e-5
        )

    def test_a_clone_shares_nothing(self, kind):
        model = build(kind)
        expected = model.train()(IMAGES).detach()
        copied = clone(model)
        with torch.no_grad():
            for value in copied.state_dict().values():
                if value.is_floating_point():
                    value.fill_(0.5)
        torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
        assert copied(IMAGES).shape == expected.shape


def test_a_parametrised_network_has_the_class_that_it_was_built_as():
    # Each parametrised module gets a class of its own.
    first, second = (parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(2))
    assert type(first) is not type(second)
    averaged = average_states([first, second])
    name = "parametrizations.weight.original1"
    torch.testing.assert_close(averaged[name], (first.state_dict()[name] + second.state_dict()[name]) / 2)
    with pytest.raises(UserError, match="Model 1 is a Bilinear, but model 0 is a Linear"):
        average_states([first, parametrizations.weight_norm(nn.Bilinear(3, 3, 2))])
    assert parametrize.is_parametrized(clone(first))


class Locked(nn.Module):
    """What no copy can be made of."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, inputs):
        return inputs


def test_what_can_not_be_copied_is_refused_before_the_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), Locked())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = CosineCycles(epochs=4, num_cycles=2, initial_learning_rate=0.1)
    attempts = [
        lambda: SnapshotRecorder(model, optimizer, schedule, steps_per_epoch=1),
        lambda: PolyakAverage(model),
        lambda: ExponentialMovingAverage(model),
        lambda: StochasticWeightAverage(model, start_epoch=0),
        lambda: averaged_model(model, [model], None, BATCHES),
        lambda: evolve_simplex(model, [model], BATCHES, BATCHES),
        lambda: greedy_soup(model, [model], BATCHES, BATCHES, recompute_singles=False),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=r"The Sequential cannot be copied \(.*lock.*\)") as caught:
            attempt()
        assert "__deepcopy__" in caught.value.remedy
    # Its weights can be, into a module that is copied.
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Identity())
    average = averaged_model(plain, [model.state_dict()], None, BATCHES)
    torch.testing.assert_close(average(IMAGES), model(IMAGES))


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))


def compiled(model):
    return torch.compile(model, backend="eager")


def inside(wrap):
    """Wrap parts of a network instead of the whole."""

    def apply(model):
        model[0], model[3] = wrap(model[0]), wrap(model[3])
        return model

    return apply


def averaging(model):
    average = AveragedModel(model)
    average.update_parameters(model)
    return average


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "AveragedModel": averaging,
    "EMA": ExponentialMovingAverage,
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "average of a compiled one": lambda model: averaging(compiled(model)),
    "compiled parts": inside(compiled),
    "averages as parts": inside(averaging),
}


class TestWrappedMembers:
    """A file holds the plain module and fills any form of it."""

    @pytest.mark.parametrize(
        ("saved", "given"),
        [
            *((name, "plain") for name in WRAPPERS),
            *(("plain", name) for name in WRAPPERS if name != "plain"),
            *(("EMA", "compiled DataParallel"), ("compiled parts", "averages as parts")),
        ],
    )
    def test_from_any_form_into_any_other(self, saved, given, tmp_path):
        torch.manual_seed(0)
        member = small()
        member(IMAGES)
        expected = member.eval()(IMAGES)
        Ensemble([WRAPPERS[saved](member)]).save(tmp_path)
        fresh = WRAPPERS[given](small())
        counts = {name: int(value) for name, value in fresh.named_buffers() if name.endswith("n_averaged")}
        loaded = load(tmp_path, members=[fresh])
        with torch.no_grad():
            torch.testing.assert_close(loaded.members[0](IMAGES), expected)
        for name, value in fresh.named_buffers():
            assert name not in counts or int(value) == counts[name]

    @pytest.mark.parametrize("wrapper", ["compiled", "DataParallel", "EMA"])
    def test_networks_of_ours_are_rebuilt(self, wrapper, tmp_path, own_network):
        member = own_network(0).eval()
        expected = member(IMAGES)
        Ensemble([WRAPPERS[wrapper](member)]).save(tmp_path)
        loaded = load(tmp_path)
        assert type(loaded.members[0]) is Network
        torch.testing.assert_close(loaded.members[0](IMAGES), expected)

    def test_another_architecture_is_named_still(self, tmp_path):
        Ensemble([compiled(small())]).save(tmp_path)
        other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Flatten(), nn.Linear(144, 3))
        for wrapper in WRAPPERS.values():
            with pytest.raises(UserError, match="does not fit its member"):
                load(tmp_path, members=[wrapper(copy.deepcopy(other))])

    def test_a_module_with_such_a_name_of_its_own(self, tmp_path):
        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = small()
                self.register_buffer("n_averaged", torch.tensor(3))

            def forward(self, images):
                return self.module(images)

        member = Holder().eval()
        Ensemble([member]).save(tmp_path)
        loaded = load(tmp_path, members=[Holder()])
        torch.testing.assert_close(loaded.members[0](IMAGES), member(IMAGES))
        with pytest.raises(UserError, match="does not fit its member"):
            load(tmp_path, members=[small()])
