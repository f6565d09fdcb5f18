"""One network of the base cell that is trained as long as our M members together, for the methods that need one.

What is made of it (snapshots, averages of weights) goes along with the training and is kept in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from dnas_ens.training.trainer import MemberTraining
    from methods.comparison import Comparison


class Companion(Protocol):
    """What goes along with a training: it sets the learning rates and keeps models."""

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate an epoch (from 0) begins with."""

    def after_step(self) -> object:
        """Take note of a step of the optimiser; the learning rate of the next may be set."""

    def after_epoch(self, epochs_done: int) -> object:
        """Take note of an epoch; 1 after the first."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it needs to go on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""


C = TypeVar("C", bound=Companion)


def long_epochs(comparison: Comparison) -> int:
    """Return the epochs of M members together."""
    return comparison.num_members * comparison.recipe.epochs


def train_long(
    comparison: Comparison, name: str, companion_of: Callable[[MemberTraining], C]
) -> tuple[MemberTraining, C, float]:
    """Train a network of the base cell for as many epochs as our members together, or go on where it stopped.

    Args:
        comparison: The run it stands beside.
        name: Folder of the method; it decides the seeds.
        companion_of: Makes what goes along.

    Returns:
        The training, what went along, and the CPU seconds of all sittings.
    """
    from dnas_ens.run.checkpoint import CheckpointStore
    from dnas_ens.run.progress import CostMeter, Progress
    from dnas_ens.training.trainer import MemberTraining

    epochs = long_epochs(comparison)
    training = MemberTraining(
        comparison.base,
        comparison.data,
        comparison.recipe_of(name, epochs=epochs),
        index=0,
        device=comparison.device,
    )
    companion = companion_of(training)
    store = CheckpointStore(comparison.baseline(name) / "checkpoints", name="training")
    newest, before = store.load_newest(), None
    if newest is not None:
        training.load_state_dict(newest[1]["training"])
        companion.load_state_dict(newest[1]["companion"])
        before = newest[1]["seconds"]
    cost = CostMeter(before)
    with Progress(
        epochs, description=name, steps_per_epoch=training.steps_per_epoch, initial_epoch=training.epoch
    ) as progress:
        while training.epoch < epochs:
            rate = companion.learning_rate(training.epoch)
            scalars = training.run_epoch(progress, learning_rate=rate, on_step=companion.after_step)
            companion.after_epoch(training.epoch)
            progress.epoch(training.epoch, **scalars)
            if training.epoch % comparison.recipe.epochs == 0:
                state = {"training": training.state_dict(), "companion": companion.state_dict()}
                store.save(training.epoch, {**state, "seconds": cost.seconds()})
    return training, companion, cost.seconds()["cpu_seconds"]
