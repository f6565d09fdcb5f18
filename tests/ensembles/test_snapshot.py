"""Cycles against the papers' formulas and torch's scheduler; snapshots of a real training, resumed exactly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from dnas_ens.ensembles.snapshot import BaseThenCycles, CosineCycles, SnapshotRecorder, TriangularCycles
from dnas_ens.errors import UserError
from dnas_ens.run.checkpoint import CheckpointStore

STEPS = 5
BASE = {"epochs": 2, "learning_rate": 0.1, "cycle_epochs": 1}
COSINE = CosineCycles(epochs=4, num_cycles=2, initial_learning_rate=0.2)


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 0.7}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    return model, optimizer, SnapshotRecorder(model, optimizer, COSINE, steps_per_epoch=STEPS)


def triangular(epochs, high, low):
    return TriangularCycles(epochs_per_cycle=epochs, highest_learning_rate=high, lowest_learning_rate=low)


def batches(num_batches=STEPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        inputs = torch.randn(16, 4, generator=generator)
        yield inputs, inputs[:, :3].argmax(dim=1)


def train(model, optimizer, recorder, epochs):
    """The learning rates of each step, and copies of the state where a snapshot was taken."""
    rates, copies = [], []
    for _ in range(epochs):
        for inputs, labels in batches():
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if recorder.step():
                copies.append({name: value.clone() for name, value in model.state_dict().items()})
    return rates, copies


def equal(first, second):
    return all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 6), st.floats(1e-4, 10.0))
def test_cosine_cycles_against_torch(epochs, steps_per_epoch, num_cycles, rate):
    total = epochs * steps_per_epoch
    cycle = math.ceil(total / num_cycles)
    schedule = CosineCycles(epochs=epochs, num_cycles=num_cycles, initial_learning_rate=rate)
    if math.ceil(total / cycle) < num_cycles:
        with pytest.raises(UserError, match="come to an end"):
            schedule.learning_rate_at(1, steps_per_epoch)
        return
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=cycle)
    ends = []
    for step in range(1, total + 1):
        found = schedule.learning_rate_at(step, steps_per_epoch)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()
        if schedule.snapshot_after(step, steps_per_epoch):
            ends.append(step)
    assert (len(ends), ends[-1]) == (num_cycles, total)
    assert all(end % cycle == 0 for end in ends[:-1])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4))
def test_base_then_cycles_against_torch(epochs, steps_per_epoch, cycles, cycle_epochs):
    schedule = BaseThenCycles(
        epochs=epochs, learning_rate=0.4, cycles=cycles, cycle_epochs=cycle_epochs, cycle_learning_rate=0.1
    )
    base, cycle = epochs * steps_per_epoch, cycle_epochs * steps_per_epoch
    expected = []
    for rate, length in [(0.4, base)] + [(0.1, cycle)] * cycles:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=length)
        for _ in range(length):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    steps = range(1, schedule.num_steps(steps_per_epoch) + 1)
    assert [schedule.learning_rate_at(step, steps_per_epoch) for step in steps] == pytest.approx(expected)
    ends = [step for step in steps if schedule.snapshot_after(step, steps_per_epoch)]
    assert ends == [base + number * cycle for number in range(cycles + 1)]


@given(st.integers(1, 6), st.integers(1, 9), st.floats(1e-6, 1.0))
def test_triangular_cycles_against_interpolation(epochs, steps_per_epoch, low):
    high, cycle = 3.0 * low, epochs * steps_per_epoch
    schedule = triangular(epochs, high, low)
    if cycle % 2:
        with pytest.raises(UserError, match="no middle"):
            schedule.learning_rate_at(1, steps_per_epoch)
        return
    steps = range(1, 3 * cycle + 1)
    expected = np.interp(steps, np.arange(7) * cycle / 2, [high, low, high, low, high, low, high])
    assert [schedule.learning_rate_at(step, steps_per_epoch) for step in steps] == pytest.approx(expected, rel=1e-9)
    due = [step for step in steps if schedule.snapshot_after(step, steps_per_epoch)]
    assert due == [cycle // 2, cycle // 2 + cycle, cycle // 2 + 2 * cycle]


def test_a_recorded_training_interrupted_or_not(tmp_path):
    whole, optimizer, reference = build()
    rates, copies = train(whole, optimizer, reference, epochs=4)
    assert rates == [[COSINE.learning_rate_at(step, STEPS)] * 2 for step in range(1, 21)]
    assert reference.snapshot_steps == [10, 20]
    assert equal(reference.snapshots, copies)
    assert not torch.equal(copies[0]["0.weight"], copies[1]["0.weight"])
    with pytest.raises(UserError, match="ended after 20 steps"):
        reference.step()

    names = "model", "optimizer", "recorder"
    training = build()
    train(*training, epochs=3)
    parts = {name: part.state_dict() for name, part in zip(names, training, strict=True)}
    CheckpointStore(tmp_path).save(1, parts)
    _, state = CheckpointStore(tmp_path).load_newest()
    model, optimizer, recorder = training = build(seed=5)
    for name, part in zip(reversed(names), reversed(training), strict=True):
        part.load_state_dict(state[name])
    assert recorder.learning_rate == COSINE.learning_rate_at(16, STEPS) == optimizer.param_groups[1]["lr"]
    train(*training, epochs=1)
    assert recorder.snapshot_steps == [10, 20]
    assert equal(recorder.snapshots, reference.snapshots)
    assert equal([model.state_dict()], [whole.state_dict()])


def test_members_are_modules_of_their_own_and_the_best_is_found():
    model, optimizer, recorder = build()
    train(model, optimizer, recorder, epochs=4)
    members = list(recorder.members())
    [newest] = recorder.members(last=1)
    assert equal([newest.state_dict()], [model.state_dict()])
    for member, snapshot in zip(members, recorder.snapshots, strict=True):
        assert not member.training
        assert torch.equal(member[0].weight, snapshot["0.weight"])
        assert member[0].weight.grad is None
    with torch.no_grad():
        losses = [np.mean([float(F.cross_entropy(each(x), y)) for x, y in batches(seed=3)]) for each in members]
        members[0][0].weight.zero_()
    assert recorder.snapshots[0]["0.weight"].any()
    assert model[0].weight.any()
    assert losses[0] != losses[1]
    assert recorder.best_single(lambda: batches(seed=3)) == int(np.argmin(losses))


def test_members_are_those_of_the_call_and_a_rate_in_a_tensor_stays_there():
    model, rate = nn.Linear(1, 1), torch.tensor(1.0)
    schedule = CosineCycles(epochs=4, num_cycles=4, initial_learning_rate=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=False, foreach=False)
    recorder = SnapshotRecorder(model, optimizer, schedule, steps_per_epoch=1)
    for epoch in range(4):
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(schedule.learning_rate_at(epoch + 1))
        with torch.no_grad():
            model.weight.fill_(float(epoch))
        recorder.step()
        if epoch == 2:
            made = recorder.members()
    assert [member.weight.item() for member in made] == [0.0, 1.0, 2.0]


def test_what_a_recorder_refuses():
    model, optimizer, recorder = build()
    other = nn.Linear(4, 3)
    stranger = SnapshotRecorder(other, torch.optim.SGD(other.parameters()), COSINE, steps_per_epoch=STEPS)
    saved = build()
    train(*saved, epochs=4)
    for call, cause in (
        (lambda: recorder.members(), "The last 0 of 0"),
        (lambda: recorder.member(-1), "no snapshot -1"),
        (lambda: saved[2].members(last=3), "The last 3 of 2"),
        (lambda: SnapshotRecorder(model, optimizer, COSINE, steps_per_epoch=0), "0 steps"),
        (lambda: stranger.load_state_dict(saved[2].state_dict()), "tensor"),
        (lambda: recorder.load_state_dict({**saved[2].state_dict(), "schedule": {}}), "saved with the schedule"),
        (lambda: CosineCycles(epochs=3, num_cycles=0, initial_learning_rate=0.1), "0 cycles"),
        (lambda: CosineCycles(epochs=3, num_cycles=1, initial_learning_rate=math.nan), "learning_rate is nan"),
        (lambda: BaseThenCycles(**BASE, cycles=-1, cycle_learning_rate=0.1), "-1 cycles"),
        (lambda: BaseThenCycles(**BASE, cycles=1, cycle_learning_rate=0.0), "cycle_learning_rate is 0.0"),
        (lambda: triangular(2, 0.1, 0.1), "not below the highest"),
        (lambda: triangular(2, 0.1, 0.0), "lowest_learning_rate is 0.0"),
        (lambda: triangular(0, 0.1, 0.01), "0 epochs"),
    ):
        with pytest.raises(UserError, match=cause):
            call()
