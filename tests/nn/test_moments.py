import pytest
import torch
import torch.nn.functional as F

from dnas_ens.nn.moments import PointwiseNorm, grouped_pointwise, moments


def features(groups=3, channels=4, batch=5, side=3, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, groups * channels, side, side)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    return values.contiguous(memory_format=torch.channels_last)


def test_gradient_of_moments_against_finite_differences():
    assert torch.autograd.gradcheck(lambda z: moments(z, 2), (features(2, 2, 2, 2).requires_grad_(),))


@pytest.mark.parametrize("training", [True, False])
def test_norm_is_convolution_and_batchnorm(training):
    norm = PointwiseNorm(3, 4).double()
    torch.nn.init.normal_(norm.pointwise)
    plain = [torch.nn.BatchNorm2d(4, affine=False).double() for _ in range(3)]
    for step in range(3):
        norm.train(training or step < 2)
        z = features(offset=step)
        found = grouped_pointwise(z, *norm.matrices(z))
        for group, batch_norm in enumerate(plain):
            batch_norm.train(norm.training)
            part = z[:, 4 * group : 4 * group + 4]
            expected = batch_norm(F.conv2d(part, norm.pointwise[group].reshape(4, 4, 1, 1)))
            torch.testing.assert_close(found[:, 4 * group : 4 * group + 4], expected)
    torch.testing.assert_close(norm.running_mean, torch.cat([b.running_mean for b in plain]))
    torch.testing.assert_close(norm.running_var, torch.cat([b.running_var for b in plain]))
    assert norm.num_batches_tracked == plain[0].num_batches_tracked == (3 if training else 2)
    kept = norm.running_mean.clone()
    norm.train().track_running_stats = False
    result = grouped_pointwise(z, *norm.matrices(z))
    torch.testing.assert_close(result.mean(dim=(0, 2, 3)), torch.zeros(12, dtype=torch.float64))
    assert torch.equal(norm.running_mean, kept)


def test_norm_of_a_constant_input_is_finite():
    norm = PointwiseNorm(1, 4, convolve=False)
    constant = torch.full((2, 4, 3, 3), 7.3).requires_grad_()
    result = grouped_pointwise(constant, *norm.matrices(constant))
    result.square().sum().backward()
    assert result.abs().max() < 1.0
    assert torch.isfinite(constant.grad).all()
