"""The star: a hypernetwork with all that turns its logits into architectures (relaxation, base, rounding)."""

from __future__ import annotations

import torch
from torch import Tensor

from dnas_ens.config import SearchConfig
from dnas_ens.search.discretise import discretise, genotype_mixture
from dnas_ens.search.draws import Draw, draw_members
from dnas_ens.search.hypernetwork import build_hypernetwork
from dnas_ens.search.relaxation import genotype_logits, gumbel_mixture, mixture_distribution
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace

#: Penalties that read a given base as something to compare with; the path itself is free at lambda = 0.
_REFERENCE_ONLY = ("js-base", "edge-overlap")


class Star:
    """Points (lambda, direction) as distributions, relaxed samples and genotypes.

    Args:
        config: The search's configuration.
        space: The search space.
        base: A given base, if the configuration names one; otherwise the base is learnt.
        device: Where the hypernetwork lives.

    Attributes:
        hypernetwork: The map from (lambda, direction) to logits.
        temperature: Temperature of the relaxation; the search loop's schedule sets it.
        given_edges: (T, E, O), 1 on the triples of a given base; None if the base is learnt.
    """

    def __init__(
        self,
        config: SearchConfig,
        space: SearchSpace,
        *,
        base: Genotype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.space, self.base = config, space, base
        self.device = torch.device(device)
        self.temperature = config.objective.temperature[0]
        self.given_edges: Tensor | None = None
        self._reference_logits: tuple[Tensor, Tensor] | None = None
        base_logits = None
        if base is not None:
            self.given_edges = genotype_mixture(base, space).to(self.device)
            logits = genotype_logits(self.given_edges, space, smoothing=config.objective.base_smoothing)
            if config.objective.penalty in _REFERENCE_ONLY:
                self._reference_logits = logits
            else:
                base_logits = logits[0].cpu(), logits[1].cpu()
        hyper = config.hypernetwork
        self.hypernetwork = build_hypernetwork(
            hyper.hypernetwork,
            space,
            num_directions=hyper.directions,
            num_knots=hyper.num_knots,
            max_lambda=hyper.max_lambda,
            train_positions=hyper.train_knot_positions,
            generator=torch.Generator().manual_seed(config.seed),
            base_logits=base_logits,
        ).to(self.device)

    @property
    def natural_temperature(self) -> float:
        """Temperature of the natural distribution; Gumbel-softmax's own temperature concerns its samples."""
        return 1.0 if self.config.objective.relaxation == "gumbel-softmax" else self.temperature

    def draw(self, num_members: int, generator: torch.Generator) -> Draw:
        """Draw m points as the configuration says, on the CPU."""
        hyper = self.config.hypernetwork
        return draw_members(
            num_members,
            num_directions=hyper.directions,
            max_lambda=hyper.max_lambda,
            margin=hyper.lambda_margin,
            generator=generator,
            fixed_lambda=self.config.objective.fixed_lambda,
        )

    def distributions(self, draw: Draw, *, detach_base: bool = False) -> Tensor:
        """Return the natural distributions (m, T, E, O) of points."""
        alpha, beta = self.hypernetwork(draw.lam, draw.direction, detach_base=detach_base)
        return mixture_distribution(alpha, beta, self.space, temperature=self.natural_temperature)

    def relaxed(self, draw: Draw, *, noise_seed: int, detach_base: bool = False) -> Tensor:
        """Return the mixture weights (m, T, E, O) of points; equal for an equal noise seed."""
        if self.config.objective.relaxation == "softmax":
            return self.distributions(draw, detach_base=detach_base)
        alpha, beta = self.hypernetwork(draw.lam, draw.direction, detach_base=detach_base)
        noise = torch.Generator(self.device).manual_seed(noise_seed)
        return gumbel_mixture(alpha, beta, self.space, temperature=self.temperature, generator=noise)

    @torch.no_grad()
    def reference(self) -> Tensor:
        """Return the base's distribution (T, E, O): the given base's, or the learnt one's."""
        if self._reference_logits is not None:
            return mixture_distribution(*self._reference_logits, self.space)
        alpha, beta = self.hypernetwork.base_logits()
        return mixture_distribution(alpha, beta, self.space, temperature=self.natural_temperature)

    def compared_with(self) -> Tensor:
        """Return what the penalty compares members with: the given base's triples, or the base's distribution."""
        if self.config.objective.penalty == "edge-overlap" and self.given_edges is not None:
            return self.given_edges
        return self.reference()

    @torch.no_grad()
    def start(self) -> Tensor:
        """Return the distribution (T, E, O) at lambda = 0, or at the fixed lambda if there is one."""
        lam = torch.tensor([self.config.objective.fixed_lambda or 0.0], device=self.device)
        return self.distributions(Draw(lam, torch.zeros(1, dtype=torch.int64, device=self.device)))[0]

    def genotype(self, mixture: Tensor) -> Genotype:
        """Round a distribution (T, E, O) as the configuration says."""
        return discretise(mixture, self.space, edges_per_node=self.config.candidates.edges_per_node)

    def base_genotype(self) -> Genotype:
        """Return the given base, or the rounded learnt one."""
        return self.base if self.base is not None else self.genotype(self.start())
