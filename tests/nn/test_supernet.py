from xml.etree import ElementTree

import pytest
import torch
from tiny import genotype, mixture, stack, supernet

from dnas_ens.errors import UserError
from dnas_ens.nn.network import AuxiliaryHead, Network, drop_path, inherit
from dnas_ens.nn.stack import shuffle_channels
from dnas_ens.nn.supernet import MixedOperation
from dnas_ens.search.relaxation import genotype_mixture
from dnas_ens.space.genotype import CELL_TYPES, Genotype
from dnas_ens.space.search_space import SearchSpace, stack_cell_types
from dnas_ens.space.spaces import SPACES
from dnas_ens.space.stack import default_stem_stride


@pytest.mark.parametrize(
    ("space", "num_cells", "edges_per_node", "partial_channels"),
    [("darts", 1, 2, 1), ("darts", 3, 1, 2), ("darts", 5, 2, 1), ("efficient", 1, 2, 1), ("efficient", 5, 2, 1)],
)
@pytest.mark.parametrize("training", [True, False])
def test_one_hot_supernet_is_the_discrete_network(space, num_cells, edges_per_node, training, partial_channels):
    net = supernet(num_cells, space=space, partial_channels=partial_channels)
    images, labels = torch.randn(6, 2, 9, 9, dtype=torch.float64), torch.arange(6) % 5
    net(images, mixture(net.space))  # so that the running statistics are not the initial ones
    sizes = {"num_nodes": 3, "edges_per_node": edges_per_node, "cell_types": net.space.cell_types}
    cells = genotype(num_cells, space=space, **sizes)
    discrete = inherit(net, cells)
    net.train(training)
    discrete.train(training)
    expected, logits = net(images, genotype_mixture(cells, net.space).double()), discrete(images)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    for result in (expected, logits):
        torch.nn.functional.cross_entropy(result, labels).backward()
    # Every weight of the discrete network has its counterpart in the supernet, with an equal gradient.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    gradients = inherit(net, cells)
    for (name, ours), theirs in zip(discrete.named_parameters(), gradients.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.data, rtol=1e-8, atol=1e-10, msg=name)
    for ours, theirs in zip(discrete.buffers(), gradients.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("space", "num_cells", "edges_per_node", "partial_channels"),
    [("darts", 3, 2, 1), ("darts", 4, 1, 2), ("efficient", 3, 2, 1), ("efficient", 4, 1, 1)],
)
def test_a_hard_path_is_the_discrete_network_and_computes_nothing_else(
    space, num_cells, edges_per_node, partial_channels
):
    net = supernet(num_cells, space=space, partial_channels=partial_channels)
    cells = genotype(
        num_cells, space=space, num_nodes=3, edges_per_node=edges_per_node, cell_types=net.space.cell_types
    )
    discrete = inherit(net, cells)
    images = torch.randn(6, 2, 9, 9, dtype=torch.float64)
    path = genotype_mixture(cells, net.space).double()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    logits, expected = net(images, path.requires_grad_(), hard=True), discrete(images)
    # To the last bit; loose ends are summed in another order.
    close = {"rtol": 0.0, "atol": 0.0 if space == "darts" else 1e-12}
    torch.testing.assert_close(logits, expected, **close)
    # The statistics of what was computed moved as the network's did, those of all else not at all.
    moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
    assert len(moved) == len(list(discrete.buffers()))
    for ours, theirs in zip(discrete.buffers(), inherit(net, cells).buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    for result in (logits, expected):
        result.square().sum().backward()
    computed = [sum(one.grad is not None for one in module.parameters()) for module in (net, discrete)]
    assert computed[0] == computed[1]
    if space == "darts":
        # Channels that pass by are weighted by all of an edge's weights.
        reached = path.detach() if partial_channels == 1 else path.detach().sum(-1, keepdim=True).expand_as(path)
        assert torch.equal(path.grad != 0, reached != 0)


@pytest.mark.parametrize("space", SPACES)
def test_slices_equal_separate_passes_with_batchnorm_in_evaluation_mode(space):
    net = supernet(space=space)
    images = torch.randn(12, 2, 8, 8, dtype=torch.float64)
    mixtures = mixture(net.space, 3).requires_grad_()
    net(images, mixtures[0])
    net.eval()
    together = net(images, mixtures)
    apart = torch.cat([net(part, own) for part, own in zip(images.chunk(3), mixtures, strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)
    assert (together[:4] - net(images[:4], mixtures[1])).abs().max() > 1e-6
    # Gradients reach the mixture of their own slice only.
    (gradient,) = torch.autograd.grad(together[:4].sum(), mixtures)
    assert [bool(of_slice.any()) for of_slice in gradient] == [True, False, False]


def test_wrong_mixture_shapes_and_missing_cells_are_refused():
    net, images = supernet(), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    with pytest.raises(UserError, match="normal cells"):
        Network(genotype(num_nodes=4), stack(3))
    with pytest.raises(ValueError, match="mixture has shape"):
        net(images, mixture(net.space)[:, 1:])
    with pytest.raises(ValueError, match="3 slices do not divide a batch of 4"):
        net(images, mixture(net.space, 3))


@pytest.mark.parametrize("space", SPACES)
def test_reductions_stand_at_thirds_and_halve_the_size(space):
    assert stack_cell_types(1) == ("reduction",)
    assert stack_cell_types(3) == ("normal", "reduction", "reduction")
    assert [i for i, kind in enumerate(stack_cell_types(20)) if kind == "reduction"] == [6, 13]
    sizes = []
    net = supernet(6, space=space)
    for cell in net.cells:
        cell.register_forward_hook(lambda module, inputs, features: sizes.append(tuple(features.shape[1:])))
    net(torch.randn(2, 2, 16, 16, dtype=torch.float64), mixture(net.space))
    # N = 3 nodes of C channels side by side, or their sum.
    wide = [(12, 16, 16)] * 2 + [(24, 8, 8)] * 2 + [(48, 4, 4)] * 2
    assert sizes == [(channels if space == "darts" else channels // 3, *side) for channels, *side in wide]


@pytest.mark.parametrize(("space", "stride"), [(space, 2**k) for space in SPACES for k in (0, 1, 2)])
def test_stems(space, stride):
    if stride not in SPACES[space].stem_strides:
        with pytest.raises(UserError, match=f"no stride of {stride}"):
            supernet(space=space, stem_stride=stride)
        return
    net = supernet(space=space, stem_stride=stride)
    features = net.stem(torch.randn(2, 2, 25, 25, dtype=torch.float64))
    assert features.shape == (2, 4 * SPACES[space].stem_channels, *(-(-25 // stride),) * 2)
    # The operations of DARTS begin with ReLU; features of the efficient space are never negative.
    assert bool((features >= 0).all()) == (space == "efficient")


def test_the_stem_reduces_images_by_their_size():
    strides = [[default_stem_stride(size, space) for size in (8, 23, 24, 64, 65)] for space in ("efficient", "darts")]
    assert strides == [[1, 1, 2, 2, 4], [1, 1, 1, 1, 4]]


def test_parameter_count_of_the_published_darts_network():
    # DARTS (second order) on CIFAR-10 as published: 20 cells, C=36, auxiliary head off: 3.3 M parameters.
    sep, dil, skip, pool = "sep_conv_3x3", "dil_conv_3x3", "skip_connect", "max_pool_3x3"
    normal = [[[sep, 0], [sep, 1]], [[sep, 0], [sep, 1]], [[skip, 0], [sep, 1]], [[skip, 0], [dil, 2]]]
    reduction = [[[pool, 0], [pool, 1]], [[pool, 1], [skip, 2]], [[pool, 0], [skip, 2]], [[pool, 1], [skip, 2]]]
    cells = Genotype.from_dict({"normal": normal, "reduction": reduction})
    network = Network(cells, stack(20, channels=36, in_channels=3, num_classes=10))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(3.35e6, rel=0.01)


@pytest.mark.parametrize(("space", "last"), [("darts", "reduction 4 = "), ("efficient", "reduction 3 = ")])
def test_spec_rebuilds_the_network(space, last):
    network = Network(genotype(1, space=space, num_nodes=3, cell_types=CELL_TYPES), stack(4), auxiliary=True)
    spec = network.spec()
    other = Network.from_spec(spec)
    other.load_state_dict(network.state_dict())
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(network.eval()(images), other.eval()(images))
    # What a notebook shows.
    lines = repr(network).splitlines()
    assert lines[0].startswith("Network(4 cells, C=4, 3 classes, ")
    assert lines[-1].startswith(last)
    assert ElementTree.fromstring(network._repr_svg_()).tag.endswith("svg")
    for wrong, cause in (
        ({"kind": "external"}, "of kind 'external'"),
        ({**spec, "colour": "red"}, "does not fit"),
        ({**spec, "channels": None}, "does not fit"),
    ):
        with pytest.raises(UserError, match=cause):
            Network.from_spec(wrong)


@pytest.mark.parametrize("space", SPACES)
def test_auxiliary_logits_in_training_only(space):
    network = Network(genotype(space=space, cell_types=CELL_TYPES), stack(3, num_classes=7), auxiliary=True)
    images = torch.randn(3, 1, 8, 8)
    logits, auxiliary = network.forward_with_auxiliary(images)
    assert logits.shape == auxiliary.shape == (3, 7)
    assert network.eval().forward_with_auxiliary(images)[1] is None
    assert AuxiliaryHead(5, 4)(torch.randn(2, 5, 9, 9)).shape == (2, 4)


def test_drop_path_zeroes_whole_images_in_training_and_keeps_the_mean():
    torch.manual_seed(0)
    for probability in (0.3, torch.tensor(0.3)):
        per_image = drop_path(torch.ones(20_000, 2, 1, 1), probability).flatten(1)
        assert torch.equal(per_image[:, 0], per_image[:, 1])
        assert per_image[:, 0].unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
        assert float(per_image.mean()) == pytest.approx(1.0, abs=0.02)
    # Evaluation is spared.
    cell = [[["skip_connect", 0], ["sep_conv_3x3", 1]]]
    network = Network(Genotype.from_dict({"normal": cell, "reduction": cell}), stack(3))
    images = torch.randn(4, 1, 8, 8)
    before = network.eval()(images)
    network.drop_path_probability = 0.9
    assert torch.equal(network(images), before)
    assert not torch.equal(network.train()(images), network(images))


def test_drop_path_leaves_a_chain_alone():
    # Where nothing passes beside an operation, dropping it would blacken the whole image.
    cells = {kind: [[["conv_3x3", 0]], [["conv_3x3", 1]]] for kind in CELL_TYPES}
    network = Network(Genotype.from_dict({"space": "efficient", **cells}), stack(3))
    images = torch.randn(4, 1, 8, 8)
    before = network(images)
    network.drop_path_probability = 0.9
    assert torch.equal(network(images), before)


def test_partial_channels_send_the_rest_past_the_operations():
    edge = MixedOperation(SearchSpace(operations=("none", "avg_pool_3x3")), 8, 8, 2, partial_channels=4).double()
    images, weights = torch.randn(3, 8, 5, 5, dtype=torch.float64), torch.tensor([0.3, 0.5]).double()
    found = edge(images, weights)
    torch.testing.assert_close(found[:, :2], 0.5 * edge.operations[1](images[:, :2]))
    # The published form pools what passes by 2x2; odd sizes are rounded up, as the operations do.
    expected = torch.nn.functional.max_pool2d(images[:, 2:], 2, ceil_mode=True)
    torch.testing.assert_close(found[:, 2:], 0.8 * expected)
    features = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert shuffle_channels(features, 4).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    with pytest.raises(UserError, match="1/3 of 8 channels"):
        stack(channels=8, partial_channels=3)
    with pytest.raises(UserError, match="do not pass by the operations of the space efficient"):
        supernet(space="efficient", partial_channels=2)
