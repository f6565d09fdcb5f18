import numpy as np
import pytest
import torch
from torch import nn

from dnas_ens.evaluate.compute_cost import count_flops, count_parameters, inference_seconds
from dnas_ens.nn.network import Network
from dnas_ens.space.genotype import random_genotype
from dnas_ens.space.search_space import DARTS_OPERATIONS
from dnas_ens.space.stack import StackSpec


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
    dense = 8 * (8 * 10) * (3 * 9)
    depthwise = 8 * (4 * 5) * 25
    linear = 7 * (8 * 4 * 5)
    model = small_network()
    assert count_flops(model, (3, 8, 10)) == 2 * (dense + depthwise + linear)
    assert count_parameters(model) == (8 * 27 + 8) + 16 + 8 * 25 + (7 * 160 + 7)


def test_flops_of_a_cell_network_against_its_layers():
    genotype = random_genotype(
        np.random.default_rng(3), operations=DARTS_OPERATIONS, num_nodes=3, cell_types=("normal", "reduction")
    )
    network = Network(
        genotype, StackSpec(num_cells=3, channels=4, in_channels=1, num_classes=10), auxiliary=True
    ).eval()
    counted = []

    def note(layer, _, outputs):
        # Each output of a layer is a sum over the weights of its channel.
        counted.append(2 * outputs.numel() * layer.weight[0].numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    network(torch.zeros(1, 1, 8, 8))
    expected = sum(counted)
    assert len(counted) > 10
    assert count_flops(network, (1, 8, 8)) == expected


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
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.gpu
def test_on_a_gpu():
    model = small_network().cuda()
    assert count_flops(model, (3, 8, 10)) == count_flops(small_network(), (3, 8, 10))
    assert inference_seconds(model, (3, 8, 10)) > 0
