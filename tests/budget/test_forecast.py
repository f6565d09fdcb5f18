import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dnas_ens.budget.amount import Amount, parse_time
from dnas_ens.budget.forecast import (
    FIRST_CYCLE,
    GUESS,
    KEPT,
    NEXT_DOUBLING,
    Done,
    Unit,
    bases_of,
    believed,
    cycle_guess,
    forecasts,
    gain_of_growth,
    network_constant,
    next_doubling,
)
from dnas_ens.errors import UserError


def done(kind, number, loss, *, alone=None, parent=None, epochs=10, cell=0, train_loss=None):
    unit = Unit(kind=kind, number=number, cell=cell, parent=parent, epochs=epochs, learning_rate=0.05)
    return Done(
        unit=unit,
        epochs=epochs,
        cost=float(epochs),
        train_loss=train_loss,
        alone=loss if alone is None else alone,
        loss=loss,
        members=(number,),
    )


class World:
    """Networks and ensembles that follow laws which the forecasts do not know: what is gained is decided here."""

    def __init__(self, *, floor, slope, between, cycle=0.3):
        self.floor, self.slope, self.between, self.cycle = floor, slope, between, cycle
        self.history = []

    def loss(self, bases, cycles, epochs):
        return self.floor + self.slope * epochs**-0.5 + self.between / (bases + self.cycle * cycles)

    def spend(self, budget):
        unit = Unit(kind="first", number=0, cell=0, parent=None, epochs=max(1, budget // 10), learning_rate=0.05)
        spent = 0.0
        while unit is not None:
            spent += unit.epochs
            self.history.append(
                done(unit.kind, unit.number, 1.0, parent=unit.parent, epochs=unit.epochs, cell=unit.cell)
            )
            bases = bases_of(self.history)
            epochs = min(base.epochs for base in bases)
            cycles = sum(each.unit.kind == "cycle" for each in self.history)
            loss = self.loss(len(bases), min(cycles, 3 * len(bases)), epochs)
            alone = self.floor + self.slope * bases[-1].epochs ** -0.5 + self.between
            self.history[-1] = Done(
                unit=unit,
                epochs=unit.epochs,
                cost=float(unit.epochs),
                train_loss=min(alone, 4 * self.slope * bases[-1].epochs ** -0.5),
                alone=alone,
                loss=loss,
                members=(0,),
            )
            options = forecasts(
                self.history,
                left=budget - spent,
                epoch_cost=lambda cell: 1.0,
                num_cells=4,
                learning_rate=0.05,
            )
            unit = options[0].unit if options else None
        return spent


def kinds(history):
    return [each.unit.kind for each in history]


def test_where_training_longer_pays_one_network_is_trained_longer():
    world = World(floor=0.0, slope=2.0, between=0.001)
    assert world.spend(60) == 60
    assert kinds(world.history).count("longer") >= 1
    assert len(bases_of(world.history)) == 1


def test_where_a_network_is_saturated_the_budget_goes_to_further_networks():
    world = World(floor=0.2, slope=0.01, between=0.1, cycle=0.0)
    assert world.spend(400) > 380
    found = kinds(world.history)
    assert {"copy", "cell"} <= set(found)
    assert len(bases_of(world.history)) >= 4
    # One cycle shows that cycles bring nothing here.
    assert found[1:3] in (["cycle", "copy"], ["cycle", "cell"])
    assert sum(each.epochs for each in world.history if each.unit.kind == "cycle") <= 0.1 * 400


@given(
    st.integers(3, 2000),
    st.floats(0.0, 0.5),
    st.floats(0.001, 3.0),
    st.floats(0.0, 0.5),
    st.floats(0.0, 1.0),
)
def test_a_budget_is_never_exceeded_and_hardly_ever_left(budget, floor, slope, between, cycle):
    world = World(floor=floor, slope=slope, between=between, cycle=cycle)
    spent = world.spend(budget)
    assert spent <= budget
    # What is left is less than the shortest cycle of what was trained, or one epoch.
    assert budget - spent <= max(1, 0.5 * max(base.epochs for base in bases_of(world.history)))


def test_bases_and_what_went_on_from_them():
    history = [
        done("first", 0, 0.5, epochs=4),
        done("longer", 1, 0.4, parent=0, epochs=12),
        done("copy", 2, 0.37, alone=0.41, epochs=16),
        done("cycle", 3, 0.36, parent=1, epochs=3),
        done("cycle", 4, 0.355, parent=3, epochs=3),
    ]
    first, second = bases_of(history)
    assert (first.epochs, first.end.unit.number, first.newest.unit.number) == (KEPT * 4 + 12, 1, 4)
    assert first.earlier == (4, 0.5)
    assert first.cycle_gains == pytest.approx((0.01, 0.005))
    assert (second.epochs, second.newest.unit.number, second.cycle_gains) == (16, 2, ())


def test_a_doubling_is_forecast_from_the_ones_before_it():
    # Two doublings (of 10 to 0.7 * 10 + 33) that gained g and 0.7 g: the next is 0.7^2 g, beside the guess.
    gain = 0.1
    history = [
        done("first", 0, 0.8, epochs=10),
        done("longer", 1, 0.8 - gain * (1 + NEXT_DOUBLING), parent=0, epochs=33),
    ]
    (base,) = bases_of(history)
    guess = 0.15 * base.end.alone * NEXT_DOUBLING**2
    assert next_doubling(base) == pytest.approx((1 - GUESS) * gain * NEXT_DOUBLING**2 + GUESS * guess)
    assert gain_of_growth(base, 2.0) == pytest.approx(next_doubling(base))
    assert gain_of_growth(base, 4.0) == pytest.approx(next_doubling(base) * (1 + NEXT_DOUBLING))


@pytest.mark.parametrize(
    ("train_loss", "share"), [(None, 1.0), (0.6, 1.0), (0.5, 1.0), (0.4, 3 / 7), (0.325, 0.0), (0.1, 0.0)]
)
def test_a_network_that_knows_its_images_has_less_to_learn(train_loss, share):
    (base,) = bases_of([done("first", 0, 0.5, train_loss=train_loss)])
    assert next_doubling(base) == pytest.approx(0.15 * 0.5 * share)


def test_a_further_network_is_forecast_by_one_over_m():
    # An ensemble whose loss is a + c / M: the constant of every step is c.
    losses = [0.3 + 0.12 / size for size in (1, 2, 3, 4)]
    history = [done("first", 0, losses[0])] + [done("copy", size, losses[size]) for size in (1, 2, 3)]
    guess = 0.07 * losses[-1]
    assert network_constant(history, "copy") == pytest.approx((guess + 3 * 0.12) / 4)
    # A kind that was not tried is expected to be as the other.
    assert network_constant(history, "cell") == network_constant(history, "copy")
    (copy,) = [
        option
        for option in forecasts(history, left=100, epoch_cost=lambda cell: 2.0, num_cells=1, learning_rate=0.05)
        if option.unit.kind == "copy"
    ]
    assert copy.gain == pytest.approx(network_constant(history, "copy") / 20)
    assert (copy.cost, copy.unit.epochs, copy.unit.number) == (20.0, 10, 4)


@pytest.mark.parametrize(
    ("left", "setup", "relative", "kind"),
    [
        (10.0, 0.0, 1.0, "cell"),
        (100.0, 0.0, 1.4, "copy"),
        (100.0, 0.0, 0.5, "cell"),
        (20.0, 12.0, 1.0, "copy"),
        (100.0, 9.0, 0.5, "cell"),
    ],
)
def test_of_copies_and_other_cells_those_that_gain_more_by_the_end(left, setup, relative, kind):
    history = [done("first", 0, 0.5, epochs=10, train_loss=0.1)]
    options = forecasts(
        history,
        left=left,
        epoch_cost=lambda cell: relative if cell else 1.0,
        num_cells=2,
        learning_rate=0.05,
        setup_cost=setup,
    )
    (network,) = [option for option in options if option.unit.parent is None]
    assert network.unit.kind == kind
    assert network.cost == pytest.approx(10 if kind == "copy" else 10 * relative + setup)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), (" 2H ", 7200)]
)
def test_times(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-5m", "0s", "5 min", "1h 30m", "nan", "infs"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match="budget"):
        parse_time(text)


def test_amounts_as_text():
    assert Amount(total=1800).shown(725) == "12:05 of 30:00"
    assert Amount(total=20, unit="epochs").shown(7) == "7 of 20 epochs"
    assert math.isclose(Amount(total=3.0).total, 3.0)


@pytest.mark.parametrize(("measured", "guess", "error"), [(0.02, 0.01, 0.005), (-0.03, 0.01, 0.02), (0.0, 0.05, 0.001)])
def test_a_measured_gain_is_believed_as_bayes_would(measured, guess, error):
    def density(gain):
        return stats.norm.pdf(gain, guess, guess) * stats.norm.pdf(measured, gain, error)

    low, high = min(measured, guess) - 8 * guess, max(measured, guess) + 8 * guess
    gains = np.linspace(low, high, 20_001)
    weights = density(gains)
    assert believed(measured, guess, error) == pytest.approx(float((gains * weights).sum() / weights.sum()), rel=1e-6)


@pytest.mark.parametrize(("error", "cycle_gain", "constant"), [(0.0, 0.1, 0.0), (1.0, FIRST_CYCLE * 0.5, 0.042)])
def test_few_val_images_leave_the_guesses_standing(error, cycle_gain, constant):
    """A lucky cycle and an unlucky copy, as 10,000 val images would show them, and as a handful may."""
    first = done("first", 0, 0.5)
    (base,) = bases_of([first, replace(done("cycle", 1, 0.4, parent=0, epochs=2), error=error)])
    assert base.cycle_gains == pytest.approx([cycle_gain], abs=1e-3)
    unlucky = replace(done("copy", 2, 0.6), error=error)
    assert network_constant([first, unlucky], "copy") == pytest.approx(constant, abs=1e-2)


@pytest.mark.parametrize(
    ("left", "found"),
    [(30, {"cycle"}), (100, {"cell"}), (109, {"cell", "cycle"}), (125, {"cell", "cycle"})],
)
def test_room_is_kept_for_a_network_that_is_worth_more_than_cycles(monkeypatch, left, found):
    """A saturated network of 100 epochs: another gains 0.03, five cycles of 20 epochs 0.0067 at most."""
    monkeypatch.setattr("dnas_ens.budget.forecast.FIRST_CYCLE", 0.0045)
    history = [done("first", 0, 0.45, epochs=100, train_loss=0.1)]
    options = forecasts(history, left=left, epoch_cost=lambda cell: 1.0, num_cells=4, learning_rate=0.05)
    assert {option.unit.kind for option in options} == found
    cycles = [option.unit.epochs for option in options if option.unit.kind == "cycle"]
    # A cycle gets what the network leaves, unless that is too short for one.
    assert cycles == ([20] if left in (30, 125) else [9] if left == 109 else [])


def test_units_in_progress_stand_at_what_was_guessed_of_them():
    history = [done("first", 0, 1.0, epochs=100, train_loss=0.2), done("copy", 1, 0.96, alone=1.0, epochs=100)]
    constant, cycle = network_constant(history, "copy"), cycle_guess(bases_of(history)[0], 0.96, num_bases=2)
    begun = [Unit(kind="copy", number=2, cell=0, parent=None, epochs=100, learning_rate=0.05)]
    begun.append(Unit(kind="cycle", number=3, cell=0, parent=0, epochs=20, learning_rate=0.05))
    expected = list(history)
    for unit in begun:
        expected.append(Done.expected(unit, expected))
    # The guess joins what was measured, and moves nothing but towards itself.
    guess = network_constant(history[:1], "copy") * 0.96
    assert network_constant(expected, "copy") == pytest.approx((2 * constant + guess) / 3, rel=0.02)
    assert bases_of(expected)[0].cycle_gains == (pytest.approx(2 / 3 * cycle),)
    assert len(bases_of(expected)) == 3
    assert (expected[-1].loss, expected[-1].epochs) == (0.96, 20)


def test_nothing_goes_on_from_a_network_in_progress_or_takes_longer_than_there_is_time():
    history = [done("first", 0, 1.0, epochs=10), done("copy", 1, 0.95, alone=1.01)]

    def found(**more):
        return forecasts(
            history, left=200.0, epoch_cost=lambda _: 1.0, num_cells=1, learning_rate=0.05, shortest_cycle=1, **more
        )

    parents = {option.unit.parent for option in found()}
    assert parents == {None, 0, 1}
    assert {option.unit.parent for option in found(busy={0, 1})} == {None}
    assert max(option.cost for option in found()) > 8
    for longest in (8.0, 3.0, 0.5):
        assert all(option.cost <= longest for option in found(longest=longest))
    assert found(longest=8.0)
    assert not found(longest=0.5)


def test_on_many_slots_the_first_network_is_lengthened_too():
    def best(**more):
        history = [done("first", 0, 1.0, epochs=10, train_loss=0.9)]
        found = forecasts(history, epoch_cost=lambda _: 1.0, num_cells=1, learning_rate=0.05, **more)
        return found[0].unit

    for slots in (1, 2, 11, 64):
        unit = best(left=1000.0 * slots, longest=1000.0)
        assert (unit.kind, unit.parent) == ("longer", 0)
        assert 10 < unit.epochs <= 1000


def test_on_several_slots_no_room_is_kept_for_a_network_that_cannot_fit():
    history = [done("first", 0, 1.0, epochs=100, train_loss=0.2)]

    def kinds(**more):
        found = forecasts(history, epoch_cost=lambda _: 1.0, num_cells=1, learning_rate=0.05, **more)
        return [option.unit.kind for option in found]

    assert kinds(left=30.0) == ["cycle"]
    assert kinds(left=60.0, longest=30.0) == ["cycle"]


@pytest.mark.parametrize(
    ("epochs", "loss", "train_loss", "left", "longer"),
    [
        # At once as long as is enough, 120 epochs, of which going on keeps 0.7 of the 16.
        (16, 1.5, 1.4, 1500, 109),
        # What is left then pays for a cycle of 22 epochs, or for nothing that is of use.
        (16, 1.5, 1.4, 132, 109),
        (16, 1.5, 1.4, 130, 130),
        # Looks on the way decide, whatever the gap is.
        (4, 1.5, 1.1, 1500, 118),
        # Later no longer than until the gap is 0.5, which is expected after 393 epochs.
        (110, 3.0, 2.86, 1500, 316),
        (110, 3.0, 2.86, 330, 316),
        # It knows its images.
        (110, 1.5, 1.34, 1500, None),
        (30, 1.5, 1.0, 1500, None),
    ],
)
def test_a_network_becomes_longer_by_enough_or_not_at_all(epochs, loss, train_loss, left, longer):
    history = [done("first", 0, loss, epochs=epochs, train_loss=train_loss)]
    options = forecasts(history, left=left, epoch_cost=lambda cell: 1.0, num_cells=1, learning_rate=0.05, enough=120.0)
    found = [option.unit.epochs for option in options if option.unit.kind == "longer"]
    assert found == ([] if longer is None else [longer])


@pytest.mark.parametrize(("train_loss", "rate"), [(1.36, 0.25), (1.34, 1.0), (None, 1.0)])
def test_a_cycle_goes_on_at_the_last_rate_until_its_network_knows_its_images(train_loss, rate):
    history = [done("first", 0, 1.5, epochs=110, train_loss=train_loss)]
    options = forecasts(history, left=30.0, epoch_cost=lambda cell: 1.0, num_cells=1, learning_rate=0.05, enough=120.0)
    assert [option.unit.learning_rate for option in options if option.unit.kind == "cycle"] == [rate * 0.05]
