import pytest
import torch
from torch import nn

from dnas_ens.errors import UserError
from dnas_ens.nn.operations import (
    FactorizedReduce,
    average_pool,
    build_operation,
    halving_pointwise,
    padded_average_pool,
    register_operation,
    require_operations,
)
from dnas_ens.space.spaces import EFFICIENT_OPERATIONS

#: Weights by stride, C = 16: depthwise k*k*C and pointwise C*C, twice for sep_conv; dense k*k*C*C.
PARAMETERS = {
    "none": (0, 0),
    "max_pool_3x3": (0, 0),
    "avg_pool_3x3": (0, 0),
    "skip_connect": (0, 2 * 8 * 16),
    "sep_conv_3x3": (2 * (9 * 16 + 16 * 16),) * 2,
    "sep_conv_5x5": (2 * (25 * 16 + 16 * 16),) * 2,
    "dil_conv_3x3": (9 * 16 + 16 * 16,) * 2,
    "dil_conv_5x5": (25 * 16 + 16 * 16,) * 2,
    "conv_3x3": (9 * 16 * 16,) * 2,
    "conv_1x1": (16 * 16,) * 2,
    "group_conv_3x3": (9 * 4 * 16,) * 2,
    "depthwise_conv_3x3": (9 * 16 + 16 * 16,) * 2,
    "dilated_conv_3x3": (9 * 16 * 16,) * 2,
}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("stride", "affine"), [(1, True), (2, False), (2, True)])
def test_shapes_parameters_and_norms_of_the_papers_operations(name, stride, affine):
    operation = build_operation(name, 16, 16, stride, affine=affine)
    for size in (8, 7):
        features = operation(torch.randn(3, 16, size, size))
        assert features.shape == (3, 16, -(-size // stride), -(-size // stride))
    assert not features.any() or name != "none"
    weights = [p for p in operation.parameters() if p.dim() > 1]
    assert sum(p.numel() for p in weights) == PARAMETERS[name][stride - 1]
    norms = [module.affine for module in operation.modules() if isinstance(module, nn.BatchNorm2d)]
    # Behind a pooling BatchNorm is never affine, as in DARTS.
    assert set(norms) <= {affine and "pool" not in name}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("channels", [(16, 32), (6, 9)])
def test_operations_widen_where_they_halve_and_leave_no_channel_dead(name, channels):
    torch.manual_seed(0)
    operation = build_operation(name, *channels, 2, affine=True)
    features = operation(torch.randn(3, channels[0], 7, 7))
    assert features.shape == (3, channels[1], 4, 4)
    assert features.std(dim=(0, 2, 3)).gt(0.0).all() == (name != "none")


@pytest.mark.parametrize("name", EFFICIENT_OPERATIONS)
def test_operations_of_the_efficient_space_are_one_kernel_deep(name):
    layers = [type(module) for module in build_operation(name, 16, 16, 1, affine=True).modules()]
    assert not any(issubclass(layer, nn.ReLU) for layer in layers)
    assert sum(issubclass(layer, nn.BatchNorm2d) for layer in layers) == (name != "skip_connect")


def test_dilated_convolution_sees_the_papers_receptive_field():
    operation = build_operation("dil_conv_5x5", 1, 1, 1, affine=False).eval()
    image = torch.rand(1, 1, 21, 21, requires_grad=True)
    operation(image)[0, 0, 10, 10].backward()
    seen = image.grad[0, 0].abs().sum(0).nonzero().flatten().tolist()
    assert seen == [6, 8, 10, 12, 14]


@pytest.mark.parametrize("size", [6, 7])
def test_factorized_reduce_sees_every_pixel(size):
    reduce = FactorizedReduce(1, 2, affine=False).eval()
    image = torch.rand(1, 1, size, size) + 0.1
    image.requires_grad_()
    reduce(image).square().sum().backward()
    # One path sees the even rows and columns, the other the odd ones.
    odd = torch.arange(size) % 2
    assert torch.equal(image.grad[0, 0] != 0, odd[:, None] == odd)


def test_a_user_can_register_an_operation_once_and_an_unknown_one_is_refused():
    name = "test_only_conv_1x1"

    @register_operation(name)
    def conv(in_channels, out_channels, stride, affine):
        return nn.Conv2d(in_channels, out_channels, 1, stride=stride)

    assert build_operation(name, 3, 6, 2, affine=True)(torch.zeros(1, 3, 4, 4)).shape == (1, 6, 2, 2)
    with pytest.raises(ValueError, match=name):
        register_operation(name)(conv)
    with pytest.raises(UserError, match="sep_conv_5x6") as caught:
        require_operations(("sep_conv_3x3", "sep_conv_5x6"))
    assert "Did you mean sep_conv_5x5?" in caught.value.remedy


def pooled(pool, images, stride):
    features = images.clone().requires_grad_()
    result = pool(features, stride)
    weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape).to(result.device)
    return [part.cpu() for part in (result, *torch.autograd.grad(result, features, weights))]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_average_pooling_does_not_count_padding_on_any_device(device, stride, size):
    torch.manual_seed(0)
    images = torch.randn(3, 4, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = pooled(average_pool, images, stride)
    assert torch.equal(average_pool(torch.ones(1, 1, *size), stride).unique(), torch.ones(1))
    for pool in (padded_average_pool, average_pool):
        for found, exact in zip(pooled(pool, images.to(device), stride), expected, strict=True):
            torch.testing.assert_close(found, exact)


@pytest.mark.parametrize(("channels", "size"), [(2, 97), (6, 64), (15, 31), (16, 8)])
def test_halving_pointwise_and_its_gradients_in_closed_form(channels, size):
    # Wide images of few channels used to end the process, in PyTorch's own gradient of the weights.
    torch.manual_seed(0)
    features = torch.randn(4, channels, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 1, 1)
    features.requires_grad_(), weight.requires_grad_()
    result = halving_pointwise(features, weight)
    gradient = torch.randn_like(result)
    for _ in range(3):
        found = torch.autograd.grad(result, (features, weight), gradient, retain_graph=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (features, weight)]
    expected = torch.einsum("oc,bchw->bohw", exact[1][..., 0, 0], exact[0][:, :, ::2, ::2])
    gradients = torch.autograd.grad(expected, exact, gradient.double())
    for value, reference in zip((result, *found), (expected, *gradients), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-3)
