"""One network that is trained from scratch with the recipe, from seeds of its own: the only trainer."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from dnas_ens.config import RetrainConfig, require
from dnas_ens.config.fields import to_dict
from dnas_ens.config.settings import AVERAGED_RATE
from dnas_ens.data.batches import Augmentation, class_weights, count_batches, epoch_indices
from dnas_ens.data.dataset import ImageData
from dnas_ens.nn.execution import Execution, candidates, fastest, step_seconds
from dnas_ens.nn.network import Network, num_parameters
from dnas_ens.run.progress import Progress
from dnas_ens.run.ranks import current
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.stack import StackSpec
from dnas_ens.training.batch_norm import CALIBRATION_IMAGES, average_statistics
from dnas_ens.training.interleaving import Steps, exhaust
from dnas_ens.training.prediction import predict_log_probs
from dnas_ens.training.step import (
    MemberSeeds,
    TrainingStep,
    build_sgd,
    cosine_learning_rate,
    drop_path_at,
    load_optimizer,
    require_finite,
    restore,
    set_learning_rate,
    training_steps,
)

Model = TypeVar("Model", bound=nn.Module)
#: Starts an epoch, given the generators of order (on the CPU) and augmentation: the tensors of each step.
TrainingBatches = Callable[[torch.Generator, torch.Generator], Iterator[tuple[Tensor, ...]]]


class _WeightAverage:
    """The mean of a network's weights over steps (SWA, arXiv 1803.05407).

    ``AveragedModel`` keeps its count in a tensor, and a GPU waits at every step for what the host reads of it.
    """

    def __init__(self, network: nn.Module) -> None:
        self._weights, self._update = list(network.parameters()), get_swa_multi_avg_fn()
        self.mean = [weight.detach().clone() for weight in self._weights]
        self.steps = 0

    def add(self) -> None:
        """Take the weights as they are now into the mean."""
        self._update(self.mean, [weight.detach() for weight in self._weights], self.steps)
        self.steps += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Make the mean the network's weights."""
        for weight, mean in zip(self._weights, self.mean, strict=True):
            weight.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """Return what the mean depends on."""
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        for mean, saved in zip(self.mean, state["mean"], strict=True):
            mean.copy_(saved)
        self.steps = state["steps"]


class Training(Generic[Model]):
    """Any module trained by SGD, epoch by epoch: its optimiser, its generators, its state.

    Args:
        build: Makes the module with fresh weights from torch's global generator.
        batches: Starts an epoch, given the generators of order and augmentation: the tensors of each step.
        recipe: Learning rate, momentum, weight decay (none where it is None), loss, clipping.
        execution: How the module is computed, where that is settled; None for what the recipe says.
        prepare: Makes images (B, ...) and labels (B,) of a step's tensors, and is recorded with the step; None takes
            the tensors as they are.
        class_weights: As ``TrainingStep`` takes them.

    Attributes:
        epoch: Epochs done.
        steps_done: Steps done of the epoch in progress; 0 between two epochs.
        total_epochs: Those there will be, where the cosine of the learning rate ends; the recipe's unless lowered.
        execution: How the module is computed; what the recipe leaves open is measured before the first epoch.
        ranks: The processes that share the training.
    """

    def __init__(
        self,
        build: Callable[[], Model],
        batches: TrainingBatches,
        recipe: RetrainConfig,
        seeds: MemberSeeds,
        *,
        name: str,
        device: torch.device | str = "cpu",
        execution: Execution | None = None,
        prepare: Callable[..., tuple[Tensor, Tensor]] | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        self.recipe, self.seeds, self.name, self._class_weights = recipe, seeds, name, class_weights
        self.ranks = current()
        self.device, self.epoch, self.total_epochs = torch.device(device), 0, recipe.epochs
        self._batches, self._prepare = batches, prepare
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.initialisation)
            network = build()
        self._open_choices = (
            candidates(
                layout=recipe.layout,
                precision=recipe.precision,
                device=self.device,
                cuda_graph=recipe.cuda_graph,
            )
            if execution is None
            else [execution]
        )
        self.execution = self._open_choices[0]
        self.network = self.execution.place_module(network, self.device)
        self.optimizer = self._new_optimizer(self.network)
        self.order = torch.Generator().manual_seed(seeds.order)
        self.augmentation_generator = torch.Generator(self.device).manual_seed(seeds.augmentation)
        self._drop_path_generator = torch.Generator(self.device)
        self.steps_done = 0
        self._between: Mapping[str, Any] | None = None
        self._average: _WeightAverage | None = None
        self._step = self._new_step()

    @property
    def num_parameters(self) -> int:
        """How many parameters the network has."""
        return num_parameters(self.network)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _new_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return build_sgd(network.parameters(), self.recipe)

    def _new_step(self) -> TrainingStep:
        return TrainingStep(
            self.network,
            self.optimizer,
            self.recipe,
            execution=self.execution,
            prepare=self._prepare,
            generators=[self.augmentation_generator, self._drop_path_generator],
            class_weights=self._class_weights,
            ranks=self.ranks,
        )

    def _execute(self, execution: Execution) -> None:
        self._open_choices, self.execution = [execution], execution
        execution.place_module(self.network, self.device)
        self._step = self._new_step()

    @property
    def execution_is_settled(self) -> bool:
        """Whether ``settle_execution`` has nothing to measure."""
        return len(self._open_choices) == 1

    def settle_execution(self) -> Execution:
        """Measure what the recipe leaves open: a training step of a copy of the network in each way."""
        if not self.execution_is_settled:
            self._execute(fastest(self._open_choices, self._trial_step, device=self.device))
        return self.execution

    def measured_step(self) -> float:
        """Return the seconds of a training step, the median of a few steps of a copy of the network."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return step_seconds([self.settle_execution()], self._trial_step, device=self.device)[self.execution]

    def _trial_step(self, execution: Execution) -> Callable[[], object]:
        network = execution.place_module(copy.deepcopy(self.network), self.device)
        step = TrainingStep(network, self._new_optimizer(network), self.recipe, execution=execution)
        return partial(step, *self._trial_batch())

    def _trial_batch(self) -> tuple[Tensor, Tensor]:
        """Return images and labels to time a step on, from generators that are thrown away."""
        order, augmentation = torch.Generator(), torch.Generator(self.device)
        tensors = next(iter(self._batches(order, augmentation)))
        images, labels = tensors if self._prepare is None else self._prepare(*tensors)
        return images, labels

    def run_epoch(
        self,
        progress: Progress | None = None,
        *,
        learning_rate: float | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> dict[str, float]:
        """Train one epoch and return its scalars: ``train_loss`` in nats, ``train_accuracy``, ``learning_rate``.

        Args:
            learning_rate: Of the epoch, or of its first step where ``on_step`` sets others; None for the recipe's
                cosine. ``self.learning_rate`` follows the optimiser's.
            on_step: Called after every step of the optimiser; a learning rate it sets by ``set_learning_rate``
                holds for the next.

        Raises:
            DivergedError: If a loss, a gradient or a weight is not finite.
        """
        # Dropout draws from the global stream; seeding it by epoch keeps a resumed training on the same path.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._epoch_seed())
            return exhaust(self.epoch_steps(progress, learning_rate=learning_rate, on_step=on_step))

    def epoch_steps(
        self,
        progress: Progress | None = None,
        *,
        learning_rate: float | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Steps[dict[str, float]]:
        """Train one epoch, pausing after every step; what is not the network's own draws from the global stream.

        Arguments as in ``run_epoch``.
        """

        def after_step(num_images: int) -> None:
            self.steps_done += 1
            if average is not None:
                average.add()
            if progress is not None:
                progress.count_images(num_images)
                progress.step()
            if on_step is not None:
                on_step()

        self.settle_execution()
        average = None
        if learning_rate is None:
            full, total = self.recipe.learning_rate, self.total_epochs
            averaged = int(self.recipe.average_last * total)
            # Weights that are averaged should still move.
            end = AVERAGED_RATE * full if averaged else 0.0
            learning_rate = cosine_learning_rate(full, self.epoch, total, end=end)
            # A training that was prolonged may not be near its end any more.
            if total - self.epoch <= averaged:
                average = self._average or _WeightAverage(self.network)
            self._average = average
        set_learning_rate(self.optimizer, learning_rate)
        if isinstance(self.network, Network):
            self._set_drop_path(self.network)
        self._order_before = self.order.get_state()
        batches = self._batches(self.order, self.augmentation_generator)
        if self._between is not None:
            self._go_on(batches, self._between)
        where = f"epoch {self.epoch + 1} of {self.name}"
        scalars = yield from training_steps(self._step, batches, on_step=after_step, where=where)
        if isinstance(self.network, Network):
            # The generator belongs to the epoch; a network that is copied or sent should not carry it along.
            self.network.drop_path_generator = None
        require_finite(scalars, where=where)
        self.epoch += 1
        self.steps_done = 0
        return {**scalars, "learning_rate": learning_rate}

    def _go_on(self, batches: Iterator[tuple[Tensor, ...]], between: Mapping[str, Any]) -> None:
        """Go back to the middle of the epoch whose batches have just begun, past those that were trained on."""
        self._between, self.steps_done = None, between["steps"]
        for _ in range(self.steps_done):
            next(batches)
        set_learning_rate(self.optimizer, between["learning_rate"])
        restore(self.augmentation_generator, between["augmentation"])
        restore(self._drop_path_generator, between["drop_path"])
        self._step.load_state_dict(between["sums"])

    def _set_drop_path(self, network: Network) -> None:
        network.drop_path_generator = self._drop_path_generator.manual_seed(self._epoch_seed())
        probability = self._drop_path_now()
        # On a GPU a tensor in eager steps too: from a number the same generator draws other paths.
        if self.device.type != "cuda" or self.recipe.drop_path == 0.0:
            network.drop_path_probability = probability
        elif isinstance(network.drop_path_probability, Tensor):
            network.drop_path_probability.fill_(probability)
        else:
            network.drop_path_probability = torch.tensor(probability, device=self.device)

    def _drop_path_now(self) -> float:
        return drop_path_at(self.recipe.drop_path, self.epoch, self.total_epochs)

    def _epoch_seed(self) -> int:
        return self.seeds.augmentation + 1 + self.epoch

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on; it changes with the training.

        Between two steps of an epoch too, except for what is drawn from torch's global generator.
        """
        between = None
        if self.steps_done:
            between = {
                "steps": self.steps_done,
                "learning_rate": self.learning_rate,
                "augmentation": self.augmentation_generator.get_state(),
                "drop_path": self._drop_path_generator.get_state(),
                "sums": self._step.state_dict(),
            }
        return {
            "epoch": self.epoch,
            "between": between,
            "execution": self.execution.to_dict(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            # In the middle of an epoch its order is drawn again.
            "order": self._order_before if self.steps_done else self.order.get_state(),
            "augmentation": self.augmentation_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        self.branch_off(state)
        if state["average"] is not None:
            self._average = _WeightAverage(self.network)
            self._average.load_state_dict(state["average"])
        restore(self.order, state["order"])
        restore(self.augmentation_generator, state["augmentation"])
        self._between, self.steps_done = state["between"], 0

    def branch_off(self, state: Mapping[str, Any]) -> None:
        """Continue from the weights, momentum and epoch of a state, with its own order and augmentation."""
        self.epoch, self._average = state["epoch"], None
        self.network.load_state_dict(state["network"])
        # A copy, because the optimiser keeps the tensors, and another branch may start from the same state.
        load_optimizer(self.optimizer, copy.deepcopy(state["optimizer"]))
        # Last, because a recorded step holds the tensors of the optimiser.
        self._execute(Execution(**state["execution"]).on(self.device))


class NetworkTraining(Training[Model]):
    """A training on the images of a data set, measured on ``val``; other arguments as in ``Training``.

    Args:
        data: Images; ``train`` is learnt from and ``val`` measured on.
        index: Position in the ensemble; decides its seeds.
    """

    def __init__(
        self,
        build: Callable[[], Model],
        data: ImageData,
        recipe: RetrainConfig,
        *,
        index: int,
        device: torch.device | str = "cpu",
        execution: Execution | None = None,
    ) -> None:
        self.index, self.num_classes, self._fingerprint = index, data.num_classes, data.fingerprint
        self._val_probs: tuple[int, np.ndarray] | None = None
        self.train_split, self.val = data.train.to(device), data.val.to(device)
        recipe = recipe.for_images(len(self.train_split))
        self.augmentation = Augmentation.for_data(data, augment=recipe.augment, cutout=recipe.cutout)
        self.steps_per_epoch = count_batches(self.train_split, recipe.batch_size, drop_last=True)

        def batches(order: torch.Generator, _: torch.Generator) -> Iterator[tuple[Tensor]]:
            indices = epoch_indices(
                self.train_split,
                recipe.batch_size,
                generator=order,
                drop_last=True,
                balanced=recipe.balance == "sampling",
            )
            return ((index,) for index in indices)

        # Gathering and augmenting are part of the step, so that a CUDA graph records them too.
        def prepare(index: Tensor) -> tuple[Tensor, Tensor]:
            own = self.ranks.own(len(index))
            images = self._augmented(index, own)
            return images, self.targets(images, index[own])

        super().__init__(
            build,
            batches,
            recipe,
            MemberSeeds.derive(recipe.seed, index),
            name=f"member {index}",
            device=device,
            execution=execution,
            prepare=prepare,
            class_weights=self._weights_of_classes(recipe),
        )
        size, batch_size = self.ranks.size, min(recipe.batch_size, len(self.train_split))
        require(
            batch_size % size == 0,
            f"{size} processes do not divide a batch of {batch_size} images.",
            f"Give --batch-size a multiple of {size}, or start another number of processes.",
        )

    def _weights_of_classes(self, recipe: RetrainConfig) -> Tensor | None:
        if recipe.balance != "weights":
            return None
        found = class_weights(self.train_split.labels)
        # Classes without a training image have a logit all the same.
        return torch.cat([found, found.new_zeros(self.num_classes - len(found))])

    def targets(self, images: Tensor, index: Tensor) -> Tensor:
        """Return what a step's augmented images (B, C, H, W) of the training split are to become: their labels."""
        return self.train_split.labels[index]

    def _trial_batch(self) -> tuple[Tensor, Tensor]:
        first = self.train_split.subset(torch.arange(min(self.recipe.batch_size, len(self.train_split))))
        return self.augmentation.normalise(first.images), first.labels

    def val_probs(self) -> np.ndarray:
        """Return probabilities (N, K) on the validation images, computed in float32; once for an epoch's weights."""
        if self._val_probs is None or self._val_probs[0] != self.epoch or self.epoch == 0:
            log_probs = predict_log_probs(self.network, self.val, augmentation=self.augmentation)
            self._val_probs = self.epoch, log_probs.exp().cpu().numpy()
        return self._val_probs[1]

    def end(self) -> None:
        """Take the average of the last weights, where the recipe asks for one, as the network's.

        BatchNorm's statistics are computed anew for it (SWA, arXiv 1803.05407).
        """
        if self._average is None:
            return
        self._average.apply()
        # Augmented as in training: statistics of plain images cost up to 0.03 nats (docs/log.md).
        count = math.ceil(CALIBRATION_IMAGES / min(self.recipe.batch_size, len(self.train_split)))
        epochs = (self._batches(self.order, self.augmentation_generator) for _ in range(count))
        batches = itertools.islice(itertools.chain.from_iterable(epochs), count)
        average_statistics(self.network, (self._augmented(index) for (index,) in batches))
        self._average = self._val_probs = None

    def _augmented(self, index: Tensor, own: slice = slice(None)) -> Tensor:
        """Return the training images of a batch, augmented; of several ranks all draw alike and each has its own."""
        images = self.train_split.images[index[own]]
        height, width = images.shape[-2:]
        draws = self.augmentation.draw(len(index), height=height, width=width, generator=self.augmentation_generator)
        return self.augmentation.apply(images, draws.part(own))

    def branch_off(self, state: Mapping[str, Any]) -> None:
        """Continue from the weights, momentum and epoch of a state, with its own order and augmentation."""
        self._val_probs = None
        super().branch_off(state)

    def identity(self) -> dict[str, Any]:
        """Return what a state of this training depends on: network, recipe and images, ready for JSON."""
        spec = getattr(self.network, "spec", None)
        network = spec() if callable(spec) else type(self.network).__name__
        flip = self.augmentation.flip
        return {"spec": network, "recipe": to_dict(self.recipe), "data": self._fingerprint, "flip": flip}


@dataclass(frozen=True)
class Parent:
    """The network that a training goes on from.

    Args:
        weights: Gives its state; called when the training begins.
    """

    number: int
    weights: Callable[[], Mapping[str, Tensor]]


class MemberTraining(NetworkTraining[Network]):
    """A member of an ensemble: the network of a genotype; arguments but these as in ``NetworkTraining``.

    Args:
        genotype: Also decides the space.
        recipe: Also the size of the network.
        parent: What the training goes on from, with a new optimiser; None for fresh weights.

    Attributes:
        val_measurements: How often val is measured during a training, evenly spread, the last time at its end.
        on_epoch: Called with every epoch's scalars, and may lower ``total_epochs`` to no less than ``epoch``.
        looks: What it has found of a training so far; a part of the state.
    """

    val_measurements: int = 4
    on_epoch: Callable[[Mapping[str, float]], object] | None = None

    def __init__(
        self,
        genotype: Genotype,
        data: ImageData,
        recipe: RetrainConfig,
        *,
        index: int,
        device: torch.device | str = "cpu",
        execution: Execution | None = None,
        parent: Parent | None = None,
    ) -> None:
        self.parent = parent
        self.looks: list[float] = []
        stack = StackSpec.for_data(
            data,
            space=genotype.space,
            num_cells=recipe.num_cells,
            channels=recipe.channels,
            stem_stride=recipe.stem_stride,
        )
        auxiliary = recipe.auxiliary_weight > 0
        super().__init__(
            lambda: Network(genotype, stack, auxiliary=auxiliary),
            data,
            recipe,
            index=index,
            device=device,
            execution=execution,
        )

    def begin(self) -> None:
        """Take over the parent's weights, if there is one."""
        if self.parent is not None:
            self.network.load_state_dict(self.parent.weights())

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with what was found of the training and how long it is to be."""
        return super().state_dict() | {"looks": list(self.looks), "total_epochs": self.total_epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state."""
        super().load_state_dict(state)
        self.looks, self.total_epochs = list(state["looks"]), state["total_epochs"]

    def _drop_path_now(self) -> float:
        # Where a training goes on, the probability has risen already.
        return super()._drop_path_now() if self.parent is None else self.recipe.drop_path

    def identity(self) -> dict[str, Any]:
        """Return what a state of this training depends on, with the number of the parent."""
        return super().identity() | {"parent": None if self.parent is None else self.parent.number}
