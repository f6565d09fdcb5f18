"""The steps of a search on images: of the supernet's weights and the hypernetwork, in turn or both at once."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnas_ens.nn.execution import PLAIN, Execution, GraphedStep
from dnas_ens.nn.supernet import Supernet
from dnas_ens.search.bilevel import filled, first_order_gradient, frozen, second_order_gradient
from dnas_ens.search.family import Points, moved
from dnas_ens.search.objective import likelihood_nll, needs_same_images, predictive_penalty
from dnas_ens.search.penalties import PenaltySteps
from dnas_ens.search.relaxation import add_auxiliary_skip
from dnas_ens.search.schedules import Schedules
from dnas_ens.training.step import build_sgd, set_learning_rate

Batch = tuple[Tensor, Tensor]


@dataclass(eq=False, kw_only=True)
class SearchSteps(PenaltySteps):
    """Supernet and family of architectures with their optimisers; see ``PenaltySteps`` for what is not named here.

    Args:
        supernet: On the family's device.
        execution: How the supernet is computed; ``execute`` changes it.
    """

    supernet: Supernet
    execution: Execution = PLAIN

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weights = list(self.supernet.parameters())
        # Of hard paths only what was drawn has gradients.
        self.weight_optimizer = build_sgd(self.weights, self.config.bilevel, fused=not self.config.objective.hard)
        self.totals = {"train_loss": torch.zeros((), device=self.family.device), **self.totals}
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
        self.take_over(schedules)
        set_learning_rate(self.weight_optimizer, schedules.learning_rate)
        self.clear_totals()
        for update in (self._update_weights, self._update_architecture):
            if isinstance(update, GraphedStep):
                update.record_anew()
        # Drawn in the order in which steps use them, and copied to the device at once instead of several times a step.
        objective, second_order = self.config.objective, self.config.bilevel.second_order
        kinds = ["members"]
        if with_architecture:
            # One step serves both where paths are hard.
            kinds = ["members", "penalised"] + ["members"] * second_order + ["members"] * (not objective.hard)
        draws = []
        for kind in kinds * num_pairs:
            if kind == "members":
                draws.append(self.family.draw(objective.num_drawn, self.generator))
                self._seeds.append(self._new_seed())
            else:
                draws.append(self.family.draw(objective.penalty_draws, self.generator))
        self._draws.extend(moved(draws, self.family.device))

    def sums(self) -> dict[str, Any]:
        """Return what an epoch has summed up, and how many of its draws are left."""
        left = {"draws": len(self._draws), "seeds": len(self._seeds)}
        return {"totals": self.totals, "watch": self.watch.state_dict(), "left": left}

    def load_sums(self, sums: Mapping[str, Any]) -> None:
        """Go back to saved sums in an epoch that has just begun."""
        for name, total in self.totals.items():
            total.copy_(sums["totals"][name])
        self.watch.load_state_dict(sums["watch"])
        for queue, left in ((self._draws, sums["left"]["draws"]), (self._seeds, sums["left"]["seeds"])):
            while len(queue) > left:
                queue.popleft()

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

    def joint_step(self, batch: Batch) -> None:
        """Take a step of the weights and one of the hypernetwork from one backward pass of the objective.

        For hard paths, which are not recorded: what is computed depends on what was drawn.
        """
        members, self._noise_seed = self._draw(), self._draw_seed()
        penalised = self._draw(self.config.objective.penalty_draws)
        loss = self._objective(batch, members, penalised)
        self.weight_optimizer.zero_grad(set_to_none=True)
        gradients = torch.autograd.grad(loss, [*self.architecture, *self.weights], allow_unused=True)
        for weight, gradient in zip(self.weights, gradients[len(self.architecture) :], strict=True):
            weight.grad = gradient
        self.ranks.average_gradients(self.weights)
        self.watch.note(nn.utils.clip_grad_norm_(self.weights, self.config.bilevel.gradient_clip))
        self.weight_optimizer.step()
        self._descend(loss.detach(), filled(gradients[: len(self.architecture)], self.architecture))

    # Updates take only tensors and read only what stays fixed during an epoch, so that they can be replayed.

    def _weight_update(self, images: Tensor, labels: Tensor, lam: Tensor, direction: Tensor) -> None:
        loss = self._training_loss((images, labels), Points(lam, direction), self._noise_seed)
        self.weight_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        (mean_loss,) = self.ranks.average_gradients(self.weights, loss.detach())
        self.watch.note(nn.utils.clip_grad_norm_(self.weights, self.config.bilevel.gradient_clip))
        self.weight_optimizer.step()
        self.totals["train_loss"] += mean_loss

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
            average=self.ranks.means,
        )
        self._descend(loss, gradients)

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
            hard = self.config.objective.hard
            if hard or self.config.objective.passes == "separate":
                passes = zip(parts, weights, strict=True)
                logits = torch.cat([self.supernet(part, weight, hard=hard) for part, weight in passes])
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
        objective = self.config.objective
        same = needs_same_images(objective.likelihood, objective.penalty)
        mixtures = self.family.relaxed(members, noise_seed=self._noise_seed)
        logits = self.member_logits(images, mixtures, same_images=same)
        num_members = len(members)
        if same:
            targets = labels[: len(labels) // num_members].expand(num_members, -1)
        else:
            targets = labels.unflatten(0, (num_members, -1))
        loss = likelihood_nll(objective.likelihood, logits, targets)
        if objective.hard:
            self.totals["train_loss"] += self.ranks.mean(loss)
        predictive = None
        if "js-predictive" in objective.penalty:
            predictive = functools.partial(
                predictive_penalty, logits, members, scale=objective.predictive_scale, ranks=self.ranks
            )
        return self._penalised(loss, penalised, predictive=predictive)

    def _draw(self, num_members: int | None = None) -> Points:
        if self._draws:
            return self._draws.popleft()
        draw = self.family.draw(num_members or self.config.objective.num_drawn, self.generator)
        return moved([draw], self.family.device)[0]

    def _draw_seed(self) -> int:
        return self._seeds.popleft() if self._seeds else self._new_seed()
