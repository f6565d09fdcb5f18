"""The two steps of the bilevel search, for the supernet's weights and for the hypernetwork, and their schedules."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dnas_ens.config import SearchConfig
from dnas_ens.nn.execution import PLAIN, Execution, GraphedStep
from dnas_ens.nn.supernet import Supernet
from dnas_ens.search.bilevel import first_order_gradient, frozen, second_order_gradient
from dnas_ens.search.family import ArchitectureFamily, Points, moved
from dnas_ens.search.objective import (
    discretisation_distance,
    diversity_penalty,
    likelihood_nll,
    needs_same_images,
    operation_imbalance,
    predictive_penalty,
)
from dnas_ens.search.relaxation import add_auxiliary_skip
from dnas_ens.training.step import FiniteWatch, build_sgd, set_learning_rate

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Schedules:
    """Values of one epoch; weights and temperature go linearly from the first architecture epoch to the last."""

    config: SearchConfig
    epoch: int

    @property
    def progress(self) -> float:
        """Where the schedules stand, in [0, 1]: 0 in the first architecture epoch, 1 in the last and after it."""
        warmup, epochs = self.config.bilevel.warmup_epochs, self.config.bilevel.epochs
        return min(1.0, max(0.0, (self.epoch - warmup) / max(1, epochs - warmup - 1)))

    @property
    def temperature(self) -> float:
        """Temperature of the relaxation."""
        return self._between(self.config.objective.temperature)

    @property
    def penalty_weight(self) -> float:
        """c, weight of the penalty on similarity."""
        return self._between(self.config.objective.penalty_weight)

    @property
    def commitment(self) -> float:
        """Weight of the distance between members and their discretisations."""
        return self._between(self.config.objective.commitment)

    @property
    def operation_balance(self) -> float:
        """Weight of how unevenly an architecture uses its operations."""
        return self._between(self.config.objective.operation_balance)

    @property
    def auxiliary_skip(self) -> float:
        """Weight of the extra skip on every edge (DARTS-, arXiv 2009.01027)."""
        return self.config.bilevel.auxiliary_skip * (1 - self.progress)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the weights: half a cosine over all epochs."""
        bilevel = self.config.bilevel
        cosine = 0.5 * (1 + math.cos(math.pi * self.epoch / bilevel.epochs))
        return bilevel.min_learning_rate + (bilevel.learning_rate - bilevel.min_learning_rate) * cosine

    def _between(self, ends: tuple[float, float]) -> float:
        return ends[0] + (ends[1] - ends[0]) * self.progress


@dataclass(eq=False, kw_only=True)
class SearchSteps:
    """Supernet and family of architectures with their optimisers.

    Args:
        family: Its hypernetwork is the architecture.
        supernet: On the family's device.
        generator: On the CPU; every draw of a step comes from it.
        schedules: Values of the current epoch; the loop sets them.
        execution: How the supernet is computed; ``execute`` changes it.

    Attributes:
        totals: Sums over the steps of an epoch, scalars that stay on the device.
        watch: Whether all gradients of an epoch were finite; steps of the architecture count as well.
    """

    config: SearchConfig
    family: ArchitectureFamily
    supernet: Supernet
    generator: torch.Generator
    schedules: Schedules
    execution: Execution = PLAIN
    totals: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        bilevel, device = self.config.bilevel, self.family.device
        self.weights = list(self.supernet.parameters())
        self.architecture = [p for p in self.family.hypernetwork.parameters() if p.requires_grad]
        self.weight_optimizer = build_sgd(
            self.weights,
            learning_rate=bilevel.learning_rate,
            momentum=bilevel.momentum,
            weight_decay=bilevel.weight_decay,
        )
        self.architecture_optimizer = torch.optim.Adam(
            self.architecture,
            lr=bilevel.architecture_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=bilevel.architecture_weight_decay,
        )
        names = ("train_loss", "architecture_loss", "penalty", "undecided", "imbalance")
        self.totals = {name: torch.zeros((), device=device) for name in names}
        self.watch = FiniteWatch(device)
        self._noise_seed = 0
        self._draws: deque[Points] = deque()
        self._seeds: deque[int] = deque()
        self.execute(self.execution)

    def execute(self, execution: Execution) -> None:
        """Compute steps in another way from now on; also called when tensors that a recording holds were replaced."""
        self.execution = execution
        for group in self.architecture_optimizer.param_groups:
            # Adam then counts its steps on the device, so that they can be recorded.
            group["capturable"] = execution.cuda_graph
        device = self.family.device
        self._update_weights = execution.graphed(self._weight_update, device)
        self._update_architecture = execution.graphed(self._architecture_update, device)

    def begin_epoch(self, schedules: Schedules, *, num_pairs: int = 0, with_architecture: bool = True) -> None:
        """Take over an epoch's values, set the totals to 0, and draw the epoch's points.

        Args:
            schedules: Values of the epoch. A recorded step holds them as numbers, so it is recorded again.
            num_pairs: Pairs of steps to draw for at once; further ones draw for themselves.
            with_architecture: Whether the epoch takes steps of the architecture.
        """
        self.schedules = schedules
        self.family.temperature = schedules.temperature
        set_learning_rate(self.weight_optimizer, schedules.learning_rate)
        for total in self.totals.values():
            total.zero_()
        for update in (self._update_weights, self._update_architecture):
            if isinstance(update, GraphedStep):
                update.record_anew()
        # Drawn in the order in which steps use them, and copied to the device at once instead of several times a step.
        objective, second_order = self.config.objective, self.config.bilevel.second_order
        architecture = ["members", "penalised"] + ["members"] * second_order
        draws = []
        for kind in ([*architecture, "members"] if with_architecture else ["members"]) * num_pairs:
            if kind == "members":
                draws.append(self.family.draw(objective.drawn_members, self.generator))
                self._seeds.append(self._new_seed())
            else:
                draws.append(self.family.draw(objective.penalty_draws, self.generator))
        self._draws.extend(moved(draws, self.family.device))

    def weight_step(self, batch: Batch) -> None:
        """Take a step of the weights on the loss of drawn members."""
        members, self._noise_seed = self._draw(), self._draw_seed()
        self._update_weights(*batch, members.lam, members.direction)

    def architecture_step(self, batch: Batch, training_batch: Batch) -> None:
        """Take a step of the hypernetwork on the objective; the training batch is for the second order alone."""
        members, self._noise_seed = self._draw(), self._draw_seed()
        penalised = self._draw(self.config.objective.penalty_draws)
        if self.config.bilevel.second_order:
            self._second_order_update(batch, training_batch, members, penalised)
        else:
            points = members.lam, members.direction, penalised.lam, penalised.direction
            self._update_architecture(*batch, *points)

    # Updates take only tensors and read only what stays fixed during an epoch, so that they can be replayed.

    def _weight_update(self, images: Tensor, labels: Tensor, lam: Tensor, direction: Tensor) -> None:
        loss = self._training_loss((images, labels), Points(lam, direction), self._noise_seed)
        self.weight_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.watch.note(nn.utils.clip_grad_norm_(self.weights, self.config.bilevel.gradient_clip))
        self.weight_optimizer.step()
        self.totals["train_loss"] += loss.detach()

    def _architecture_update(
        self,
        images: Tensor,
        labels: Tensor,
        lam: Tensor,
        direction: Tensor,
        penalised_lam: Tensor,
        penalised_direction: Tensor,
    ) -> None:
        def validation_loss() -> Tensor:
            penalised = Points(penalised_lam, penalised_direction)
            return self._objective((images, labels), Points(lam, direction), penalised)

        # Otherwise the backward pass would also compute gradients of the weights, which nobody uses.
        with frozen(self.supernet):
            loss, gradients = first_order_gradient(validation_loss, self.architecture)
        self._descend(loss, gradients)

    def _second_order_update(self, batch: Batch, training_batch: Batch, members: Points, penalised: Points) -> None:
        training_members, training_seed = self._draw(), self._draw_seed()
        state = self.weight_optimizer.state
        loss, gradients = second_order_gradient(
            lambda: self._training_loss(training_batch, training_members, training_seed, with_architecture=True),
            lambda: self._objective(batch, members, penalised),
            weights=self.weights,
            architecture=self.architecture,
            learning_rate=self.schedules.learning_rate,
            momentum=self.config.bilevel.momentum,
            momentum_buffers=[state[weight].get("momentum_buffer") for weight in self.weights],
            weight_decay=self.config.bilevel.weight_decay,
        )
        self._descend(loss, gradients)

    def _descend(self, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.architecture, gradients, strict=True):
            parameter.grad = gradient
        self.watch.note(nn.utils.get_total_norm(gradients))
        self.architecture_optimizer.step()
        self.totals["architecture_loss"] += loss

    def member_logits(self, images: Tensor, mixtures: Tensor, *, same_images: bool) -> Tensor:
        """Return logits (m, b, K): of m slices of the batch, or of m passes over the first b = B/m images."""
        num_members = len(mixtures)
        weights = add_auxiliary_skip(mixtures, self.family.space, weight=self.schedules.auxiliary_skip)
        images = self.execution.place(images)
        if same_images:
            images = images[: len(images) // num_members]
            parts = [images] * num_members
        else:
            parts = list(images.chunk(num_members))
        with self.execution.autocast(images.device):
            if self.config.objective.passes == "separate":
                passes = zip(parts, weights, strict=True)
                logits = torch.cat([self.supernet(part, weight) for part, weight in passes])
            else:
                logits = self.supernet(torch.cat(parts), weights)
        # The loss needs more than bfloat16; a supernet in double precision keeps its own dtype.
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return logits.view(num_members, -1, logits.shape[-1])

    def _training_loss(
        self, batch: Batch, members: Points, noise_seed: int, *, with_architecture: bool = False
    ) -> Tensor:
        images, labels = batch
        with torch.set_grad_enabled(with_architecture):
            mixtures = self.family.relaxed(members, noise_seed=noise_seed)
        logits = self.member_logits(images, mixtures, same_images=False)
        return likelihood_nll("member", logits, labels.unflatten(0, (len(mixtures), -1)))

    def _objective(self, batch: Batch, members: Points, penalised: Points) -> Tensor:
        """Return L_val of the drawn members + c * the penalty on their similarity.

        Distances between architectures need no images, so they are penalised at many more points.
        """
        images, labels = batch
        objective, now = self.config.objective, self.schedules
        same = needs_same_images(objective.likelihood, objective.penalty)
        mixtures = self.family.relaxed(members, noise_seed=self._noise_seed)
        logits = self.member_logits(images, mixtures, same_images=same)
        num_members = len(members)
        if same:
            targets = labels[: len(labels) // num_members].expand(num_members, -1)
        else:
            targets = labels.unflatten(0, (num_members, -1))
        loss = likelihood_nll(objective.likelihood, logits, targets)
        distributions = self.family.distributions(penalised, detach_base=False)
        undecided = discretisation_distance(
            distributions, self.family.space, edges_per_node=self.config.candidates.edges_per_node
        ).mean()
        self.totals["undecided"] += undecided.detach()
        loss = loss + now.commitment * undecided
        imbalance = operation_imbalance(distributions, self.family.space).mean()
        self.totals["imbalance"] += imbalance.detach()
        loss = loss + now.operation_balance * imbalance
        if objective.penalty == "none":
            return loss
        penalty = diversity_penalty(
            objective.penalty,
            distributions=self.family.distributions(penalised, detach_base=True),
            samples=self.family.relaxed(penalised, noise_seed=self._noise_seed + 1, detach_base=True),
            base=self.family.compared_with(),
            points=penalised,
            space=self.family.space,
        )
        if "js-predictive" in objective.penalty:
            penalty = penalty + predictive_penalty(logits, members, scale=objective.predictive_scale)
        self.totals["penalty"] += penalty.detach()
        return loss + now.penalty_weight * penalty

    def _draw(self, num_members: int | None = None) -> Points:
        if self._draws:
            return self._draws.popleft()
        draw = self.family.draw(num_members or self.config.objective.drawn_members, self.generator)
        return moved([draw], self.family.device)[0]

    def _draw_seed(self) -> int:
        return self._seeds.popleft() if self._seeds else self._new_seed()

    def _new_seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator))
