"""The Triton kernels, interpreted on a CPU and compared with PyTorch's operations in float64."""

import os
import subprocess
import sys

import pytest
import torch

from dnas_ens.nn.depthwise import triton_works

pytest.importorskip("triton", reason="PyTorch brings Triton along where there may be a GPU")

# The interpreter is chosen when kernels are defined, so it has a process of its own.
DEPTHWISE = """
import itertools, torch, torch.nn.functional as F
from dnas_ens.nn.depthwise_triton import depthwise_conv

torch.manual_seed(0)
torch.set_num_threads(1)
cases = itertools.product(((1, 4), (5, 16)), ((3, 1), (5, 2)), (1, 2), ((6, 5),))
for (edges, channels), (side, dilation), stride, size in cases:
    images = torch.randn(3, channels, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(edges * channels, 1, side, side, requires_grad=True)
    found = depthwise_conv(images, weight, stride=stride, dilation=dilation)
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact_images, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (images, weight))
    expected = F.conv2d(
        torch.cat([exact_images] * edges, 1), exact_weight, None, stride, dilation * (side // 2), dilation,
        groups=edges * channels,
    )
    slope = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (images, weight), slope)
    exact = torch.autograd.grad(expected, (exact_images, exact_weight), slope.double())
    for own, other in zip((found, *gradients), (expected, *exact), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-5)
rounded = depthwise_conv(images.bfloat16(), weight, stride=stride, dilation=dilation)
assert rounded.dtype == torch.bfloat16
torch.testing.assert_close(rounded.float(), found, rtol=2**-6, atol=2**-6)
print("same")
"""

# In double precision the plain form runs, and takes the gradients by autograd.
FOLDED_NORM = """
import copy, itertools, torch
from dnas_ens.nn import moments

torch.manual_seed(0)
torch.set_num_threads(1)


def outcome(norm, features):
    found = norm.matrices(features)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype) for part in found]
    total = sum((weight * part).sum() for weight, part in zip(weights, found, strict=True))
    inputs = [features, *norm.parameters()]
    return [*found, *torch.autograd.grad(total, inputs), *norm.buffers()]


plain = moments.folds_in_triton
for (channels, groups, further), convolve, dense in itertools.product(
    ((16, 3, 0), (32, 2, 1)), (True, False), (True, False)
):
    norm = moments.PointwiseNorm(groups, channels, convolve=convolve).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = 1.5 * torch.randn(4, (groups + further) * channels, 5, 4, dtype=torch.float64) + 0.7
    features = features.contiguous(memory_format=torch.channels_last)
    own = copy.deepcopy(norm).float()
    expected = outcome(norm, features.requires_grad_())
    moments.folds_in_triton = lambda features, channels: True
    moments.DENSE_PRODUCT = 64 if dense else 0
    found = outcome(own, features.detach().float().requires_grad_())
    moments.folds_in_triton, moments.DENSE_PRODUCT = plain, 32
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.to(other.dtype), other, rtol=1e-4, atol=1e-4)
print("same")
"""


@pytest.mark.parametrize("script", [DEPTHWISE, FOLDED_NORM], ids=["depthwise", "folded norm"])
def test_kernels_are_the_plain_form(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, timeout=300)
    assert done.stdout == "same\n", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run, and nothing is said")
def test_where_kernels_do_not_run_it_is_said_once(capsys):
    triton_works.cache_clear()
    assert not triton_works()
    assert not triton_works()
    assert capsys.readouterr().err.count("our GPU kernels do not run here (") == 1


@pytest.mark.gpu
def test_kernels_run_on_a_gpu():
    assert triton_works()
