"""Steps of the hypernetwork on what needs no images: the penalties and their part in every objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dnas_ens.config import SearchConfig
from dnas_ens.run.ranks import current
from dnas_ens.search.bilevel import first_order_gradient
from dnas_ens.search.family import ArchitectureFamily, Points, moved
from dnas_ens.search.objective import discretisation_distance, diversity_penalty, operation_imbalance
from dnas_ens.search.schedules import Schedules
from dnas_ens.search.step_time import StepTimes
from dnas_ens.training.step import FiniteWatch


@dataclass(eq=False, kw_only=True)
class PenaltySteps:
    """A family of architectures with the optimiser of its hypernetwork.

    Args:
        family: Its hypernetwork is the architecture.
        generator: On the CPU; every draw of a step comes from it.
        schedules: Values of the current epoch; the loop sets them.
        step_times: What a training step takes, if the search looks for cheap ones.

    Attributes:
        totals: Sums over the steps of an epoch, scalars that stay on the device.
        watch: Whether all gradients of an epoch were finite.
        ranks: The processes whose gradients are averaged.
    """

    config: SearchConfig
    family: ArchitectureFamily
    generator: torch.Generator
    schedules: Schedules
    step_times: StepTimes | None = None
    totals: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        bilevel, device = self.config.bilevel, self.family.device
        self.ranks = current()
        self.architecture = [p for p in self.family.hypernetwork.parameters() if p.requires_grad]
        self.architecture_optimizer = torch.optim.Adam(
            self.architecture,
            lr=bilevel.architecture_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=bilevel.architecture_weight_decay,
        )
        names = ("architecture_loss", "penalty", "undecided", "imbalance")
        self.totals = {name: torch.zeros((), device=device) for name in names}
        if self.step_times is not None:
            self.totals["step_ms"] = torch.zeros((), device=device)
            self._uniform_ms = self.step_times.uniform()
        self.watch = FiniteWatch(device)
        self._noise_seed = 0

    def take_over(self, schedules: Schedules) -> None:
        """Take over the values of an epoch."""
        self.schedules = schedules
        self.family.temperature = schedules.temperature

    def clear_totals(self) -> None:
        """Set the totals to 0, at the beginning of an epoch."""
        for total in self.totals.values():
            total.zero_()

    def penalty_step(self) -> None:
        """Take a step of the hypernetwork on the penalties alone."""
        drawn = self.family.draw(self.config.objective.penalty_draws, self.generator)
        penalised = moved([drawn], self.family.device)[0]
        self._noise_seed = self._new_seed()
        zero = torch.zeros((), device=self.family.device)
        self._descend(*first_order_gradient(lambda: self._penalised(zero, penalised), self.architecture))

    def _penalised(self, loss: Tensor, penalised: Points, *, predictive: Callable[[], Tensor] | None = None) -> Tensor:
        """Return a loss + w1 * commitment + w2 * operation balance + w3 * step time + c * the penalty on similarity.

        Args:
            loss: The likelihood's part, a scalar.
            penalised: Points of the paths at which distances between architectures are taken.
            predictive: Computes the penalty on predictions, for the penalties that have one.
        """
        objective, now = self.config.objective, self.schedules
        distributions = self.family.distributions(penalised, detach_base=False)
        undecided = discretisation_distance(
            distributions, self.family.space, edges_per_node=self.config.candidates.edges_per_node
        ).mean()
        self.totals["undecided"] += undecided.detach()
        loss = loss + now.commitment * undecided
        imbalance = operation_imbalance(distributions, self.family.space).mean()
        self.totals["imbalance"] += imbalance.detach()
        loss = loss + now.operation_balance * imbalance
        if self.step_times is not None:
            step_ms = self.step_times.expected(distributions).mean()
            self.totals["step_ms"] += step_ms.detach()
            loss = loss + objective.step_time_weight * step_ms / self._uniform_ms
        if objective.penalty == "none":
            return loss
        natural = self.family.distributions(penalised, detach_base=True)
        samples = natural
        # Hard paths are drawn for images; expected edges are those of the natural distribution.
        if not objective.hard:
            samples = self.family.relaxed(penalised, noise_seed=self._noise_seed + 1, detach_base=True)
        penalty = diversity_penalty(
            objective.penalty,
            distributions=natural,
            samples=samples,
            base=self.family.compared_with(),
            points=penalised,
            space=self.family.space,
        )
        if predictive is not None:
            penalty = penalty + predictive()
        self.totals["penalty"] += penalty.detach()
        return loss + now.penalty_weight * penalty

    def _descend(self, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        *gradients, loss = self.ranks.means([*gradients, loss])
        for parameter, gradient in zip(self.architecture, gradients, strict=True):
            parameter.grad = gradient
        self.watch.note(nn.utils.get_total_norm(gradients))
        self.architecture_optimizer.step()
        self.totals["architecture_loss"] += loss

    def _new_seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator))
