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

    Every node n draws k of its (edge, operation) pairs, at most one an edge, as it keeps k when discretised: the
    largest of s(e, o) = log p_n(e, o) + Gumbel noise (the Gumbel top-k trick, arXiv 1903.06059; ``none`` is left
    out). The value is 1 on the drawn pairs and exactly 0 elsewhere. The gradient is that of k softmax(s / t).

    Args:
        alpha: (..., T, E, O) operation logits.
        beta: (..., T, E) edge logits.
        temperature: t > 0.
        edges_per_node: k; a node with fewer edges draws one pair on each.

    Returns:
        (..., T, E, O).
    """
    edge_logs = torch.cat([beta[..., node].log_softmax(-1) for node in space.node_slices], dim=-1)
    scores = edge_logs.unsqueeze(-1) + alpha.log_softmax(-1) + gumbel_noise(alpha, generator)
    if NONE in space.operations:
        never = torch.tensor([name == NONE for name in space.operations], device=scores.device)
        scores = scores.masked_fill(never, -torch.inf)
    drawn = nearest_discrete(_node_softmax(scores.detach(), space), space, edges_per_node=edges_per_node) > 0
    relaxed = _node_softmax(scores / temperature, space)
    kept = [
        min(edges_per_node, node.stop - node.start) for node in space.node_slices for _ in range(node.start, node.stop)
    ]
    relaxed = relaxed * torch.tensor(kept, device=relaxed.device, dtype=relaxed.dtype).unsqueeze(-1)
    # The bracket is exactly 0, so that the drawn weights are exactly 1.
    return drawn.to(alpha.dtype) + (relaxed - relaxed.detach())


def _node_softmax(scores: Tensor, space: SearchSpace) -> Tensor:
    """Return the softmax of scores (..., T, E, O) over the pairs of each node."""
    blocks = [scores[..., node, :] for node in space.node_slices]
    return torch.cat([block.flatten(-2).softmax(-1).view_as(block) for block in blocks], dim=-2)
