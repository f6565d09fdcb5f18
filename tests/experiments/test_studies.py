"""Trainings of reference models that branch off."""

import torch
from studies.reference_models import Bench, StudyOptions
from tiny import same

OPTIONS = StudyOptions(model="mlp", data="digits", limit_train=200, epochs=4, learning_rate=0.05, device="cpu", seeds=1)


def test_branches_begin_alike_and_see_other_batches():
    bench = Bench.of(OPTIONS)
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
