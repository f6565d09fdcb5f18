"""Training a network: one epoch, the schedules, the seeds of a member, and the guard on numbers."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.config import BilevelConfig, RetrainConfig
from dnas_ens.errors import DivergedError
from dnas_ens.nn.execution import PLAIN, Execution
from dnas_ens.nn.network import Network
from dnas_ens.run.checkpoint import first_not_finite
from dnas_ens.run.ranks import Ranks
from dnas_ens.training.interleaving import Steps


@dataclass(frozen=True, kw_only=True)
class MemberSeeds:
    """Independent seeds of one member."""

    initialisation: int
    order: int
    augmentation: int

    @classmethod
    def derive(cls, root: int, member: int) -> MemberSeeds:
        """Derive the seeds of a member from the recipe's seed; any two members' are independent."""
        words = np.random.SeedSequence([root, member]).generate_state(3)
        return cls(initialisation=int(words[0]), order=int(words[1]), augmentation=int(words[2]))


def build_sgd(
    parameters: Iterable[Tensor], recipe: RetrainConfig | BilevelConfig, *, fused: bool = True
) -> torch.optim.SGD:
    """Return SGD; on a GPU fused, its learning rate a tensor that a recorded step reads at every replay.

    Args:
        fused: False where some parameters have no gradient in some steps, which the fused kernel refuses.
    """
    weights, momentum, weight_decay = list(parameters), recipe.momentum, recipe.weight_decay or 0.0
    if fused and weights[0].device.type == "cuda":
        rate = torch.tensor(recipe.learning_rate, device=weights[0].device)
        return torch.optim.SGD(weights, lr=rate, momentum=momentum, weight_decay=weight_decay, fused=True)
    return torch.optim.SGD(weights, lr=recipe.learning_rate, momentum=momentum, weight_decay=weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameters, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of SGD but keep the optimiser's own device and kernels: a run can continue on another device."""
    own = [{name: group[name] for name in ("lr", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    learning_rate = float(optimizer.param_groups[0]["lr"])
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)
    set_learning_rate(optimizer, learning_rate)


def restore(generator: torch.Generator, state: Tensor) -> None:
    """Set a generator to a saved state; one of another kind of device begins a stream of its own, always the same."""
    saved = state.cpu()
    if len(saved) == len(generator.get_state()):
        generator.set_state(saved)
    else:
        generator.manual_seed(int.from_bytes(hashlib.sha256(saved.numpy().tobytes()).digest()[:7]))


class FiniteWatch:
    """Tracks on the device whether all gradients were finite, and how many steps came before the first that was not.

    It is read once an epoch: reading at every step would make a GPU wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._all_finite = torch.ones((), dtype=torch.int64, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was noted since the last check."""
        return {"all_finite": self._all_finite, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a saved state."""
        self._all_finite.copy_(state["all_finite"])
        self._good_steps.copy_(state["good_steps"])

    def note(self, norm: Tensor) -> None:
        """Note a step's gradient norm, before its update."""
        self._all_finite.mul_(torch.isfinite(norm))
        self._good_steps.add_(self._all_finite)

    def require_finite(self, module: nn.Module, *, where: str) -> None:
        """Check the steps since the last call, and what they left of a module.

        Raises:
            DivergedError: Naming the first step whose gradient was not finite, or the first tensor that is not.
        """
        finite, good_steps = bool(self._all_finite), int(self._good_steps)
        self._all_finite.fill_(1)
        self._good_steps.zero_()
        tensors = [*module.parameters(), *module.buffers()]
        each = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
        # Looking up the name is slow, so only where a tensor is bad.
        unharmed = not each or bool(torch.stack(each).all())
        tensor = "" if unharmed else first_not_finite(module.state_dict())
        if not finite:
            left = f"; {tensor} is not finite after it" if tensor else ""
            raise DivergedError(f"The gradient of step {good_steps + 1} in {where} is not finite{left}.")
        if tensor:
            raise DivergedError(f"{tensor} is not finite after the last step in {where}.")


class TrainingStep:
    """A step of the optimiser on the loss of a classifier (B, C, H, W) -> logits (B, K), and sums over steps.

    Loss: cross-entropy with label smoothing, plus ``auxiliary_weight`` times the loss of the auxiliary head.

    Args:
        network: On its device, in the layout of ``execution``.
        execution: How the network is computed; a recording lasts as long as this object.
        prepare: Makes images and labels of a step's tensors; None takes them as they are.
        generators: What ``prepare`` and the network draw from on the device, besides its default generator.
        class_weights: Weight of each class (K,) in the loss, which is then divided by the sum of the weights of its
            images; None for equal ones.
        ranks: The processes that have a share of each batch, and average their gradients; None for this one alone.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: RetrainConfig,
        *,
        execution: Execution = PLAIN,
        prepare: Callable[..., tuple[Tensor, Tensor]] | None = None,
        generators: Iterable[torch.Generator] = (),
        class_weights: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._class_weights, self._ranks = class_weights, ranks or Ranks()
        self.network, self.optimizer, self.recipe, self.execution = network, optimizer, recipe, execution
        self.device = next(network.parameters()).device
        self._prepare = prepare
        self._total_loss, self._hits = (
            torch.zeros((), device=self.device),
            torch.zeros((), device=self.device),
        )
        self._num_images = 0
        self._watch = FiniteWatch(self.device)
        self._run = execution.graphed(self._step, self.device, generators=generators)

    def __call__(self, *tensors: Tensor) -> int:
        """Take a step on images (B, C, H, W) and labels (B,), or what ``prepare`` makes them of; returns B.

        Probabilities (B, K) may stand for labels.
        """
        self._run(*tensors)
        count = len(tensors[-1])
        self._num_images += count
        return count

    def _step(self, *tensors: Tensor) -> None:
        images, labels = tensors if self._prepare is None else self._prepare(*tensors)
        with self.execution.autocast(self.device):
            placed = self.execution.place(images)
            if isinstance(self.network, Network):
                logits, auxiliary_logits = self.network.forward_with_auxiliary(placed)
            else:
                logits, auxiliary_logits = self.network(placed), None
        loss = nll = self._cross_entropy(logits, labels)
        if auxiliary_logits is not None:
            loss = nll + self.recipe.auxiliary_weight * self._cross_entropy(auxiliary_logits, labels)
        # What is told is comparable with val: neither smoothed nor weighted.
        told = nll
        if self.recipe.label_smoothing or self._class_weights is not None:
            told = F.cross_entropy(logits.detach().float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        classes = labels if labels.ndim == 1 else labels.argmax(-1)
        hits = (logits.argmax(-1) == classes).sum(dtype=torch.float32)
        told, hits = self._ranks.average_gradients(self.network.parameters(), told.detach(), hits)
        self._watch.note(nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip))
        self.optimizer.step()
        # Kept on the device: reading them here would make a GPU wait at every step.
        self._total_loss.add_(told * (len(labels) * self._ranks.size))
        self._hits.add_(hits, alpha=self._ranks.size)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing, weights = self.recipe.label_smoothing, self._class_weights
        loss = F.cross_entropy(logits.float(), labels, weight=weights, label_smoothing=smoothing)
        if weights is not None and self._ranks.size > 1:
            # Divided by the weights of all images of the batch instead of those of the share.
            own = weights[labels].sum()
            loss = loss * (own / self._ranks.mean(own))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last call of ``scalars``."""
        sums = {"loss": self._total_loss, "hits": self._hits, "images": self._num_images}
        return {**sums, "watch": self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to saved sums, in place, because a recorded step holds the tensors."""
        self._total_loss.copy_(state["loss"])
        self._hits.copy_(state["hits"])
        self._num_images = state["images"]
        self._watch.load_state_dict(state["watch"])

    def scalars(self, *, where: str = "the training") -> dict[str, float]:
        """Return mean NLL in nats and accuracy in [0, 1] since the last call, of the images as they were augmented.

        The NLL is that of the classifier alone, without label smoothing and weights of classes.

        Raises:
            DivergedError: A gradient or a weight is not finite.
        """
        self._watch.require_finite(self.network, where=where)
        found = {
            "train_loss": float(self._total_loss) / max(1, self._num_images),
            "train_accuracy": float(self._hits) / max(1, self._num_images),
        }
        self._total_loss.zero_()
        self._hits.zero_()
        self._num_images = 0
        return found


def training_steps(
    step: TrainingStep,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    on_step: Callable[[int], None] | None = None,
    where: str = "the training",
) -> Steps[dict[str, float]]:
    """Take a step on each of the given batches, pausing after it; ``exhaust`` of it trains without a pause.

    Args:
        batches: The tensors of each step, on its device.
        on_step: Called after every step with the number of its images.

    Returns:
        The step's ``scalars``.

    Raises:
        DivergedError: A gradient or a weight is not finite, seen after the last batch.
    """
    step.network.train()
    for batch in batches:
        count = step(*batch)
        if on_step is not None:
            on_step(count)
        yield
    return step.scalars(where=where)


def drop_path_at(drop_path: float, epoch: int, epochs: int) -> float:
    """Return the drop-path probability of an epoch (from 0) of several: linear from 0 to ``drop_path`` (DARTS)."""
    return drop_path * epoch / epochs


def cosine_learning_rate(learning_rate: float, epoch: int, epochs: int, *, end: float = 0.0) -> float:
    """Return the learning rate of an epoch (from 0) of several: half a cosine from ``learning_rate`` to ``end``."""
    return float(end + 0.5 * (learning_rate - end) * (1 + np.cos(np.pi * epoch / epochs)))


def cosine_to_constant(learning_rate: float, constant: float, *, epoch: int, begin: int) -> float:
    """Return the learning rate of an epoch (from 0) of a training whose last models are averaged.

    Half a cosine leads from ``learning_rate`` to ``constant``, which is reached in the epoch ``begin`` and kept, as
    averages over the end of a training want it (SWA, arXiv 1803.05407).
    """
    return constant if epoch >= begin else cosine_learning_rate(learning_rate, epoch, begin, end=constant)


def tell_if_guessing(val_nll: float, num_classes: int, what: str) -> None:
    """Warn on stderr if the validation NLL is more than twice that of guessing, ln K."""
    if val_nll > 2 * math.log(num_classes):
        print(
            f"{what} is far worse than guessing on val: NLL {val_nll:.2f}, and ln {num_classes} is "
            f"{math.log(num_classes):.2f}. Lower the learning rate.",
            file=sys.stderr,
            flush=True,
        )


def require_finite(values: Mapping[str, float], *, where: str) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        DivergedError: Naming the values and where they were seen.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(f"{', '.join(bad)} not finite in {where}.")
