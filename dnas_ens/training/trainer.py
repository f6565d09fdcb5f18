"""One network that is trained from scratch with the recipe, from seeds of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dnas_ens.config import RetrainConfig
from dnas_ens.config.fields import to_dict
from dnas_ens.data.batches import Augmentation, count_batches, epoch_indices
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.nn.execution import Execution, candidates, fastest
from dnas_ens.nn.network import Network
from dnas_ens.nn.stack import SMALL_IMAGE
from dnas_ens.run.progress import Progress
from dnas_ens.space.genotype import Genotype
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
    set_learning_rate,
    training_steps,
)

Model = TypeVar("Model", bound=nn.Module)


class NetworkTraining(Generic[Model]):
    """State and epochs of one network.

    Args:
        build: Makes the network with fresh weights from torch's global generator.
        data: Images; ``train`` is learnt from and ``val`` measured on.
        recipe: How to train.
        index: Position in the ensemble; decides its seeds.
        device: Where to train.
        execution: How the network is computed, where that is settled; None for what the recipe says.

    Attributes:
        execution: How the network is computed; what the recipe leaves open is measured before the first epoch.
        num_classes: K.
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
        self.recipe, self.index = recipe, index
        self.device = torch.device(device)
        self.seeds = MemberSeeds.derive(recipe.seed, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seeds.initialisation)
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
        self.train_split: Split = data.train.to(self.device)
        self.val: Split = data.val.to(self.device)
        self._fingerprint = data.fingerprint
        self.num_classes = data.num_classes
        self.augmentation = Augmentation.for_data(data, augment=recipe.augment, cutout=recipe.cutout)
        self.order = torch.Generator().manual_seed(self.seeds.order)
        self.augmentation_generator = torch.Generator(self.device).manual_seed(self.seeds.augmentation)
        self._drop_path_generator = torch.Generator(self.device)
        self.epoch = 0
        self.steps_per_epoch = count_batches(self.train_split, recipe.batch_size, drop_last=True)
        self._step = self._new_step()

    def _new_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return build_sgd(
            network.parameters(),
            learning_rate=self.recipe.learning_rate,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )

    def _new_step(self) -> TrainingStep:
        # Gathered and augmented within the step, so that a recording holds that too.
        def prepare(index: Tensor) -> tuple[Tensor, Tensor]:
            images, labels = self.train_split.images[index], self.train_split.labels[index]
            return self.augmentation(images, self.augmentation_generator), labels

        return TrainingStep(
            self.network,
            self.optimizer,
            self.recipe,
            execution=self.execution,
            prepare=prepare,
            generators=[self.augmentation_generator, self._drop_path_generator],
        )

    def _execute(self, execution: Execution) -> None:
        self._open_choices, self.execution = [execution], execution
        execution.place_module(self.network, self.device)
        self._step = self._new_step()

    @property
    def execution_is_settled(self) -> bool:
        """Whether nothing is left open that ``settle_execution`` would measure."""
        return len(self._open_choices) == 1

    def settle_execution(self) -> Execution:
        """Measure what the recipe leaves open: a training step of a copy of the network in each way."""

        def build_step(execution: Execution) -> Callable[[], object]:
            network = execution.place_module(copy.deepcopy(self.network), self.device)
            step = TrainingStep(network, self._new_optimizer(network), self.recipe, execution=execution)
            first = self.train_split.subset(torch.arange(min(self.recipe.batch_size, len(self.train_split))))
            return partial(step, self.augmentation.normalise(first.images), first.labels)

        if not self.execution_is_settled:
            self._execute(fastest(self._open_choices, build_step, device=self.device))
        return self.execution

    def run_epoch(
        self,
        progress: Progress | None = None,
        *,
        learning_rate: float | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> dict[str, float]:
        """Train one epoch and return its scalars.

        Args:
            progress: Where to show how far it is.
            learning_rate: Of the epoch, or of its first step where ``on_step`` sets others; None for the recipe's
                cosine.
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
            if progress is not None:
                progress.count_images(num_images)
                progress.step()
            if on_step is not None:
                on_step()

        self.settle_execution()
        if learning_rate is None:
            learning_rate = cosine_learning_rate(self.recipe, self.epoch)
        set_learning_rate(self.optimizer, learning_rate)
        if isinstance(self.network, Network):
            self._set_drop_path(self.network)
        order = epoch_indices(self.train_split, self.recipe.batch_size, generator=self.order, drop_last=True)
        where = f"epoch {self.epoch + 1} of member {self.index}"
        batches = ((index,) for index in order)
        scalars = yield from training_steps(self._step, batches, on_step=after_step, where=where)
        if isinstance(self.network, Network):
            # It belongs to the epoch, and a network that is copied or sent elsewhere should not carry it along.
            self.network.drop_path_generator = None
        require_finite(scalars, where=where)
        self.epoch += 1
        return {**scalars, "learning_rate": learning_rate}

    def _set_drop_path(self, network: Network) -> None:
        network.drop_path_generator = self._drop_path_generator.manual_seed(self._epoch_seed())
        probability = drop_path_at(self.recipe, self.epoch)
        if not self.execution.cuda_graph or self.recipe.drop_path == 0.0:
            network.drop_path_probability = probability
        elif isinstance(network.drop_path_probability, Tensor):
            network.drop_path_probability.fill_(probability)
        else:
            network.drop_path_probability = torch.tensor(probability, device=self.device)

    def _epoch_seed(self) -> int:
        return self.seeds.augmentation + 1 + self.epoch

    def val_probs(self) -> np.ndarray:
        """Return probabilities (N, K) on the validation images, computed in float32."""
        return predict_log_probs(self.network, self.val, augmentation=self.augmentation).exp().cpu().numpy()

    def identity(self) -> dict[str, Any]:
        """Return what a state of this training depends on: network, recipe and images, ready for JSON."""
        spec = getattr(self.network, "spec", None)
        network = spec() if callable(spec) else type(self.network).__name__
        return {"spec": network, "recipe": to_dict(self.recipe), "data": self._fingerprint}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the training goes on."""
        return {
            "epoch": self.epoch,
            "execution": self.execution.to_dict(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "augmentation": self.augmentation_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.epoch = state["epoch"]
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
        # After them, for a recorded step holds the tensors of the optimiser.
        self._execute(Execution(**state["execution"]))
        self.order.set_state(state["order"].cpu())
        self.augmentation_generator.set_state(state["augmentation"].cpu())


class MemberTraining(NetworkTraining[Network]):
    """A member of an ensemble: the network of a genotype; arguments but the first as in ``NetworkTraining``.

    Args:
        genotype: Its cells.
        data: Images.
        recipe: Also the size of the network.
        index: Position in the ensemble.
        device: Where to train.
        execution: How the network is computed, where that is settled.
    """

    def __init__(
        self,
        genotype: Genotype,
        data: ImageData,
        recipe: RetrainConfig,
        *,
        index: int,
        device: torch.device | str = "cpu",
        execution: Execution | None = None,
    ) -> None:
        def build() -> Network:
            return Network(
                genotype,
                num_cells=recipe.num_cells,
                channels=recipe.channels,
                in_channels=data.num_channels,
                num_classes=data.num_classes,
                auxiliary=recipe.auxiliary_weight > 0,
                large_images=data.image_size > SMALL_IMAGE,
            )

        super().__init__(build, data, recipe, index=index, device=device, execution=execution)
