"""The star alone: a search that minimises the penalties and reads no image, the honest zero of every search.

What lambda steers needs no data: the paths leave their base and each other as far as they are asked to. What a
likelihood adds must show against cells found so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from dnas_ens.config import SearchConfig
from dnas_ens.run.ranks import current
from dnas_ens.search.divergence import pairwise_architecture_distance
from dnas_ens.search.family import ArchitectureFamily
from dnas_ens.search.penalties import PenaltySteps
from dnas_ens.search.relaxation import normalised_entropy
from dnas_ens.search.schedules import Schedules
from dnas_ens.search.step_time import StepTimes
from dnas_ens.space.genotype import Genotype
from dnas_ens.training.step import require_finite

#: Steps between two lines of the log and two states on disk.
STEPS_A_ROUND = 50
#: Every random stream of a search has a seed of its own, so that another batch size does not shift the others.
STREAMS = ("order", "architecture_order", "augmentation", "draws")


def stream(config: SearchConfig, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of one of `STREAMS`, at its beginning."""
    return torch.Generator(device).manual_seed(1000 * config.seed + STREAMS.index(name))


class FamilyLoop(ABC):
    """What every search loop has: a family of architectures, trained epoch by epoch and resumable after each.

    Args:
        base: A given base, if the configuration names one.
        step_times: For ``step_time_weight``; without them its term is left out.

    Attributes:
        ranks: The processes that share the search.
        epoch: Epochs done.
        steps_done: Steps done of the epoch in progress, where a state can be taken between two steps; 0 elsewhere.
    """

    num_epochs: int
    steps_per_epoch: int
    steps_done: int = 0

    def __init__(
        self,
        config: SearchConfig,
        *,
        device: torch.device | str = "cpu",
        base: Genotype | None = None,
        step_times: StepTimes | None = None,
    ) -> None:
        self.config, self.device, self.ranks = config, torch.device(device), current()
        self.step_times = None if step_times is None else step_times.to(self.device)
        self.family = ArchitectureFamily(config, base=base, device=device)
        self.epoch = 0

    @property
    def within_an_epoch(self) -> bool:
        """Whether it goes on within an epoch, from a state between two steps; without images it never does."""
        return False

    @property
    def step(self) -> int:
        """Steps done."""
        return self.epoch * self.steps_per_epoch

    @property
    def schedules(self) -> Schedules:
        """What the schedules say for the current epoch."""
        return Schedules(self.config, self.epoch)

    @property
    def execution(self) -> dict[str, str | bool]:
        """How images are computed; empty where none are."""
        return {}

    @abstractmethod
    def run_epoch(self, on_step: Callable[[int], None] | None = None) -> dict[str, float]:
        """Train one epoch and return its scalars.

        Args:
            on_step: Called after every step with the number of images it used.

        Raises:
            DivergedError: If a loss, a gradient or a weight is not finite.
        """

    def require_agreement(self) -> None:
        """Check that all ranks have the same hypernetwork; see `Ranks.require_agreement`."""
        self.ranks.require_agreement(self.family.hypernetwork, "The hypernetwork")

    @torch.no_grad()
    def measure_family(self) -> dict[str, float]:
        """Return diversity, skips and entropy at the current state."""
        hyper = self.config.hypernetwork
        members = self.family.distributions(self.family.grid(torch.tensor([0.5 * hyper.max_lambda])))
        distances = pairwise_architecture_distance(members, self.family.space)
        pairs = max(1, hyper.directions * (hyper.directions - 1))
        genotype = self.family.start_genotype()
        return {
            "member_distance": float(distances.sum()) / pairs,
            "skips": float(max(genotype.skip_counts().values())),
            "entropy": normalised_entropy(self.family.start().cpu(), self.family.space),
            "temperature": self.family.temperature,
        }

    def should_stop(self) -> bool:
        """Say whether a base cell holds more skip connections than allowed (DARTS+, arXiv 1909.06035)."""
        limit = self.config.bilevel.max_skips
        return limit is not None and max(self.family.start_genotype().skip_counts().values()) > limit

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the search depends on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""


class StarLoop(FamilyLoop):
    """The star alone: ``star_steps`` steps of the hypernetwork on the penalties, in rounds of `STEPS_A_ROUND`.

    The schedules run over the steps: weights and temperature are at their last values in the last one.

    Args:
        **options: device, base and step_times, as for ``FamilyLoop``.
    """

    def __init__(self, config: SearchConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.steps_per_epoch = min(STEPS_A_ROUND, config.bilevel.star_steps)
        self.num_epochs = -(-config.bilevel.star_steps // self.steps_per_epoch)
        self.steps = PenaltySteps(
            config=config,
            family=self.family,
            generator=stream(config, "draws"),
            schedules=self.schedules,
            step_times=self.step_times,
        )

    @property
    def step(self) -> int:
        """Steps done; the last round may hold fewer than the others."""
        return min(self.epoch * self.steps_per_epoch, self.config.bilevel.star_steps)

    @property
    def schedules(self) -> Schedules:
        """What the schedules say for the current step."""
        return Schedules(self.config, self.step)

    def run_epoch(self, on_step: Callable[[int], None] | None = None) -> dict[str, float]:
        """Take the steps of a round; arguments, result and errors as in ``FamilyLoop``."""
        first = self.step
        self.epoch += 1
        self.steps.clear_totals()
        for step in range(first, self.step):
            self.steps.take_over(Schedules(self.config, step))
            self.steps.penalty_step()
            if on_step is not None:
                on_step(0)
        where = f"steps {first + 1} to {self.step} of the star"
        self.steps.watch.require_finite(self.family.hypernetwork, where=where)
        scalars = {name: float(total) / (self.step - first) for name, total in self.steps.totals.items()}
        require_finite(scalars, where=where)
        self.family.temperature = self.schedules.temperature
        return scalars | self.measure_family()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the search depends on."""
        return {
            "epoch": self.epoch,
            "hypernetwork": self.family.hypernetwork.state_dict(),
            "architecture_optimizer": self.steps.architecture_optimizer.state_dict(),
            "draws": self.steps.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.epoch = state["epoch"]
        self.family.temperature = self.schedules.temperature
        self.family.hypernetwork.load_state_dict(state["hypernetwork"])
        self.steps.architecture_optimizer.load_state_dict(state["architecture_optimizer"])
        self.steps.generator.set_state(state["draws"].cpu())
