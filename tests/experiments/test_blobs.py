"""The blobs problem: seeded, disjoint, balanced, as overlapping as asked for, and learnt by the MLP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from studies.weight_averaging.blobs import draw_blobs

from dnas_ens.errors import UserError
from dnas_ens.nn.reference_models.small_networks import MLP


def test_splits_are_one_draw_of_scikit_learn() -> None:
    problem = draw_blobs(3, num_train=20, num_val=30, num_test=40, num_classes=4, std=1.5)
    points, labels = make_blobs(n_samples=90, centers=4, n_features=2, cluster_std=1.5, random_state=3)
    splits = (problem.train, problem.val, problem.test)
    assert [len(inputs) for inputs, _ in splits] == [20, 30, 40]
    assert np.array_equal(np.concatenate([inputs for inputs, _ in splits]), points.astype(np.float32))
    assert np.array_equal(np.concatenate([classes for _, classes in splits]), labels)
    assert problem.train[0].dtype == np.float32
    assert problem.train[1].dtype == np.int64


def test_the_seed_decides() -> None:
    one, same, other = draw_blobs(0), draw_blobs(0), draw_blobs(1)
    assert np.array_equal(one.test[0], same.test[0])
    assert not np.array_equal(one.test[0], other.test[0])


def test_clouds_have_the_deviation_asked_for() -> None:
    inputs, labels = draw_blobs(0, num_test=6000, std=0.5).test
    for label in range(3):
        cloud = inputs[labels == label]
        np.testing.assert_allclose(cloud.std(axis=0), 0.5, rtol=0.05)


def test_the_mlp_does_as_well_as_logistic_regression() -> None:
    # Three Gaussian clouds of equal spread have linear borders, so logistic regression is near the optimum.
    problem = draw_blobs(2)
    torch.manual_seed(0)
    model = MLP(in_features=2, num_classes=3)
    inputs, labels = (torch.from_numpy(array) for array in problem.train)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    with torch.inference_mode():
        hits = (model(torch.from_numpy(problem.val[0])).argmax(-1).numpy() == problem.val[1]).mean()
    witness = LogisticRegression().fit(*problem.train).score(*problem.val)
    assert hits > witness - 0.05


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="at least 1 point"):
        draw_blobs(0, num_val=0)
    with pytest.raises(UserError, match="1 classes"):
        draw_blobs(0, num_classes=1)
    with pytest.raises(UserError, match="deviation of nan"):
        draw_blobs(0, std=float("nan"))
