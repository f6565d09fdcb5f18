"""The efficient space against networks written by hand: the plain CNN and a ResNet are points of it."""

import itertools

import pytest
import torch
from tiny import genotype, mixture, stack
from torch import nn

from dnas_ens.nn.network import Network
from dnas_ens.nn.reference_models.small_networks import SixLayerCNN
from dnas_ens.nn.supernet import looseness
from dnas_ens.search.relaxation import genotype_mixture
from dnas_ens.space.cells import loose_ends
from dnas_ens.space.known_cells import PLAIN_CNN, RESNET
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import EFFICIENT_OPERATIONS, SPACES


class Block(nn.Module):
    """ReLU(conv-BN-ReLU-conv-BN + shortcut) of arXiv 1512.03385, projections where the shape changes (option B)."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))
        self.second = nn.Sequential(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))

    def forward(self, features):
        return torch.relu(self.second(torch.relu(self.first(features))) + self.shortcut(features))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        stem = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.features = nn.Sequential(*stem, Block(4, 4, 1), Block(4, 8, 2), Block(8, 16, 2))
        self.classifier = nn.Linear(16, 3)

    def forward(self, images):
        return self.classifier(self.features(images).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("cells", "stem_stride", "by_hand"),
    [(PLAIN_CNN, 2, lambda: SixLayerCNN(width=4, in_channels=1, num_classes=3)), (RESNET, 1, ResNet)],
    ids=["plain CNN", "ResNet"],
)
def test_networks_written_by_hand_are_points_of_the_space(cells, stem_stride, by_hand):
    torch.manual_seed(0)
    network = Network(cells, stack(3, stem_stride=stem_stride)).double()
    other = by_hand().double()
    # Both have their layers in the same order.
    network.load_state_dict(dict(zip(network.state_dict(), other.state_dict().values(), strict=True)))
    images = torch.randn(6, 1, 14, 14, dtype=torch.float64)
    for net in (network, other):
        net(images).logsumexp(-1).sum().backward()
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    # After a step that has moved the BatchNorm statistics too.
    torch.testing.assert_close(network.eval()(images), other.eval()(images), rtol=1e-12, atol=1e-12)


def test_no_node_is_dead_and_no_feature_negative():
    for seed in range(10):
        cells = genotype(seed, space="efficient", num_nodes=3, cell_types=("normal", "reduction"))
        network = Network(cells, stack(3))
        negative = []
        for cell in network.cells:
            cell.register_forward_hook(lambda *hook, seen=negative: seen.append(bool((hook[2] < 0).any())))
        network(torch.randn(8, 1, 8, 8)).logsumexp(-1).sum().backward()
        assert negative == [False] * 3
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_looseness_of_a_genotype_marks_its_loose_ends():
    space = SearchSpace.for_stack(3, name="efficient", operations=("none", *EFFICIENT_OPERATIONS))
    for seed in range(20):
        cells = genotype(seed, space="efficient", num_nodes=3, cell_types=space.cell_types)
        loose = looseness(genotype_mixture(cells, space), space)
        for cell_type, found in zip(space.cell_types, loose.tolist(), strict=True):
            ends = loose_ends(cells.cell(cell_type), SPACES["efficient"])
            assert found == [float(source in ends) for source in (1, 2, 3)]


def test_looseness_is_the_chance_that_no_later_node_reads():
    space = SearchSpace(name="efficient", operations=("none", "conv_3x3", "skip_connect"), num_nodes=3)
    weights = mixture(space, 4)  # (4, T, E, O), of sum at most 1 on every edge
    reads = weights[..., 1:].sum(-1)
    edge = {pair: index for index, pair in enumerate(space.edges)}
    for slot, kind in itertools.product(range(4), range(2)):
        read = {pair: float(reads[slot, kind, index]) for pair, index in edge.items()}
        expected = [(1 - read[1, 1]) * (1 - read[2, 1]), 1 - read[2, 2], 1.0]
        assert looseness(weights[slot, kind], space).tolist() == pytest.approx(expected)
    # More than one edge's worth of weight, as an auxiliary skip may add, leaves nothing loose.
    assert looseness(5 * torch.ones(space.shape), space)[0].tolist() == [0.0, 0.0, 1.0]
