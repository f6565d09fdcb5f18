"""Spending a budget: one training after another, each where it is expected to pay most, an ensemble after every one."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from dnas_ens.budget.amount import Amount
from dnas_ens.budget.choice import best_set, cross_fitted_losses
from dnas_ens.budget.forecast import KEPT, NAMES, Done, Forecast, Unit, bases_of, forecasts
from dnas_ens.budget.ledger import LEDGER, Ledger
from dnas_ens.budget.length import Length, val_share
from dnas_ens.config import RetrainConfig, SearchConfig, require
from dnas_ens.config.fields import to_dict
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.storage import MANIFEST
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import fit_temperature
from dnas_ens.nn.execution import Execution
from dnas_ens.nn.network import Network
from dnas_ens.run.files import as_json, read_json
from dnas_ens.space.genotype import Genotype
from dnas_ens.training.members import Plan, build_training, ensemble_of, settled_execution, trained_network
from dnas_ens.training.trainer import MemberTraining
from dnas_ens.training.workers import process_pool
from dnas_ens.types import FloatArray

if TYPE_CHECKING:
    from dnas_ens.run.folder import RunFolder

#: The first network is trained for this share of the budget, and for so many steps at most, so that there is soon an
#: ensemble. In less than so many seconds nobody waits for one, and it is trained as long as one network may be.
FIRST_SHARE, FIRST_STEPS, SOON = 0.1, 500, 60.0
#: Networks are half as wide as the recipe says where the budget is fewer epochs than this.
NARROW_BELOW = 8
#: Epochs, and steps, that a network should have before it is made wider or has company, with augmentation and without:
#: images that never change are soon known. With it a network gains up to 160, unless it knows its images before
#: (docs/log.md).
ENOUGH = {True: (160, 0), False: (12, 400)}
#: Steps of a cycle at least.
CYCLE_STEPS = 200
#: So many times those epochs must be affordable for cells that are found to be worth more than the first known one from
#: the beginning: they are better and take longer. Without augmentation more of the known one are worth as much.
FOUND = {True: 2.5, False: math.inf}
#: Twice the width must leave room for so many networks of that length, and of so many steps, and twice as many for
#: every further doubling; without augmentation several narrow networks are always worth more than a wide one.
WIDE, WIDE_STEPS = {True: 1.0, False: math.inf}, 2400
#: With augmentation it is also taken while epochs take so many times as long at most: on a GPU that a narrow network
#: leaves idle. Up to so many channels.
FREE, WIDEST = 1.25, 128
#: What has been spent is written down this often at least, in seconds, so that a killed process loses no more of it.
SECONDS_BETWEEN_NOTES = 60.0
#: Share of a budget of time that is kept for what is not training.
RESERVE = 0.02
#: Predicting val once takes this share of a budget of time at most, but for so many images: further ones say little of
#: the one or two networks that a short budget pays for.
VAL_SHARE, LEAST_VAL = 0.02, 1000


class Cells(Protocol):
    """Where the budget's cells are from.

    Attributes:
        known: Those that need no search, the cheapest first.
        count: How many there are in all, the known ones included.
        setup_seconds: What finding the others is expected to take.
        relative_cost: What an epoch of the others is expected to take, as a multiple of the first cell's; above 1 where
            they are better too.
    """

    known: Sequence[Genotype]
    count: int
    setup_seconds: float
    relative_cost: float

    def find(self) -> Sequence[Genotype]:
        """Return all cells, the known ones first; called once, when another is wanted."""


class Spending:
    """A budget being spent in a run folder.

    Args:
        recipe: How networks are trained; its epochs and cycles are not read, and its channels are where widths begin.
        amount: The budget.
        cells: Where cells are from.
        clock: Gives the seconds that a budget of time is of; ``time.process_time`` for those of the CPU.
        workers: Networks that a budget of time trains side by side on a CPU, in processes that share the threads; 0 for
            one a thread. Fewer where the time is too short for so many of a useful length, and one with another clock.
    """

    def __init__(
        self,
        data: ImageData,
        recipe: RetrainConfig,
        *,
        amount: Amount,
        cells: Cells,
        folder: Path,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.monotonic,
        workers: int = 1,
    ) -> None:
        self.clock = clock
        self.data, self.recipe, self.amount, self.cells = data, recipe.of_base(), amount, cells
        self.folder, self.device = folder, torch.device(device)
        self._found: Sequence[Genotype] | None = None
        self._networks: dict[int, Network] = {}
        self._val_probs: dict[int, FloatArray] = {}
        self._step_seconds: dict[int, float] = {}
        self._steps_in: dict[int, float] = {}
        self._execution: Execution | None = None
        self._sent: ImageData | None = None
        self._known_losses: dict[tuple[int, ...], FloatArray] = {}
        self._began = clock()
        file = folder / LEDGER
        begun = file.exists()
        of_members = (MANIFEST, "members/*/member.json", "checkpoints/member-*.json")
        require(
            begun or not any(True for pattern in of_members for _ in folder.glob(pattern)),
            f"The networks of {folder} are not those of a budget.",
            "Spend it in another folder, by another --run-dir or none.",
        )
        asked = as_json(to_dict(self.recipe))
        self._ledger = Ledger.read(file, amount, asked) if begun else self._plan(asked)
        self.val = _some(data.val, self._enough_val)
        self.labels = self.val.labels.cpu().numpy()
        self._charged, self._goes_on = self._ledger.spent, {unit.number for unit in self._ledger.coming}
        self._noted = time.monotonic()
        self.slots = self._slots(workers)
        self._started: dict[int, tuple[float, Future[None]]] = {}

    def run(self, on_unit: Callable[[Done], object] | None = None) -> Ensemble:
        """Spend what is left of the budget and return the ensemble.

        Args:
            on_unit: Called after every unit, when the ensemble of all units so far is on disk.
        """
        for done in self._ledger.done:
            self._load(done.unit)
        ensemble = self._save(self._ledger.done[-1].members) if self._ledger.done else None
        with ExitStack() as stack:
            pool: ProcessPoolExecutor | None = None
            # What was spent counts, however it ends.
            stack.callback(self._write)
            while self._decide_more():
                self._write()
                unit = self._ledger.coming[0]
                if self.slots > 1 and self._ledger.done:
                    pool = pool or stack.enter_context(process_pool(self.slots))
                    self._begin(pool)
                    unit = self._next_to_end()
                done = self._do(unit)
                self._ledger.done.append(done)
                ensemble = self._save(done.members)
                self._write()
                self._tell(done)
                if on_unit is not None:
                    on_unit(done)
        assert ensemble is not None, "the first unit always fits"
        return ensemble

    @property
    def history(self) -> Sequence[Done]:
        """The finished units."""
        return self._ledger.done

    def _plan(self, asked: Mapping[str, Any]) -> Ledger:
        """Choose width, cell and length of the first training from measured steps of the cheapest cell."""
        timed = self.amount.unit == "seconds"
        chosen = self.recipe.channels
        epochs: dict[int, float] = {}

        def affordable(channels: int) -> float:
            if channels not in epochs:
                recipe = replace(self.recipe, channels=channels)
                training = self._training(Plan(genotype=self.cells.known[0], recipe=recipe), 0)
                epochs[channels] = self._steps_per_epoch * training.measured_step()
            return self.amount.total / (epochs[channels] if timed else 1.0)

        enough = self._enough
        if timed and affordable(chosen) < NARROW_BELOW:
            chosen = max(4, chosen // 8 * 4)
        wide = WIDE[self.recipe.augment] * max(enough, WIDE_STEPS / self._steps_per_epoch)
        while timed and affordable(chosen) >= 2 * wide and self._or_none(affordable, 2 * chosen) >= wide:
            chosen, wide = 2 * chosen, 2 * wide
        free = timed and self.recipe.augment and self._waits_for_host
        while free and 2 * chosen <= WIDEST and FREE * self._or_none(affordable, 2 * chosen) >= affordable(chosen):
            chosen *= 2
        self.recipe, count = replace(self.recipe, channels=chosen), affordable(chosen)
        most = max(4, FIRST_STEPS // self._steps_per_epoch)
        first = int(max(1, min(FIRST_SHARE * count, most)))
        if timed and self.amount.total <= SOON:
            # Few steps were measured: how many of many epochs there is time for shows while it is trained.
            first = int(max(1, min(enough, 2 * count if count >= NARROW_BELOW else count)))
        taken = epochs[chosen]
        if count < 1:
            raise UserError(
                f"An epoch takes {taken:.0f} s, which is more than the budget.",
                f"Give --budget {2 * taken + 1:.0f}s or more, or fewer images by --limit-train.",
            )
        self._say(
            f"an epoch of {len(self.data.train):,} images takes {taken:.2f} s with C={chosen}; the budget is "
            f"about {count:,.0f} epochs, the first training up to {min(first, int(count))}"
        )
        better = self.cells.relative_cost > 1 and self.cells.count > len(self.cells.known)
        first_cell = len(self.cells.known) if better and count >= FOUND[self.recipe.augment] * enough else 0
        return Ledger(
            recipe=asked,
            channels=chosen,
            first_cell=first_cell,
            first_epochs=first,
            epoch_seconds=taken,
            done=[],
            coming=[],
        )

    @property
    def _enough_val(self) -> int:
        """How many images of val decide."""
        if self.amount.unit == "epochs":
            return len(self.data.val)
        an_image = val_share(1, len(self.data.train)) * self._ledger.epoch_seconds
        return max(LEAST_VAL, int(VAL_SHARE * self.amount.total / an_image))

    def _slots(self, workers: int) -> int:
        """Return how many networks are trained side by side once there is a first one."""
        if self.amount.unit == "epochs" or self.device.type != "cpu" or self.clock is not time.monotonic:
            # Epochs are counted so that every machine decides alike; processes have no other clock in common.
            return 1
        affordable = self.amount.total / (self._enough * self._ledger.epoch_seconds)
        if self.amount.total <= SOON or affordable < 2:
            # Starting processes takes seconds.
            return 1
        slots = max(1, min(workers or torch.get_num_threads(), int(affordable)))
        if slots > 1:
            self._say(f"after the first network up to {slots} side by side")
        return slots

    @property
    def _waits_for_host(self) -> bool:
        """Whether a narrow network may leave the device idle."""
        return self.device.type == "cuda"

    @staticmethod
    def _or_none(affordable: Callable[[int], float], channels: int) -> float:
        """Return how many epochs of a width are affordable, none where it does not fit in memory."""
        try:
            return affordable(channels)
        except torch.OutOfMemoryError:
            return 0.0

    @property
    def _enough(self) -> float:
        """Epochs that a network should have before it is wider or has company, unless it knows its images before."""
        epochs, steps = ENOUGH[self.recipe.augment]
        return max(epochs, steps / self._steps_per_epoch)

    @property
    def _steps_per_epoch(self) -> int:
        return max(1, len(self.data.train) // self.recipe.batch_size)

    def _training(self, plan: Plan, number: int) -> MemberTraining:
        build = partial(build_training, plan, self.data, number=number, device=self.device, folder=self.folder)
        self._execution = self._execution or settled_execution(build(), self.folder)
        return build(execution=self._execution)

    def _plan_of(self, unit: Unit) -> Plan:
        recipe = replace(
            self.recipe,
            channels=self._ledger.channels,
            epochs=unit.epochs,
            learning_rate=unit.learning_rate,
        )
        return Plan(genotype=self._cell(unit.cell), recipe=recipe, parent=unit.parent)

    def _cell(self, index: int) -> Genotype:
        return self.cells.known[index] if index < len(self.cells.known) else self._all_cells()[index]

    def _all_cells(self) -> Sequence[Genotype]:
        if self._found is None:
            self._found = self.cells.find()
        return self._found

    def _decide_more(self) -> bool:
        """Decide on units as long as there is room beside those in progress; return whether there are any."""
        coming = self._ledger.coming
        slots = self.slots if self._ledger.done else 1
        while sum(not self._is_trained(unit) for unit in coming) < slots and (unit := self._decide()) is not None:
            coming.append(unit)
        return bool(coming)

    def _is_trained(self, unit: Unit) -> bool:
        """Return whether a unit that was begun beside others has been trained."""
        return unit.number in self._started and self._started[unit.number][1].done()

    def _begin(self, pool: ProcessPoolExecutor) -> None:
        """Begin what has been decided, as far as there are free slots."""
        # Sending a tensor moves its storage and leaves NumPy views dangling, so a copy is sent.
        self._sent = self._sent or copy.deepcopy(self.data)
        for unit in self._ledger.coming:
            running = sum(not future.done() for _, future in self._started.values())
            if unit.number not in self._started and running < self.slots:
                plan, number = self._plan_of(unit), unit.number
                task = partial(
                    _train_in_time,
                    plan,
                    self._sent,
                    number=number,
                    folder=self.folder,
                    execution=self._execution,
                    num_val=len(self.val),
                    length=self._length_of(unit),
                )
                self._started[number] = self.clock(), pool.submit(task)

    def _next_to_end(self) -> Unit:
        """Wait until one of the units that have been begun has ended, and return it; its error is raised here."""
        begun = {self._started[unit.number][1]: unit for unit in self._ledger.coming if unit.number in self._started}
        while not (ended := wait(begun, timeout=SECONDS_BETWEEN_NOTES, return_when=FIRST_COMPLETED).done):
            self._write()
        for future in ended:
            future.result()
        return next(unit for future, unit in begun.items() if future in ended)

    def _decide(self) -> Unit | None:
        if not self._ledger.done:
            cell = self._ledger.first_cell
            return Unit(
                kind="first",
                number=0,
                # There may be fewer cells than were expected.
                cell=min(cell, len(self._all_cells()) - 1) if cell else 0,
                parent=None,
                epochs=self._ledger.first_epochs,
                learning_rate=self.recipe.learning_rate,
            )
        options = self._forecasts()
        if options and self._found is None and options[0].unit.cell >= len(self.cells.known):
            # What is found decides once more: there may be fewer cells than were expected, or dearer ones.
            self._all_cells()
            options = self._forecasts()
        return options[0].unit if options else None

    def _forecasts(self) -> list[Forecast]:
        timed = self.amount.unit == "seconds"
        left = self.amount.total * (1 - self._reserve if timed else 1) - self._spent()
        history, coming = list(self._ledger.done), self._ledger.coming
        for unit in coming:
            history.append(Done.expected(unit, history))
        return forecasts(
            history,
            left=self.slots * left - sum(map(self._still_takes, coming)),
            longest=left,
            busy={unit.number for unit in coming},
            epoch_cost=self._epoch_cost,
            num_cells=len(self._found) if self._found is not None else self.cells.count,
            learning_rate=self.recipe.learning_rate,
            enough=self._enough,
            shortest_cycle=max(1, math.ceil(CYCLE_STEPS / self._steps_per_epoch)),
            setup_cost=self.cells.setup_seconds if timed and self._found is None else 0.0,
        )

    def _still_takes(self, unit: Unit) -> float:
        """Return what a unit in progress is expected to take from now on."""
        if self._is_trained(unit):
            return 0.0
        begun = self._started[unit.number][0] if unit.number in self._started else self.clock()
        return max(0.0, unit.epochs * self._epoch_cost(unit.cell) - (self.clock() - begun))

    def _epoch_cost(self, cell: int) -> float:
        """Return what an epoch of a cell costs: as measured in its units, else by its steps and the others' units."""
        if self.amount.unit == "epochs":
            return 1.0
        # As many side by side as there are now; the first network, or all that an earlier process trained, had others.
        measured = [done for done in self._ledger.done if done.slots == self.slots] or self._ledger.done
        costs = {}
        for trained in {done.unit.cell for done in measured}:
            own = [done for done in measured if done.unit.cell == trained]
            cost = sum(done.cost * self._slower(done.slots) for done in own)
            costs[trained] = cost / sum(done.epochs for done in own)
        if cell in costs:
            return costs[cell]
        # An epoch takes more than its steps, by what it was for the cells that were trained.
        beside = [cost / self._epoch_of_steps(other) for other, cost in costs.items()]
        return self._epoch_of_steps(cell) * sum(beside) / len(beside)

    def _slower(self, slots: int) -> float:
        """How many times as long a step takes with the threads of a slot now as with those of one of so many slots."""
        return 1.0 if slots == self.slots else self._step_in(self.slots) / self._step_in(slots)

    def _step_in(self, slots: int) -> float:
        """Return the seconds of a step of the first cell with the threads of a slot, by a trial."""
        if slots not in self._steps_in:
            recipe = replace(self.recipe, channels=self._ledger.channels)
            training = self._training(Plan(genotype=self.cells.known[0], recipe=recipe), 0)
            threads = torch.get_num_threads()
            torch.set_num_threads(max(1, threads // slots))
            try:
                self._steps_in[slots] = training.measured_step()
            finally:
                torch.set_num_threads(threads)
        return self._steps_in[slots]

    def _epoch_of_steps(self, cell: int) -> float:
        """Return what the steps of an epoch take by a trial, or are expected to before a cell is found."""
        if cell == 0:
            return self._ledger.epoch_seconds
        if cell >= len(self.cells.known) and (self._found is None or self.slots > 1):
            # Beside others a trial would take longer than those of the cells it is compared with.
            return self._ledger.epoch_seconds * self.cells.relative_cost
        if cell not in self._step_seconds:
            recipe = replace(self.recipe, channels=self._ledger.channels)
            plan = Plan(genotype=self._cell(cell), recipe=recipe)
            self._step_seconds[cell] = self._training(plan, 0).measured_step()
        return self._step_seconds[cell] * self._steps_per_epoch

    def _do(self, unit: Unit) -> Done:
        begun = self.clock()
        self._load(unit)
        note = read_json(self.folder / "members" / str(unit.number) / "member.json")
        if self.amount.unit == "epochs":
            cost = float(note["epochs"])
        elif unit.number in self._started:
            cost = float(note["wall_seconds"])
        else:
            cost = self.clock() - begun
            if unit.number in self._goes_on:
                # With what earlier processes did of it.
                cost = max(cost, float(note["wall_seconds"]))
        *before, _ = numbers = list(self._networks)
        alone, losses = self._losses(unit.number), self._losses(*numbers)
        alone_error = error = 0.0
        if unit.parent is not None:
            alone_error = _standard_error(self._losses(unit.parent) - alone)
        if before:
            error = _standard_error(self._losses(*before) - losses)
        return Done(
            unit=unit,
            epochs=note["epochs"],
            cost=cost,
            train_loss=note["train_loss"],
            alone=float(alone.mean()),
            loss=float(losses.mean()),
            members=tuple(sorted(numbers[place] for place in best_set(self._stacked(numbers), self.labels))),
            alone_error=alone_error,
            error=error,
            at=self._spent() + (cost if self.amount.unit == "epochs" else 0.0),
            slots=self.slots if unit.number in self._started else 1,
        )

    def _stacked(self, numbers: Sequence[int]) -> FloatArray:
        return np.stack([self._val_probs[number] for number in numbers])

    def _losses(self, *numbers: int) -> FloatArray:
        """Return the cross-fitted losses on val (N,) of the best set of some networks, computed once."""
        if numbers not in self._known_losses:
            self._known_losses[numbers] = cross_fitted_losses(self._stacked(numbers), self.labels)
        return self._known_losses[numbers]

    def _load(self, unit: Unit) -> None:
        """Train the unit's network, or take it from the folder if it is finished there."""
        training = self._training(self._plan_of(unit), unit.number)
        training.val, training.val_measurements = self.val.to(self.device), 1
        length = Length(training, **self._length_of(unit), clock=self.clock)

        def on_epoch(scalars: Mapping[str, float]) -> None:
            length(scalars)
            if time.monotonic() - self._noted >= SECONDS_BETWEEN_NOTES:
                self._write()

        training.on_epoch = on_epoch
        self._networks[unit.number] = trained_network(training, folder=self.folder, num_members=unit.number + 1)
        self._val_probs[unit.number] = training.val_probs()

    def _length_of(self, unit: Unit) -> dict[str, Any]:
        """Return what decides how long a unit's training becomes, by argument of `Length`."""
        ends = self._ends if self.amount.unit == "seconds" else None
        if unit.kind == "longer":
            by_number = {done.unit.number: done for done in self._ledger.done}
            line, parent = list[Done](), unit.parent
            while parent is not None:
                line.insert(0, by_number[parent])
                parent = line[0].unit.parent
            (base,) = bases_of(line)
            return {"ends": ends, "worth": KEPT * base.epochs, "at_most": self._enough}
        if unit.kind == "cycle":
            return {"ends": ends}
        # Beside others it may begin before it is known how long they are of use.
        return {"ends": ends, "at_most": self._enough, "looks": unit.kind == "first" or self.slots > 1}

    @property
    def _ends(self) -> float:
        """When on the clock no more is to be trained."""
        return self.amount.total * (1 - self._reserve) - self._charged + self._began

    @property
    def _reserve(self) -> float:
        """Share of a budget of time that is kept for what is not training."""
        # Networks that end together wait for one another while val is predicted.
        share = val_share(len(self.val), len(self.data.train))
        val = self._ledger.epoch_seconds * share / self.amount.total
        return RESERVE + (self.slots - 1) * val

    def _save(self, members: Sequence[int]) -> Ensemble:
        probs = self._stacked(members)
        ensemble = ensemble_of(
            [self._networks[number] for number in members],
            temperature=fit_temperature.of(probs.mean(axis=0, dtype=np.float64), self.labels),
            data=self.data,
        )
        ensemble.save(self.folder, overwrite=True, numbers=members, num_trained=max(self._networks) + 1)
        return ensemble

    def _spent(self) -> float:
        """Return what is spent: the time of this process and of earlier ones, or the epochs."""
        if self.amount.unit == "epochs":
            return float(sum(done.epochs for done in self._ledger.done))
        return self._charged + self.clock() - self._began

    def _write(self) -> None:
        self._noted, self._ledger.spent = time.monotonic(), self._spent()
        done = {done.unit.number for done in self._ledger.done}
        self._ledger.coming = [unit for unit in self._ledger.coming if unit.number not in done]
        self._ledger.write(self.folder / LEDGER, self.amount)

    def _tell(self, done: Done) -> None:
        before = self._ledger.done[-2].loss if len(self._ledger.done) > 1 else None
        change = "" if before is None else f" ({done.loss - before:+.4f}"
        if change and self.amount.unit == "seconds":
            change += f", {60 * (done.loss - before) / max(done.cost, 1e-9):+.4f} a minute"  # type: ignore[operator]
        change += ")" if change else ""
        self._say(
            f"{NAMES[done.unit.kind]}: ensemble of {len(done.members)}, calibrated NLL on val {done.loss:.4f}{change}; "
            f"{self.amount.shown(self._spent())} spent"
        )

    def _say(self, text: str) -> None:
        print(f"budget: {text}", file=sys.stderr, flush=True)


def _train_in_time(
    plan: Plan,
    data: ImageData,
    *,
    number: int,
    folder: Path,
    execution: Execution | None,
    num_val: int,
    length: dict[str, Any],
) -> None:
    """Train a network into the folder, in a process of its own."""
    training = build_training(plan, data, number=number, device="cpu", folder=folder, execution=execution)
    training.val, training.val_measurements = _some(data.val, num_val), 1
    training.on_epoch = Length(training, **length)
    trained_network(training, folder=folder, num_members=number + 1)


def _some(val: Split, count: int) -> Split:
    return val if count >= len(val) else val.drawn(count)


def _standard_error(differences: FloatArray) -> float:
    return float(differences.std(ddof=1) / len(differences) ** 0.5) if len(differences) > 1 else 0.0


def spend_budget(
    config: SearchConfig,
    data: ImageData,
    recipe: RetrainConfig,
    *,
    amount: Amount,
    device: torch.device | str = "cpu",
    run: RunFolder,
    workers: int = 1,
) -> Ensemble:
    """Spend a budget in a run folder; an interruption leaves the best ensemble so far there.

    Args:
        config: How other cells are searched.
        recipe: How networks are trained; widths and lengths are the budget's.
        amount: The budget; more than before goes on with what was done.
        workers: See `Spending`.
    """
    from dnas_ens.budget.cells import StarCells

    cells = StarCells(config, data, device=device, run=run)
    spending = Spending(data, recipe, amount=amount, cells=cells, folder=run.path, device=device, workers=workers)

    def log(done: Done) -> None:
        scalars = {"val_nll": done.loss, "val_nll_alone": done.alone, "members": float(len(done.members))}
        run.metrics.log(scalars, step=done.unit.number, epoch=done.unit.number, phase="budget")

    # A process may have been killed between a unit and its line.
    logged = {line["step"] for line in run.metrics.read("budget")}
    for done in spending.history:
        if done.unit.number not in logged:
            log(done)
    try:
        return spending.run(log)
    except KeyboardInterrupt as interrupt:
        if spending.history:
            done = spending.history[-1]
            interrupt.add_note(
                f"{run.path} holds the best ensemble so far: {len(done.members)} networks, calibrated NLL on val "
                f"{done.loss:.4f}"
            )
        raise
