"""One network that leaves several behind: snapshots of a cyclic learning rate (arXiv 1704.00109)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from frontier import Option, option

from methods.comparison import Comparison
from methods.long_training import long_epochs, train_long
from methods.results import Result

if TYPE_CHECKING:
    from dnas_ens.evaluate.predictions import Predictions
    from dnas_ens.training.trainer import MemberTraining


class _Cycles:
    """M cosine cycles, each of which leaves a snapshot."""

    def __init__(self, comparison: Comparison, training: MemberTraining) -> None:
        from dnas_ens.ensembles.snapshot import CosineCycles, SnapshotRecorder

        self.recorder = SnapshotRecorder(
            training.network,
            training.optimizer,
            CosineCycles(
                epochs=long_epochs(comparison),
                num_cycles=comparison.num_members,
                initial_learning_rate=comparison.recipe.learning_rate,
            ),
            steps_per_epoch=training.steps_per_epoch,
        )

    def learning_rate(self, _epoch: int) -> float:
        return self.recorder.learning_rate

    def after_step(self) -> None:
        self.recorder.step()

    def after_epoch(self, _epochs_done: int) -> None:
        """Nothing is done by epochs."""

    def state_dict(self) -> dict[str, Any]:
        return self.recorder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recorder.load_state_dict(state)


def snapshots(comparison: Comparison) -> Iterator[Result]:
    """One network of the base cell trained as long as our M members, in M cosine cycles (arXiv 1704.00109)."""

    def make() -> tuple[Predictions, dict[str, Any]]:
        _, cycles, seconds = train_long(
            comparison, "snapshots", lambda training: _Cycles(comparison, training)
        )
        return comparison.predict(cycles.recorder.members()), {"cpu_seconds": seconds}

    predictions, made = comparison.kept("snapshots", make)
    cycles, search = comparison.num_members, comparison.search_seconds
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

    Args:
        predictions: Of all snapshots, the oldest first.
        search_seconds: What finding the cell took.
        cycle_seconds: CPU seconds of a cycle.
        epochs: Epochs of a cycle.
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
