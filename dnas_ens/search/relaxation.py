"""From architecture logits to mixture weights: softmax or Gumbel-softmax at a falling temperature."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dnas_ens.errors import UserError
from dnas_ens.space.search_space import SKIP_CONNECT, SearchSpace

Relaxation = Literal["softmax", "gumbel-softmax"]


def edge_probs(beta: Tensor, space: SearchSpace, *, temperature: float = 1.0) -> Tensor:
    """Return softmax(beta / t) over the incoming edges of each node (PC-DARTS, arXiv 1907.05737).

    Args:
        beta: (..., T, E) edge logits.
        space: The space.
        temperature: t > 0.

    Returns:
        (..., T, E), summing to 1 over each node's edges.
    """
    return torch.cat([(beta[..., node] / temperature).softmax(-1) for node in space.node_slices], dim=-1)


def mixture_distribution(
    alpha: Tensor, beta: Tensor, space: SearchSpace, *, temperature: float = 1.0
) -> Tensor:
    """Return the natural distribution p_n(e, o) = softmax(beta / t)_e * softmax(alpha_e / t)_o of every node.

    Args:
        alpha: (..., T, E, O) operation logits.
        beta: (..., T, E) edge logits.
        space: The space.
        temperature: t > 0.

    Returns:
        (..., T, E, O), summing to 1 over each node's incoming edges and operations.
    """
    operation_probs = (alpha / temperature).softmax(-1)
    return edge_probs(beta, space, temperature=temperature).unsqueeze(-1) * operation_probs


def gumbel_mixture(
    alpha: Tensor,
    beta: Tensor,
    space: SearchSpace,
    *,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a relaxed sample of the operations: softmax((alpha + g) / t) with Gumbel noise g.

    Source: Jang et al. (arXiv 1611.01144). Edges keep their softmax weights, for a node keeps several of them.

    Args:
        alpha: (..., T, E, O) operation logits.
        beta: (..., T, E) edge logits.
        space: The space.
        temperature: t > 0; the sample tends to one-hot as t falls to 0.
        generator: Source of the noise.

    Returns:
        (..., T, E, O), summing to 1 over each node's incoming edges and operations.
    """
    uniform = torch.rand(alpha.shape, generator=generator, device=alpha.device, dtype=alpha.dtype)
    tiny = torch.finfo(alpha.dtype).tiny
    noise = -torch.log(-torch.log(uniform.clamp(tiny, 1.0 - torch.finfo(alpha.dtype).eps)))
    operation_probs = ((alpha.log_softmax(-1) + noise) / temperature).softmax(-1)
    return edge_probs(beta, space).unsqueeze(-1) * operation_probs


def add_auxiliary_skip(mixture: Tensor, space: SearchSpace, *, weight: float) -> Tensor:
    """Add a skip connection of the given weight to every edge, outside the competition (DARTS-, 2009.01027).

    The auxiliary skip of a stride-2 edge shares the weights of that edge's ``skip_connect``.

    Args:
        mixture: (..., T, E, O).
        space: The space; it must hold ``skip_connect``.
        weight: Share of the edge's weight, decayed to 0 over the search.

    Raises:
        UserError: If the space has no ``skip_connect``.
    """
    if weight == 0.0:
        return mixture
    if SKIP_CONNECT not in space.operations:
        raise UserError(
            "The auxiliary skip needs the operation skip_connect.",
            "Add skip_connect to --operations or leave out --auxiliary-skip.",
        )
    extra = torch.zeros_like(mixture)
    extra[..., space.operations.index(SKIP_CONNECT)] = weight * mixture.sum(-1)
    return mixture + extra


def genotype_logits(mixture: Tensor, space: SearchSpace, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return logits (alpha, beta) whose distribution is the smoothed one-hot of a discrete architecture.

    Equation: operation probabilities (1 - tau) * onehot + tau / O on the kept edges, uniform on the others;
    edge probabilities (1 - tau) / k on the k kept edges, and tau / n more on each of a node's n edges.

    Args:
        mixture: (T, E, O), 1 on every (edge, operation) of the genotype and 0 elsewhere.
        space: The space.
        smoothing: tau in (0, 1).
    """
    num_operations = len(space.operations)
    kept = mixture.sum(-1, keepdim=True)
    operation_probs = (1 - smoothing) * mixture + smoothing / num_operations
    operation_probs = torch.where(kept > 0, operation_probs, torch.full_like(mixture, 1 / num_operations))
    edge_blocks = []
    for node in space.node_slices:
        block = kept[:, node, 0]
        edge_blocks.append(
            (1 - smoothing) * block / block.sum(-1, keepdim=True) + smoothing / block.shape[-1]
        )
    return operation_probs.log(), torch.cat(edge_blocks, dim=-1).log()
