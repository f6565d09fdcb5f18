import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from tiny import distributions

from dnas_ens.search.divergence import (
    architecture_distance,
    jensen_shannon_terms,
    node_divergences,
    pairwise_architecture_distance,
    pairwise_predictive_distance,
    safe_root,
)
from dnas_ens.search.relaxation import mixture_distribution
from dnas_ens.space.search_space import SearchSpace

SPACE = SearchSpace(num_nodes=3)


def test_divergence_against_scipy():
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(12), size=(2, 50))
    p[0], q[0] = np.eye(12)[3], np.eye(12)[4]
    ours = jensen_shannon_terms(torch.tensor(p), torch.tensor(q)).sum(-1).numpy()
    np.testing.assert_allclose(ours, jensenshannon(p, q, axis=1, base=2) ** 2, atol=1e-12)
    assert ours[0] == pytest.approx(1.0)


def test_architecture_distance_against_scipy_node_by_node():
    p, q = distributions(SPACE, 2, scale=2.0).numpy()
    distances = []
    for cell_type in range(2):
        for node in SPACE.node_slices:
            distances.append(jensenshannon(p[cell_type, node].ravel(), q[cell_type, node].ravel(), base=2))
    p, q = torch.tensor(p), torch.tensor(q)
    assert node_divergences(p, q, SPACE).shape == (2, 3)
    ours = architecture_distance(p, q, SPACE)
    assert float(ours) == pytest.approx(np.mean(distances), abs=1e-10)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.0, 8.0))
def test_distance_is_a_metric(seed, scale):
    a, b, c = distributions(SPACE, 3, seed=seed, scale=scale)
    d = {
        pair: float(architecture_distance(*pair_of, SPACE))
        for pair, pair_of in {"ab": (a, b), "ba": (b, a), "ac": (a, c), "bc": (b, c)}.items()
    }
    assert float(architecture_distance(a, a, SPACE)) == 0.0
    assert d["ab"] == d["ba"]
    assert 0.0 <= d["ab"] <= 1.0 + 1e-12
    assert d["ac"] <= d["ab"] + d["bc"] + 1e-3  # the line near 0 may bend by the root of its epsilon
    if scale > 0.1:
        assert d["ab"] > 0.0


def test_pairwise_distance_agrees_with_single_pairs():
    members = distributions(SPACE, 4, scale=2.0)
    matrix = pairwise_architecture_distance(members, SPACE)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.zeros(4, dtype=torch.float64))
    assert matrix[1, 3] == architecture_distance(members[1], members[3], SPACE)


def test_the_roots_gradient_does_not_vanish_near_equality_and_is_finite_at_it():
    alpha = torch.zeros(SPACE.shape, dtype=torch.float64)
    beta = torch.zeros(SPACE.shape[:-1], dtype=torch.float64)
    base = mixture_distribution(alpha, beta, SPACE)
    slopes = []
    for size in (0.0, 1e-3, 1e-1):
        step = torch.zeros_like(alpha)
        step[..., 0] = size
        moved = (alpha + step).requires_grad_()
        architecture_distance(mixture_distribution(moved, beta, SPACE), base, SPACE).backward()
        slopes.append(float(moved.grad.norm()))
    assert math.isfinite(slopes[0])
    assert slopes[1] == pytest.approx(slopes[2], rel=0.1)


def test_safe_root_is_continuous_and_monotone():
    values = torch.linspace(0, 4e-8, 2001, dtype=torch.float64)
    roots = safe_root(values)
    assert roots[0] == 0
    assert bool((roots.diff() > 0).all())
    assert float(roots.diff().max()) < 1e-6
    assert float(safe_root(torch.tensor(0.25))) == 0.5
    assert float(safe_root(torch.tensor(-1e-9))) == 0.0


def test_gradients_survive_probabilities_of_zero():
    logits = torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]], requires_grad=True)
    pairwise_predictive_distance(logits.log_softmax(-1))[0, 1].backward()
    assert bool(torch.isfinite(logits.grad).all())


def test_predictive_distance_against_scipy():
    generator = np.random.default_rng(1)
    probs = generator.dirichlet(np.ones(5), size=(3, 20))
    ours = pairwise_predictive_distance(torch.tensor(probs).log()).numpy()
    for i in range(3):
        for j in range(3):
            expected = 0.0 if i == j else jensenshannon(probs[i], probs[j], axis=1, base=2).mean()
            assert ours[i, j] == pytest.approx(expected, abs=1e-9)
