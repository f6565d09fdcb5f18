import pytest
import torch
from torch import nn

from dnas_ens.errors import UserError
from dnas_ens.nn.operations import (
    FactorizedReduce,
    average_pool,
    build_operation,
    halving_pointwise,
    operation_names,
    padded_average_pool,
    register_operation,
    require_operations,
)

CONVOLUTIONS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
DARTS = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", *CONVOLUTIONS)


def test_registry_holds_the_eight_of_darts():
    assert set(DARTS) <= set(operation_names())


@pytest.mark.parametrize("name", DARTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 7, 2])
def test_every_operation_keeps_channels_and_rounds_sizes_up(name, stride, size):
    operation = build_operation(name, 6, stride, affine=True)
    features = operation(torch.randn(3, 6, size, size))
    assert features.shape == (3, 6, -(-size // stride), -(-size // stride))


def test_parameter_counts_of_the_papers_operations():
    def count(name, stride=1):
        return sum(p.numel() for p in build_operation(name, 16, stride, affine=False).parameters())

    # Depthwise k*k*C and pointwise C*C, once for dilated and twice for separable convolutions.
    assert count("sep_conv_3x3") == 2 * (9 * 16 + 16 * 16)
    assert count("sep_conv_5x5") == 2 * (25 * 16 + 16 * 16)
    assert count("dil_conv_3x3") == 9 * 16 + 16 * 16
    assert count("dil_conv_5x5") == 25 * 16 + 16 * 16
    assert count("skip_connect") == count("max_pool_3x3") == count("none") == 0
    assert count("skip_connect", 2) == 2 * 8 * 16


def test_dilated_convolution_sees_the_papers_receptive_field():
    operation = build_operation("dil_conv_5x5", 1, 1, affine=False).eval()
    image = torch.rand(1, 1, 21, 21, requires_grad=True)
    operation(image)[0, 0, 10, 10].backward()
    seen = image.grad[0, 0].abs().sum(0).nonzero().flatten().tolist()
    assert seen == [6, 8, 10, 12, 14]


def test_average_pooling_does_not_count_padding():
    pool = build_operation("avg_pool_3x3", 1, 1, affine=False)[0]
    assert torch.equal(pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_none_passes_nothing_on():
    zero = build_operation("none", 2, 2, affine=False)
    assert zero(torch.full((1, 2, 4, 4), 5.0)).abs().sum() == 0


@pytest.mark.parametrize("size", [6, 7])
def test_factorized_reduce_sees_every_pixel(size):
    reduce = FactorizedReduce(1, 2, affine=False).eval()
    image = torch.rand(1, 1, size, size) + 0.1
    image.requires_grad_()
    reduce(image).square().sum().backward()
    touched = image.grad[0, 0] != 0
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    # One path sees the even rows and columns, the other the odd ones.
    assert torch.equal(touched, (rows % 2) == (columns % 2))


def test_search_operations_have_no_affine_batchnorm_and_retrained_ones_have():
    for affine in (False, True):
        operation = build_operation("sep_conv_3x3", 4, 1, affine=affine)
        norms = [m for m in operation.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [norm.affine for norm in norms] == [affine, affine]


def test_a_user_can_register_an_operation_once():
    name = "test_only_conv_1x1"

    @register_operation(name)
    def conv(channels, stride, affine):
        return nn.Conv2d(channels, channels, 1, stride=stride)

    assert build_operation(name, 3, 2, affine=True)(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 2, 2)
    with pytest.raises(ValueError, match=name):
        register_operation(name)(conv)


def test_unknown_operation_names_the_nearest():
    with pytest.raises(UserError) as caught:
        require_operations(("sep_conv_3x3", "sep_conv_5x6"))
    assert "sep_conv_5x6" in caught.value.cause
    assert "Did you mean sep_conv_5x5?" in caught.value.remedy


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 3)])
def test_average_pooling_of_a_gpu_is_pytorchs(stride, size):
    torch.manual_seed(0)
    images = torch.randn(3, 4, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    outcomes = []
    for pool in (padded_average_pool, average_pool):
        features = images.clone().requires_grad_()
        result = pool(features, stride)
        weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape)
        outcomes.append((result, *torch.autograd.grad(result, features, weights)))
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_average_pooling_on_a_gpu_has_the_gradient_of_a_cpu():
    torch.manual_seed(0)
    images = torch.randn(3, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    gradients = []
    for device in ("cpu", "cuda"):
        features = images.clone().to(device).requires_grad_()
        average_pool(features, 1).square().sum().backward()
        gradients.append(features.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("channels", [2, 6, 8, 15, 16])
@pytest.mark.parametrize("size", [8, 31, 56, 64, 97])
def test_halving_pointwise_and_its_gradients_in_closed_form(channels, size):
    # Wide images of few channels used to end the process, in PyTorch's own gradient of the weights.
    torch.manual_seed(0)
    features = torch.randn(4, channels, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 1, 1)
    features.requires_grad_()
    weight.requires_grad_()
    result = halving_pointwise(features, weight)
    gradient = torch.randn_like(result)
    for _ in range(3):
        found = torch.autograd.grad(result, (features, weight), gradient, retain_graph=True)
    seen, kernel, given = (
        features.detach()[:, :, ::2, ::2].double(),
        weight.detach()[..., 0, 0].double(),
        gradient,
    )
    expected = torch.einsum("oc,bchw->bohw", kernel, seen)
    of_features = torch.zeros_like(features, dtype=torch.float64)
    of_features[:, :, ::2, ::2] = torch.einsum("oc,bohw->bchw", kernel, given.double())
    of_weight = torch.einsum("bohw,bchw->oc", given.double(), seen)[..., None, None]
    for value, reference in zip((result, *found), (expected, of_features, of_weight), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-3)
