"""One network that leaves several behind: snapshots of a cyclic learning rate (arXiv 1704.00109)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from frontier import Option, option

from methods.comparison import Comparison
from methods.results import Result

if TYPE_CHECKING:
    from dnas_ens.evaluate.predictions import Predictions


def snapshots(comparison: Comparison) -> Iterator[Result]:
    """One network of the base cell trained as long as our M members, in M cosine cycles (arXiv 1704.00109)."""
    from dnas_ens.evaluate.predictions import Predictions
    from dnas_ens.files import read_json, write_json

    folder = comparison.folder / "baselines" / "snapshots"
    if not (folder / "cost.json").exists():
        trained, cost = _train_snapshots(comparison)
        folder.mkdir(parents=True, exist_ok=True)
        trained.save(folder / "predictions.npz")
        write_json(folder / "cost.json", cost)
    predictions = Predictions.load(folder / "predictions.npz")
    cycles, search = comparison.num_members, comparison.search_seconds
    training = float(read_json(folder / "cost.json")["cpu_seconds"])
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


def _train_snapshots(comparison: Comparison) -> tuple[Predictions, dict[str, float]]:
    from dnas_ens.cost import CostMeter
    from dnas_ens.ensembles.snapshot import CosineCycles, SnapshotRecorder
    from dnas_ens.evaluate.predictions import Predictions
    from dnas_ens.inference import predict_log_probs
    from dnas_ens.interleaving import exhaust
    from dnas_ens.progress import Progress
    from dnas_ens.retrain.training import MemberTraining
    from dnas_ens.training import drop_path_at, training_steps

    cost = CostMeter()
    cycles, recipe = comparison.num_members, comparison.recipe
    epochs = cycles * recipe.epochs
    training = MemberTraining(
        comparison.base,
        comparison.data,
        replace(recipe, seed=recipe.seed + zlib.crc32(b"snapshots")),
        index=0,
        device=comparison.device,
    )
    training.settle_execution()
    recorder = SnapshotRecorder(
        training.network,
        training.optimizer,
        CosineCycles(epochs=epochs, num_cycles=cycles, initial_learning_rate=recipe.learning_rate),
        steps_per_epoch=training.steps_per_epoch,
    )
    with Progress(epochs, description="snapshots", steps_per_epoch=training.steps_per_epoch) as progress:
        for epoch in range(epochs):
            training.network.drop_path_probability = drop_path_at(recipe, epoch % recipe.epochs)

            def on_step(_: int) -> None:
                recorder.step()
                progress.step()

            scalars = exhaust(
                training_steps(
                    training.network,
                    training.batches(),
                    training.optimizer,
                    recipe,
                    execution=training.execution,
                    on_step=on_step,
                )
            )
            progress.epoch(epoch + 1, **scalars)
    seconds = cost.seconds()
    val, test = comparison.data.val, comparison.data.test
    probs = {
        split: [
            predict_log_probs(member, images.to(comparison.device), augmentation=training.augmentation)
            .exp()
            .cpu()
            .numpy()
            for member in recorder.members()
        ]
        for split, images in (("val", val), ("test", test))
    }
    parameters = sum(parameter.numel() for parameter in training.network.parameters())
    return (
        Predictions(
            val_probs=np.stack(probs["val"]),
            val_labels=val.labels.cpu().numpy(),
            test_probs=np.stack(probs["test"]),
            test_labels=test.labels.cpu().numpy(),
            classes=comparison.data.classes,
            weights=[1.0 / cycles] * cycles,
            parameters=[parameters] * cycles,
        ),
        seconds,
    )
