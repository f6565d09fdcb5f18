import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnas_ens.nn.depthwise import DepthwiseConv2d, depthwise_conv, native_depthwise


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
