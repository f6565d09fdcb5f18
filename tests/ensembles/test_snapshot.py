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

from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.snapshot import CosineCycles, SnapshotRecorder, TriangularCycles
from dnas_ens.errors import UserError
from dnas_ens.run.checkpoint import CheckpointStore

STEPS = 5
COSINE = CosineCycles(epochs=4, num_cycles=2, initial_learning_rate=0.2)


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 0.7}]
    return model, torch.optim.SGD(groups, lr=1.0, momentum=0.9)


def batches(num_batches=STEPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        inputs = torch.randn(16, 4, generator=generator)
        yield inputs, inputs[:, :3].argmax(dim=1)


def train(model, optimizer, recorder, epochs):
    for _ in range(epochs):
        for inputs, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            recorder.step()


def trained(epochs=4):
    model, optimizer = build()
    recorder = SnapshotRecorder(model, optimizer, COSINE, steps_per_epoch=STEPS)
    train(model, optimizer, recorder, epochs)
    return model, optimizer, recorder


def test_a_cosine_cycle_by_hand():
    # T = 8 and M = 2 make cycles of 4 steps: cos 0, cos 45, cos 90 and cos 135 degrees.
    schedule = CosineCycles(epochs=8, num_cycles=2, initial_learning_rate=0.1)
    cycle = [0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.sqrt(0.5))]
    assert [schedule.learning_rate_at(step) for step in range(1, 9)] == pytest.approx(cycle * 2)
    assert [step for step in range(1, 9) if schedule.snapshot_after(step)] == [4, 8]


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 6), st.floats(1e-4, 10.0))
def test_cosine_cycles_against_the_formula_and_torch(epochs, steps_per_epoch, num_cycles, rate):
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
        formula = rate / 2 * (math.cos(math.pi * math.fmod(step - 1, cycle) / cycle) + 1)
        assert found == pytest.approx(formula, rel=1e-12)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()
        if schedule.snapshot_after(step, steps_per_epoch):
            ends.append(step)
    assert len(ends) == num_cycles
    assert ends[-1] == total
    assert all(end % cycle == 0 for end in ends[:-1])


@given(st.integers(1, 6), st.integers(1, 9), st.floats(1e-6, 1.0))
def test_triangular_cycles_against_interpolation(epochs, steps_per_epoch, low):
    high = 3.0 * low
    cycle = epochs * steps_per_epoch
    schedule = TriangularCycles(epochs_per_cycle=epochs, highest_learning_rate=high, lowest_learning_rate=low)
    if cycle % 2:
        with pytest.raises(UserError, match="no middle"):
            schedule.learning_rate_at(1, steps_per_epoch)
        return
    steps = np.arange(1, 3 * cycle + 1)
    corners = [0, cycle / 2, cycle, 3 * cycle / 2, 2 * cycle, 5 * cycle / 2, 3 * cycle]
    expected = np.interp(steps, corners, [high, low, high, low, high, low, high])
    found = [schedule.learning_rate_at(int(step), steps_per_epoch) for step in steps]
    assert found == pytest.approx(expected, rel=1e-9)
    due = [step for step in steps if schedule.snapshot_after(int(step), steps_per_epoch)]
    assert due == [cycle // 2, cycle // 2 + cycle, cycle // 2 + 2 * cycle]
    assert [found[step - 1] for step in due] == pytest.approx([low] * 3)


def test_the_recorder_sets_every_step_and_copies_at_the_ends_of_cycles():
    model, optimizer = build()
    recorder = SnapshotRecorder(model, optimizer, COSINE, steps_per_epoch=STEPS)
    seen, copies = [], []
    for _ in range(4):
        for inputs, labels in batches():
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if recorder.step():
                copies.append({name: value.clone() for name, value in model.state_dict().items()})
    assert seen == [[COSINE.learning_rate_at(step, STEPS)] * 2 for step in range(1, 21)]
    assert recorder.snapshot_steps == [10, 20]
    for snapshot, copied in zip(recorder.snapshots, copies, strict=True):
        assert all(torch.equal(snapshot[name], copied[name]) for name in copied)
    assert not torch.equal(recorder.snapshots[0]["0.weight"], recorder.snapshots[1]["0.weight"])
    with pytest.raises(UserError, match="ended after 20 steps"):
        recorder.step()


def test_an_interrupted_training_goes_on_exactly(tmp_path):
    whole, _, reference = trained()
    model, optimizer, recorder = trained(epochs=3)
    parts = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "recorder": recorder.state_dict(),
    }
    CheckpointStore(tmp_path).save(1, parts)
    _, state = CheckpointStore(tmp_path).load_newest()

    model, optimizer = build(seed=5)
    recorder = SnapshotRecorder(model, optimizer, COSINE, steps_per_epoch=STEPS)
    recorder.load_state_dict(state["recorder"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert recorder.learning_rate == COSINE.learning_rate_at(16, STEPS) == optimizer.param_groups[1]["lr"]
    train(model, optimizer, recorder, epochs=1)
    assert recorder.snapshot_steps == [10, 20]
    for snapshot, expected in zip(recorder.snapshots, reference.snapshots, strict=True):
        assert all(torch.equal(snapshot[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_members_are_modules_of_their_own():
    model, _, recorder = trained()
    members = list(recorder.members())
    inputs = next(iter(batches(seed=9)))[0]
    newest = Ensemble(list(recorder.members(last=1)))(inputs)
    assert torch.allclose(newest, model.eval()(inputs).softmax(dim=1), atol=1e-6)
    assert len(members) == 2
    for member, snapshot in zip(members, recorder.snapshots, strict=True):
        assert not member.training
        assert torch.equal(member[0].weight, snapshot["0.weight"])
        assert member[0].weight.grad is None
    with torch.no_grad():
        members[0][0].weight.zero_()
    assert recorder.snapshots[0]["0.weight"].any()
    assert model[0].weight.any()


def test_the_best_single_snapshot():
    _, _, recorder = trained()

    def val_batches():
        return batches(seed=3)

    losses = []
    for member in recorder.members():
        with torch.no_grad():
            losses.append(np.mean([float(F.cross_entropy(member(x), y)) for x, y in val_batches()]))
    assert losses[0] != losses[1]
    assert recorder.best_single(val_batches) == int(np.argmin(losses))
    recorder.snapshots.reverse()
    assert recorder.best_single(val_batches) == int(np.argmin(losses[::-1]))


def test_a_learning_rate_in_a_tensor_stays_there():
    model, _ = build()
    rate = torch.tensor(1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=False, foreach=False)
    recorder = SnapshotRecorder(model, optimizer, COSINE, steps_per_epoch=1)
    assert optimizer.param_groups[0]["lr"] is rate
    recorder.step()
    assert float(rate) == pytest.approx(COSINE.learning_rate_at(2))


def test_members_are_those_of_the_call():
    model = nn.Linear(1, 1)
    schedule = CosineCycles(epochs=4, num_cycles=4, initial_learning_rate=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = SnapshotRecorder(model, optimizer, schedule, steps_per_epoch=1)
    for epoch in range(4):
        with torch.no_grad():
            model.weight.fill_(float(epoch))
        recorder.step()
        if epoch == 2:
            made = recorder.members()
    assert [member.weight.item() for member in made] == [0.0, 1.0, 2.0]


def test_what_a_recorder_refuses():
    model, optimizer, recorder = trained(epochs=1)
    with pytest.raises(UserError, match="The last 0 of 0"):
        recorder.members()
    with pytest.raises(UserError, match="no snapshot -1"):
        recorder.member(-1)
    with pytest.raises(UserError, match="0 steps"):
        SnapshotRecorder(model, optimizer, COSINE, steps_per_epoch=0)
    with pytest.raises(UserError, match="saved with the schedule"):
        SnapshotRecorder(model, optimizer, COSINE, steps_per_epoch=7).load_state_dict(recorder.state_dict())
    _, _, full = trained()
    with pytest.raises(UserError, match="The last 3 of 2"):
        full.members(last=3)
    other = nn.Linear(4, 3)
    stranger = SnapshotRecorder(other, torch.optim.SGD(other.parameters()), COSINE, steps_per_epoch=STEPS)
    with pytest.raises(UserError, match="tensor"):
        stranger.load_state_dict(full.state_dict())


@pytest.mark.parametrize(
    ("kind", "arguments", "cause"),
    [
        (CosineCycles, (3, 0, 0.1), "0 cycles"),
        (CosineCycles, (3, 1, math.nan), "initial_learning_rate is nan"),
        (TriangularCycles, (2, 0.1, 0.1), "not below the highest"),
        (TriangularCycles, (2, 0.1, 0.0), "lowest_learning_rate is 0.0"),
        (TriangularCycles, (0, 0.1, 0.01), "0 epochs"),
    ],
)
def test_impossible_schedules(kind, arguments, cause):
    with pytest.raises(UserError, match=cause):
        kind(**dict(zip(kind.__dataclass_fields__, arguments, strict=True)))
