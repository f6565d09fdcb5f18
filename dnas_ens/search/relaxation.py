"""From architecture logits to mixture weights (softmax or Gumbel-softmax), on to a genotype, and back.

Operation logits alpha have shape (..., T, E, O), edge logits beta (..., T, E). Natural distributions and relaxed
samples, (..., T, E, O), sum to 1 over each node's incoming edges and operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnas_ens.errors import UserError
from dnas_ens.search.divergence import jensen_shannon_terms
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import NONE, SKIP_CONNECT


def edge_probs(beta: Tensor, space: SearchSpace, *, temperature: float = 1.0) -> Tensor:
    """Return softmax(beta / t) over the incoming edges of each node (PC-DARTS, arXiv 1907.05737), (..., T, E)."""
    return torch.cat([(beta[..., node] / temperature).softmax(-1) for node in space.node_slices], dim=-1)


def mixture_distribution(alpha: Tensor, beta: Tensor, space: SearchSpace, *, temperature: float = 1.0) -> Tensor:
    """Return the natural distribution p_n(e, o) = softmax(beta / t)_e * softmax(alpha_e / t)_o of every node."""
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

    Source: Jang et al. (arXiv 1611.01144). Edges keep their softmax weights, because a node keeps several of them.

    Args:
        temperature: t > 0; the sample tends to one-hot as t falls to 0.
    """
    operation_probs = ((alpha.log_softmax(-1) + gumbel_noise(alpha, generator)) / temperature).softmax(-1)
    return edge_probs(beta, space).unsqueeze(-1) * operation_probs


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard Gumbel noise of the shape, dtype and device of a tensor."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    tiny = torch.finfo(like.dtype).tiny
    return -torch.log(-torch.log(uniform.clamp(tiny, 1.0 - torch.finfo(like.dtype).eps)))


def add_auxiliary_skip(mixture: Tensor, space: SearchSpace, *, weight: float) -> Tensor:
    """Add a skip connection of the given weight to every edge, outside the competition (DARTS-, 2009.01027).

    The auxiliary skip of a stride-2 edge shares the weights of that edge's ``skip_connect``.

    Args:
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


def discretise(mixture: Tensor, space: SearchSpace, *, edges_per_node: int = 2) -> Genotype:
    """Keep the strongest edges of every node, each with its best operation other than ``none``.

    Where nodes read the one before them, that edge is kept whatever its strength. Strength of an edge:
    softmax(beta)_e * max over o of softmax(alpha_e)_o, that is the largest entry of the mixture on the edge (DARTS,
    arXiv 1806.09055, with PC-DARTS's edge weights).

    Args:
        mixture: (T, E, O) natural distribution.
        edges_per_node: Edges kept; nodes with fewer incoming edges keep all. Where nodes may keep fewer, the number is
            the one of `nearest_discrete`.

    Returns:
        The genotype, with the space's cell types.
    """
    mixture = mixture.detach().cpu()
    allowed = [index for index, name in enumerate(space.operations) if name != NONE]
    strength, best = mixture[..., allowed].max(-1)
    counts = (nearest_discrete(mixture, space, edges_per_node=edges_per_node) > 0).any(-1)
    cells = {}
    for type_index, cell_type in enumerate(space.cell_types):
        nodes = []
        for node in space.node_slices:
            scores = _always_kept(strength[type_index, node], space)
            count = int(counts[type_index, node].sum())
            kept = scores.argsort(descending=True, stable=True)[:count].sort().values.tolist()
            nodes.append(
                tuple(
                    (space.operations[allowed[int(best[type_index, node.start + source])]], source) for source in kept
                )
            )
        cells[cell_type] = tuple(nodes)
    return Genotype(**cells, space=space.name)


def nearest_discrete(mixtures: Tensor, space: SearchSpace, *, edges_per_node: int) -> Tensor:
    """Return the distributions of the discretised architectures: uniform over the pairs a node keeps.

    The pairs are those of the strongest edges, each with its best operation other than ``none``; where nodes read the
    one before them, that edge is always among them. Where a node may keep fewer edges, it keeps the number whose
    uniform distribution has the least Jensen-Shannon divergence from its own.

    Args:
        edges_per_node: k, edges the discretisation keeps, at most.

    Returns:
        (..., T, E, O), 1/k on every kept (edge, operation), without a gradient.
    """
    allowed = mixtures.detach().clone()
    # By number: a mask would be copied from the host at every step. The same holds below.
    if NONE in space.operations:
        allowed.select(-1, space.operations.index(NONE)).fill_(-1.0)
    strength, best = allowed.max(-1)
    nodes = []
    for node in space.node_slices:
        uniform = []
        ranked = _always_kept(strength[..., node], space)
        for count in space.rules.edge_counts(edges_per_node, node.stop - node.start):
            kept = ranked.topk(count, dim=-1).indices
            share = torch.zeros_like(strength[..., node]).scatter(-1, kept, 1.0 / count)
            pairs = torch.zeros_like(mixtures[..., node, :])
            uniform.append(pairs.scatter_(-1, best[..., node].unsqueeze(-1), share.unsqueeze(-1)))
        nodes.append(_nearest(mixtures[..., node, :].detach(), uniform))
    return torch.cat(nodes, dim=-2)


def _always_kept(strength: Tensor, space: SearchSpace) -> Tensor:
    """Return a node's strengths (..., e), each at most 1, that of an edge which is always kept above all others."""
    if not space.rules.reads_previous:
        return strength
    # The sources of a node are in order: the last one is the node before it.
    return torch.cat([strength[..., :-1], strength[..., -1:] + 2.0], dim=-1)


def _nearest(distributions: Tensor, choices: list[Tensor]) -> Tensor:
    """Return for each distribution (..., e, O) the choice of the least divergence; of equal ones the first."""
    if len(choices) == 1:
        return choices[0]
    stacked = torch.stack(choices)
    divergence = jensen_shannon_terms(distributions, stacked).sum(dim=(-2, -1))
    nearest = divergence.argmin(0)[..., None, None].expand(stacked.shape[1:])
    return stacked.gather(0, nearest.unsqueeze(0))[0]


def genotype_mixture(genotype: Genotype, space: SearchSpace) -> Tensor:
    """Return (T, E, O), 1 on every (edge, operation) of the genotype and 0 elsewhere.

    Raises:
        UserError: If the genotype does not live in the space.
    """
    genotype.require_space(space.name)
    mixture = torch.zeros(space.shape)
    for type_index, cell_type in enumerate(space.cell_types):
        cell = genotype.cell(cell_type) if cell_type in genotype.cell_types else ()
        if len(cell) != space.num_nodes:
            raise UserError(
                f"The {cell_type} cell of the genotype has {len(cell)} nodes; the search has {space.num_nodes}.",
                "Search with the --num-nodes and --num-cells of the base's own search.",
            )
        for node, edges in enumerate(cell):
            for operation, source in edges:
                if operation not in space.operations:
                    raise UserError(
                        f"The genotype uses {operation!r}, which is not searched.",
                        f"Add {operation} to --operations.",
                    )
                mixture[type_index, space.edges.index((node, source)), space.operations.index(operation)] = 1
    return mixture


def genotype_logits(mixture: Tensor, space: SearchSpace, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return logits (alpha, beta) whose distribution is the smoothed one-hot of a discrete architecture.

    Equation: operation probabilities (1 - tau) * onehot + tau / O on the kept edges, uniform on the others;
    edge probabilities (1 - tau) / k on the k kept edges, and tau / n more on each of a node's n edges.

    Args:
        mixture: (T, E, O), 1 on every (edge, operation) of the genotype and 0 elsewhere.
        smoothing: tau in (0, 1).
    """
    num_operations = len(space.operations)
    kept = mixture.sum(-1, keepdim=True)
    operation_probs = (1 - smoothing) * mixture + smoothing / num_operations
    operation_probs = torch.where(kept > 0, operation_probs, torch.full_like(mixture, 1 / num_operations))
    edge_blocks = []
    for node in space.node_slices:
        block = kept[:, node, 0]
        edge_blocks.append((1 - smoothing) * block / block.sum(-1, keepdim=True) + smoothing / block.shape[-1])
    return operation_probs.log(), torch.cat(edge_blocks, dim=-1).log()


def normalised_entropy(mixture: Tensor, space: SearchSpace) -> float:
    """Return the mean entropy of the nodes' distributions over the largest possible, in [0, 1].

    Near 1 the search has not decided anything; near 0 it has collapsed onto single choices.

    Args:
        mixture: (T, E, O) or (m, T, E, O) natural distributions.
    """
    terms = -torch.xlogy(mixture, mixture).sum(-1)
    shares = []
    for node in space.node_slices:
        num_outcomes = (node.stop - node.start) * len(space.operations)
        largest = torch.tensor(float(num_outcomes)).log()
        # A node with a single outcome has nothing to decide.
        shares.append(terms[..., node].sum(-1) / largest.clamp_min(torch.finfo(torch.float32).tiny))
    return float(torch.stack(shares).mean())
