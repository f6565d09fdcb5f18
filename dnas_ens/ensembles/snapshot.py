"""Snapshots: an ensemble from one training run whose learning rate goes up and down.

Snapshot ensembles (Huang et al., arXiv 1704.00109) and fast geometric ensembling (Garipov et al., arXiv
1802.10026) differ in the learning rate alone. In any training loop::

    recorder = SnapshotRecorder(
        model, optimizer, CosineCycles(epochs=40, num_cycles=8, initial_learning_rate=0.1), steps_per_epoch=391
    )
    for inputs, labels in batches:
        ...
        optimizer.step()
        recorder.step()
    ensemble = Ensemble(list(recorder.members(last=3)))

For weights by log-loss give `dnas_ens.ensembles.weighting.fit_weights` the probabilities that
`dnas_ens.training.prediction.predict_members` computes on validation batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dnas_ens.ensembles.averaging import check_clone, check_fit, clone, copied_to_cpu
from dnas_ens.ensembles.selection import greedy_selection
from dnas_ens.errors import UserError
from dnas_ens.training.prediction import Batches, predict_members
from dnas_ens.training.step import set_learning_rate


class Schedule(Protocol):
    """A learning rate for every step of a training, from 1, and the steps after which a snapshot is due.

    A dataclass, so that a resumed training can tell whether its schedule is the same.
    """

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step."""

    def snapshot_after(self, step: int, steps_per_epoch: int) -> bool:
        """Tell whether a snapshot is due after a step."""

    def num_steps(self, steps_per_epoch: int) -> int | None:
        """Return how many steps there are; None if it has no end."""


@dataclass(frozen=True, kw_only=True)
class CosineCycles:
    """Cosine annealing with restarts (arXiv 1704.00109, equation 2).

    alpha(t) = alpha_0 / 2 (cos(pi mod(t - 1, c) / c) + 1) with c = ceil(T / M), at every step t = 1..T. A snapshot
    is due at every cycle's end, where alpha is lowest, and after T, which may cut the last cycle short.

    Args:
        epochs: Length of the training; T is its number of steps.
        num_cycles: M, 1 or more.
        initial_learning_rate: alpha_0, at which every cycle starts; above 0.

    Raises:
        UserError: A value that is not possible.
    """

    epochs: int
    num_cycles: int
    initial_learning_rate: float

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.num_cycles < 1:
            raise UserError(
                f"{self.epochs} epochs of {self.num_cycles} cycles were asked for.",
                "Ask for 1 or more of both.",
            )
        _check_learning_rate("initial_learning_rate", self.initial_learning_rate)

    def learning_rate_at(self, step: int, steps_per_epoch: int = 1) -> float:
        """Return alpha(t) for t = step in 1..T."""
        cycle = self._cycle(steps_per_epoch)
        return self.initial_learning_rate / 2.0 * (math.cos(math.pi * ((step - 1) % cycle) / cycle) + 1.0)

    def snapshot_after(self, step: int, steps_per_epoch: int = 1) -> bool:
        """Tell whether a cycle ends with a step in 1..T."""
        return step % self._cycle(steps_per_epoch) == 0 or step == self.num_steps(steps_per_epoch)

    def num_steps(self, steps_per_epoch: int = 1) -> int:
        """Return T."""
        return self.epochs * steps_per_epoch

    def _cycle(self, steps_per_epoch: int) -> int:
        steps = self.num_steps(steps_per_epoch)
        cycle = -(-steps // self.num_cycles)
        if cycle * (self.num_cycles - 1) >= steps:
            raise UserError(
                f"Cycles of {cycle} steps come to an end before {self.num_cycles} of them in {steps} steps.",
                f"Ask for {-(-steps // cycle)} cycles, or for a number that divides the steps.",
            )
        return cycle


@dataclass(frozen=True, kw_only=True)
class BaseThenCycles:
    """One long cosine, the base, and then short cycles from a lower rate, as `--cycles` has them for a member.

    A member's cosines go down by epochs instead, and where its last weights are averaged to a quarter of their rate.

    alpha(t) = alpha_0 / 2 (cos(pi (t - 1) / B) + 1) for t = 1..B; after it, in H cycles of c steps,
    alpha_c / 2 (cos(pi mod(t - 1 - B, c) / c) + 1). A snapshot is due at the end of the base and of every cycle. Where
    epochs are few, a longer base is worth more; past the point where it gains, a cycle costs a fraction of a network.

    Args:
        epochs: Of the base, 1 or more; B is its number of steps.
        learning_rate: alpha_0, above 0.
        cycles: H, 0 or more.
        cycle_epochs: Of one cycle, 1 or more; c is its number of steps.
        cycle_learning_rate: alpha_c, above 0.

    Raises:
        UserError: A value that is not possible.
    """

    epochs: int
    learning_rate: float
    cycles: int
    cycle_epochs: int
    cycle_learning_rate: float

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.cycles < 0 or self.cycle_epochs < 1:
            raise UserError(
                f"A base of {self.epochs} epochs and {self.cycles} cycles of {self.cycle_epochs} were asked for.",
                "Ask for 1 or more epochs, and for 0 or more cycles.",
            )
        _check_learning_rate("learning_rate", self.learning_rate)
        _check_learning_rate("cycle_learning_rate", self.cycle_learning_rate)

    def learning_rate_at(self, step: int, steps_per_epoch: int = 1) -> float:
        """Return alpha(t) for t = step from 1."""
        base, cycle = self.epochs * steps_per_epoch, self.cycle_epochs * steps_per_epoch
        if step <= base:
            return self.learning_rate / 2.0 * (math.cos(math.pi * (step - 1) / base) + 1.0)
        return self.cycle_learning_rate / 2.0 * (math.cos(math.pi * ((step - 1 - base) % cycle) / cycle) + 1.0)

    def snapshot_after(self, step: int, steps_per_epoch: int = 1) -> bool:
        """Tell whether the base or a cycle ends with a step."""
        base = self.epochs * steps_per_epoch
        return step >= base and (step - base) % (self.cycle_epochs * steps_per_epoch) == 0

    def num_steps(self, steps_per_epoch: int = 1) -> int:
        """Return the steps of the base and all cycles."""
        return (self.epochs + self.cycles * self.cycle_epochs) * steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class TriangularCycles:
    """The triangular cycle of fast geometric ensembling (arXiv 1802.10026, section 4.1), without an end.

    With t(i) = (mod(i - 1, c) + 1) / c at step i and cycles of c steps:
    alpha(i) = (1 - 2 t) alpha_1 + 2 t alpha_2 for t <= 1/2, else (2 - 2 t) alpha_2 + (2 t - 1) alpha_1.
    A snapshot is due where alpha is lowest: in the middle of a cycle. It is meant for a model that has been
    trained already.

    Args:
        epochs_per_cycle: c in epochs; the paper uses 2 and 4. The number of steps must be even.
        highest_learning_rate: alpha_1, at the ends of a cycle.
        lowest_learning_rate: alpha_2, in its middle; above 0 and below alpha_1.

    Raises:
        UserError: A value that is not possible.
    """

    epochs_per_cycle: int
    highest_learning_rate: float
    lowest_learning_rate: float

    def __post_init__(self) -> None:
        if self.epochs_per_cycle < 1:
            raise UserError(f"A cycle of {self.epochs_per_cycle} epochs was asked for.", "Ask for 1 or more.")
        _check_learning_rate("highest_learning_rate", self.highest_learning_rate)
        _check_learning_rate("lowest_learning_rate", self.lowest_learning_rate)
        if self.lowest_learning_rate >= self.highest_learning_rate:
            raise UserError(
                f"The lowest learning rate {self.lowest_learning_rate} is not below the highest, "
                f"{self.highest_learning_rate}.",
                "Exchange them, or give a lower one.",
            )

    def learning_rate_at(self, step: int, steps_per_epoch: int = 1) -> float:
        """Return alpha(i) for i = step from 1."""
        cycle = self._cycle(steps_per_epoch)
        position = ((step - 1) % cycle + 1) / cycle
        share = 2.0 * position if position <= 0.5 else 2.0 - 2.0 * position
        return (1.0 - share) * self.highest_learning_rate + share * self.lowest_learning_rate

    def snapshot_after(self, step: int, steps_per_epoch: int = 1) -> bool:
        """Tell whether a step from 1 is the middle of a cycle."""
        cycle = self._cycle(steps_per_epoch)
        return step % cycle == cycle // 2

    def num_steps(self, steps_per_epoch: int = 1) -> None:
        """Return None: the cycles go on for as long as the training does."""

    def _cycle(self, steps_per_epoch: int) -> int:
        steps = self.epochs_per_cycle * steps_per_epoch
        if steps % 2:
            raise UserError(f"A cycle of {steps} steps has no middle.", "Let a cycle have an even number of epochs.")
        return steps


class SnapshotRecorder:
    """Sets the learning rate of a training and copies the model at the ends of its cycles.

    The first learning rate is set at once; call `step` after every step of the optimiser, and no other
    scheduler. All parameter groups get the same learning rate; momentum is kept over a restart, as in the paper.

    Args:
        model: The model that is trained, any module.
        schedule: `CosineCycles`, `TriangularCycles` or another dataclass with their methods.
        steps_per_epoch: Steps of the optimiser in an epoch, 1 or more; with 1 a "step" may be an epoch.

    Raises:
        UserError: Fewer than one step an epoch, a schedule that does not divide into such epochs, or a model that
            cannot be copied (see `dnas_ens.ensembles.averaging.clone`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        steps_per_epoch: int,
    ) -> None:
        if steps_per_epoch < 1:
            raise UserError(f"An epoch of {steps_per_epoch} steps was asked for.", "Ask for 1 or more.")
        check_clone(model)
        self.model, self.optimizer = model, optimizer
        self.schedule, self.steps_per_epoch = schedule, steps_per_epoch
        self.steps_done = 0
        self.snapshots: list[dict[str, Any]] = []
        self.snapshot_steps: list[int] = []
        set_learning_rate(self.optimizer, self.learning_rate)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the coming step; after the last one it stays."""
        end = self.schedule.num_steps(self.steps_per_epoch)
        coming = self.steps_done + 1 if end is None else min(self.steps_done + 1, end)
        return self.schedule.learning_rate_at(coming, self.steps_per_epoch)

    def step(self) -> bool:
        """Count a step of the optimiser, take a snapshot if it is due, set the next learning rate.

        Returns whether a snapshot was taken; UserError where the schedule has ended.
        """
        if self.steps_done == self.schedule.num_steps(self.steps_per_epoch):
            raise UserError(
                f"The schedule ended after {self.steps_done} steps.", "Train for as long as its epochs say."
            )
        self.steps_done += 1
        due = self.schedule.snapshot_after(self.steps_done, self.steps_per_epoch)
        if due:
            self.snapshots.append(copied_to_cpu(self.model.state_dict()))
            self.snapshot_steps.append(self.steps_done)
        set_learning_rate(self.optimizer, self.learning_rate)
        return due

    def member(self, index: int) -> nn.Module:
        """Return a snapshot as a module of its own, on the model's device and in evaluation mode.

        A negative index counts from the newest; UserError where there is no such snapshot.
        """
        if not -len(self.snapshots) <= index < len(self.snapshots):
            raise UserError(f"There is no snapshot {index} among {len(self.snapshots)}.", "Train on until it is taken.")
        member = clone(self.model).eval()
        member.load_state_dict(self.snapshots[index])
        member.zero_grad(set_to_none=True)
        return member

    def members(self, last: int | None = None) -> Iterator[nn.Module]:
        """Yield the `last` snapshots (None: all) as modules, the oldest first, each made when it is asked for.

        Early ones can hurt an ensemble. UserError for fewer than one, or more than there are.
        """
        count = len(self.snapshots) if last is None else last
        if not 1 <= count <= len(self.snapshots):
            raise UserError(
                f"The last {count} of {len(self.snapshots)} snapshots were asked for.",
                "Ask for 1 or more and at most as many as were taken.",
            )
        # The range is fixed now: training may continue and take snapshots before the last module is made.
        first = len(self.snapshots) - count
        return (self.member(index) for index in range(first, first + count))

    def best_single(self, val_batches: Batches) -> int:
        """Return the index of the snapshot with the least NLL on validation batches; ties go to the oldest.

        The batches come in the same order at every call; see `dnas_ens.training.prediction.predict_members`.

        Raises:
            UserError: No snapshots, or see `predict_members`.
        """
        probs, labels = predict_members(self.members(), val_batches)
        return greedy_selection(probs, labels, num_members=1)[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots and where the training stands; model and optimiser are saved apart."""
        return {
            "schedule": self._description(),
            "steps_done": self.steps_done,
            "snapshot_steps": list(self.snapshot_steps),
            "snapshots": [dict(snapshot) for snapshot in self.snapshots],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, and set the learning rate of the next step; snapshots are copied.

        Raises:
            UserError: It was saved with another schedule, or its snapshots do not fit the model.
        """
        if state["schedule"] != self._description():
            raise UserError(
                f"The state was saved with the schedule {state['schedule']}, but this is {self._description()}.",
                "Go on with the schedule that the training began with.",
            )
        if state["snapshots"]:
            check_fit(self.model, state["snapshots"])
        self.snapshots = [copied_to_cpu(snapshot) for snapshot in state["snapshots"]]
        self.snapshot_steps = list(state["snapshot_steps"])
        self.steps_done = int(state["steps_done"])
        set_learning_rate(self.optimizer, self.learning_rate)

    def _description(self) -> dict[str, Any]:
        fields: dict[str, Any] = asdict(self.schedule)  # type: ignore[call-overload]
        return {"kind": type(self.schedule).__name__, **fields, "steps_per_epoch": self.steps_per_epoch}


def _check_learning_rate(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise UserError(f"{name} is {value}.", "Give a finite number above 0.")
