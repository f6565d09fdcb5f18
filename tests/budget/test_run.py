import itertools
import json
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from tiny import genotype, same

import dnas_ens as de
from dnas_ens.budget.amount import Amount
from dnas_ens.budget.cells import StarCells
from dnas_ens.budget.choice import best_set, cross_fitted_loss
from dnas_ens.budget.forecast import Done, Unit
from dnas_ens.budget.run import Spending
from dnas_ens.config import RetrainConfig
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.ensembles import Ensemble
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import fit_temperature
from dnas_ens.run.files import load_tensors, read_json
from dnas_ens.space.known_cells import PLAIN_CNN, RESNET
from dnas_ens.training.members import Plan, build_training, train_member

RECIPE = RetrainConfig(num_cells=1, channels=4, batch_size=16, epochs=99, cycles=3)


class Given:
    """Cells that are there from the beginning."""

    setup_seconds, relative_cost = 0.0, 1.0

    def __init__(self, *genotypes):
        self.known, self.count, self._all = genotypes[:1], len(genotypes), list(genotypes)
        self.asked = 0

    def find(self):
        self.asked += 1
        return self._all


def spending(data, folder, *, epochs=24, cells=None):
    cells = cells or Given(genotype(0), genotype(1), genotype(2))
    return Spending(data, RECIPE, amount=Amount(total=epochs, unit="epochs"), cells=cells, folder=folder)


def ledger(folder):
    return json.loads((folder / "budget.json").read_text())


def test_after_every_unit_there_is_an_ensemble_and_the_budget_is_kept(few_digits, tmp_path):
    seen = []

    def look(done):
        loaded = Ensemble.load(tmp_path)
        seen.append((done.unit.number, len(loaded.members), loaded.evaluate(few_digits.val)["nll"]))

    ensemble = spending(few_digits, tmp_path).run(look)
    entries = ledger(tmp_path)["done"]
    assert [number for number, _, _ in seen] == list(range(len(entries)))
    assert [members for _, members, _ in seen] == [len(entry["members"]) for entry in entries]
    assert np.isfinite([loss for _, _, loss in seen]).all()
    spent = sum(entry["epochs"] for entry in entries)
    # What is left is too short for anything.
    assert 16 < spent <= 24
    assert ledger(tmp_path)["spent"] == spent
    assert same(ensemble.state_dict(), Ensemble.load(tmp_path).state_dict())
    manifest = json.loads((tmp_path / "ensemble.json").read_text())
    assert manifest["num_trained"] == len(entries)
    # The last network by hand: where it goes on from another, from its weights.
    unit = entries[-1]["unit"]
    recipe = RetrainConfig(
        num_cells=1, channels=4, batch_size=16, epochs=unit["epochs"], learning_rate=unit["learning_rate"]
    )
    plan = Plan(genotype=genotype(unit["cell"]), recipe=recipe, parent=unit["parent"])
    network, _ = train_member(build_training(plan, few_digits, number=unit["number"], device="cpu", folder=tmp_path))
    assert same(network.state_dict(), load_tensors(tmp_path / f"members/{unit['number']}/model.safetensors"))


@pytest.mark.parametrize("where", ["between units", "within one"])
def test_a_budget_that_was_interrupted_goes_on_to_the_same_ensemble(few_digits, tmp_path, monkeypatch, where):
    straight = spending(few_digits, tmp_path / "straight").run()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    begun = spending(few_digits, tmp_path / "cut")
    if where == "between units":
        with pytest.raises(KeyboardInterrupt):
            begun.run(lambda done: interrupt() if done.unit.number == 1 else None)
    else:
        from dnas_ens.training.trainer import MemberTraining

        run_epoch = MemberTraining.run_epoch
        monkeypatch.setattr(
            MemberTraining,
            "run_epoch",
            lambda self, *rest, **more: (
                interrupt() if (self.index, self.epoch) == (1, 2) else run_epoch(self, *rest, **more)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            begun.run()
        assert ledger(tmp_path / "cut")["coming"][0]["number"] == 1
        monkeypatch.setattr(MemberTraining, "run_epoch", run_epoch)
    # What was there is an ensemble.
    assert len(Ensemble.load(tmp_path / "cut").members) >= 1
    again = spending(few_digits, tmp_path / "cut").run()
    assert same(straight.state_dict(), again.state_dict())
    assert ledger(tmp_path / "cut")["done"] == ledger(tmp_path / "straight")["done"]


def test_a_finished_budget_can_be_raised(few_digits, tmp_path):
    spending(few_digits, tmp_path, epochs=8).run()
    before = ledger(tmp_path)["done"]
    spending(few_digits, tmp_path, epochs=14).run()
    after = ledger(tmp_path)
    assert after["done"][: len(before)] == before
    assert 8 < after["spent"] <= 14
    assert after["budget"]["total"] == 14
    with pytest.raises(UserError, match="a budget of epochs, and one of seconds"):
        Spending(few_digits, RECIPE, amount=Amount(total=60.0), cells=Given(genotype(0)), folder=tmp_path)


@pytest.fixture
def saturated(monkeypatch):
    """Neither longer trainings nor cycles are expected to bring anything."""
    for name in ("FIRST_DOUBLING", "FIRST_CYCLE"):
        monkeypatch.setattr(f"dnas_ens.budget.forecast.{name}", 0.0)
    monkeypatch.setattr("dnas_ens.budget.forecast.GUESS", 1.0)


@pytest.mark.usefixtures("saturated")
def test_other_cells_are_looked_for_once_and_only_when_one_is_wanted(few_digits, tmp_path):
    cells = Given(genotype(0), genotype(1), genotype(2))
    spending(few_digits, tmp_path / "short", epochs=1, cells=cells).run()
    assert cells.asked == 0
    spending(few_digits, tmp_path / "long", epochs=40, cells=cells).run()
    kinds = [entry["unit"]["kind"] for entry in ledger(tmp_path / "long")["done"]]
    assert "cell" in kinds
    assert cells.asked == 1


@pytest.mark.parametrize(("needed", "relative_cost", "first"), [(2.5, 1.4, 1), (2.5, 1.0, 0), (9.0, 1.4, 0)])
def test_better_cells_come_first_where_several_trainings_are_affordable(
    few_digits, tmp_path, monkeypatch, needed, relative_cost, first
):
    monkeypatch.setattr("dnas_ens.budget.run.ENOUGH", dict.fromkeys((True, False), (1, 1)))
    monkeypatch.setattr("dnas_ens.budget.run.FOUND", dict.fromkeys((True, False), needed))
    cells = Given(genotype(0), genotype(1))
    cells.relative_cost = relative_cost
    spending(few_digits, tmp_path, epochs=4, cells=cells).run()
    assert ledger(tmp_path)["done"][0]["unit"]["cell"] == first
    # There may be none.
    cells = Given(genotype(0))
    cells.count, cells.relative_cost = 2, relative_cost
    spending(few_digits, tmp_path / "none", epochs=4, cells=cells).run()
    assert ledger(tmp_path / "none")["done"][0]["unit"]["cell"] == 0


@pytest.mark.usefixtures("saturated")
def test_a_search_that_finds_no_other_cell_is_no_failure(few_digits, tmp_path):
    cells = Given(genotype(0))
    cells.count = 3
    spending(few_digits, tmp_path, epochs=40, cells=cells).run()
    assert cells.asked == 1
    assert {entry["unit"]["cell"] for entry in ledger(tmp_path)["done"]} == {0}


def test_an_epoch_of_another_cell_costs_what_its_steps_say(few_digits, tmp_path, monkeypatch):
    begun = Spending(few_digits, RECIPE, amount=Amount(total=100.0), cells=Given(genotype(0)), folder=tmp_path)
    begun._ledger.epoch_seconds, begun._found = 6.0, [genotype(0), genotype(1), genotype(2)]
    begun._step_seconds = {1: 2.0, 2: 3.0}  # Six steps an epoch: the first cell's took 1 s.
    for cell, epochs, cost in ((0, 10, 80.0), (1, 10, 170.0)):
        unit = Unit(kind="copy", number=cell, cell=cell, parent=None, epochs=epochs, learning_rate=0.05)
        figures = {"cost": cost, "train_loss": 1.0, "alone": 1.0, "loss": 1.0, "members": (0,)}
        begun._ledger.done.append(Done(unit=unit, epochs=epochs, **figures))
    # An epoch took 8 / 6 and 17 / 12 of its steps, that is 1.375 on average.
    assert [begun._epoch_cost(cell) for cell in range(3)] == pytest.approx([8.0, 17.0, 24.75])


def test_a_budget_of_time_is_planned_from_measured_steps(few_digits, tmp_path, capfd):
    amount = Amount(total=6.0)
    given = Given(genotype(0), genotype(1))
    Spending(few_digits, RECIPE, amount=amount, cells=given, folder=tmp_path).run()
    found = ledger(tmp_path)
    assert found["done"]
    assert found["epoch_seconds"] > 0
    said = capfd.readouterr().err
    assert "budget: an epoch of" in said
    assert "calibrated NLL on val" in said
    assert "of 0:06 spent" in said


@pytest.mark.parametrize(("waits", "augment", "channels"), [(True, True, 16), (True, False, 4), (False, True, 4)])
def test_a_network_is_as_wide_as_hardly_costs_more(few_digits, tmp_path, monkeypatch, waits, augment, channels):
    # As on a GPU: twice as wide costs 1.1 and 1.2 times as much, and then there is no memory left.
    steps = {4: 1.0, 8: 1.1, 16: 1.32}

    def measured(training):
        if training.recipe.channels not in steps:
            raise torch.OutOfMemoryError
        return 1e-3 * steps[training.recipe.channels]

    monkeypatch.setattr("dnas_ens.training.trainer.MemberTraining.measured_step", measured)
    monkeypatch.setattr(Spending, "_waits_for_host", waits)
    recipe = replace(RECIPE, augment=augment)
    planned = Spending(few_digits, recipe, amount=Amount(total=1.0), cells=Given(genotype(0)), folder=tmp_path)
    assert planned.recipe.channels == planned._ledger.channels == channels
    # Six steps.
    assert planned._ledger.epoch_seconds == pytest.approx(6e-3 * steps[channels])


@pytest.mark.parametrize(("seconds", "channels"), [(2.3, 4), (2.5, 8), (9.5, 8), (9.7, 16)])
def test_a_network_is_twice_as_wide_where_enough_of_it_is_affordable(
    few_digits, tmp_path, monkeypatch, seconds, channels
):
    # An epoch of six steps takes 6, 12 and 24 ms; 1,200 steps of the second width make 2.4 s, 2,400 of the third 9.6.
    monkeypatch.setattr(
        "dnas_ens.training.trainer.MemberTraining.measured_step",
        lambda training: 1e-3 * training.recipe.channels / 4,
    )
    monkeypatch.setattr("dnas_ens.budget.run.WIDE_STEPS", 1200)
    planned = Spending(few_digits, RECIPE, amount=Amount(total=seconds), cells=Given(genotype(0)), folder=tmp_path)
    assert planned.recipe.channels == channels


def test_what_is_spent_is_noted_while_a_network_is_trained(few_digits, tmp_path, monkeypatch):
    """A killed process cannot write what it has spent."""
    monkeypatch.setattr("dnas_ens.budget.run.SECONDS_BETWEEN_NOTES", 0.0)
    seconds, notes = itertools.count(), []
    begun = Spending(
        few_digits,
        RECIPE,
        amount=Amount(total=100.0),
        cells=Given(genotype(0)),
        folder=tmp_path,
        clock=lambda: next(seconds),
    )
    write = begun._write

    def noted():
        write()
        notes.append((len(ledger(tmp_path)["done"]), ledger(tmp_path)["spent"]))

    monkeypatch.setattr(begun, "_write", noted)
    begun.run()
    before = [spent for done, spent in notes if not done]
    assert len(before) > 3
    assert before == sorted(before)
    # After the last unit too, and where nothing was left to be done.
    assert notes[-1][1] == ledger(tmp_path)["spent"] > before[-1]


def test_what_is_looked_at_is_what_nobody_knows_the_length_of(few_digits, tmp_path):
    begun = spending(few_digits, tmp_path)

    def made(kind, number, parent, epochs):
        unit = Unit(kind=kind, number=number, cell=0, parent=parent, epochs=epochs, learning_rate=0.05)
        figures = {"cost": 1.0, "train_loss": 1.0, "alone": 1.0, "loss": 1.0, "members": (0,)}
        begun._ledger.done.append(Done(unit=unit, epochs=epochs, **figures))
        return unit

    enough = begun._enough
    assert begun._length_of(made("first", 0, None, 10)) == {"ends": None, "at_most": enough, "looks": True}
    assert begun._length_of(made("longer", 1, 0, 20)) == {"ends": None, "at_most": enough, "worth": 7.0}
    assert begun._length_of(made("cycle", 2, 1, 4)) == {"ends": None}
    again = made("longer", 3, 2, 30)
    assert begun._length_of(again) == {"ends": None, "at_most": enough, "worth": pytest.approx(0.7 * 27)}
    copied = made("copy", 4, None, 27)
    # What has gone on since does not matter to it.
    assert begun._length_of(again)["worth"] == pytest.approx(0.7 * 27)
    assert begun._length_of(copied) == {"ends": None, "at_most": enough, "looks": False}
    # Beside others a copy may begin before that is known.
    begun.slots = 2
    assert begun._length_of(copied)["looks"]


@pytest.fixture
def short(monkeypatch):
    """A network of two epochs needs no more before it has company, and processes may start in any time."""
    monkeypatch.setattr("dnas_ens.budget.run.ENOUGH", dict.fromkeys((True, False), (2, 0)))
    monkeypatch.setattr("dnas_ens.budget.run.SOON", 0.0)


def in_time(data, folder, seconds, **more):
    cells = Given(genotype(0), genotype(1), genotype(2))
    return Spending(data, RECIPE, amount=Amount(total=seconds), cells=cells, folder=folder, **more)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
# The interruption may meet a worker that is just saving.
@pytest.mark.filterwarnings("ignore:Checkpoint .* is passed over:RuntimeWarning")
def test_networks_are_trained_side_by_side_and_interrupted_ones_go_on(few_digits, tmp_path, monkeypatch):
    begun = in_time(few_digits, tmp_path, 60.0, workers=2)
    assert begun.slots == 2
    beside, begin = [], begun._begin

    def look(pool):
        begin(pool)
        beside.append([unit for unit in begun._ledger.coming if unit.number in begun._started])

    def interrupt(done):
        if len(begun.history) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(begun, "_begin", look)
    with pytest.raises(KeyboardInterrupt):
        begun.run(interrupt)
    assert max(map(len, beside)) == 2
    found = ledger(tmp_path)
    ended = [entry["unit"]["number"] for entry in found["done"]]
    # The first one has no company, and nothing goes on from what is in progress.
    assert ended[0] == 0
    assert [entry["slots"] for entry in found["done"]] == [1, 2, 2, 2]
    assert [entry["at"] for entry in found["done"]] == sorted(entry["at"] for entry in found["done"])
    assert all(unit.number not in {one.parent for one in units} for units in beside for unit in units)
    assert sorted([*ended, *(entry["number"] for entry in found["coming"])]) == list(range(4 + len(found["coming"])))
    assert len(Ensemble.load(tmp_path).members) == len(found["done"][-1]["members"])
    # Nothing is left for another, but what was in progress is finished, by a single process too.
    again = in_time(few_digits, tmp_path, found["spent"], workers=1)
    ensemble = again.run()
    assert len(again.history) == 4 + len(found["coming"])
    assert again.history[:4] == begun.history
    assert same(ensemble.state_dict(), Ensemble.load(tmp_path).state_dict())


class Futures:
    """In the place of a pool: units end, or fail, when the test says so."""

    def __init__(self):
        self.begun = {}

    def submit(self, task):
        self.begun[task.keywords["number"]] = Future()
        return self.begun[task.keywords["number"]]


@pytest.mark.usefixtures("short")
def test_slots_are_filled_until_they_are_full_and_an_error_of_any_unit_ends_the_budget(few_digits, tmp_path):
    spending = in_time(few_digits, tmp_path, 1000.0, workers=3)
    assert spending.slots == 3
    assert spending._decide_more()
    assert [unit.kind for unit in spending._ledger.coming] == ["first"]
    figures = {"cost": 2.0, "train_loss": 0.9, "alone": 1.0, "loss": 1.0, "members": (0,)}
    spending._ledger.done.append(Done(unit=spending._ledger.coming.pop(), epochs=2, **figures))
    pool = Futures()
    assert spending._decide_more()
    spending._begin(pool)
    units = spending._ledger.coming
    assert [unit.number for unit in units] == list(pool.begun) == [1, 2, 3]
    assert units[0].kind == "longer"
    assert all(unit.parent is None for unit in units[1:])
    # A unit that has ended gives its slot up before those that were begun earlier.
    pool.begun[2].set_result(None)
    assert spending._next_to_end().number == 2
    assert spending._decide_more()
    spending._begin(pool)
    assert list(pool.begun) == [1, 2, 3, 4]
    pool.begun[4].set_exception(MemoryError("no memory"))
    units.remove(units[1])
    with pytest.raises(MemoryError, match="no memory"):
        spending._next_to_end()


@pytest.mark.usefixtures("short")
def test_how_many_are_trained_side_by_side(few_digits, tmp_path, monkeypatch):
    def slots(name, seconds, **more):
        return in_time(few_digits, tmp_path / name, seconds, **more).slots

    assert slots("a", 1000.0) == 1
    assert slots("b", 1000.0, workers=5) == 5
    assert slots("c", 1000.0, workers=0) == torch.get_num_threads()
    assert slots("d", 1000.0, workers=5, clock=time.process_time) == 1
    assert spending(few_digits, tmp_path / "e").slots == 1
    monkeypatch.setattr("dnas_ens.budget.run.SOON", 2000.0)
    assert slots("f", 1000.0, workers=5) == 1
    monkeypatch.setattr("dnas_ens.budget.run.SOON", 0.0)
    begun = in_time(few_digits, tmp_path / "g", 1000.0, workers=5)
    begun._ledger.epoch_seconds = 1000.0 / 2 / 3.5
    assert begun._slots(5) == 3


@pytest.mark.usefixtures("short")
def test_what_an_epoch_costs_among_others(few_digits, tmp_path):
    begun = in_time(few_digits, tmp_path, 1000.0, workers=2)
    unit = Unit(kind="first", number=0, cell=0, parent=None, epochs=10, learning_rate=0.05)
    figures = {"epochs": 10, "train_loss": 1.0, "alone": 1.0, "loss": 1.0, "members": (0,)}
    begun._ledger.done.append(Done(unit=unit, cost=20.0, **figures))
    # Of the first network alone, with a step that takes 1.5 times as long with half of the threads.
    begun._steps_in = {1: 0.2, 2: 0.3}
    assert begun._epoch_cost(0) == pytest.approx(2.0 * 1.5)
    begun._ledger.done.append(Done(unit=replace(unit, number=1), cost=40.0, slots=2, **figures))
    assert begun._epoch_cost(0) == pytest.approx(4.0)
    # Gone on with alone: what was measured alone counts.
    begun.slots = 1
    assert begun._epoch_cost(0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"done": 5},
        {"done": [{"unit": {}}]},
        {"unit": {"kind": "none"}},
        {"unit": {"number": 1}},
        {"slots": 0},
        {"unit": {"cell": -1}},
        {"unit": {"epochs": 0}},
        {"unit": {"parent": 0}},
        {"unit": "first"},
    ],
)
def test_a_ledger_that_no_budget_wrote_is_told(few_digits, tmp_path, wrong):
    spending(few_digits, tmp_path, epochs=1).run()
    file = tmp_path / "budget.json"
    found = read_json(file)
    if isinstance(wrong.get("unit"), dict):
        found["done"][0]["unit"] |= wrong["unit"]
    elif wrong.keys() & {"unit", "slots"}:
        found["done"][0] |= wrong
    else:
        found |= wrong
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"budget\.json"):
        spending(few_digits, tmp_path, epochs=2)


def test_from_python(few_digits, tmp_path):
    ensemble = de.spend(few_digits, 6, folder=tmp_path, channels=4, batch_size=16, device="cpu")
    assert same(ensemble.state_dict(), Ensemble.load(tmp_path).state_dict())
    assert 4 < ledger(tmp_path)["spent"] <= 6
    assert 0 <= ensemble.evaluate(few_digits.test)["accuracy"] <= 1
    before = (tmp_path / "budget.json").read_bytes()
    with pytest.raises(UserError, match=r"recipe\.learning_rate is 0\.05 there and 0\.2 here"):
        de.spend(few_digits, 9, folder=tmp_path, channels=4, batch_size=16, device="cpu", learning_rate=0.2)
    with pytest.raises(UserError, match="The budget is 0 epochs"):
        de.spend(few_digits, 0, folder=tmp_path)
    assert (tmp_path / "budget.json").read_bytes() == before
    (tmp_path / "budget.json").unlink()
    with pytest.raises(UserError, match="are not those of a budget"):
        de.spend(few_digits, 9, folder=tmp_path, channels=4, batch_size=16, device="cpu")
    assert not (tmp_path / "budget.json").exists()


def test_a_short_budget_looks_at_a_part_of_val(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr("dnas_ens.budget.run.LEAST_VAL", 12)
    monkeypatch.setattr("dnas_ens.budget.run.VAL_SHARE", 1e-9)
    given = Given(genotype(0))
    short = Spending(few_digits, RECIPE, amount=Amount(total=0.5), cells=given, folder=tmp_path / "short")
    assert same({"labels": short.val.labels}, {"labels": few_digits.val.drawn(12).labels})
    ensemble = short.run()
    probs = np.mean(ensemble.predict_probs(short.val), axis=0, dtype=np.float64)
    assert float(ensemble.temperature) == pytest.approx(fit_temperature(probs, short.val.labels.numpy()), rel=1e-4)
    # Epochs are counted so that every machine decides alike.
    assert len(spending(few_digits, tmp_path / "epochs").val) == len(few_digits.val)


def test_what_a_recipe_leaves_open_is_measured_once(few_digits, tmp_path):
    cells, recipe = Given(genotype(0)), replace(RECIPE, precision="measured")
    Spending(few_digits, recipe, amount=Amount(total=12, unit="epochs"), cells=cells, folder=tmp_path).run()
    notes = [read_json(path) for path in tmp_path.glob("members/*/member.json")]
    assert len(notes) > 1
    measured = read_json(tmp_path / "execution.json")
    assert [note["execution"] for note in notes] == len(notes) * [{**notes[0]["execution"], **measured}]


def test_cells_that_are_not_those_by_hand_begin_from_a_base(few_digits):
    searched = with_fields(search_preset("smoke"), star_steps=2, pool_size=6)
    assert StarCells(searched, few_digits).known == [PLAIN_CNN]
    (base,) = StarCells(with_fields(searched, num_nodes=2), few_digits).known
    assert base.num_nodes == 2
    assert StarCells(with_fields(searched, base=Path("resnet")), few_digits).known == [RESNET]


def test_a_budget_below_an_epoch_is_refused(few_digits, tmp_path):
    given = Given(genotype(0))
    with pytest.raises(UserError, match="more than the budget"):
        Spending(few_digits, RECIPE, amount=Amount(total=1e-6), cells=given, folder=tmp_path)


def test_who_joins_against_a_search_of_all_beginnings():
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=60)
    logits = 2.0 * np.eye(3)[labels] + generator.normal(size=(5, 60, 3)) * np.array([1, 1.5, 3, 6, 2])[:, None, None]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    def loss(averaged, target, *, fitted=None):
        def at(temperature, average, of):
            scaled = np.log(average) / temperature
            scaled -= np.log(np.exp(scaled).sum(-1, keepdims=True))
            return -scaled[np.arange(len(of)), of].mean()

        fitted_average, fitted_target = (averaged, target) if fitted is None else fitted
        # The temperature has a normal prior on its logarithm, of deviation 0.5.
        prior = 2.0 / len(fitted_target)
        best = minimize_scalar(
            lambda log: at(np.exp(log), fitted_average, fitted_target) + prior * log**2,
            bounds=(-3, 3),
            method="bounded",
        )
        return at(np.exp(best.x), averaged, target)

    chosen = best_set(probs, labels)
    # Greedy by NLL, one at a time; then the size with the least calibrated NLL.
    order = []
    for _ in range(5):
        left = [index for index in range(5) if index not in order]
        nll = [-np.log(probs[[*order, index]].mean(0)[np.arange(60), labels]).mean() for index in left]
        order.append(left[int(np.argmin(nll))])
    sizes = [loss(probs[order[:size]].mean(0), labels) for size in range(1, 6)]
    assert chosen == order[: int(np.argmin(sizes)) + 1]
    assert len(chosen) < 5

    # Cross-fitted: halves are every other image of a class; each is scored with what the other half chose and fitted.
    halves = np.zeros(60, dtype=int)
    for label in range(3):
        places = np.flatnonzero(labels == label)
        halves[places] = (np.arange(len(places)) + label) % 2
    total = 0.0
    for fitted_on, scored_on in ((0, 1), (1, 0)):
        inside, outside = halves == fitted_on, halves == scored_on
        picked = best_set(probs[:, inside], labels[inside])
        total += outside.sum() * loss(
            probs[picked][:, outside].mean(0),
            labels[outside],
            fitted=(probs[picked][:, inside].mean(0), labels[inside]),
        )
    assert cross_fitted_loss(probs, labels) == pytest.approx(total / 60, abs=1e-6)
