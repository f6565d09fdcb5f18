"""Training a network: one epoch, the schedules, the seeds of a member, and the guard on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.config import RetrainConfig
from dnas_ens.execution import PLAIN, Execution
from dnas_ens.interleaving import Steps
from dnas_ens.nn.network import Network


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


def training_steps(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    recipe: RetrainConfig,
    *,
    execution: Execution = PLAIN,
    on_step: Callable[[int], None] | None = None,
) -> Steps[dict[str, float]]:
    """Train a classifier (B, C, H, W) -> logits (B, K) over the given batches, pausing after each.

    ``exhaust`` of it trains without a pause.

    Loss: cross-entropy with label smoothing, plus ``auxiliary_weight`` times that of the auxiliary head.

    Args:
        network: On its device, in the layout of ``execution``.
        batches: Images or other inputs, and labels, on that device.
        optimizer: Of the network's parameters.
        recipe: Loss and clipping.
        execution: How the network is computed.
        on_step: Called after every step with the number of its images.

    Returns:
        Mean loss in nats (without the auxiliary head's) and accuracy in [0, 1] on the training batches.
    """
    network.train()
    device = next(network.parameters()).device
    total_loss, hits = torch.zeros((), device=device), torch.zeros((), device=device)
    num_images = 0

    def step(images: Tensor, labels: Tensor) -> None:
        with execution.autocast(device):
            placed = execution.place(images)
            if isinstance(network, Network):
                logits, auxiliary_logits = network.forward_with_auxiliary(placed)
            else:
                logits, auxiliary_logits = network(placed), None
        nll = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        loss = nll
        if auxiliary_logits is not None:
            auxiliary = F.cross_entropy(
                auxiliary_logits.float(), labels, label_smoothing=recipe.label_smoothing
            )
            loss = nll + recipe.auxiliary_weight * auxiliary
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.gradient_clip)
        optimizer.step()
        # Kept on the device: reading them here would make a GPU wait at every step.
        total_loss.add_(nll.detach() * len(labels))
        hits.add_((logits.argmax(-1) == labels).sum())

    generator = getattr(network, "drop_path_generator", None)
    run_step = execution.graphed(step, device, generators=[] if generator is None else [generator])
    for images, labels in batches:
        run_step(images, labels)
        num_images += len(labels)
        if on_step is not None:
            on_step(len(labels))
        yield
    return {
        "train_loss": float(total_loss) / max(1, num_images),
        "train_accuracy": float(hits) / max(1, num_images),
    }


def drop_path_at(recipe: RetrainConfig, epoch: int) -> float:
    """Return the drop-path probability of an epoch (from 0): linear from 0 to ``drop_path`` (DARTS)."""
    return recipe.drop_path * epoch / recipe.epochs


def cosine_learning_rate(recipe: RetrainConfig, epoch: int) -> float:
    """Return the learning rate of an epoch (from 0): half a cosine from ``learning_rate`` towards 0."""
    return float(0.5 * recipe.learning_rate * (1 + np.cos(np.pi * epoch / recipe.epochs)))


def cosine_to_constant(learning_rate: float, constant: float, *, epoch: int, begin: int) -> float:
    """Return the learning rate of an epoch (from 0) of a training whose last models are averaged.

    Half a cosine leads from ``learning_rate`` to ``constant``, which is reached in the epoch ``begin`` and kept, as
    averages over the end of a training want it (SWA, arXiv 1803.05407).
    """
    if epoch >= begin:
        return constant
    return constant + 0.5 * (learning_rate - constant) * (1 + math.cos(math.pi * epoch / begin))


def require_finite(values: Mapping[str, float], *, where: str) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        FloatingPointError: Naming the values and where they were seen.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} not finite in {where}; the last checkpoint is unharmed. Lower the learning rate."
        )
