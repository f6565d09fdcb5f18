"""Trainings of a reference model under a schedule of snapshots, kept with their states and their cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dnas_ens.ensembles.snapshot import Schedule
    from studies.bench import Bench


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A finished training.

    Args:
        states: The snapshots, the oldest first.
        record: What training.json holds: seeds, schedule, snapshot steps, seconds.
    """

    states: list[dict[str, torch.Tensor]]
    record: dict[str, Any]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the training, of all its sittings."""
        return float(self.record["cpu_seconds"])


def train(
    bench: Bench,
    folder: Path,
    schedule: Schedule,
    *,
    root: int,
    member: int,
    epochs: int | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> Trained:
    """Train the model under a schedule of snapshots, or load what was trained.

    Args:
        bench: Data, device and recipe.
        folder: Where the training is kept.
        schedule: Learning rates, and when to take a snapshot.
        root: The study's seed.
        member: Which training of that seed; decides its seeds together with `root`.
        epochs: How many; None for the option's.
        start: A state to begin with instead of fresh weights.
    """
    from dnas_ens.data.batches import count_batches
    from dnas_ens.ensembles.snapshot import SnapshotRecorder
    from dnas_ens.run.checkpoint import CheckpointStore
    from dnas_ens.run.files import load_tensors, read_json, save_tensors, write_json
    from dnas_ens.run.progress import CostMeter

    if not (folder / "training.json").exists():
        training = bench.training(root=root, member=member, name=str(folder))
        if start is not None:
            training.model.load_state_dict(start)
        steps = count_batches(bench.data.train, bench.options.batch_size, drop_last=True)
        recorder = SnapshotRecorder(training.model, training.optimizer, schedule, steps_per_epoch=steps)
        epochs = bench.options.epochs if epochs is None else epochs
        store = CheckpointStore(folder / "checkpoints", name="training")
        newest = store.load_newest()
        seconds: dict[str, float] = {}
        if newest is not None:
            training.load_state_dict(newest[1]["training"])
            recorder.load_state_dict(newest[1]["training"]["recorder"])
            seconds = newest[1]["seconds"]
        cost = CostMeter(seconds)

        def on_step(_: int) -> None:
            recorder.step()

        while training.epoch < epochs:
            loss = training.run_epoch(on_step=on_step)
            if training.epoch % max(1, epochs // 10) == 0 and training.epoch < epochs:
                state = {**training.state_dict(), "recorder": recorder.state_dict()}
                store.save(training.epoch, {"training": state, "seconds": cost.seconds()})
        for index, snapshot in enumerate(recorder.snapshots):
            save_tensors(folder / f"snapshot-{index}.safetensors", snapshot)
        write_json(
            folder / "training.json",
            {
                "seeds": asdict(training.seeds),
                "schedule": recorder.state_dict()["schedule"],
                "snapshot_steps": recorder.snapshot_steps,
                "parameters": training.num_parameters,
                "train_loss": loss,
                **cost.seconds(),
            },
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(f"trained {folder}: {cost.seconds()['cpu_seconds']:.1f} CPU s", flush=True)
    record = read_json(folder / "training.json")
    count = len(record["snapshot_steps"])
    return Trained(
        states=[load_tensors(folder / f"snapshot-{index}.safetensors") for index in range(count)],
        record=record,
    )


@contextmanager
def all_sittings(file: Path) -> Iterator[Callable[[], float]]:
    """Count the CPU seconds of a computation that may be interrupted and gone on with.

    Args:
        file: Keeps the seconds of the sittings so far.

    Yields:
        What returns the seconds of all sittings, to be called after the block.
    """
    from dnas_ens.run.files import read_json, write_json
    from dnas_ens.run.progress import CostMeter

    cost = CostMeter(read_json(file) if file.exists() else None)
    try:
        yield lambda: float(read_json(file)["cpu_seconds"])
    finally:
        write_json(file, cost.seconds())
