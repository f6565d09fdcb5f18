import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from sklearn.metrics.pairwise import cosine_similarity
from studies.loss_landscape.landscape import (
    ArchitectureMismatchError,
    embed_predictions,
    normalised_disagreement,
    share_of_independent,
    weight_cosines,
)
from torch import nn

from dnas_ens.errors import UserError
from dnas_ens.metrics.diversity import pairwise_disagreement
from dnas_ens.nn.network import Network
from dnas_ens.nn.reference_models import reference_model
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.stack import StackSpec


class Direction(nn.Module):
    """Classifies points of the plane by the side of a line: logits (w . x, -w . x)."""

    def __init__(self, angle, length=1.0):
        super().__init__()
        self.weight = nn.Parameter(length * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float64))
        self.register_buffer("noise", torch.rand(3))

    def forward(self, points):
        score = points @ self.weight
        return torch.stack([score, -score], dim=1)


ANGLES = np.array([0.0, 0.3, 1.2, np.pi])


def circle(count=3600):
    """Points of even angles that lie on no boundary."""
    angles = (np.arange(count) + 0.5) * 2 * np.pi / count
    return torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1))


def probs_of(models, points):
    with torch.no_grad():
        return np.stack([model(points).softmax(-1).numpy() for model in models])


def test_linear_models_of_known_angles():
    models = [Direction(angle, length) for angle, length in zip(ANGLES, (1, 5, 0.1, 2), strict=True)]
    apart = np.abs(ANGLES[:, None] - ANGLES[None, :])
    np.testing.assert_allclose(weight_cosines(models[0], models), np.cos(apart), atol=1e-12)
    # Two lines at an angle tell a share of angle / pi of a circle apart.
    points = circle()
    probs = probs_of(models, points)
    np.testing.assert_allclose(pairwise_disagreement(probs), apart / np.pi, atol=1 / 1800)
    labels = (points[:, 0] < 0).long().numpy()
    errors = ANGLES / np.pi
    means = (errors[:, None] + errors[None, :]) / 2
    expected = np.divide(apart / np.pi, means, out=np.zeros_like(means), where=means > 0)
    np.testing.assert_allclose(normalised_disagreement(probs, labels), expected, atol=0.01)
    # Of two classes, independent votes of accuracies a and b differ on a (1 - b) + b (1 - a).
    both = (1 - errors)[:, None] * errors[None, :] + errors[:, None] * (1 - errors)[None, :]
    expected = np.divide(apart / np.pi, both, out=np.zeros_like(both), where=both > 0)
    np.testing.assert_allclose(share_of_independent(probs, labels), expected, atol=0.01)


def test_cosines_of_a_network_are_those_of_its_flat_parameters():
    torch.manual_seed(0)
    models = [reference_model("resnet20", 1, 10, 8) for _ in range(3)]
    flat = np.stack(
        [
            np.concatenate([parameter.detach().double().numpy().ravel() for parameter in model.parameters()])
            for model in models
        ]
    )
    states = [model.state_dict() for model in models]
    # Running statistics are no weights.
    next(value for name, value in states[1].items() if name.endswith("running_mean")).fill_(1e6)
    found = weight_cosines(models[0], states)
    np.testing.assert_allclose(found, cosine_similarity(flat), atol=1e-12)
    assert found[0, 1] == pytest.approx(1 - cosine(flat[0], flat[1]))
    assert np.array_equal(np.diag(found), np.ones(3))


def test_weights_of_zero_point_nowhere():
    zero = Direction(0.0, length=0.0)
    assert weight_cosines(zero, [zero, Direction(1.0)]).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def genotype(operation):
    cell = ((("skip_connect", 0), (operation, 1)),)
    return Genotype(normal=cell, reduction=cell)


def network(operation):
    return Network(genotype(operation), StackSpec(num_cells=1, channels=4, in_channels=1, num_classes=3))


def test_architectures_have_no_common_weights():
    small, medium = (reference_model(name, 1, 10, 8) for name in ("small-cnn", "medium-cnn"))
    with pytest.raises(ArchitectureMismatchError, match="in late and") as caught:
        weight_cosines(small, [small, medium], names=["Early", "Late"])
    assert "by their predictions" in caught.value.remedy
    # Poolings have no weights, so that only the genotypes tell these apart.
    with pytest.raises(ArchitectureMismatchError, match="Solution 0 has another genotype"):
        weight_cosines(network("max_pool_3x3"), [network("avg_pool_3x3")])
    with pytest.raises(ArchitectureMismatchError, match="has shape"):
        weight_cosines(small, [medium.state_dict()])
    with pytest.raises(UserError, match="no weights"):
        weight_cosines(small, [])


def test_independent_errors_have_a_share_of_one():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 100_000)
    right = generator.random((3, len(labels))) < np.array([[0.9], [0.7], [0.8]])
    wrong = (labels + generator.integers(1, 10, right.shape)) % 10
    probs = np.eye(10)[np.where(right, labels, wrong)]
    shares = share_of_independent(probs, labels)
    np.testing.assert_allclose(shares + np.eye(3), np.ones((3, 3)), atol=0.02)


def test_solutions_without_errors_agree():
    labels = np.array([0, 1, 2, 0])
    probs = np.stack([np.eye(3)[labels]] * 2)
    assert not normalised_disagreement(probs, labels).any()
    assert not share_of_independent(probs, labels).any()


def test_trajectories_in_different_places_are_apart_in_the_embedding():
    generator = np.random.default_rng(0)
    centres = generator.dirichlet(np.full(5, 0.3), size=(2, 40))
    noise = generator.dirichlet(np.ones(5), size=(2, 8, 40))
    probs = (0.95 * centres[:, None] + 0.05 * noise).reshape(16, 40, 5)
    points = embed_predictions(probs)
    assert points.shape == (16, 2)
    assert np.array_equal(points, embed_predictions(probs))
    distances = np.linalg.norm(points[:, None] - points[None, :], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert ((distances.argmin(axis=1) < 8) == (np.arange(16) < 8)).all()
    with pytest.raises(ValueError, match="4 solutions"):
        embed_predictions(probs[:3])
