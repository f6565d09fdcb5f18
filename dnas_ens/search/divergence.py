"""Distances between architectures and between predictions, all in [0, 1].

The natural distribution of node n is categorical over its incoming (edge, operation) pairs,
p_n(e, o) = softmax(beta)_e * softmax(alpha_e)_o, so a mixture tensor (T, E, O) holds one distribution for
each of the T * N nodes. Two mixtures p and q that are compared, (..., T, E, O), may differ in shape as far as
they broadcast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dnas_ens.space.search_space import SearchSpace

#: Below this divergence the root is replaced by a line, so that its gradient stays finite at equality.
ROOT_EPSILON = 1e-8
#: Probabilities are clamped to this before their logarithm is taken; too small to change the divergence.
PROBABILITY_FLOOR = 1e-30


def jensen_shannon_terms(p: Tensor, q: Tensor) -> Tensor:
    """Return each outcome's share of the Jensen-Shannon divergence, in units of ln 2.

    Equation: 1/2 p log2(p / m) + 1/2 q log2(q / m) with m = (p + q) / 2.

    Args:
        p: Probabilities of any shape; zeros are allowed.
        q: Probabilities of a shape that broadcasts with p.

    Returns:
        The broadcast shape; summed over the outcomes of a distribution it is the divergence in [0, 1].
    """
    # Without the clamp, an underflowed probability has the gradient log(0).
    p, q = p.clamp_min(PROBABILITY_FLOOR), q.clamp_min(PROBABILITY_FLOOR)
    mean = 0.5 * (p + q)
    terms = 0.5 * (torch.xlogy(p, p) + torch.xlogy(q, q)) - torch.xlogy(mean, mean)
    return terms / math.log(2.0)


def safe_root(divergence: Tensor) -> Tensor:
    """Return the square root, linear below `ROOT_EPSILON`, so that it is exact at 0 with a finite gradient.

    The Jensen-Shannon divergence is quadratic around equality and its own gradient vanishes there, where every
    search starts; its root is a metric (Endres and Schindelin, 2003) and has a gradient of constant size.

    Args:
        divergence: Values in [0, 1]; rounding may have taken them slightly below 0.
    """
    root = divergence.clamp_min(ROOT_EPSILON).sqrt()
    line = divergence.clamp_min(0.0) / math.sqrt(ROOT_EPSILON)
    return torch.where(divergence > ROOT_EPSILON, root, line)


def node_divergences(p: Tensor, q: Tensor, space: SearchSpace) -> Tensor:
    """Return the Jensen-Shannon divergence of every node's distribution, (..., T, N), in [0, 1] (units of ln 2)."""
    terms = jensen_shannon_terms(p, q).sum(-1)
    return torch.stack([terms[..., node].sum(-1) for node in space.node_slices], dim=-1)


def architecture_distance(p: Tensor, q: Tensor, space: SearchSpace) -> Tensor:
    """Return D, the mean over nodes and cell types of the Jensen-Shannon distance sqrt(JSD_n / ln 2).

    Shape (...), in [0, 1]. It is a metric, as a mean of metrics.
    """
    return safe_root(node_divergences(p, q, space)).mean(dim=(-2, -1))


def pairwise_architecture_distance(mixtures: Tensor, space: SearchSpace) -> Tensor:
    """Return D between all pairs of m mixtures (m, T, E, O) as (m, m), in [0, 1]."""
    return architecture_distance(mixtures[:, None], mixtures[None, :], space)


def pairwise_predictive_distance(log_probs: Tensor) -> Tensor:
    """Return the mean over images of the Jensen-Shannon distance between predicted class distributions.

    Of log-probabilities (m, B, K) on the same images, as (m, m), in [0, 1].
    """
    probs = log_probs.exp()
    return safe_root(jensen_shannon_terms(probs[:, None], probs[None, :]).sum(-1)).mean(-1)
