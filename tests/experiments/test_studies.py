"""Trainings of reference models, and whether a scale is the published one."""

import numpy as np
import pytest
import torch
from studies.reference_models import Bench, StudyOptions

from dnas_ens.data.batches import iterate_batches

OPTIONS = StudyOptions(model="mlp", data="digits", limit_train=200, epochs=4, learning_rate=0.05, device="cpu", seeds=1)


@pytest.fixture(scope="module")
def bench():
    return Bench.of(OPTIONS)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_is_plain_sgd(bench):
    """Against torch alone: one epoch of the same batches by hand."""
    training = bench.training(root=0, member=0)
    model = bench.model()
    model.load_state_dict(training.network.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    order, augmentation = torch.Generator(), torch.Generator()
    order.set_state(training.order.get_state())
    augmentation.set_state(training.augmentation_generator.get_state())
    losses = []
    for images, labels in iterate_batches(
        bench.data.train,
        OPTIONS.batch_size,
        generator=order,
        augmentation=training.augmentation,
        augmentation_generator=augmentation,
        drop_last=True,
    ):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert training.run_epoch(learning_rate=0.03)["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert training.epoch == 1
    torch.testing.assert_close(training.network.state_dict(), model.state_dict())


def test_branches_begin_alike_and_see_other_batches(bench):
    first, second = (bench.training(root=0, member=member) for member in (0, 1))
    first.run_epoch()
    order = second.order.get_state()
    second.branch_off(first.state_dict())
    assert second.epoch == 1
    assert same(first.network.state_dict(), second.network.state_dict())
    assert torch.equal(second.order.get_state(), order)
    before = {name: tensor.clone() for name, tensor in first.network.state_dict().items()}
    second.run_epoch()
    # Neither weights nor momentum are shared.
    assert same(before, first.network.state_dict())
    assert not same(before, second.network.state_dict())
    states = [training.optimizer.state_dict()["state"][0]["momentum_buffer"] for training in (first, second)]
    assert not torch.equal(*states)


def test_the_published_scale_is_known():
    assert StudyOptions().is_published
    assert StudyOptions(seeds=9, device="cpu").is_published
    assert not OPTIONS.is_published
    assert OPTIONS.recipe.gradient_clip == float("inf")
    assert OPTIONS.recipe.weight_decay == 5e-4
