"""The objective of an architecture step: a likelihood and a penalty on similarity between members.

    min over a of  E[L_val] + c(t) * [ mean_i (lam_i - D(theta_i, base))^2
                                       + mean_{i<j} relu(target_ij - D(theta_i, theta_j))^2 ]

with target_ij = max(lam_i, lam_j) on different directions and |lam_i - lam_j| on the same one.

Logits of members have shape (m, B, K), labels (m, B). Distributions of members, and their relaxed samples, have shape
(m, T, E, O), those of their base (T, E, O), and lambdas (m,).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dnas_ens.config import PENALTIES
from dnas_ens.run.ranks import Ranks
from dnas_ens.search.divergence import (
    architecture_distance,
    jensen_shannon_terms,
    pairwise_architecture_distance,
    pairwise_predictive_distance,
)
from dnas_ens.search.family import Points
from dnas_ens.search.relaxation import nearest_discrete
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import NONE

Likelihood = Literal["member", "ensemble", "none"]


def needs_same_images(likelihood: Likelihood, penalty: PENALTIES) -> bool:
    """Say whether all members must see the same images: for averaged or compared predictions they must."""
    return likelihood == "ensemble" or "js-predictive" in penalty


def likelihood_nll(kind: Likelihood, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the likelihood part of the objective, in nats.

    The mean cross-entropy of the members; or for the kind "ensemble" -log of their averaged probability, the objective
    of neural ensemble search: mean over images of -log (1/m sum_i softmax(logits_i)_label), by Jensen's inequality at
    most the former. The members then saw the same images, so that rows of labels are equal.
    """
    if kind != "ensemble":
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    log_probs = logits.log_softmax(-1)
    log_mean = torch.logsumexp(log_probs, dim=0) - math.log(len(logits))
    return F.nll_loss(log_mean, labels[0])


def pair_targets(points: Points) -> Tensor:
    """Return the distance asked for between each pair of drawn members, (m, m) in units of lambda."""
    lam, direction = points.lam, points.direction
    largest = torch.maximum(lam[:, None], lam[None, :])
    along_path = (lam[:, None] - lam[None, :]).abs()
    return torch.where(direction[:, None] == direction[None, :], along_path, largest)


def pair_penalty(distances: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over pairs of relu(target - distance)^2; 0 for a single member.

    Args:
        distances: (m, m), in [0, 1].
        targets: (m, m), the distances asked for.
    """
    # On their device: indices on the host would be copied at every step, which a CUDA graph cannot record.
    rows, columns = torch.triu_indices(len(distances), len(distances), offset=1, device=distances.device)
    if len(rows) == 0:
        return distances.new_zeros(())
    return F.relu(targets[rows, columns] - distances[rows, columns]).square().mean()


def base_penalty(mixtures: Tensor, base: Tensor, lam: Tensor, space: SearchSpace) -> Tensor:
    """Return mean_i (lam_i - D(theta_i, base))^2, the part that makes lambda in [0, 1] mean a distance."""
    return (lam - architecture_distance(mixtures, base, space)).square().mean()


def js_base_penalty(mixtures: Tensor, base: Tensor, lam: Tensor) -> Tensor:
    """Return mean_i of -lam_i * JS(base, theta_i), the penalty of EdgeNES's first version.

    JS is the Jensen-Shannon divergence between the operation distributions, a mean over edges, in [0, 1].
    The published form has no target: with lambda large it asks for all the distance there is.
    """
    terms = jensen_shannon_terms(per_edge(mixtures), per_edge(base))
    return -(lam * terms.sum(-1).mean(dim=(-2, -1))).mean()


def per_edge(mixtures: Tensor) -> Tensor:
    """Return the operation distributions (..., T, E, O), each edge summing to 1."""
    return mixtures / mixtures.sum(-1, keepdim=True).clamp_min(torch.finfo(mixtures.dtype).tiny)


def expected_shared_edges(mixtures: Tensor, base_edges: Tensor, space: SearchSpace) -> Tensor:
    """Return how many (node, edge, operation) triples a draw from each mixture shares with the base, (m,).

    Every node draws as many pairs as the base keeps there, so the number is the sum over nodes of
    k_n * sum of p_n(e, o) over the base's pairs, at most the base's number of edges when p_n is spread evenly
    over them.

    Args:
        base_edges: 1 on the triples of the base.
    """
    shared = (mixtures * base_edges).sum(-1)
    kept = base_edges.sum(-1)
    return sum(
        (kept[:, node].sum(-1) * shared[..., node].sum(-1)).sum(-1)  # (m, T) summed over cell types
        for node in space.node_slices
    )  # type: ignore[return-value]


def edge_overlap_penalty(samples: Tensor, base_edges: Tensor, lam: Tensor, space: SearchSpace) -> Tensor:
    """Return mean_i (lam_i - expected shared edges)^2 (EdgeNES's second version); lambda counts shared edges."""
    return (lam - expected_shared_edges(samples, base_edges, space)).square().mean()


def predictive_penalty(logits: Tensor, points: Points, *, scale: float, ranks: Ranks | None = None) -> Tensor:
    """Return the pair penalty on predicted class distributions, the predictive part of ``js-predictive``.

    Equation: mean_{i<j} relu(scale * target_ij - J_ij)^2 with J_ij the mean over images of the Jensen-Shannon
    distance between the members' predictions.

    Args:
        scale: Predictive distance asked for per unit of lambda.
        ranks: Several processes with a share of the images each, whose mean J is. The mean of their gradients is the
            gradient of the penalty.
    """
    distances = pairwise_predictive_distance(logits.log_softmax(-1))
    if ranks is not None and ranks.size > 1:
        distances = distances + (ranks.mean(distances) - distances.detach())
    return pair_penalty(distances, scale * pair_targets(points))


def discretisation_distance(mixtures: Tensor, space: SearchSpace, *, edges_per_node: int) -> Tensor:
    """Return D between distributions and their discretisations, what the search leaves undecided.

    By the triangle inequality D between two members differs from D between their discretised networks by at most
    the sum of their discretisation distances. Without this term a member gets its distance from an undecided
    base by deciding for what the base prefers anyway, and lambda moves distributions but not genotypes.

    Returns:
        (...), in [0, 1]: 0 for a distribution that is its own discretisation.
    """
    discrete = nearest_discrete(mixtures, space, edges_per_node=edges_per_node)
    return architecture_distance(mixtures, discrete, space)


def operation_imbalance(mixtures: Tensor, space: SearchSpace) -> Tensor:
    """Return how far an architecture is from using all operations equally often in each cell type, in nats.

    Equation: mean over cell types t of KL(u_t || uniform) = ln O - H(u_t), with u_to the mean over the nodes of
    sum_e p_tn(e, o), the share of operation o in cells of the type; ``none`` is left out. A supernet's shared weights
    favour the operations that learn least, poolings above all, however they are read; balanced over both types
    together, poolings gather in reduction cells, which hold most parameters (docs/log.md). Held near equal
    shares, as random cells have them on average, the search decides where an operation goes rather than how many
    there are.

    Returns:
        (...), in [0, ln O].
    """
    usage = mixtures.sum(dim=-2)
    if NONE in space.operations:
        index = space.operations.index(NONE)
        usage = torch.cat([usage[..., :index], usage[..., index + 1 :]], dim=-1)
    # An operation whose share underflows would have a gradient of minus infinity.
    usage = (usage / usage.sum(-1, keepdim=True)).clamp_min(1e-12)
    return math.log(usage.shape[-1]) + torch.xlogy(usage, usage).sum(-1).mean(-1)


def diversity_penalty(
    kind: PENALTIES,
    *,
    distributions: Tensor,
    samples: Tensor,
    base: Tensor,
    points: Points,
    space: SearchSpace,
) -> Tensor:
    """Return the part of a penalty that reads architectures alone, a scalar.

    Args:
        kind: Which one. ``js-predictive`` keeps the term to the base alone, see ``predictive_penalty``.
        samples: Equal to the distributions for the softmax relaxation.
        base: The base's distribution; 1 on the base's triples for ``edge-overlap``.
    """
    if kind == "none":
        return distributions.new_zeros(())
    if kind == "js-base":
        return js_base_penalty(distributions, base, points.lam)
    if kind == "edge-overlap":
        return edge_overlap_penalty(samples, base, points.lam, space)
    penalty = base_penalty(distributions, base, points.lam, space)
    if "js-pairwise" in kind:
        distances = pairwise_architecture_distance(distributions, space)
        penalty = penalty + pair_penalty(distances, pair_targets(points))
    return penalty
