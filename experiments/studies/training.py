"""One network that is trained epoch by epoch, from seeds of its own, and can go on from a state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dnas_ens.config import RetrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dnas_ens.training.step import MemberSeeds
    from studies.batches import TrainingPass


class Training:
    """A network with SGD, and the generators of its order and augmentation.

    Args:
        build: Makes the network with fresh weights from torch's global generator.
        training_pass: Starts an epoch.
        recipe: Learning rate at the beginning, momentum, weight decay, clipping.
        seeds: Of initialisation, order and augmentation.
        name: What an error calls it.
        device: Where to train; the network is built there.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        training_pass: TrainingPass,
        recipe: RetrainConfig,
        seeds: MemberSeeds,
        *,
        name: str,
        device: str | torch.device = "cpu",
    ) -> None:
        import torch

        self.training_pass, self.recipe, self.seeds, self.name = training_pass, recipe, seeds, name
        self.device, self.epoch = torch.device(device), 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.initialisation)
            self.model = build()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.order = torch.Generator().manual_seed(seeds.order)
        self.augmentation = torch.Generator(self.device).manual_seed(seeds.augmentation)

    @property
    def num_parameters(self) -> int:
        """How many parameters the network has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def run_epoch(
        self, *, learning_rate: float | None = None, on_step: Callable[[int], None] | None = None
    ) -> float:
        """Train one epoch.

        Args:
            learning_rate: Of the whole epoch; None leaves the optimiser's.
            on_step: Called after every step with the number of its images.

        Returns:
            Mean training loss in nats.

        Raises:
            DivergedError: The loss, a gradient or a weight is not finite.
        """
        import torch

        from dnas_ens.training.interleaving import exhaust
        from dnas_ens.training.step import TrainingStep, require_finite, training_steps

        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        batches = self.training_pass(self.order, self.augmentation)
        # Dropout draws from the global stream; seeding it by epoch keeps a resumed training on the same path.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seeds.augmentation + 1 + self.epoch)
            step = TrainingStep(self.model, self.optimizer, self.recipe)
            where = f"epoch {self.epoch + 1} of {self.name}"
            scalars = exhaust(training_steps(step, batches, on_step=on_step, where=where))
        self.epoch += 1
        require_finite(scalars, where=where)
        return scalars["train_loss"]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the training goes on; it changes with the training."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "augmentation": self.augmentation.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state, generators included."""
        self.branch_off(state)
        self.order.set_state(state["order"].cpu())
        self.augmentation.set_state(state["augmentation"].cpu())

    def branch_off(self, state: Mapping[str, Any]) -> None:
        """Go on from the weights, momentum and epoch of a state, in an order and augmentation of its own."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        # The optimiser takes over the tensors of a state, which another branch may begin from too.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
