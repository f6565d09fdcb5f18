import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from dnas_ens.data.corruptions import CorruptionDraws, corrupt, elastic, motion_blur, pixelate, translation
from dnas_ens.data.names import CORRUPTION_NAMES, SEVERITIES, STRENGTHS
from dnas_ens.errors import UserError

WITHOUT_DRAWS = {"gaussian_blur", "defocus_blur", "brightness", "contrast", "jpeg", "pixelate"}


def random_images(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def draws(num, name="any"):
    return CorruptionDraws(0, name, range(num))


@pytest.mark.parametrize("name", CORRUPTION_NAMES)
def test_every_corruption_keeps_the_form_and_changes_more_with_severity(name, digits):
    for shape in ((3, 1, 8, 8), (2, 3, 32, 32), (2, 3, 5, 9)):
        images = random_images(*shape)
        before = images.clone()
        for severity in SEVERITIES:
            corrupted = corrupt(images, name, severity)
            assert (corrupted.dtype, corrupted.shape) == (torch.uint8, images.shape)
            assert not torch.equal(corrupted, images)
        assert torch.equal(images, before)
    images = digits.test.images
    changes = [float((corrupt(images, name, severity).int() - images).abs().double().mean()) for severity in SEVERITIES]
    assert all(weaker < stronger for weaker, stronger in pairwise(changes))
    flat = torch.full((2, 3, 9, 9), 77, dtype=torch.uint8)
    if name in ("gaussian_blur", "defocus_blur", "motion_blur", "pixelate", "elastic"):
        assert torch.equal(corrupt(flat, name, 5), flat)


@pytest.mark.parametrize("name", CORRUPTION_NAMES)
def test_seed_index_and_corruption_alone_decide_what_is_drawn(name):
    images = random_images(7, 3, 12, 12)
    whole = corrupt(images, name, 3, seed=4)
    for chosen in ([3, 0, 6, 2], [5, 1, 4]):
        part = corrupt(images[chosen], name, 3, seed=4, indices=chosen)
        # A convolution over another number of images may round the last place the other way.
        assert (part.int() - whole[chosen].int()).abs().max() <= 1
    if name not in WITHOUT_DRAWS:
        alike = corrupt(images[:1].expand(30, -1, -1, -1), name, 3)
        assert len(torch.unique(alike, dim=0)) > 1
        assert not torch.equal(whole, corrupt(images, name, 3, seed=1))
    assert not torch.equal(draws(2, name).uniform(5), draws(2, "another").uniform(5))


def test_noise_has_the_distribution_it_is_named_for():
    grey = torch.full((50, 1, 20, 20), 128, dtype=torch.uint8)
    for severity in (1, 3):
        noisy = corrupt(grey, "gaussian_noise", severity).double() / 255
        assert float(noisy.mean()) == pytest.approx(128 / 255, abs=0.005)
        assert float(noisy.std()) == pytest.approx(STRENGTHS["gaussian_noise"][severity - 1], rel=0.03)
    photons = STRENGTHS["shot_noise"][2]
    counted = corrupt(grey, "shot_noise", 3).double().numpy() / 255 * photons
    rate = 128 / 255 * photons
    observed = np.bincount(counted.round().astype(int).ravel(), minlength=19)[:19] / counted.size
    # The 18 photons of white are where brighter pixels are cut off.
    expected = np.append(stats.poisson.pmf(np.arange(18), rate), stats.poisson.sf(17, rate))
    np.testing.assert_allclose(observed, expected, atol=0.01)
    peppered = corrupt(grey, "impulse_noise", 4)
    for value in (0, 255):
        assert float((peppered == value).double().mean()) == pytest.approx(0.09, abs=0.01)


def test_light_and_pixelate_by_hand():
    images = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    brighter, flatter = corrupt(images, "brightness", 3), corrupt(images, "contrast", 2)
    assert brighter.flatten().tolist() == [51, 151, 251, 255]  # + 0.2 * 255, cut at white
    mean = 555 / 4
    assert flatter.flatten().tolist() == pytest.approx([mean / 2 + x / 2 for x in (0, 100, 200, 255)], abs=0.51)
    # Cells of 4/3 pixels from the centre of [0, 4): [2, 10/3) holds pixel 2 and a third of pixel 3.
    line = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4).expand(-1, -1, 4, -1)
    row = pixelate(line, 0.75, draws(1))[0, 0, 0].tolist()
    assert row == pytest.approx([0, 0, 1 / 4, (1 / 4) / 3 + 2 / 3], abs=1e-6)


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_another_coder(channels):
    coder = pytest.importorskip("torchvision.io")
    if not hasattr(coder, "encode_jpeg"):
        pytest.skip("this torchvision has no encode_jpeg to compare with")
    images = random_images(1, channels, 24, 24)
    expected = coder.decode_jpeg(coder.encode_jpeg(images[0], quality=int(STRENGTHS["jpeg"][1])))
    ours = corrupt(images, "jpeg", 2)[0]
    # Two builds may round a coefficient differently.
    assert float((ours.int() - expected.int()).abs().float().mean()) < 1.0


def test_gaussian_blur_is_that_of_scipy():
    images = random_images(1, 1, 64, 64)
    sigma = STRENGTHS["gaussian_blur"][2] * math.sqrt(2)
    expected = ndimage.gaussian_filter(images[0, 0].double().numpy(), sigma, mode="mirror", truncate=6)
    ours = corrupt(images, "gaussian_blur", 3)[0, 0].double().numpy()
    np.testing.assert_allclose(ours[8:-8, 8:-8], expected[8:-8, 8:-8], atol=1.2)


def test_defocus_spreads_a_point_over_a_disc_and_motion_over_a_line():
    point = torch.zeros(40, 1, 33, 33)
    point[:, :, 16, 16] = 1.0
    radius = STRENGTHS["defocus_blur"][4] * math.sqrt(33 / 32)
    light = (point * 255).to(torch.uint8)
    disc = corrupt(light, "defocus_blur", 5)[0, 0] > 0
    assert int(disc.sum()) == pytest.approx(math.pi * (radius + 0.5) ** 2, rel=0.15)
    length = STRENGTHS["motion_blur"][4] * math.sqrt(33 / 32)
    lines = motion_blur(point, STRENGTHS["motion_blur"][4], draws(40))[:, 0].double()
    np.testing.assert_allclose(lines.sum((1, 2)), 1.0, atol=1e-5)
    steps = torch.arange(33).double() - 16
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    places = torch.stack([rows, columns])
    covariance = torch.einsum("nrc,irc,jrc->nij", lines, places, places)
    across, along = torch.linalg.eigvalsh(covariance).T
    # The variance of a uniform line of length L is L^2 / 12; its width is about a pixel.
    np.testing.assert_allclose(along.mean(), length**2 / 12, rtol=0.1)
    assert float(across.max()) < 0.5


def test_rotation_is_that_of_scipy_to_one_side_or_the_other():
    # Without an edge, so that interpolation is nearly exact.
    y, x = np.mgrid[0:32, 0:32]
    image = (128 + 60 * np.sin(x / 5) + 50 * np.cos(y / 4)).astype(np.uint8)
    turned = corrupt(torch.from_numpy(image).expand(12, 1, 32, 32), "rotation", 2)[:, 0].numpy().astype(float)
    expected = [
        ndimage.rotate(image.astype(float), angle, reshape=False, order=1, mode="nearest") for angle in (-20, 20)
    ]
    errors = np.abs(turned[:, None] - np.stack(expected)).max((2, 3))
    assert (errors.min(1) < 3).all()
    assert set(errors.argmin(1)) == {0, 1}


def test_translation_moves_by_its_length_in_all_directions():
    point = torch.zeros(200, 1, 32, 32)
    point[:, :, 16, 16] = 1.0
    moved = translation(point, 0.2, draws(200))[:, 0].double()
    steps = torch.arange(32).double() - 16
    rows, columns = (moved * steps[:, None]).sum((1, 2)), (moved * steps).sum((1, 2))
    np.testing.assert_allclose(torch.hypot(rows, columns), 0.2 * 32, rtol=1e-3)
    angles = torch.atan2(rows, columns).numpy()
    assert stats.kstest(angles, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 0.01


def test_elastic_moves_by_its_length_in_the_root_mean_square():
    side = 64
    ramp = torch.arange(float(side)).expand(8, 1, side, side)
    moved = [elastic(image, 0.02, draws(8)) - image for image in (ramp, ramp.mT)]
    square = (moved[0] ** 2 + moved[1] ** 2).mean()
    assert float(square.sqrt()) == pytest.approx(0.02 * side, rel=0.1)


def test_occlusion_covers_a_square():
    images = torch.zeros(400, 1, 32, 32, dtype=torch.uint8)
    covered = corrupt(images, "occlusion", 4)
    assert set(covered.unique().tolist()) == {0, 128}
    assert int((covered > 0).sum((1, 2, 3)).max()) in (256, 272, 289)  # whole where it is not cut at a border
    centres_hit = (covered > 0).double().mean((0, 1))
    assert float(centres_hit[16, 16]) == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize(
    ("images", "arguments", "words"),
    [
        (random_images(1, 1, 8, 8), {"name": "gausian_noise"}, "no corruption 'gausian_noise'. Give one of gauss"),
        (random_images(1, 1, 8, 8), {"severity": 0}, "severity is 0"),
        (random_images(1, 8, 8), {}, "images to corrupt"),
        (random_images(1, 2, 8, 8), {}, "images to corrupt"),
        (torch.rand(1, 1, 8, 8), {}, "images to corrupt"),
        (random_images(2, 1, 8, 8), {"indices": [1]}, "indices"),
        (random_images(1, 1, 8, 8), {"seed": -1}, "negative"),
    ],
)
def test_mistakes(images, arguments, words):
    with pytest.raises(UserError, match=words):
        corrupt(images, **{"name": "jpeg", "severity": 1, **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("name", CORRUPTION_NAMES)
def test_a_gpu_corrupts_alike(name):
    images = random_images(4, 3, 32, 32)
    expected = corrupt(images, name, 3)
    difference = (corrupt(images.cuda(), name, 3).cpu().int() - expected.int()).abs()
    assert float((difference > 1).double().mean()) < 0.01
