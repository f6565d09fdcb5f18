"""The search loop: supernet weights and hypernetwork in turn, resumable after every epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dnas_ens.config import SearchConfig
from dnas_ens.data.batches import Augmentation, count_batches, iterate_batches
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.errors import UserError
from dnas_ens.nn.execution import LAYOUTS, PLAIN, Execution, candidates, fastest
from dnas_ens.nn.fast_supernet import FastSupernet
from dnas_ens.nn.supernet import Supernet
from dnas_ens.search.divergence import pairwise_architecture_distance
from dnas_ens.search.family import ArchitectureFamily
from dnas_ens.search.relaxation import normalised_entropy
from dnas_ens.search.steps import Batch, Schedules, SearchSteps
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.stack import StackSpec
from dnas_ens.training.batch_norm import accuracy_under_batch_statistics
from dnas_ens.training.step import load_optimizer, require_finite

_STREAMS = ("order", "architecture_order", "augmentation", "draws")


class SearchLoop:
    """State and steps of one search.

    Args:
        data: Images; only ``train`` (halved) and ``val`` are read.
        base: A given base, if the configuration names one.
    """

    def __init__(
        self,
        config: SearchConfig,
        data: ImageData,
        *,
        device: torch.device | str = "cpu",
        base: Genotype | None = None,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.family = ArchitectureFamily(config, base=base, device=device)
        if len(data.train) < 4:
            raise UserError(
                f"There are {len(data.train)} training images, which the search halves.",
                "Give it at least 4 of them: 4 images a class where val and test are drawn from the same folder.",
            )
        weight_half, architecture_half = data.search_halves(seed=config.seed)
        self.weight_half = weight_half.to(self.device)
        self.architecture_half = architecture_half.to(self.device)
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
        # Both forms start from the same weights, so that a seed means the same search.
        self.supernet = FastSupernet.from_reference(reference) if supernet.form == "fast" else reference
        # Separate streams, so that another batch size or number of members does not shift the others.
        self.generators = {
            name: torch.Generator(self.device if name == "augmentation" else "cpu").manual_seed(
                1000 * config.seed + index
            )
            for index, name in enumerate(_STREAMS)
        }
        self.epoch = 0
        self.steps_per_epoch = max(1, len(self.weight_half) // config.bilevel.batch_size)
        bilevel = config.bilevel
        # The fast form converts its inputs to channels_last itself.
        layouts = (PLAIN.layout,) if supernet.form == "fast" else tuple(LAYOUTS)
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
        self.steps = SearchSteps(
            config=config,
            family=self.family,
            supernet=self.supernet,
            generator=self.generators["draws"],
            schedules=self.schedules,
            execution=execution,
        )

    @property
    def schedules(self) -> Schedules:
        """What the schedules say for the current epoch."""
        return Schedules(self.config, self.epoch)

    def _execute(self, execution: Execution) -> None:
        self._open_choices = [execution]
        execution.place_module(self.supernet, self.device)
        self.steps.execute(execution)

    def _settle_execution(self) -> None:
        """Measure what the settings leave open: a forward and backward pass of a copy of the supernet in each way."""
        num_members = self.config.objective.drawn_members

        def build_step(execution: Execution) -> Callable[[], object]:
            supernet = execution.place_module(copy.deepcopy(self.supernet), self.device)
            first = slice(0, self.config.bilevel.batch_size)
            images, _ = self._whole_slices(self.weight_half.images[first], self.weight_half.labels[first])
            images = self.augmentation.normalise(images)
            mixtures = torch.full((num_members, *self.family.space.shape), 0.1, device=self.device)
            mixtures.requires_grad_()

            def step() -> None:
                with execution.autocast(self.device):
                    logits = supernet(execution.place(images), mixtures)
                supernet.zero_grad(set_to_none=True)
                logits.float().logsumexp(-1).mean().backward()

            return execution.graphed(step, self.device)

        if len(self._open_choices) > 1:
            self._execute(fastest(self._open_choices, build_step, device=self.device))

    def _whole_slices(self, images: Tensor, labels: Tensor) -> Batch:
        """Leave out images that do not fill a slice for each member; if there are too few images, they are repeated."""
        num_members = self.config.objective.drawn_members
        # A slice of one image that has shrunk to one pixel has no variance for BatchNorm.
        least = 2 * num_members if self.config.objective.passes == "separate" else num_members
        if len(labels) < least:
            turns = torch.arange(least, device=labels.device) % len(labels)
            return images[turns], labels[turns]
        whole = len(labels) // num_members * num_members
        return images[:whole], labels[:whole]

    def _batches(self, split: Split, order: str) -> Iterator[tuple[Tensor, Tensor]]:
        return iterate_batches(
            split,
            self.config.bilevel.batch_size,
            generator=self.generators[order],
            augmentation=self.augmentation,
            augmentation_generator=self.generators["augmentation"],
            drop_last=True,
        )

    def run_epoch(self, on_step: Callable[[int], None] | None = None) -> dict[str, float]:
        """Train one epoch and return its scalars.

        Args:
            on_step: Called after every step with the number of images it used.

        Raises:
            DivergedError: If a loss, a gradient or a weight is not finite.
        """
        self._settle_execution()
        search_architecture = self.epoch >= self.config.bilevel.warmup_epochs and bool(self.steps.architecture)
        self.steps.begin_epoch(
            self.schedules,
            num_pairs=min(
                count_batches(half, self.config.bilevel.batch_size, drop_last=True)
                for half in (self.weight_half, self.architecture_half)
            ),
            with_architecture=search_architecture,
        )
        self.supernet.train()
        steps = 0
        pairs = zip(
            self._batches(self.weight_half, "order"),
            self._batches(self.architecture_half, "architecture_order"),
            strict=False,
        )
        for training_batch, validation_batch in pairs:
            training_batch = self._whole_slices(*training_batch)
            validation_batch = self._whole_slices(*validation_batch)
            if search_architecture:
                self.steps.architecture_step(validation_batch, training_batch)
            self.steps.weight_step(training_batch)
            steps += 1
            if on_step is not None:
                on_step(len(training_batch[1]) + (len(validation_batch[1]) if search_architecture else 0))
        where = f"epoch {self.epoch + 1} of the search"
        for module in (self.supernet, self.family.hypernetwork):
            self.steps.watch.require_finite(module, where=where)
        scalars = {name: float(total) / max(1, steps) for name, total in self.steps.totals.items()}
        require_finite(scalars, where=where)
        self.epoch += 1
        self.family.temperature = self.schedules.temperature
        return scalars | self.measure()

    @torch.no_grad()
    def measure(self, *, num_images: int = 1000) -> dict[str, float]:
        """Return validation accuracy, diversity, skips and entropy at the current state."""
        hyper = self.config.hypernetwork
        members = self.family.distributions(self.family.grid(torch.tensor([0.5 * hyper.max_lambda])))
        distances = pairwise_architecture_distance(members, self.family.space)
        pairs = max(1, hyper.directions * (hyper.directions - 1))
        base = self.family.start()
        genotype = self.family.base_genotype()
        return {
            "val_accuracy": accuracy_under_batch_statistics(
                lambda images: self.supernet(images, base),
                self.supernet,
                self.val.drawn(num_images),
                augmentation=self.augmentation,
            ),
            "member_distance": float(distances.sum()) / pairs,
            "skips": float(max(genotype.skip_counts().values())),
            "entropy": normalised_entropy(base.cpu(), self.family.space),
            "temperature": self.schedules.temperature,
        }

    def should_stop(self) -> bool:
        """Say whether a base cell holds more skip connections than allowed (DARTS+, arXiv 1909.06035)."""
        limit = self.config.bilevel.max_skips
        return limit is not None and max(self.family.base_genotype().skip_counts().values()) > limit

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the search depends on."""
        return {
            "epoch": self.epoch,
            "execution": self.steps.execution.to_dict(),
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
        self._execute(Execution(**state["execution"]))
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
