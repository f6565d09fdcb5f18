"""The search on images: supernet weights and hypernetwork in turn, or together along hard paths."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dnas_ens.config import SearchConfig, require
from dnas_ens.data.batches import Augmentation, count_batches, iterate_batches
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.errors import UserError
from dnas_ens.nn.execution import LAYOUTS, PLAIN, Execution, candidates, fastest
from dnas_ens.nn.fast_supernet import FastSupernet
from dnas_ens.nn.supernet import Supernet
from dnas_ens.nn.synchronised import synchronise
from dnas_ens.search.relaxation import genotype_mixture
from dnas_ens.search.star import STREAMS, FamilyLoop, stream
from dnas_ens.search.steps import Batch, SearchSteps
from dnas_ens.space.stack import StackSpec
from dnas_ens.training.batch_norm import accuracy_under_batch_statistics
from dnas_ens.training.step import load_optimizer, require_finite, restore


class SearchLoop(FamilyLoop):
    """State and steps of one search on images.

    Args:
        data: Images; only ``train`` and ``val`` are read.
        **options: device, base and step_times, as for ``FamilyLoop``.

    Attributes:
        weight_images: What the weights are trained on: one half of the training images, for hard paths all of them.
        architecture_images: What the architecture is trained on: the other half, or all of them.
    """

    def __init__(self, config: SearchConfig, data: ImageData, **options: Any) -> None:
        super().__init__(config, **options)
        if len(data.train) < 4:
            raise UserError(
                f"There are {len(data.train)} training images, which the search halves.",
                "Give it at least 4 of them: 4 images a class where val and test are drawn from the same folder.",
            )
        hard = config.objective.hard
        if hard:
            self.weight_images = self.architecture_images = data.train.to(self.device)
        else:
            halves = data.search_halves(seed=config.seed)
            self.weight_images, self.architecture_images = (half.to(self.device) for half in halves)
        self._require_shares()
        self.val = data.val.to(self.device)
        self.augmentation = Augmentation.for_data(data, augment=config.bilevel.augment)

        supernet = config.supernet
        stack = StackSpec.for_data(
            data,
            space=supernet.space,
            num_cells=supernet.num_cells,
            channels=supernet.num_channels,
            stem_stride=supernet.stem_stride,
            partial_channels=supernet.partial_channels,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            reference = Supernet(self.family.space, stack)
        # Both forms start from the same weights, so that a seed means the same search. The fast form computes all
        # operations of a source together, of which hard paths want few.
        fast = supernet.form == "fast" and not hard
        self.supernet = FastSupernet.from_reference(reference) if fast else reference
        self.generators = {
            name: stream(config, name, self.device if name == "augmentation" else "cpu") for name in STREAMS
        }
        self._between: tuple[dict[str, Any], Tensor] | None = None
        self.num_epochs = config.bilevel.epochs
        self.steps_per_epoch = max(1, len(self.weight_images) // config.bilevel.batch_size)
        bilevel = config.bilevel
        # The fast form converts its inputs to channels_last itself.
        layouts = (PLAIN.layout,) if fast else tuple(LAYOUTS)
        self._open_choices = candidates(
            layout=bilevel.layout,
            precision=bilevel.precision,
            device=self.device,
            layouts=layouts,
            cuda_graph=bilevel.cuda_graph,
            recordable=config.recordable,
        )
        execution = self._open_choices[0]
        self.supernet = execution.place_module(self.supernet, self.device)
        if self.ranks.sync_batch_norm:
            synchronise(self.supernet)
        self.steps = SearchSteps(
            config=config,
            family=self.family,
            supernet=self.supernet,
            generator=self.generators["draws"],
            schedules=self.schedules,
            step_times=self.step_times,
            execution=execution,
        )

    @property
    def execution(self) -> dict[str, str | bool]:
        """How images are computed."""
        return self.steps.execution.to_dict()

    @property
    def within_an_epoch(self) -> bool:
        """Whether it goes on within an epoch, from a state between two steps."""
        return self._between is not None

    def _execute(self, execution: Execution) -> None:
        self._open_choices = [execution]
        execution.place_module(self.supernet, self.device)
        self.steps.execute(execution)

    def _settle_execution(self) -> None:
        """Measure what the settings leave open: a forward and backward pass of a copy of the supernet in each way."""
        num_members = self.config.objective.num_drawn

        def build_step(execution: Execution) -> Callable[[], object]:
            supernet = execution.place_module(copy.deepcopy(self.supernet), self.device)
            first = slice(0, self.config.bilevel.batch_size)
            images, _ = self._whole_slices(self.weight_images.images[first], self.weight_images.labels[first])
            images = self.augmentation.normalise(images)
            hard = self.config.objective.hard
            soft = torch.full((num_members, *self.family.space.shape), 0.1, device=self.device)
            mixtures = (self._base_path() if hard else soft).requires_grad_()

            def step() -> None:
                with execution.autocast(self.device):
                    logits = supernet(execution.place(images), mixtures, hard=hard)
                supernet.zero_grad(set_to_none=True)
                logits.float().logsumexp(-1).mean().backward()

            return execution.graphed(step, self.device)

        if len(self._open_choices) > 1:
            chosen = fastest(self._open_choices, build_step, device=self.device)
            fields: dict[str, Any] = self.ranks.shared(chosen.to_dict())
            self._execute(Execution(**fields))

    def _whole_slices(self, images: Tensor, labels: Tensor) -> Batch:
        """Leave out images that do not fill a slice for each member; if there are too few images, they are repeated.

        Of several ranks each takes its share of every slice.
        """
        num_members, ranks = self.config.objective.num_drawn, self.ranks
        if ranks.size > 1:
            share = len(labels) // (num_members * ranks.size)
            own = torch.arange(num_members * ranks.size * share, device=labels.device)
            own = own.view(num_members, -1)[:, ranks.own(ranks.size * share)].flatten()
            return images[own], labels[own]
        least = self._least_images
        if len(labels) < least:
            turns = torch.arange(least, device=labels.device) % len(labels)
            return images[turns], labels[turns]
        whole = len(labels) // num_members * num_members
        return images[:whole], labels[:whole]

    @property
    def _least_images(self) -> int:
        """How many images a pass of one rank needs."""
        # A slice of one image that has shrunk to one pixel has no variance for BatchNorm.
        separate = self.config.objective.hard or self.config.objective.passes == "separate"
        return self.config.objective.num_drawn * (2 if separate else 1)

    def _require_shares(self) -> None:
        """Check that several ranks have a share of every slice of a batch."""
        size, members, batch_size = self.ranks.size, self.config.objective.num_drawn, self.config.bilevel.batch_size
        if size == 1:
            return
        require(
            batch_size % (size * members) == 0,
            f"{size} processes times {members} drawn members do not divide a batch of {batch_size} images.",
            f"Give --batch-size a multiple of {size * members}, or start another number of processes.",
        )
        found = min(batch_size, len(self.weight_images), len(self.architecture_images))
        require(
            found >= size * self._least_images,
            f"{size} processes need {size * self._least_images} images for a step, and there are {found}.",
            "Start fewer processes, or give more images or a larger --batch-size.",
        )

    def _batches(self, split: Split, order: str) -> Iterator[tuple[Tensor, Tensor]]:
        return iterate_batches(
            split,
            self.config.bilevel.batch_size,
            generator=self.generators[order],
            augmentation=self.augmentation,
            augmentation_generator=self.generators["augmentation"],
            drop_last=True,
            first_batch=self.steps_done,
        )

    def _batch_pairs(self) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield a batch for the weights and one for the architecture, None where one serves both."""
        training = itertools.starmap(self._whole_slices, self._batches(self.weight_images, "order"))
        if self.config.objective.hard:
            yield from ((batch, None) for batch in training)
        else:
            validation = self._batches(self.architecture_images, "architecture_order")
            yield from zip(training, itertools.starmap(self._whole_slices, validation), strict=False)

    def run_epoch(self, on_step: Callable[[int], None] | None = None) -> dict[str, float]:
        """Train one epoch; arguments, result and errors as in ``FamilyLoop``."""
        self._settle_execution()
        search_architecture = self.epoch >= self.config.bilevel.warmup_epochs and bool(self.steps.architecture)
        self._starts = {name: self.generators[name].get_state() for name in ("order", "architecture_order", "draws")}
        self.steps.begin_epoch(
            self.schedules,
            num_pairs=min(
                count_batches(half, self.config.bilevel.batch_size, drop_last=True)
                for half in (self.weight_images, self.architecture_images)
            ),
            with_architecture=search_architecture,
        )
        self.supernet.train()
        if self._between is not None:
            self._go_on(*self._between)
        for training_batch, validation_batch in self._batch_pairs():
            num_images = len(training_batch[1]) * self.ranks.size
            if search_architecture and validation_batch is None:
                self.steps.joint_step(training_batch)
            else:
                if search_architecture and validation_batch is not None:
                    num_images += len(validation_batch[1]) * self.ranks.size
                    self.steps.architecture_step(validation_batch, training_batch)
                self.steps.weight_step(training_batch)
            self.steps_done += 1
            if on_step is not None:
                on_step(num_images)
        where = f"epoch {self.epoch + 1} of the search"
        for module in (self.supernet, self.family.hypernetwork):
            self.steps.watch.require_finite(module, where=where)
        scalars = {name: float(total) / max(1, self.steps_done) for name, total in self.steps.totals.items()}
        require_finite(scalars, where=where)
        self.epoch += 1
        self.steps_done = 0
        self.family.temperature = self.schedules.temperature
        return scalars | self.measure()

    def _go_on(self, between: dict[str, Any], draws: Tensor) -> None:
        """Go back to the middle of the epoch that has just begun, past the draws that were used."""
        self._between, self.steps_done = None, between["steps"]
        self.steps.load_sums(between["sums"])
        restore(self.generators["draws"], draws)

    def require_agreement(self) -> None:
        """Check that all ranks have the same hypernetwork and weights; see `Ranks.require_agreement`."""
        super().require_agreement()
        self.ranks.require_agreement(self.supernet, "The supernet")

    @torch.no_grad()
    def measure(self, *, num_images: int = 1000) -> dict[str, float]:
        """Return validation accuracy, diversity, skips and entropy at the current state.

        The accuracy is that of the relaxed base, for hard paths that of its discrete one.
        """
        hard = self.config.objective.hard
        base = self._base_path() if hard else self.family.start()
        accuracy = accuracy_under_batch_statistics(
            lambda images: self.supernet(images, base, hard=hard),
            self.supernet,
            self.val.drawn(num_images),
            augmentation=self.augmentation,
        )
        return {"val_accuracy": accuracy, **self.measure_family()}

    def _base_path(self) -> Tensor:
        """Return the discrete start of the paths as mixture weights (T, E, O) of 0 and 1."""
        return genotype_mixture(self.family.start_genotype(), self.family.space).to(self.device)

    def scoring_images(self) -> Split:
        """Return the validation images that candidates are scored on."""
        given = self.config.candidates.score_images
        most = len(self.weight_images) if given is None else given
        return self.val if most >= len(self.val) else self.val.drawn(most)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the search depends on, also between two steps of an epoch."""
        between = None
        if self.steps_done:
            between = {"steps": self.steps_done, "starts": self._starts, "sums": self.steps.sums()}
        return {
            "epoch": self.epoch,
            "between": between,
            "execution": self.execution,
            "supernet": self.supernet.state_dict(),
            "hypernetwork": self.family.hypernetwork.state_dict(),
            "weight_optimizer": self.steps.weight_optimizer.state_dict(),
            "architecture_optimizer": self.steps.architecture_optimizer.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.epoch = state["epoch"]
        self.family.temperature = self.schedules.temperature
        self.supernet.load_state_dict(state["supernet"])
        self.family.hypernetwork.load_state_dict(state["hypernetwork"])
        load_optimizer(self.steps.weight_optimizer, state["weight_optimizer"])
        self.steps.architecture_optimizer.load_state_dict(state["architecture_optimizer"])
        # Last, because a recorded step holds the tensors of the optimisers.
        self._execute(Execution(**state["execution"]).on(self.device))
        self._between, self.steps_done = None, 0
        starts = state["generators"]
        if state["between"] is not None:
            # The epoch begins once more with the same order and draws.
            self._between = state["between"], state["generators"]["draws"]
            starts = state["generators"] | state["between"]["starts"]
        for name, generator in self.generators.items():
            restore(generator, starts[name])
