import pytest
import torch
from torch import nn

from dnas_ens.evaluate.compute_cost import count_flops, inference_seconds
from dnas_ens.nn.network import count_parameters


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 4 * 5, 7),
    )


def test_flops_by_hand():
    # Multiply-adds: outputs times inputs to each of them.
    dense, depthwise, linear = 8 * (8 * 10) * (3 * 9), 8 * (4 * 5) * 25, 7 * (8 * 4 * 5)
    model = small_network()
    assert count_flops(model, (3, 8, 10)) == 2 * (dense + depthwise + linear)
    assert count_parameters(model) == (8 * 27 + 8) + 16 + 8 * 25 + (7 * 160 + 7)


def test_measuring_leaves_no_trace():
    model = small_network().train()
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.random.get_rng_state()
    count_flops(model, (3, 8, 10))
    seconds = inference_seconds(model, (3, 8, 10), batch_size=4)
    assert 0 < seconds < 1
    assert [module.training for module in model] == [True, True, False, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
def test_on_a_gpu():
    model = small_network().cuda()
    assert count_flops(model, (3, 8, 10)) == count_flops(small_network(), (3, 8, 10))
    assert inference_seconds(model, (3, 8, 10)) > 0
