"""One network that is trained from scratch with the recipe, from seeds of its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dnas_ens.config import RetrainConfig
from dnas_ens.data.batches import Augmentation, count_batches, iterate_batches
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.execution import Execution, candidates, fastest
from dnas_ens.genotype import Genotype
from dnas_ens.inference import predict_log_probs
from dnas_ens.interleaving import Steps, exhaust
from dnas_ens.nn.network import Network
from dnas_ens.nn.stack import SMALL_IMAGE
from dnas_ens.progress import Progress
from dnas_ens.training import (
    MemberSeeds,
    cosine_learning_rate,
    drop_path_at,
    require_finite,
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

    Attributes:
        execution: How the network is computed; what the recipe leaves open is measured before the first epoch.
    """

    def __init__(
        self,
        build: Callable[[], Model],
        data: ImageData,
        recipe: RetrainConfig,
        *,
        index: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.recipe, self.index = recipe, index
        self.device = torch.device(device)
        self.seeds = MemberSeeds.derive(recipe.seed, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seeds.initialisation)
            network = build()
        self._open_choices = candidates(
            layout=recipe.layout,
            precision=recipe.precision,
            device=self.device,
            cuda_graph=recipe.cuda_graph,
        )
        self.execution = self._open_choices[0]
        self.network = self.execution.place_module(network, self.device)
        self.optimizer = self._new_optimizer(self.network)
        self.train_split: Split = data.train.to(self.device)
        self.val: Split = data.val.to(self.device)
        self.augmentation = Augmentation.for_data(data, augment=recipe.augment, cutout=recipe.cutout)
        self.order = torch.Generator().manual_seed(self.seeds.order)
        self.augmentation_generator = torch.Generator(self.device).manual_seed(self.seeds.augmentation)
        self.epoch = 0
        self.steps_per_epoch = count_batches(self.train_split, recipe.batch_size, drop_last=True)

    def _new_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            network.parameters(),
            lr=self.recipe.learning_rate,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )

    def _execute(self, execution: Execution) -> None:
        self._open_choices, self.execution = [execution], execution
        execution.place_module(self.network, self.device)

    def settle_execution(self) -> None:
        """Measure what the recipe leaves open: a training step of a copy of the network in each way."""

        def build_step(execution: Execution) -> Callable[[], object]:
            network = execution.place_module(copy.deepcopy(self.network), self.device)
            optimizer = self._new_optimizer(network)
            first = self.train_split.subset(torch.arange(min(self.recipe.batch_size, len(self.train_split))))
            batch = self.augmentation.normalise(first.images), first.labels
            endless = itertools.repeat(batch)
            steps = training_steps(network, endless, optimizer, self.recipe, execution=execution)
            return partial(next, steps)

        if len(self._open_choices) > 1:
            self._execute(fastest(self._open_choices, build_step, device=self.device))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch, in a fresh order and augmented anew."""
        return iterate_batches(
            self.train_split,
            self.recipe.batch_size,
            generator=self.order,
            augmentation=self.augmentation,
            augmentation_generator=self.augmentation_generator,
            drop_last=True,
        )

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
            on_step: Called after every step of the optimiser. A learning rate it sets is lost on a recorded step,
                so such a recipe has ``cuda_graph`` off.

        Raises:
            FloatingPointError: If the loss is not finite.
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
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if isinstance(self.network, Network):
            self.network.drop_path_probability = drop_path_at(self.recipe, self.epoch)
            drop_path = torch.Generator(self.device).manual_seed(self._epoch_seed())
            self.network.drop_path_generator = drop_path
        scalars = yield from training_steps(
            self.network,
            self.batches(),
            self.optimizer,
            self.recipe,
            execution=self.execution,
            on_step=after_step,
        )
        if isinstance(self.network, Network):
            # It belongs to the epoch, and a network that is copied or sent elsewhere should not carry it along.
            self.network.drop_path_generator = None
        require_finite(scalars, where=f"epoch {self.epoch + 1} of member {self.index}")
        self.epoch += 1
        return {**scalars, "learning_rate": learning_rate}

    def _epoch_seed(self) -> int:
        return self.seeds.augmentation + 1 + self.epoch

    def val_probs(self) -> np.ndarray:
        """Return probabilities (N, K) on the validation images, computed in float32."""
        return predict_log_probs(self.network, self.val, augmentation=self.augmentation).exp().cpu().numpy()

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
        self._execute(Execution(**state["execution"]))
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
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
    """

    def __init__(
        self,
        genotype: Genotype,
        data: ImageData,
        recipe: RetrainConfig,
        *,
        index: int,
        device: torch.device | str = "cpu",
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

        super().__init__(build, data, recipe, index=index, device=device)
