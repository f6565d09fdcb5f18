import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.nn.depthwise import DepthwiseConv2d, depthwise_conv, native_depthwise, parity_grids


def gradients(features, weight, gradient, **steps):
    features, weight = features.clone().requires_grad_(), weight.clone().requires_grad_()
    result = depthwise_conv(features, weight, **steps)
    return (result, *torch.autograd.grad(result, (features, weight), gradient(result)))


@settings(max_examples=30)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 16, 20]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    channels_last=st.booleans(),
)
def test_fast_gradients_are_pytorchs(batch, channels, height, width, kernel, stride, dilation, channels_last):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(batch, channels, height, width, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(channels, 1, kernel, kernel, dtype=torch.float64)
    steps = {"stride": stride, "dilation": dilation}

    def gradient(result):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(result.shape, generator=generator, dtype=result.dtype)

    ours = gradients(features, weight, gradient, **steps)
    with native_depthwise():
        theirs = gradients(features, weight, gradient, **steps)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_module_is_an_ordinary_depthwise_convolution():
    torch.manual_seed(0)
    ours = DepthwiseConv2d(6, 5, 2, dilation=2)
    theirs = torch.nn.Conv2d(6, 6, 5, 2, 4, dilation=2, groups=6, bias=False)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(ours(images), theirs(images))
    with torch.no_grad():
        assert ours(images).grad_fn is None


def test_channels_of_a_larger_tensor_are_read_in_place():
    whole = torch.randn(2, 32, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    whole.requires_grad_()
    weight = torch.randn(16, 1, 5, 5, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        result = depthwise_conv(whole[:, 16:], weight)
    assert whole.untyped_storage().data_ptr() in {tensor.untyped_storage().data_ptr() for tensor in kept}
    (found,) = torch.autograd.grad(result.square().sum(), whole)
    plain = F.conv2d(whole[:, 16:], weight, padding=2, groups=16)
    (expected,) = torch.autograd.grad(plain.square().sum(), whole)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 4), (1, 3)])
def test_parity_grids_hold_every_pixel_once(height, width):
    images = torch.arange(2 * 3 * height * width, dtype=torch.float32).reshape(2, 3, height, width) + 1
    grids = parity_grids(images)
    assert grids.shape == (8, 3, -(-height // 2), -(-width // 2))
    for row in (0, 1):
        for column in (0, 1):
            part = images[:, :, row::2, column::2]
            grid = grids[4 * row + 2 * column : 4 * row + 2 * column + 2]
            assert torch.equal(grid[:, :, : part.shape[2], : part.shape[3]], part)
    assert grids[grids > 0].sum() == images.sum()
