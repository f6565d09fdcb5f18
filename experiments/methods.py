"""The methods ``compare_ensembles.py`` sets beside a searched ensemble: each trains what it needs and predicts.

Every method works in a folder of its own under the run's ``baselines/``, with the recipe of the run and seeds of its
own; members that are finished there are not trained again. Choices are made on val; test is predicted with what was
chosen. Legend: M members of the searched ensemble.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.config import RetrainConfig
from dnas_ens.genotype import Genotype

if TYPE_CHECKING:
    import torch

    from dnas_ens.data.dataset import ImageData
    from dnas_ens.evaluate.predictions import Predictions

#: Random cells of the pool, of which M are chosen (NES-RS) and the best is taken for a deep ensemble (protocol).
POOL_SIZE = 10


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the comparison.

    Args:
        name: What it is.
        predictions: On val and test.
        networks: Networks trained for it, discarded ones included.
        cpu_seconds: All training it needs, the search included where its cells come from it.
    """

    name: str
    predictions: Predictions
    networks: int
    cpu_seconds: float


class Comparison:
    """What the methods share: the run, its data, its recipe, and the ensemble it found.

    Args:
        folder: The run folder.
        found: Its genotypes.json.
        data: Images.
        recipe: The run's recipe.
        device: Where to train.
        workers: Members trained side by side on a CPU.
    """

    def __init__(
        self,
        folder: Path,
        found: dict[str, Any],
        data: ImageData,
        recipe: RetrainConfig,
        *,
        device: torch.device,
        workers: int,
    ) -> None:
        self.folder, self.found, self.data, self.recipe = folder, found, data, recipe
        self.device, self.workers = device, workers
        self.base = Genotype.from_dict(found["base"]["genotype"])
        self.genotypes = [
            Genotype.from_dict(found["candidates"][index]["genotype"]) for index in found["selected"]
        ]
        self.search_seconds = float(found["report"].get("cpu_seconds", 0.0))

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.genotypes)

    @functools.cached_property
    def ours(self) -> Result:
        """The searched ensemble."""
        from dnas_ens.evaluate.predictions import Predictions
        from dnas_ens.evaluate.run import predict_folder

        stored = self.folder / "predictions.npz"
        predictions = (
            Predictions.load(stored)
            if stored.exists()
            else predict_folder(self.folder, self.data, device=self.device)
        )
        seconds = self.search_seconds + sum(training_seconds(self.folder, self.num_members))
        return Result(
            name="ours (searched ensemble)",
            predictions=predictions,
            networks=self.num_members,
            cpu_seconds=seconds,
        )

    def train(
        self, name: str, genotypes: Sequence[Genotype], **fields: Any
    ) -> tuple[Predictions, list[float]]:
        """Train genotypes in the folder of a method; return their predictions and CPU seconds.

        Args:
            name: Folder of the method; it decides the seeds.
            genotypes: What to train.
            **fields: Fields of the recipe that differ.
        """
        from dnas_ens.evaluate.run import predict_folder
        from dnas_ens.retrain.members import train_members

        folder = self.folder / "baselines" / name
        folder.mkdir(parents=True, exist_ok=True)
        # Another root for every method, so that no member repeats one of ours where the cells agree.
        seed = self.recipe.seed + zlib.crc32(name.encode())
        train_members(
            genotypes,
            self.data,
            replace(self.recipe, seed=seed, **fields),
            device=self.device,
            folder=folder,
            workers=self.workers,
        )
        predictions = predict_folder(folder, self.data, device=self.device)
        return predictions, training_seconds(folder, len(genotypes))

    @functools.cached_property
    def random_cells(self) -> tuple[list[Genotype], Predictions, list[float]]:
        """The pool of random cells, trained once for all methods that choose from it."""
        from dnas_ens.baselines import random_pool
        from dnas_ens.search_space import SearchSpace

        space = SearchSpace(
            operations=tuple(self.operations),
            num_nodes=self.base.num_nodes,
            cell_types=self.base.cell_types,
        )
        pool = random_pool(space, POOL_SIZE, seed=self.recipe.seed)
        return (pool, *self.train("random-cells", pool))

    @property
    def operations(self) -> Sequence[str]:
        """Candidate operations of the search but for ``none``."""
        from dnas_ens.files import read_json

        supernet = read_json(self.folder / "config.json")["search"]["supernet"]
        return [name for name in supernet["operations"] if name != "none"]


def training_seconds(folder: Path, num_members: int) -> list[float]:
    """Return the CPU seconds the first members of a folder took to train."""
    from dnas_ens.files import read_json

    return [
        float(read_json(folder / "members" / str(index) / "member.json")["cpu_seconds"])
        for index in range(num_members)
    ]


def ours(comparison: Comparison) -> Iterator[Result]:
    """The searched ensemble, its best member, and its members weighted on val."""
    from dnas_ens.ensembles.weighting import caruana_weights, fit_weights
    from dnas_ens.evaluate.tables import best_single

    whole = comparison.ours
    yield whole
    best = best_single(whole.predictions)
    yield replace(whole, name="its best member on val", predictions=whole.predictions.of_members([best]))
    everyone = range(comparison.num_members)
    val = whole.predictions.val_probs.astype(np.float64), whole.predictions.val_labels
    for name, fitted in (
        ("its members weighted by log-loss (SLSQP)", fit_weights(*val, seed=comparison.recipe.seed)),
        ("its members weighted by Caruana selection", caruana_weights(*val)),
    ):
        weights = [float(weight) for weight in fitted.weights]
        predictions = whole.predictions.of_members(everyone, weights)
        yield replace(whole, name=name, predictions=predictions)


def base_cell(comparison: Comparison) -> Iterator[Result]:
    """Deep ensembles of the base cell: of M members, and of as many as our whole cost trains if the cell were free."""
    count = comparison.num_members
    predictions, seconds = comparison.train("base-cell", [comparison.base] * count)
    yield Result(
        name="deep ensemble of the base cell",
        predictions=predictions,
        networks=count,
        cpu_seconds=comparison.search_seconds + sum(seconds),
    )
    affordable = max(count, round(comparison.ours.cpu_seconds / (sum(seconds) / count)))
    if affordable > count:
        more, more_seconds = comparison.train("base-cell-more", [comparison.base] * (affordable - count))
        joined = predictions.with_members_of(more)
        yield Result(
            name=f"the same at our cost, cell for free ({affordable} members)",
            predictions=joined,
            networks=affordable,
            cpu_seconds=sum(seconds) + sum(more_seconds),
        )


def best_cell(comparison: Comparison) -> Iterator[Result]:
    """The bar to clear: a deep ensemble of the best cell that the search found, by its retrained member on val."""
    from dnas_ens.evaluate.tables import best_single

    genotype = comparison.genotypes[best_single(comparison.ours.predictions)]
    predictions, seconds = comparison.train("best-cell", [genotype] * comparison.num_members)
    yield Result(
        name="deep ensemble of the best found cell",
        predictions=predictions,
        networks=2 * comparison.num_members,
        # Finding out which cell is best took the training of our members.
        cpu_seconds=comparison.ours.cpu_seconds + sum(seconds),
    )


def random_cells(comparison: Comparison) -> Iterator[Result]:
    """Random-NES, NES-RS, and a deep ensemble of the best of ten random cells."""
    from dnas_ens.ensembles.selection import greedy_selection
    from dnas_ens.evaluate.tables import best_single

    pool, predictions, seconds = comparison.random_cells
    count = comparison.num_members
    yield Result(
        name="random cells (Random-NES)",
        predictions=predictions.of_members(range(count)),
        networks=count,
        cpu_seconds=sum(seconds[:count]),
    )
    val = predictions.val_probs.astype(np.float64), predictions.val_labels
    yield Result(
        name=f"greedy choice of {len(pool)} random cells (NES-RS)",
        predictions=predictions.of_members(greedy_selection(*val, num_members=count)),
        networks=len(pool),
        cpu_seconds=sum(seconds),
    )
    best = pool[best_single(predictions)]
    of_best, more_seconds = comparison.train("best-random-cell", [best] * count)
    yield Result(
        name=f"deep ensemble of the best of {len(pool)} random cells",
        predictions=of_best,
        networks=len(pool) + count,
        cpu_seconds=sum(seconds) + sum(more_seconds),
    )


def deviations(comparison: Comparison) -> Iterator[Result]:
    """RandomD-NES: random deviations of the base that share as many edges with it as our members do."""
    from dnas_ens.baselines import deviations_sharing

    shared = [
        min(g.shared_edges(comparison.base), comparison.base.num_edges - 1) for g in comparison.genotypes
    ]
    genotypes = deviations_sharing(
        comparison.base, shared, operations=comparison.operations, seed=comparison.recipe.seed
    )
    predictions, seconds = comparison.train("deviations", genotypes)
    yield Result(
        name="random deviations of the base at our distances (RandomD-NES)",
        predictions=predictions,
        networks=len(genotypes),
        cpu_seconds=comparison.search_seconds + sum(seconds),
    )


def wider(comparison: Comparison) -> Iterator[Result]:
    """One network of the base cell with as many parameters as our members together (arXiv 2202.06985)."""
    from dnas_ens.retrain.members import MemberTraining

    wanted = sum(comparison.ours.predictions.parameters)

    def parameters(channels: int) -> int:
        recipe = replace(comparison.recipe, channels=channels)
        network = MemberTraining(comparison.base, comparison.data, recipe, index=0).network
        return sum(parameter.numel() for parameter in network.parameters())

    channels = comparison.recipe.channels
    while parameters(channels) < wanted:
        channels += 2
    predictions, seconds = comparison.train("wider", [comparison.base], channels=channels)
    yield Result(
        name=f"one network as large (base cell, C={channels})",
        predictions=predictions,
        networks=1,
        cpu_seconds=comparison.search_seconds + sum(seconds),
    )


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
    cycles = comparison.num_members
    seconds = comparison.search_seconds + float(read_json(folder / "cost.json")["cpu_seconds"])
    for name, members in (
        (f"snapshots of the base cell ({cycles} cycles)", range(cycles)),
        ("its last three snapshots", range(max(0, cycles - 3), cycles)),
        ("its last snapshot alone", range(cycles - 1, cycles)),
    ):
        chosen = predictions.of_members(members)
        yield Result(name=name, predictions=chosen, networks=1, cpu_seconds=seconds)


def _train_snapshots(comparison: Comparison) -> tuple[Predictions, dict[str, float]]:
    from dnas_ens.cost import CostMeter
    from dnas_ens.data.batches import iterate_batches
    from dnas_ens.ensembles.snapshot import CosineCycles, SnapshotRecorder
    from dnas_ens.evaluate.predictions import Predictions
    from dnas_ens.inference import predict_log_probs
    from dnas_ens.progress import Progress
    from dnas_ens.retrain.members import MemberTraining
    from dnas_ens.training import drop_path_at, train_epoch

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
    recorder = SnapshotRecorder(
        training.network,
        training.optimizer,
        CosineCycles(epochs=epochs, num_cycles=cycles, initial_learning_rate=recipe.learning_rate),
        steps_per_epoch=training.steps_per_epoch,
    )
    with Progress(epochs, description="snapshots", steps_per_epoch=training.steps_per_epoch) as progress:
        for epoch in range(epochs):
            training.network.drop_path_probability = drop_path_at(recipe, epoch % recipe.epochs)
            batches = iterate_batches(
                training.train_split,
                recipe.batch_size,
                generator=training.order,
                augmentation=training.augmentation,
                augmentation_generator=training.augmentation_generator,
                drop_last=True,
            )

            def on_step(_: int) -> None:
                recorder.step()
                progress.step()

            scalars = train_epoch(training.network, batches, training.optimizer, recipe, on_step=on_step)
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


Method = Callable[[Comparison], Iterator[Result]]
#: By the name on the command line, in the order of the table.
METHODS: dict[str, Method] = {
    "ours": ours,
    "base-cell": base_cell,
    "best-cell": best_cell,
    "random-cells": random_cells,
    "deviations": deviations,
    "snapshots": snapshots,
    "wider": wider,
}
