"""What all methods share: the run they are compared with, its data and recipe, and how they train and search.

Every method works in a folder of its own under the run's ``baselines/``, with the recipe of the run and seeds of its
own; what is finished there is not done again, and what was interrupted continues. Choices are made on val; test is
predicted with what was chosen. Legend: M members of the searched ensemble, N images.
"""

from __future__ import annotations

import functools
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dnas_ens.compare.frontier import Option, Trained, of_exchangeable, of_ordered
from dnas_ens.compare.methods import Budget
from dnas_ens.compare.records import Record, Records
from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.config.fields import to_dict
from dnas_ens.config.presets import search_preset
from dnas_ens.config.settings import Engine
from dnas_ens.data.dataset import ImageData
from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles.ensemble import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.evaluate.predictions import Predictions, predict_splits
from dnas_ens.evaluate.run import predict_folder
from dnas_ens.metrics.calibration import CrossFit, per_image_calibrated_nll
from dnas_ens.nn.network import Network
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import as_json, read_json
from dnas_ens.run.folder import RunFolder
from dnas_ens.search.run import run_search
from dnas_ens.space.genotype import Genotype, ranked_genotypes
from dnas_ens.training.members import train_members
from dnas_ens.training.prediction import Batches, plain_passes, training_passes
from dnas_ens.training.trainer import MemberTraining

#: Training images that BatchNorm statistics of averaged weights are computed from, at most.
STATISTICS_IMAGES = 5_000
#: Val images that averages of weights are chosen by, at most.
JUDGING_IMAGES = 2_000


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the comparison.

    Args:
        name: What it is; the same with every seed.
        predictions: On val and test.
        networks: Networks trained for it, discarded ones included.
        cpu_seconds: All training it needs, the search included where its cells come from it.
        search_seconds: What searching took of that; training networks that are discarded is not part of it.
        label: Its name in the figure; empty where it is no method of its own.
        options: The ways to spend on it, for the frontier; none if it is not a method of its own.
        detail: What differs between seeds, such as a width.
        cross_fit: Weights and temperature from different halves of val, where weights were fitted on val too.
    """

    name: str
    predictions: Predictions
    networks: int
    cpu_seconds: float
    search_seconds: float = 0.0
    label: str = ""
    options: Sequence[Option] = ()
    detail: str = ""
    cross_fit: CrossFit | None = None

    @classmethod
    def of_all(
        cls,
        trained: Trained,
        *,
        searching: float = 0.0,
        fixed: float | None = None,
        ordered: bool = False,
        **fields: Any,
    ) -> Result:
        """Return the row of networks that are all in its ensemble; fields that are given beat what follows from them.

        Args:
            searching: What searching took.
            fixed: What is spent before the first of them; by default that.
            ordered: Whether they were chosen in their order; exchangeable otherwise.
        """
        fixed = searching if fixed is None else fixed
        if "options" not in fields:
            fields["options"] = (of_ordered if ordered else of_exchangeable)(trained, fixed_seconds=fixed)
        found: dict[str, Any] = {
            "predictions": trained.predictions,
            "networks": len(trained.seconds),
            "cpu_seconds": fixed + sum(trained.seconds),
            "search_seconds": searching,
        }
        return cls(**found | fields)

    def losses(self) -> np.ndarray:
        """Return the calibrated NLL on every test image, (N,), nats."""
        if self.cross_fit is not None:
            return self.cross_fit.per_image_calibrated_nll
        val, test = self.predictions.averaged()
        return per_image_calibrated_nll(val, self.predictions.val_labels, test, self.predictions.test_labels)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A further search: its base cell, the members it chose, its CPU seconds and its genotypes.json."""

    base: Genotype
    genotypes: list[Genotype]
    seconds: float
    file: Path


@dataclass(eq=False, kw_only=True)
class Comparison:
    """A run and what is trained beside it.

    Args:
        found: genotypes.json of the run folder.
        recipe: What every network is trained with; its weight decay is settled for the images.
        workers: Members trained side by side on a CPU.
        trained_members: Members of the run's ensemble, which may have grown; None for those the search selected.
    """

    folder: Path
    search: SearchConfig
    found: dict[str, Any]
    data: ImageData
    recipe: RetrainConfig
    device: torch.device
    workers: int = 1
    engine: Engine = "local"
    budget: Budget = field(default_factory=Budget)
    trained_members: int | None = None
    _trained: dict[str, Trained] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.recipe = self.recipe.for_images(len(self.data.train))
        self.base = Genotype.from_dict(self.found["base"]["genotype"])
        self.genotypes = ranked_genotypes(self.found, self.trained_members)
        self.search_seconds = float(self.found["report"].get("cpu_seconds", 0.0))

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.genotypes)

    @property
    def operations(self) -> tuple[str, ...]:
        """Candidate operations of the search except ``none``."""
        return tuple(name for name in self.search.supernet.search_space.operations if name != "none")

    @property
    def sizes(self) -> list[int]:
        """Sizes of our ensembles whose total cost the methods are given: M, and the larger ones asked for."""
        return [self.num_members, *self.budget.members_grid]

    @functools.cached_property
    def members(self) -> Trained:
        """The members of the searched ensemble, in the order they were chosen in."""
        return self._predicted(self.folder, self.num_members, self.recipe)

    @functools.cached_property
    def grown(self) -> Trained:
        """Our members and as many more of the search's ranking as the largest ensemble asked for has."""
        more = ranked_genotypes(self.found, self.sizes[-1])[self.num_members :]
        return self.members.joined(self.train("ours-more", more)) if more else self.members

    @functools.cached_property
    def total_seconds(self) -> float:
        """CPU seconds of the searched ensemble, search and training: the total cost the others are given."""
        return self.cost_of(self.num_members)

    @functools.cached_property
    def largest_seconds(self) -> float:
        """CPU seconds of the largest of our ensembles, which methods that can grow are grown to."""
        return self.cost_of(self.sizes[-1])

    def cost_of(self, members: int) -> float:
        """Return the CPU seconds of our ensemble of so many members, search and training."""
        return self.search_seconds + sum(self.grown.seconds[:members])

    def baseline(self, name: str) -> Path:
        """Return the folder of a method, which exists."""
        folder = self.folder / "baselines" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def recipe_of(self, name: str, **fields: Any) -> RetrainConfig:
        """Return the recipe of a method. Its root of seeds is its own, so no member repeats one of ours."""
        return replace(self.recipe, seed=self.recipe.seed + zlib.crc32(name.encode()), **fields)

    def train(self, name: str, genotypes: Sequence[Genotype], **fields: Any) -> Trained:
        """Train genotypes in the folder of a method, or take what is finished there.

        Args:
            name: Folder of the method; it decides the seeds.
            **fields: Fields of the recipe that differ.
        """
        if name not in self._trained:
            recipe = self.recipe_of(name, **fields)
            folder = self._room_for(name, genotypes[0], recipe)
            # Several share the threads among them.
            with self.threads_of_a_member() if len(genotypes) == 1 else nullcontext():
                train_members(
                    genotypes,
                    self.data,
                    recipe,
                    device=self.device,
                    folder=folder,
                    workers=self.workers,
                    engine=self.engine,
                )
            self._trained[name] = self._predicted(folder, len(genotypes), recipe)
        return self._trained[name]

    @contextmanager
    def threads_of_a_member(self) -> Iterator[None]:
        """Give what is trained alone on a CPU as many threads as each of our members has beside the others.

        Costs are CPU seconds, and a further thread costs nearly as many for little.
        """
        threads = torch.get_num_threads()
        beside = min(self.workers or threads, self.num_members)
        torch.set_num_threads(max(1, threads // beside))
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _room_for(self, name: str, genotype: Genotype, recipe: RetrainConfig) -> Path:
        """Return the folder of a method, or one of its own for this size where it holds networks of another one.

        Once ours has grown, the best cell, or how wide one network as large is, may be another.
        """
        first, held = self.baseline(name) / "members" / "0" / "member.json", None
        if first.exists():
            held = read_json(first)
        elif state := CheckpointStore(self.baseline(name) / "checkpoints", name="member-0").load_newest():
            held = state[1]["identity"]
        if held is None:
            return self.baseline(name)
        wanted = as_json({"genotype": genotype.to_dict(), "recipe": to_dict(recipe.of_base())})
        same = {"genotype": held["spec"]["genotype"], "recipe": held["recipe"]} == wanted
        return self.baseline(name if same else f"{name}-of-{self.num_members}")

    def _predicted(self, folder: Path, num_members: int, recipe: RetrainConfig) -> Trained:
        """Return the trained members of a folder."""
        return Trained(
            predictions=predict_folder(folder, self.data, device=self.device, reuse=True),
            seconds=[float(member["cpu_seconds"]) for member in trained_files(folder, num_members)],
            epochs=recipe.epochs,
        )

    def train_within(
        self, name: str, cells: Callable[[int], Sequence[Genotype]], *, first: int, seconds: float
    ) -> Trained:
        """Train networks in the folder of a method, and as many more as a cost pays for in NAME-more.

        Args:
            cells: Returns the first so many genotypes.
            first: Networks that are trained in any case; what one costs is their mean.
            seconds: CPU seconds that all together may take.
        """
        trained = self.train(name, cells(first))
        more = cells(affordable_networks(trained.seconds, seconds))[first:]
        return trained.joined(self.train(f"{name}-more", more)) if more else trained

    def at_other_epochs(self, name: str, genotypes: Sequence[Genotype]) -> list[Trained]:
        """Train the genotypes for every other number of epochs asked for.

        For longer ones only so many are trained that the epochs in all stay those of the recipe, at least one.
        """
        found = []
        for epochs in self.budget.epochs_grid:
            if epochs != self.recipe.epochs:
                count = self.networks_of(len(genotypes), epochs)
                found.append(self.train(f"{name}-epochs-{epochs}", genotypes[:count], epochs=epochs))
        return found

    def networks_of(self, count: int, epochs: int) -> int:
        """Return how many of so many networks are trained for other epochs than the recipe's."""
        return min(count, max(1, -(-count * self.recipe.epochs // epochs)))

    @functools.cached_property
    def passes(self) -> tuple[Batches, Batches]:
        """Passes over training images, for BatchNorm statistics, and over val images that averages are chosen by.

        The latter are of one half of val: temperatures are fitted on all of it.
        """
        train, val = self.data.train, self.data.val
        judging = val.subset(alternating_halves(val.labels.cpu().numpy())[0])
        of_train, of_val = (
            split.to(self.device) for split in (train.drawn(STATISTICS_IMAGES), judging.drawn(JUDGING_IMAGES))
        )
        augmented = training_passes(self.data, of_train, augment=self.recipe.augment, cutout=self.recipe.cutout)
        return augmented, plain_passes(self.data, of_val)

    def network(self) -> Network:
        """Return a network of the base cell in evaluation mode, whose weights are to be loaded."""
        return MemberTraining(self.base, self.data, self.recipe, index=0, device=self.device).network.eval()

    def predict(self, networks: Iterable[nn.Module]) -> Predictions:
        """Predict val and test with networks, equally weighted."""
        ensemble = Ensemble(list(networks), classes=self.data.classes, preprocessing=Preprocessing.of(self.data))
        return predict_splits(ensemble.eval(), self.data, device=self.device)

    @property
    def _records(self) -> Records:
        return Records(self.folder / "baselines" / "records.jsonl", key=("method", "members"))

    def place_of(self, name: str) -> Path:
        """Return the folder of a method for this number of our members; the first one that was noted has the plain."""
        first = next((record["members"] for record in self._records if record["method"] == name), self.num_members)
        return self.baseline(name if first == self.num_members else f"{name}-of-{self.num_members}")

    def kept(self, name: str, make: Callable[[], tuple[Predictions, dict[str, Any]]]) -> tuple[Predictions, Record]:
        """Return a method's predictions and what is noted of them; made once for each number of our members."""
        file, key = self.place_of(name) / "predictions.npz", (name, self.num_members)
        records = self._records
        if key not in records or not file.exists():
            predictions, notes = make()
            predictions.save(file)
            records.add({"method": name, "members": self.num_members, **notes})
            shutil.rmtree(file.parent / "checkpoints", ignore_errors=True)
        return Predictions.load(file), records[key]

    def further_search(self, regime: str, *, members: int, base: Path | None = None) -> SearchConfig:
        """Return the search of another regime with the run's data, supernet and epochs, and its seed."""
        own = self.search
        published = search_preset(own.preset, regime, base=base)
        several = own.candidates.pool_size if members > 1 else 1
        # It may be soft where ours is hard: of several members at once, and by a supernet in channels_last.
        batch, layout = own.bilevel.batch_size, own.bilevel.layout
        drawn = own.objective.drawn_members
        if drawn is None and batch % 4:
            drawn = next(count for count in (3, 2, 1) if batch % count == 0)
        layout = "auto" if layout == "contiguous" and own.supernet.form != "reference" else layout
        return replace(
            published,
            seed=own.seed,
            data=own.data,
            supernet=own.supernet,
            bilevel=replace(own.bilevel, layout=layout),
            objective=replace(published.objective, drawn_members=drawn),
            candidates=replace(own.candidates, members=members, pool_size=several),
        )

    def search_again(
        self, name: str, regime: str, *, seed: int, members: int = 1, base: Path | None = None
    ) -> Searched:
        """Search by another regime with the run's data, supernet and epochs, or take what is finished.

        Args:
            name: Folder under ``baselines/``, a run folder of its own.
            regime: One of `dnas_ens.config.presets`.
            base: genotypes.json of a given base, in another folder of ``baselines/``.
        """
        config = replace(self.further_search(regime, members=members, base=base), seed=seed)
        settings = to_dict(config)
        if base is not None:
            # As seen from the run, so that it may be moved.
            settings["hypernetwork"]["base"] = str(base.relative_to(self.folder))
        with RunFolder.create(self.baseline(name), config=settings, resume=True) as run:
            if not run.file("genotypes.json").exists():
                run_search(config, self.data, device=self.device, run=run, resume=True)
            found = run.read_json("genotypes.json")
        return Searched(
            base=Genotype.from_dict(found["base"]["genotype"]),
            genotypes=ranked_genotypes(found),
            seconds=float(found["report"]["cpu_seconds"]),
            file=run.file("genotypes.json"),
        )


def trained_files(folder: Path, num_members: int) -> list[dict[str, Any]]:
    """Return the member.json files of a folder."""
    return [read_json(folder / "members" / str(index) / "member.json") for index in range(num_members)]


def affordable_networks(trained: Sequence[float], seconds: float) -> int:
    """Return how many networks a cost pays for, those included that are trained anyway; one costs their mean."""
    return max(len(trained), round(seconds * len(trained) / sum(trained)))
