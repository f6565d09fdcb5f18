"""What all methods share: the run they stand beside, its data and recipe, and how they train and search.

Every method works in a folder of its own under the run's ``baselines/``, with the recipe of the run and seeds of its
own; what is finished there is not done again, and what was interrupted goes on. Choices are made on val; test is
predicted with what was chosen. Legend: M members of the searched ensemble, N images.
"""

from __future__ import annotations

import functools
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.space.genotype import Genotype, ranked_genotypes
from methods.results import Budget, Searched, Trained

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dnas_ens.data.dataset import ImageData
    from dnas_ens.evaluate.predictions import Predictions
    from dnas_ens.nn.network import Network
    from dnas_ens.training.prediction import Batches

#: Training images that BatchNorm statistics of averaged weights are computed from, at most.
STATISTICS_IMAGES = 5_000
#: Val images that averages of weights are chosen by, at most.
JUDGING_IMAGES = 2_000


@dataclass(eq=False, kw_only=True)
class Comparison:
    """A run and what is trained beside it.

    Args:
        folder: The run folder.
        search: The configuration of its search.
        found: Its genotypes.json.
        data: Images.
        recipe: The run's recipe.
        device: Where to train.
        workers: Members trained side by side on a CPU.
        budget: How much the methods may train.
        trained_members: Members of the run's ensemble, which may have grown; None for those the search selected.
    """

    folder: Path
    search: SearchConfig
    found: dict[str, Any]
    data: ImageData
    recipe: RetrainConfig
    device: torch.device
    workers: int = 1
    budget: Budget = field(default_factory=Budget)
    trained_members: int | None = None
    _trained: dict[str, Trained] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.base = Genotype.from_dict(self.found["base"]["genotype"])
        self.genotypes = ranked_genotypes(self.found, self.trained_members)
        self.search_seconds = float(self.found["report"].get("cpu_seconds", 0.0))

    @property
    def num_members(self) -> int:
        """M."""
        return len(self.genotypes)

    @property
    def operations(self) -> tuple[str, ...]:
        """Candidate operations of the search but for ``none``."""
        return tuple(name for name in self.search.supernet.operations if name != "none")

    @functools.cached_property
    def members(self) -> Trained:
        """The members of the searched ensemble, in the order they were chosen in."""
        from dnas_ens.evaluate.run import predict_folder

        predictions = predict_folder(self.folder, self.data, device=self.device, reuse=True)
        seconds = training_seconds(self.folder, self.num_members)
        return Trained(predictions=predictions, seconds=seconds, epochs=self.recipe.epochs)

    @functools.cached_property
    def grown(self) -> Trained:
        """Our members and as many more of the search's ranking as the largest ensemble asked for has."""
        more = ranked_genotypes(self.found, self.sizes[-1])[self.num_members :]
        return self.members.joined(self.train("ours-more", more)) if more else self.members

    @property
    def sizes(self) -> list[int]:
        """Sizes of our ensembles whose total cost the methods are given: M, and the larger ones asked for."""
        return [self.num_members, *self.budget.members]

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

    def recipe_of(self, name: str, **fields: Any) -> RetrainConfig:
        """Return the recipe of a method, which has another root of seeds.

        So no member repeats one of ours where the cells agree.
        """
        return replace(self.recipe, seed=self.recipe.seed + zlib.crc32(name.encode()), **fields)

    def train(self, name: str, genotypes: Sequence[Genotype], **fields: Any) -> Trained:
        """Train genotypes in the folder of a method, or take what is finished there.

        Args:
            name: Folder of the method; it decides the seeds.
            genotypes: What to train.
            **fields: Fields of the recipe that differ.
        """
        from dnas_ens.evaluate.run import predict_folder
        from dnas_ens.training.members import train_members

        if name not in self._trained:
            folder = self.baseline(name)
            recipe = self.recipe_of(name, **fields)
            train_members(
                genotypes, self.data, recipe, device=self.device, folder=folder, workers=self.workers
            )
            self._trained[name] = Trained(
                predictions=predict_folder(folder, self.data, device=self.device, reuse=True),
                seconds=training_seconds(folder, len(genotypes)),
                epochs=recipe.epochs,
            )
        return self._trained[name]

    def train_within(
        self, name: str, cells: Callable[[int], Sequence[Genotype]], *, first: int, seconds: float
    ) -> Trained:
        """Train networks in the folder of a method, and as many more as a cost pays for in NAME-more.

        Args:
            name: Folder of the method.
            cells: Returns the first so many genotypes.
            first: Networks that are trained in any case; what one costs is their mean.
            seconds: CPU seconds that all together may take.
        """
        trained = self.train(name, cells(first))
        more = cells(affordable_networks(trained.seconds, seconds))[first:]
        return trained.joined(self.train(f"{name}-more", more)) if more else trained

    @functools.cached_property
    def passes(self) -> tuple[Batches, Batches]:
        """Passes over training images, for BatchNorm statistics, and over val images that averages are chosen by.

        The latter are of one half of val: temperatures are fitted on all of it.
        """
        from studies.batches import plain_passes

        from dnas_ens.data.splits import alternating_halves

        train, val = self.data.train, self.data.val
        judging = val.subset(alternating_halves(val.labels.cpu().numpy())[0])
        of_train, of_val = (
            plain_passes(self.data, split.to(self.device))
            for split in (train.drawn(STATISTICS_IMAGES), judging.drawn(JUDGING_IMAGES))
        )
        return of_train, of_val

    def network(self) -> Network:
        """Return a network of the base cell in evaluation mode, whose weights are to be loaded."""
        from dnas_ens.training.trainer import MemberTraining

        return MemberTraining(self.base, self.data, self.recipe, index=0, device=self.device).network.eval()

    def predict(self, networks: Iterable[nn.Module]) -> Predictions:
        """Predict val and test with networks, equally weighted."""
        from dnas_ens.ensembles.ensemble import Ensemble
        from dnas_ens.ensembles.preprocessing import Preprocessing
        from dnas_ens.evaluate.predictions import predict_splits

        ensemble = Ensemble(
            list(networks), classes=self.data.classes, preprocessing=Preprocessing.of(self.data)
        )
        return predict_splits(ensemble.eval(), self.data, device=self.device)

    def kept(
        self, name: str, make: Callable[[], tuple[Predictions, dict[str, Any]]]
    ) -> tuple[Predictions, dict[str, Any]]:
        """Return a method's predictions and what is noted of them, made only where its folder does not hold them.

        Args:
            name: Folder of the method.
            make: Trains and predicts.
        """
        from dnas_ens.evaluate.predictions import Predictions
        from dnas_ens.run.files import read_json, write_json

        folder = self.baseline(name)
        if not (folder / "cost.json").exists():
            predictions, notes = make()
            predictions.save(folder / "predictions.npz")
            # Last, for this file says that the method is finished.
            write_json(folder / "cost.json", notes)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return Predictions.load(folder / "predictions.npz"), read_json(folder / "cost.json")

    def at_other_epochs(self, name: str, genotypes: Sequence[Genotype]) -> list[Trained]:
        """Train the genotypes for every other number of epochs asked for.

        For longer ones only so many are trained that the epochs in all stay those of the recipe, at least one.
        """
        own, found = self.recipe.epochs, []
        for epochs in self.budget.epochs:
            if epochs != own:
                count = min(len(genotypes), max(1, -(-len(genotypes) * own // epochs)))
                found.append(self.train(f"{name}-epochs-{epochs}", genotypes[:count], epochs=epochs))
        return found

    def baseline(self, name: str) -> Path:
        """Return the folder of a method, which exists."""
        folder = self.folder / "baselines" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def search_again(
        self, name: str, regime: str, *, seed: int, members: int = 1, base: Path | None = None
    ) -> Searched:
        """Search by another regime with the run's data, supernet and epochs, or take what is finished.

        Args:
            name: Folder under ``baselines/``, a run folder of its own.
            regime: One of `dnas_ens.config.presets`.
            seed: Seed of the search.
            members: Members to choose.
            base: genotypes.json of a given base, in another folder of ``baselines/``.
        """
        from dnas_ens.config.fields import to_dict
        from dnas_ens.config.presets import search_preset
        from dnas_ens.run.files import read_json
        from dnas_ens.run.folder import RunFolder
        from dnas_ens.search.run import run_search

        own = self.search
        published = search_preset(own.preset, regime, base=base)
        several = own.candidates.pool_size if members > 1 else 1
        config = replace(
            published,
            seed=seed,
            data=own.data,
            supernet=own.supernet,
            bilevel=own.bilevel,
            objective=replace(published.objective, drawn_members=own.objective.drawn_members),
            candidates=replace(own.candidates, members=members, pool_size=several),
        )
        settings = to_dict(config)
        if base is not None:
            # As seen from the run, so that it may be moved.
            settings["hypernetwork"]["base"] = str(base.relative_to(self.folder))
        with RunFolder.create(self.baseline(name), config=settings, resume=True) as run:
            file = run.file("genotypes.json")
            if not file.exists():
                run_search(config, self.data, device=self.device, run=run, resume=True)
            found = read_json(file)
        return Searched(
            base=Genotype.from_dict(found["base"]["genotype"]),
            genotypes=ranked_genotypes(found),
            seconds=float(found["report"]["cpu_seconds"]),
            file=file,
        )


def affordable_networks(trained: Sequence[float], seconds: float) -> int:
    """Return how many networks a cost pays for, those included that are trained in any case.

    Args:
        trained: CPU seconds of the latter; what one costs is their mean.
        seconds: CPU seconds that all together may take.
    """
    return max(len(trained), round(seconds * len(trained) / sum(trained)))


def training_seconds(folder: Path, num_members: int) -> list[float]:
    """Return the CPU seconds the first members of a folder took to train."""
    from dnas_ens.run.files import read_json

    return [
        float(read_json(folder / "members" / str(index) / "member.json")["cpu_seconds"])
        for index in range(num_members)
    ]
