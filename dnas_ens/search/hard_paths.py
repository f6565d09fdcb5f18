"""Hard paths: a drawn discrete architecture whose gradient is that of its relaxation (GDAS, arXiv 1910.04465)."""

from __future__ import annotations

import torch
from torch import Tensor

from dnas_ens.search.relaxation import gumbel_noise, nearest_discrete
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import NONE


def hard_paths(
    alpha: Tensor,
    beta: Tensor,
    space: SearchSpace,
    *,
    temperature: float,
    edges_per_node: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw discrete architectures from the natural distribution, with a straight-through gradient.

    Every node n draws k of its (edge, operation) pairs, at most one an edge: the largest of
    s(e, o) = log p_n(e, o) + Gumbel noise (the Gumbel top-k trick, arXiv 1903.06059; ``none`` is left out). k, and an
    edge that is always kept, are as in the discretisation of softmax(s). The value is 1 on the drawn pairs and exactly
    0 elsewhere. The gradient is that of k softmax(s / t).

    Args:
        alpha: (..., T, E, O) operation logits.
        beta: (..., T, E) edge logits.
        temperature: t > 0.
        edges_per_node: The most that k can be; a node with fewer edges draws one pair on each at most.

    Returns:
        (..., T, E, O).
    """
    edge_logs = torch.cat([beta[..., node].log_softmax(-1) for node in space.node_slices], dim=-1)
    scores = edge_logs.unsqueeze(-1) + alpha.log_softmax(-1) + gumbel_noise(alpha, generator)
    if NONE in space.operations:
        never = torch.tensor([name == NONE for name in space.operations], device=scores.device)
        scores = scores.masked_fill(never, -torch.inf)
    drawn = nearest_discrete(_node_softmax(scores.detach(), space), space, edges_per_node=edges_per_node) > 0
    drawn = drawn.to(alpha.dtype)
    counts = [
        drawn[..., node, :].sum((-2, -1), keepdim=True).expand_as(drawn[..., node, :]) for node in space.node_slices
    ]
    relaxed = torch.cat(counts, dim=-2) * _node_softmax(scores / temperature, space)
    # The bracket is exactly 0, so that the drawn weights are exactly 1.
    return drawn + (relaxed - relaxed.detach())


def _node_softmax(scores: Tensor, space: SearchSpace) -> Tensor:
    """Return the softmax of scores (..., T, E, O) over the pairs of each node."""
    blocks = [scores[..., node, :] for node in space.node_slices]
    return torch.cat([block.flatten(-2).softmax(-1).view_as(block) for block in blocks], dim=-2)
