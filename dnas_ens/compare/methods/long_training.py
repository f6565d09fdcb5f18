"""One network trained as long as our M members together, and its snapshots (arXiv 1704.00109).

What is made of such a training (snapshots, averages of weights) goes along with it and is kept in its checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dnas_ens.compare.frontier import Option, option
from dnas_ens.compare.methods.comparison import Comparison, Result
from dnas_ens.ensembles.snapshot import CosineCycles, Schedule, SnapshotRecorder
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.run.checkpoint import CheckpointStore, RegularStates
from dnas_ens.run.progress import CostMeter, Progress
from dnas_ens.training.trainer import MemberTraining, NetworkTraining


class Companion(Protocol):
    """What goes along with a training: it sets the learning rates and keeps models."""

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate an epoch (from 0) begins with."""

    def after_step(self) -> object:
        """Take note of a step of the optimiser; the learning rate of the next may be set."""

    def after_epoch(self, epochs_done: int) -> object:
        """Take note of an epoch; 1 after the first."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state it needs to continue."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""


C = TypeVar("C", bound=Companion)


class Cycles:
    """A schedule of learning rates that leaves snapshots."""

    def __init__(self, training: NetworkTraining[Any], schedule: Schedule) -> None:
        self.recorder = SnapshotRecorder(
            training.network, training.optimizer, schedule, steps_per_epoch=training.steps_per_epoch
        )
        self.after_step = self.recorder.step
        self.state_dict, self.load_state_dict = self.recorder.state_dict, self.recorder.load_state_dict

    def learning_rate(self, _epoch: int) -> float:
        """Return the learning rate of the coming step."""
        return self.recorder.learning_rate

    def after_epoch(self, _epochs_done: int) -> None:
        """Nothing is done by epochs."""


def train_on(
    training: NetworkTraining[Any],
    companion: Companion,
    folder: Path,
    *,
    epochs: int,
    save_every: int,
    description: str,
) -> dict[str, float]:
    """Train up to a number of epochs, from the newest checkpoint where there is one.

    Args:
        folder: Holds checkpoints/.
        save_every: Epochs from one checkpoint to the next, where they take no longer than a minute.

    Returns:
        The scalars of the last epoch, and the seconds of all starts.
    """
    store = CheckpointStore(folder / "checkpoints", name="training")
    newest = store.load_newest()
    before, scalars = None, {}
    # As text, since a study's recipe may clip no gradient, at infinity. One of another length is begun afresh.
    identity = json.dumps(training.identity(), default=str)
    if newest is not None and newest[1].get("identity") == identity:
        training.load_state_dict(newest[1]["training"])
        companion.load_state_dict(newest[1]["companion"])
        before, scalars = newest[1]["seconds"], newest[1]["scalars"]
    cost = CostMeter(before)

    def save() -> None:
        state = {"training": training.state_dict(), "companion": companion.state_dict()}
        steps = training.epoch * training.steps_per_epoch + training.steps_done
        store.save(steps, {**state, "scalars": scalars, "seconds": cost.seconds(), "identity": identity})

    states = RegularStates(save)

    def on_step() -> None:
        companion.after_step()
        states.after_step(done=training.steps_done, of=training.steps_per_epoch)

    with Progress(
        epochs,
        description=description,
        steps_per_epoch=training.steps_per_epoch,
        initial_epoch=training.epoch,
    ) as progress:
        while training.epoch < epochs:
            rate = companion.learning_rate(training.epoch)
            scalars = training.run_epoch(progress, learning_rate=rate, on_step=on_step)
            companion.after_epoch(training.epoch)
            progress.epoch(training.epoch, **scalars)
            if training.epoch % save_every == 0:
                states.after_epoch()
    return {**scalars, **cost.seconds()}


def long_epochs(comparison: Comparison) -> int:
    """Return the epochs of M members together."""
    return comparison.num_members * comparison.recipe.epochs


def train_long(
    comparison: Comparison, name: str, companion_of: Callable[[MemberTraining], C]
) -> tuple[MemberTraining, C, float]:
    """Train a network of the base cell for as many epochs as our members together, or continue where it stopped.

    Returns:
        The training, its companion, and the CPU seconds of all starts.
    """
    epochs, recipe = long_epochs(comparison), comparison.recipe
    training = MemberTraining(
        comparison.base,
        comparison.data,
        comparison.recipe_of(name, epochs=epochs),
        index=0,
        device=comparison.device,
    )
    companion = companion_of(training)
    folder = comparison.place_of(name)
    with comparison.threads_of_a_member():
        found = train_on(training, companion, folder, epochs=epochs, save_every=recipe.epochs, description=name)
    return training, companion, found["cpu_seconds"]


def snapshots(comparison: Comparison) -> Iterator[Result]:
    """One network of the base cell trained as long as our M members, in M cosine cycles (arXiv 1704.00109)."""
    cycles, search = comparison.num_members, comparison.search_seconds

    def make() -> tuple[Predictions, dict[str, Any]]:
        schedule = CosineCycles(
            epochs=long_epochs(comparison),
            num_cycles=cycles,
            initial_learning_rate=comparison.recipe.learning_rate,
        )
        _, along, seconds = train_long(comparison, "snapshots", lambda training: Cycles(training, schedule))
        return comparison.predict(along.recorder.members()), {"cpu_seconds": seconds}

    predictions, made = comparison.kept("snapshots", make)
    training = float(made["cpu_seconds"])
    options = snapshot_options(predictions, search, training / cycles, epochs=comparison.recipe.epochs)
    for position, (name, members) in enumerate(
        (
            (f"snapshots of the base cell ({cycles} cycles)", range(cycles)),
            ("its last three snapshots", range(max(0, cycles - 3), cycles)),
            ("its last snapshot alone", range(cycles - 1, cycles)),
        )
    ):
        yield Result(
            name=name,
            label="" if position else "snapshots",
            predictions=predictions.of_members(members),
            networks=1,
            cpu_seconds=search + training,
            search_seconds=search,
            options=() if position else options,
        )


def snapshot_options(
    predictions: Predictions, search_seconds: float, cycle_seconds: float, *, epochs: int
) -> Sequence[Option]:
    """Return the last k snapshots after c cycles, for every k and c: cycles are alike, so a training may end with any.

    ``epochs`` are those of a cycle.
    """
    return [
        option(
            predictions,
            [range(first, cycles)],
            cpu_seconds=[search_seconds + cycles * cycle_seconds],
            epochs=cycles * epochs,
            spent=f"last {cycles - first} of {cycles} × {epochs}",
        )
        for cycles in range(1, len(predictions.val_probs) + 1)
        for first in range(cycles)
    ]
