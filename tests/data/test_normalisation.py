import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from dnas_ens.data.batches import normalise
from dnas_ens.data.dataset import measure_normalisation
from dnas_ens.errors import UserError


@given(images=arrays(np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=5)))
def test_measured_as_numpy_does(images: np.ndarray) -> None:
    mean, std = measure_normalisation(torch.from_numpy(images))
    np.testing.assert_allclose(mean, images.mean(axis=(0, 2, 3)) / 255, rtol=1e-12)
    expected = images.std(axis=(0, 2, 3)) / 255
    np.testing.assert_allclose(std, np.where(expected == 0, 1, expected), rtol=1e-9)


def test_measured_over_more_than_one_chunk() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 4, 4), dtype=np.uint8)
    images[2000:] //= 2
    mean, std = measure_normalisation(torch.from_numpy(images))
    np.testing.assert_allclose(mean, images.mean(axis=(0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, images.std(axis=(0, 2, 3)) / 255, rtol=1e-12)


def test_normalise_as_numpy_does_and_has_mean_0_and_deviation_1() -> None:
    images = torch.randint(256, (50, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = measure_normalisation(images)
    normalised = normalise(images, mean=mean, std=std)
    channels = (1, 3, 1, 1)
    expected = (images.numpy() / 255 - np.reshape(mean, channels)) / np.reshape(std, channels)
    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_constants_first_made_in_inference_mode_serve_training() -> None:
    images = torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)
    with torch.inference_mode():
        normalise(images, mean=(0.123,), std=(0.5,))
    weight = torch.ones(1, requires_grad=True)
    (normalise(images, mean=(0.123,), std=(0.5,)) * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(18 * (0.2 - 0.123) / 0.5, rel=1e-5)


def test_nothing_to_measure() -> None:
    with pytest.raises(UserError, match="no training images"):
        measure_normalisation(torch.empty(0, 1, 8, 8, dtype=torch.uint8))
