"""The family of architectures a search learns: points (lambda, direction), and what is derived from one.

The one route from lambda to a genotype: `Points` -> hypernetwork -> ``distributions`` -> ``discretised``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dnas_ens.config import SearchConfig
from dnas_ens.search.divergence import architecture_distance, pairwise_architecture_distance
from dnas_ens.search.hard_paths import hard_paths
from dnas_ens.search.hypernetwork import HYPERNETWORKS
from dnas_ens.search.relaxation import (
    discretise,
    genotype_logits,
    genotype_mixture,
    gumbel_mixture,
    mixture_distribution,
)
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace

#: Penalties that only compare with a given base; the paths need not start from it.
_COMPARING_PENALTIES = ("js-base", "edge-overlap")


@dataclass(frozen=True)
class Points:
    """m points of the family: lam (m,) float and direction (m,) int64."""

    lam: Tensor
    direction: Tensor

    def __len__(self) -> int:
        return len(self.lam)

    def joined(self, other: Points) -> Points:
        """Return these points and then the others."""
        return Points(torch.cat([self.lam, other.lam]), torch.cat([self.direction, other.direction]))


def moved(draws: Sequence[Points], device: torch.device | str) -> list[Points]:
    """Return the points on a device, by one copy of all lambdas and one of all directions."""
    if not draws:
        return []
    sizes = [len(draw) for draw in draws]
    lam = torch.cat([draw.lam for draw in draws]).to(device).split(sizes)
    direction = torch.cat([draw.direction for draw in draws]).to(device).split(sizes)
    return [Points(*parts) for parts in zip(lam, direction, strict=True)]


class ArchitectureFamily:
    """Points (lambda, direction) as distributions, relaxed samples and genotypes.

    Args:
        base: A given base, if the configuration names one; otherwise the base is learnt.

    Attributes:
        space: That of the configuration's stack.
        hypernetwork: The map from (lambda, direction) to logits.
        temperature: Temperature of the relaxation; the search loop's schedule sets it.
        given_edges: (T, E, O), 1 on the triples of a given base; None if the base is learnt.
    """

    def __init__(
        self,
        config: SearchConfig,
        *,
        base: Genotype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.base, self.device = config, base, torch.device(device)
        space: SearchSpace = config.supernet.search_space
        self.space = space
        self.temperature = config.objective.temperature[0]
        self.given_edges: Tensor | None = None
        self._reference_logits: tuple[Tensor, Tensor] | None = None
        base_logits = None
        if base is not None:
            self.given_edges = genotype_mixture(base, space).to(self.device)
            logits = genotype_logits(self.given_edges, space, smoothing=config.objective.base_smoothing)
            if config.objective.penalty in _COMPARING_PENALTIES:
                self._reference_logits = logits
            else:
                base_logits = logits[0].cpu(), logits[1].cpu()
        hyper = config.hypernetwork
        self.hypernetwork = HYPERNETWORKS[hyper.hypernetwork](
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
        """Temperature of the natural distribution; that of the Gumbel relaxations concerns their samples."""
        return self.temperature if self.config.objective.relaxation == "softmax" else 1.0

    def draw(self, num_points: int, generator: torch.Generator) -> Points:
        """Draw m pairs: lambda stratified on [-margin, max_lambda + margin] and clipped, directions shuffled.

        The margin gives the ends of the range their share of training (EdgeNES found them untrained otherwise).
        Directions come without replacement; when m exceeds R every direction comes equally often, up to one. Where the
        configuration fixes lambda, every lambda is that one.

        Args:
            generator: On the CPU, like the points; `moved` takes many of them at once to another device.
        """
        hyper, fixed = self.config.hypernetwork, self.config.objective.fixed_lambda
        strata = torch.arange(num_points) + torch.rand(num_points, generator=generator)
        lam = strata / num_points * (hyper.max_lambda + 2 * hyper.lambda_margin) - hyper.lambda_margin
        # Shuffled, because the first slice of every batch would otherwise hold the small lambdas.
        lam = lam[torch.randperm(num_points, generator=generator)].clamp(0.0, hyper.max_lambda)
        if fixed is not None:
            lam = torch.full_like(lam, fixed)
        rounds = -(-num_points // hyper.directions)
        direction = torch.cat([torch.randperm(hyper.directions, generator=generator) for _ in range(rounds)])
        return Points(lam, direction[:num_points])

    def grid(self, lam: Tensor) -> Points:
        """Return L lambdas (L,) on each of the R directions, direction by direction, R * L points."""
        num_directions = self.config.hypernetwork.directions
        direction = torch.arange(num_directions).repeat_interleave(len(lam))
        return Points(lam.repeat(num_directions).to(self.device), direction.to(self.device))

    def point(self, lam: float, direction: int = 0) -> Points:
        """Return a single point."""
        return Points(torch.tensor([lam], device=self.device), torch.tensor([direction], device=self.device))

    def distributions(self, points: Points, *, detach_base: bool = False) -> Tensor:
        """Return the natural distributions (m, T, E, O) of points."""
        alpha, beta = self.hypernetwork(points.lam, points.direction, detach_base=detach_base)
        return mixture_distribution(alpha, beta, self.space, temperature=self.natural_temperature)

    def relaxed(self, points: Points, *, noise_seed: int, detach_base: bool = False) -> Tensor:
        """Return the mixture weights (m, T, E, O) of points; equal for an equal noise seed."""
        if self.config.objective.relaxation == "softmax":
            return self.distributions(points, detach_base=detach_base)
        alpha, beta = self.hypernetwork(points.lam, points.direction, detach_base=detach_base)
        noise = torch.Generator(self.device).manual_seed(noise_seed)
        if self.config.objective.hard:
            return hard_paths(
                alpha,
                beta,
                self.space,
                temperature=self.temperature,
                edges_per_node=self.config.candidates.edges_per_node,
                generator=noise,
            )
        return gumbel_mixture(alpha, beta, self.space, temperature=self.temperature, generator=noise)

    def discretised(self, mixtures: Tensor) -> list[Genotype]:
        """Round distributions (m, T, E, O) as the configuration says."""
        edges_per_node = self.config.candidates.edges_per_node
        return [discretise(mixture, self.space, edges_per_node=edges_per_node) for mixture in mixtures]

    @torch.no_grad()
    def genotypes(self, points: Points) -> list[Genotype]:
        """Return the genotypes of points."""
        return self.discretised(self.distributions(points))

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

    def start_point(self) -> Points:
        """Return the point at lambda = 0, or at the fixed lambda if there is one."""
        return self.point(self.config.objective.fixed_lambda or 0.0)

    @torch.no_grad()
    def start(self) -> Tensor:
        """Return the distribution (T, E, O) at the start of the paths."""
        return self.distributions(self.start_point())[0]

    def start_genotype(self) -> Genotype:
        """Return the rounded start of the paths; a given base that is only compared with is another one."""
        return self.genotypes(self.start_point())[0]

    def base_genotype(self) -> Genotype:
        """Return the given base, or the rounded learnt one."""
        return self.base if self.base is not None else self.start_genotype()


@dataclass(frozen=True, kw_only=True)
class DiversityCurve:
    """What a sweep of lambda over all directions shows; every list has R * L entries, direction by direction.

    Args:
        lam: Diversity parameters.
        direction: Directions, 0 to R - 1.
        distance_to_base: D to the base, in [0, 1].
        shared_edges: (node, edge, operation) triples shared with the discretised base.
        distance_between: For each of the L lambdas the mean D between directions at equal lambda, in [0, 1];
            empty for R = 1.
    """

    lam: list[float]
    direction: list[int]
    distance_to_base: list[float]
    shared_edges: list[int]
    distance_between: list[float]


@torch.no_grad()
def diversity_curve(family: ArchitectureFamily, *, num_lambdas: int = 21) -> DiversityCurve:
    """Sweep lambda over L evenly spaced values from 0 to its largest on every direction."""
    space, num_directions = family.space, family.config.hypernetwork.directions
    lam = torch.linspace(0.0, family.config.hypernetwork.max_lambda, num_lambdas)
    points = family.grid(lam)
    mixtures = family.distributions(points)
    base = family.base_genotype()
    between: list[float] = []
    if num_directions > 1:
        rows, columns = torch.triu_indices(num_directions, num_directions, offset=1)
        by_direction = mixtures.unflatten(0, (num_directions, num_lambdas))
        for index in range(num_lambdas):
            distances = pairwise_architecture_distance(by_direction[:, index], space)
            between.append(float(distances[rows, columns].mean()))
    return DiversityCurve(
        lam=points.lam.tolist(),
        direction=points.direction.tolist(),
        distance_to_base=architecture_distance(mixtures, family.reference(), space).tolist(),
        shared_edges=[genotype.shared_edges(base) for genotype in family.discretised(mixtures)],
        distance_between=between,
    )
