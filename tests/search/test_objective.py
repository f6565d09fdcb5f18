import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from tiny import distributions, logits

from dnas_ens.config import PENALTIES
from dnas_ens.search.divergence import architecture_distance
from dnas_ens.search.family import Points
from dnas_ens.search.objective import (
    discretisation_distance,
    diversity_penalty,
    edge_overlap_penalty,
    expected_shared_edges,
    js_base_penalty,
    likelihood_nll,
    nearest_discrete,
    operation_imbalance,
    predictive_penalty,
)
from dnas_ens.search.relaxation import discretise, genotype_mixture, mixture_distribution
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import SPACES

SPACE = SearchSpace(num_nodes=2, operations=("skip_connect", "sep_conv_3x3", "max_pool_3x3"))


def draw(lam, direction):
    return Points(torch.tensor(lam, dtype=torch.float64), torch.tensor(direction))


def test_likelihoods_by_hand():
    probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.3, 0.7], [0.1, 0.9]]], dtype=torch.float64)
    labels = torch.tensor([[0, 1], [0, 1]])
    expected_member = -np.mean(np.log([0.9, 0.5, 0.3, 0.9]))
    expected_ensemble = -np.mean(np.log([(0.9 + 0.3) / 2, (0.5 + 0.9) / 2]))
    assert float(likelihood_nll("member", probs.log(), labels)) == pytest.approx(expected_member)
    assert float(likelihood_nll("ensemble", probs.log(), labels)) == pytest.approx(expected_ensemble)
    # By Jensen's inequality, and finite for confident members.
    logits = 200 * torch.randn(3, 40, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(3, 40, dtype=torch.int64)
    ensemble, member = (float(likelihood_nll(kind, logits, labels)) for kind in ("ensemble", "member"))
    assert ensemble <= member < math.inf


def test_penalties_on_architectures_are_the_objective_of_the_method():
    members, base = distributions(SPACE, 3), distributions(SPACE, seed=9)
    points = draw([0.1, 0.4, 0.7], [0, 1, 1])
    lam, direction = points.lam.tolist(), points.direction.tolist()
    to_base = np.mean([(lam[i] - float(architecture_distance(members[i], base, SPACE))) ** 2 for i in range(3)])
    pairs = []
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        target = max(lam[i], lam[j]) if direction[i] != direction[j] else abs(lam[i] - lam[j])
        pairs.append(max(0.0, target - float(architecture_distance(members[i], members[j], SPACE))) ** 2)
    given = {"distributions": members, "samples": members, "base": base, "points": points, "space": SPACE}
    found = {kind: float(diversity_penalty(kind, **given)) for kind in get_args(PENALTIES)}
    assert found["js-pairwise"] == pytest.approx(to_base + np.mean(pairs))
    assert found["js-pairwise+js-predictive"] == found["js-pairwise"]
    assert found["js-predictive"] == pytest.approx(to_base)
    assert found["none"] == 0.0
    alone = {"distributions": members[:1], "samples": members[:1], "points": draw([0.1], [0])}
    to_base = (0.1 - float(architecture_distance(members[0], base, SPACE))) ** 2
    assert float(diversity_penalty("js-pairwise", **{**given, **alone})) == pytest.approx(to_base)


def test_predictive_penalty_reads_predictions_instead_of_architectures():
    points = draw([0.5, 0.2], [0, 1])
    same = torch.zeros(2, 6, 4, dtype=torch.float64)
    apart = torch.zeros(2, 6, 4, dtype=torch.float64)
    apart[0, :, 0], apart[1, :, 1] = 50.0, 50.0
    # Equal predictions miss the whole target of 0.4 * 0.5; disjoint ones miss nothing.
    assert float(predictive_penalty(same, points, scale=0.4)) == pytest.approx(0.2**2, abs=1e-6)
    assert float(predictive_penalty(apart, points, scale=0.4)) == 0.0


def test_js_base_is_minus_lambda_times_the_mean_divergence_of_edges():
    members, base = distributions(SPACE, 2), distributions(SPACE, seed=9)
    lam = torch.tensor([0.3, 0.9], dtype=torch.float64)
    values = []
    for member, weight in zip(members, lam, strict=True):
        rows = zip(member.reshape(-1, 3), base.reshape(-1, 3), strict=True)
        values.append(-float(weight) * np.mean([jensenshannon(p, q, base=2) ** 2 for p, q in rows]))
    assert float(js_base_penalty(members, base, lam)) == pytest.approx(np.mean(values))


def test_shared_edges_of_a_one_hot_sample_are_counted_exactly():
    cell = [[["skip_connect", 0], ["sep_conv_3x3", 1]], [["max_pool_3x3", 1], ["sep_conv_3x3", 2]]]
    base = genotype_mixture(Genotype.from_dict({"normal": cell, "reduction": cell}), SPACE)
    # Every node spreads its mass evenly over the base's own two pairs: all 8 are shared.
    full = base / 2
    assert float(expected_shared_edges(full[None], base, SPACE)) == pytest.approx(8.0)
    half = full.clone()
    half[1] = 0.0
    half[1, :, 0] = 0.25 * (base[1].sum(-1) == 0)
    assert float(expected_shared_edges(half[None], base, SPACE)) == pytest.approx(4.0)
    lam = torch.tensor([6.0])
    assert float(edge_overlap_penalty(full[None], base, lam, SPACE)) == pytest.approx(4.0)


@pytest.mark.parametrize("edges_per_node", [1, 2])
@pytest.mark.parametrize("name", SPACES)
def test_nearest_discrete_is_the_discretisation(name, edges_per_node):
    space = SearchSpace(name=name, num_nodes=3, operations=("none", "skip_connect", "sep_conv_3x3"))
    alpha, beta = logits(space, 5, seed=4, scale=2.0)
    alpha[..., 0] += 2.0  # mostly none
    members = mixture_distribution(alpha, beta, space)
    discrete = nearest_discrete(members, space, edges_per_node=edges_per_node)
    for member, rounded in zip(members, discrete, strict=True):
        kept = genotype_mixture(discretise(member, space, edges_per_node=edges_per_node), space).double()
        counts = [kept[:, node].sum(dim=(1, 2)) for node in space.node_slices]
        shares = [kept[:, node] / count[:, None, None] for node, count in zip(space.node_slices, counts, strict=True)]
        torch.testing.assert_close(rounded, torch.cat(shares, dim=1))
    lost = discretisation_distance(members, space, edges_per_node=edges_per_node)
    expected = [float(architecture_distance(*pair, space)) for pair in zip(members, discrete, strict=True)]
    np.testing.assert_allclose(lost, expected)


def test_imbalance_is_the_divergence_of_the_usage_from_equal_shares():
    drawn = distributions(SPACE, 5)
    usage = drawn.numpy().sum(axis=2)  # all edges of a cell type
    usage /= usage.sum(axis=2, keepdims=True)
    uniform = np.full(3, 1 / 3)
    expected = [np.mean([entropy(shares, uniform) for shares in of_types]) for of_types in usage]
    np.testing.assert_allclose(operation_imbalance(drawn, SPACE).numpy(), expected)


def test_imbalance_of_one_operation_and_of_all_equally():
    # ``none`` does not count.
    with_none = SearchSpace(num_nodes=3, operations=("none", "skip_connect", "sep_conv_3x3"))
    mostly_none, no_edge = (0.0 * part for part in logits(with_none))
    mostly_none[..., 0] = 7.0
    drawn = mixture_distribution(mostly_none, no_edge, with_none)
    assert float(operation_imbalance(drawn, with_none)) == pytest.approx(0.0)
    # One operation in normal cells and another in reduction cells are not balanced, whatever both make together.
    apart = torch.zeros(SPACE.shape, dtype=torch.float64)
    for cell_type in range(2):
        apart[cell_type, :, cell_type] = 0.5
    apart.requires_grad_()
    value = operation_imbalance(apart, SPACE)
    assert float(value.detach()) == pytest.approx(math.log(3))
    assert torch.isfinite(torch.autograd.grad(value, apart)[0]).all()
