"""How lambda steers: distances and shared edges along the paths of a hypernetwork."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dnas_ens.search.discretise import discretise
from dnas_ens.search.divergence import architecture_distance, pairwise_architecture_distance
from dnas_ens.search.draws import grid
from dnas_ens.search.hypernetwork import Hypernetwork
from dnas_ens.search.relaxation import mixture_distribution
from dnas_ens.space.genotype import Genotype


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

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


@torch.no_grad()
def mixtures_at(hypernetwork: Hypernetwork, lam: Tensor, direction: Tensor, *, temperature: float) -> Tensor:
    """Return the natural distributions (m, T, E, O) at m points of the star."""
    alpha, beta = hypernetwork(lam, direction)
    return mixture_distribution(alpha, beta, hypernetwork.space, temperature=temperature)


@torch.no_grad()
def diversity_curve(
    hypernetwork: Hypernetwork,
    *,
    reference: Tensor,
    base: Genotype,
    temperature: float,
    edges_per_node: int,
    num_lambdas: int = 21,
) -> DiversityCurve:
    """Sweep lambda from 0 to its largest value on every direction.

    Args:
        hypernetwork: The star.
        reference: (T, E, O) distribution of the base.
        base: The discretised base.
        temperature: Temperature of the distributions.
        edges_per_node: For the discretisation.
        num_lambdas: L, values of lambda on each direction.
    """
    space, num_directions = hypernetwork.space, hypernetwork.num_directions
    points = grid(
        num_lambdas,
        num_directions=num_directions,
        max_lambda=hypernetwork.max_lambda,
        device=hypernetwork.base.device,
    )
    mixtures = mixtures_at(hypernetwork, points.lam, points.direction, temperature=temperature)
    shared = [
        discretise(mixture, space, edges_per_node=edges_per_node).shared_edges(base) for mixture in mixtures
    ]
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
        distance_to_base=architecture_distance(mixtures, reference, space).tolist(),
        shared_edges=shared,
        distance_between=between,
    )
