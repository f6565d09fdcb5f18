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
    pairwise_architecture_distance,
    pairwise_predictive_distance,
)
from dnas_ens.search.relaxation import mixture_distribution
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import SPACES

SPACE = SearchSpace(num_nodes=3)


@pytest.mark.parametrize("name", SPACES)
def test_architecture_distance_against_scipy_node_by_node(name):
    space = SearchSpace.for_stack(3, name=name)
    members = distributions(space, 2, scale=2.0)
    p, q = members.numpy()
    distances = []
    for cell_type in range(2):
        for node in space.node_slices:
            distances.append(jensenshannon(p[cell_type, node].ravel(), q[cell_type, node].ravel(), base=2))
    expected = pytest.approx(np.mean(distances), abs=1e-10)
    assert float(architecture_distance(*members, space)) == expected
    assert pairwise_architecture_distance(members, space).flatten().tolist() == [0.0, expected, expected, 0.0]


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.0, 8.0))
def test_distance_is_a_metric(seed, scale):
    a, b, c = distributions(SPACE, 3, seed=seed, scale=scale)
    aa, ab, ba, ac, bc = (
        float(architecture_distance(first, second, SPACE)) for first, second in ((a, a), (a, b), (b, a), (a, c), (b, c))
    )
    assert aa == 0.0 <= ab == ba <= 1.0 + 1e-12
    assert ac <= ab + bc + 1e-3  # the line near 0 may bend by the root of its epsilon
    assert ab > 0.0 or scale <= 0.1


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
