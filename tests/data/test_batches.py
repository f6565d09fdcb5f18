from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare
from sklearn.utils.class_weight import compute_class_weight

from dnas_ens.data import Augmentation, Split, count_batches, iterate_batches
from dnas_ens.data.batches import class_weights, epoch_indices, normalise
from dnas_ens.errors import UserError

IDENTITY = {"mean": (0.0,), "std": (1 / 255,)}  # leaves pixels as they are
COLOUR = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def random_images(num, channels, height, width):
    return torch.randint(1, 256, (num, channels, height, width), dtype=torch.uint8, generator=seeded(1))


def numbered(num):
    """Image i has all pixels i and label i."""
    labels = torch.arange(num)
    return Split(labels.to(torch.uint8)[:, None, None, None].expand(num, 1, 2, 2), labels)


def one_by_one(augmentation, images, draws):
    """The same augmentation, an image, a row and a column at a time."""
    num, channels, height, width = images.shape
    result = np.zeros(images.shape)
    for i, c, y, x in np.ndindex(num, channels, height, width):
        source_y, source_x = y, width - 1 - x if draws.flips is not None and draws.flips[i] else x
        if draws.crop_rows is not None:
            source_y += int(draws.crop_rows[i]) - augmentation.pad
            source_x += int(draws.crop_columns[i]) - augmentation.pad
        inside = 0 <= source_y < height and 0 <= source_x < width
        pixel = int(images[i, c, source_y, source_x]) if inside else 0
        result[i, c, y, x] = (pixel / 255 - augmentation.mean[c]) / augmentation.std[c]
    for i in range(num if draws.cutout_rows is not None else 0):
        top = int(draws.cutout_rows[i]) - augmentation.cutout // 2
        left = int(draws.cutout_columns[i]) - augmentation.cutout // 2
        result[i, :, max(top, 0) : top + augmentation.cutout, max(left, 0) : left + augmentation.cutout] = 0
    return result


@pytest.mark.parametrize(("pad", "flip", "cutout"), [(0, False, 0), (2, False, 0), (0, True, 4), (2, True, 3)])
@DEVICES
def test_augmentation_is_that_of_a_plain_loop(pad, flip, cutout, device):
    augmentation = Augmentation(pad=pad, flip=flip, cutout=cutout, **COLOUR)
    images = random_images(24, 3, 7, 6)
    draws = augmentation.draw(24, height=7, width=6, generator=seeded(4, device))
    augmented = augmentation(images.to(device), seeded(4, device))
    assert (augmented.dtype, augmented.device.type, augmented.is_contiguous()) == (torch.float32, device, True)
    np.testing.assert_allclose(augmented.cpu().numpy(), one_by_one(augmentation, images, draws), atol=1e-5)


def test_offsets_flips_and_centres_are_uniform_and_independent():
    num = 20_000
    augmentation = Augmentation(pad=2, flip=True, cutout=2, **IDENTITY)
    draws = augmentation.draw(num, height=5, width=7, generator=seeded(0))
    for name, high in (("crop_rows", 5), ("crop_columns", 5), ("cutout_rows", 5), ("cutout_columns", 7)):
        counts = getattr(draws, name).bincount(minlength=high)
        assert len(counts) == high
        assert chisquare(counts.numpy()).pvalue > 1e-4
    assert binomtest(int(draws.flips.sum()), num).pvalue > 1e-4
    columns = np.stack([part.numpy() for part in vars(draws).values()]).astype(float)
    assert np.abs(np.corrcoef(columns) - np.eye(5)).max() < 5 / np.sqrt(num)


@pytest.mark.parametrize(("size", "pad"), [(4, 1), (16, 2), (28, 4), (64, 4)])
def test_for_data(make_data, size, pad):
    data = make_data(8, size=size)
    normalisation = {"mean": data.mean, "std": data.std}
    expected = Augmentation(pad=pad, flip=data.flip, cutout=3, **normalisation)
    assert Augmentation.for_data(data, cutout=3) == expected
    plain = Augmentation(pad=0, flip=False, cutout=0, **normalisation)
    assert Augmentation.for_data(data, augment=False, cutout=3) == plain


def epoch(split, **arguments):
    for images, labels in iterate_batches(split, 4, **arguments):
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
        yield labels.tolist()


@given(num=st.integers(0, 13), drop_last=st.booleans())
def test_batches_in_order_and_how_many(num, drop_last):
    batches = list(epoch(numbered(num), drop_last=drop_last))
    expected = [list(range(start, min(start + 4, num))) for start in range(0, num, 4)]
    if drop_last and len(expected) > 1 and num % 4:
        expected.pop()
    assert batches == expected
    assert count_batches(numbered(num), 4, drop_last=drop_last) == len(batches)


@DEVICES
def test_shuffled_epochs_are_permutations_drawn_once_from_the_generator(device):
    generator, expected = seeded(0), seeded(0)
    for _ in range(2):
        batches = list(epoch(numbered(50).to(device), generator=generator))
        assert list(chain(*batches)) == torch.randperm(50, generator=expected).tolist()
    assert torch.equal(generator.get_state(), expected.get_state())


def test_seeds_of_order_and_augmentation_are_independent_and_resuming_in_mid_epoch_gives_the_same_batches():
    split = Split(random_images(30, 1, 6, 6), torch.arange(30))
    before = split.fingerprint()
    augmentation = Augmentation(pad=1, flip=True, cutout=2, **IDENTITY)

    def run(order, augmenting, **options):
        generators = {"generator": order, "augmentation_generator": augmenting}
        return iterate_batches(split, 8, augmentation=augmentation, **generators, **options)

    def joined(batches):
        return [torch.cat(part) for part in zip(*batches, strict=True)]

    images, labels = joined(run(seeded(0), seeded(0)))
    other_images, other_labels = joined(run(seeded(0), seeded(1)))
    assert torch.equal(labels, other_labels)
    assert not torch.equal(images, other_images)
    assert not torch.equal(labels, joined(run(seeded(1), seeded(0)))[1])
    augmenting = seeded(0)
    stopped = run(seeded(0), augmenting)
    next(stopped), next(stopped)
    stopped.close()
    resumed = joined(run(seeded(0), augmenting, first_batch=2))
    assert all(map(torch.equal, resumed, (images[16:], labels[16:])))
    assert split.fingerprint() == before


def test_without_augmentation_generator_only_normalises():
    split = Split(random_images(6, 1, 5, 5), torch.arange(6))
    augmentation = Augmentation(pad=2, flip=True, cutout=3, mean=(0.4,), std=(0.2,))
    ((images, _),) = iterate_batches(split, 6, augmentation=augmentation)
    torch.testing.assert_close(images, (split.images / 255 - 0.4) / 0.2, atol=1e-5, rtol=0)


def test_constants_first_made_in_inference_mode_serve_training():
    images = torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)
    with torch.inference_mode():
        normalise(images, mean=(0.123,), std=(0.5,))
    weight = torch.ones(1, requires_grad=True)
    (normalise(images, mean=(0.123,), std=(0.5,)) * weight).sum().backward()
    assert weight.grad.item() == pytest.approx(18 * (0.2 - 0.123) / 0.5, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"pad": -1}, {"std": (0.0,)}, {"mean": (0.1, 0.2)}, {"mean": (), "std": ()}])
def test_augmentation_out_of_range(wrong):
    with pytest.raises(UserError):
        Augmentation(**{"pad": 1, "flip": False, "cutout": 0, "mean": (0.5,), "std": (0.2,), **wrong})
    with pytest.raises(UserError, match="The batch size is 0"):
        next(iterate_batches(numbered(4), 0))


@pytest.mark.gpu
def test_the_order_is_drawn_on_the_cpu():
    with pytest.raises(UserError, match="generator is on cuda"):
        next(iterate_batches(numbered(4).to("cuda"), 5, generator=torch.Generator("cuda")))


def test_balanced_epochs_draw_every_class_equally_often():
    labels = torch.tensor([0] * 90 + [2] * 9 + [3])
    split = Split(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), labels)
    counts = torch.zeros(4)
    for epoch in range(200):
        indices = epoch_indices(split, 10, generator=seeded(epoch), balanced=True)
        drawn = torch.cat(list(indices))
        assert len(drawn) == 100
        counts += torch.bincount(labels[drawn], minlength=4)
    assert counts[1] == 0
    # Three classes that occur, a third each: a chi-squared test of 20,000 draws.
    assert chisquare(counts[[0, 2, 3]].numpy()).pvalue > 1e-4
    assert class_weights(labels).tolist() == pytest.approx([100 / 270, 0.0, 100 / 27, 100 / 3])
    balanced = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels.numpy())
    assert class_weights(labels)[[0, 2, 3]].numpy() == pytest.approx(balanced)
