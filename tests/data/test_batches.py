from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare

from dnas_ens.data import Augmentation, AugmentationDraws, Split, count_batches, iterate_batches
from dnas_ens.errors import UserError

IDENTITY = {"mean": (0.0,), "std": (1 / 255,)}  # leaves pixels as they are


def random_images(num: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (num, channels, height, width), dtype=torch.uint8, generator=generator)


def numbered(num: int) -> Split:
    """Image i has all pixels i and label i."""
    labels = torch.arange(num)
    return Split(labels.to(torch.uint8)[:, None, None, None].expand(num, 1, 2, 2), labels)


def one_by_one(augmentation: Augmentation, images: torch.Tensor, draws: AugmentationDraws) -> np.ndarray:
    """The same augmentation, an image, a row and a column at a time."""
    num, channels, height, width = images.shape
    result = np.zeros(images.shape)
    for i in range(num):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    column = width - 1 - x if draws.flips is not None and draws.flips[i] else x
                    source_y, source_x = y, column
                    if draws.crop_rows is not None and draws.crop_columns is not None:
                        source_y += int(draws.crop_rows[i]) - augmentation.pad
                        source_x += int(draws.crop_columns[i]) - augmentation.pad
                    inside = 0 <= source_y < height and 0 <= source_x < width
                    pixel = int(images[i, c, source_y, source_x]) if inside else 0
                    result[i, c, y, x] = (pixel / 255 - augmentation.mean[c]) / augmentation.std[c]
        if draws.cutout_rows is not None and draws.cutout_columns is not None:
            top = int(draws.cutout_rows[i]) - augmentation.cutout // 2
            left = int(draws.cutout_columns[i]) - augmentation.cutout // 2
            result[
                i, :, max(top, 0) : top + augmentation.cutout, max(left, 0) : left + augmentation.cutout
            ] = 0
    return result


@pytest.mark.parametrize(
    ("pad", "flip", "cutout"),
    [(0, False, 0), (2, False, 0), (0, True, 0), (0, False, 3), (0, False, 4), (2, True, 3)],
)
def test_augmentation_is_that_of_a_plain_loop(pad: int, flip: bool, cutout: int) -> None:
    augmentation = Augmentation(pad=pad, flip=flip, cutout=cutout, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    images = random_images(24, 3, 7, 6)
    draws = augmentation.draw(24, height=7, width=6, generator=torch.Generator().manual_seed(4))
    augmented = augmentation(images, torch.Generator().manual_seed(4))
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.float32
    np.testing.assert_allclose(augmented.numpy(), one_by_one(augmentation, images, draws), atol=1e-5)


def test_offsets_flips_and_centres_are_uniform_and_independent() -> None:
    augmentation = Augmentation(pad=2, flip=True, cutout=2, **IDENTITY)
    num = 20_000
    draws = augmentation.draw(num, height=5, width=7, generator=torch.Generator().manual_seed(0))
    for drawn, high in (
        (draws.crop_rows, 5),
        (draws.crop_columns, 5),
        (draws.cutout_rows, 5),
        (draws.cutout_columns, 7),
    ):
        counts = drawn.bincount(minlength=high)
        assert len(counts) == high
        assert chisquare(counts.numpy()).pvalue > 1e-4
    assert binomtest(int(draws.flips.sum()), num).pvalue > 1e-4
    columns = np.stack([part.numpy() for part in vars(draws).values()]).astype(float)
    correlations = np.corrcoef(columns) - np.eye(5)
    assert np.abs(correlations).max() < 5 / np.sqrt(num)


def test_parts_that_are_off_draw_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    images = random_images(3, 1, 4, 4)
    augmentation = Augmentation(pad=0, flip=False, cutout=0, **IDENTITY)
    assert torch.equal(augmentation(images, generator), images.float())
    assert torch.equal(generator.get_state(), before)


def test_flip_mirrors_left_and_right() -> None:
    images = torch.tensor([[[[1, 2], [3, 4]]]] * 64, dtype=torch.uint8)
    augmentation = Augmentation(pad=0, flip=True, cutout=0, **IDENTITY)
    augmented = augmentation(images, torch.Generator().manual_seed(0)).round().int()
    seen = {tuple(image.flatten().tolist()) for image in augmented}
    assert seen == {(1, 2, 3, 4), (2, 1, 4, 3)}


def test_cutout_squares_by_hand() -> None:
    # Centres in a corner, in the middle, at the far corner; side 4 covers centre - 2 to centre + 1.
    augmentation = Augmentation(pad=0, flip=False, cutout=4, **IDENTITY)
    centres = torch.tensor([0, 4, 7])
    draws = AugmentationDraws(cutout_rows=centres, cutout_columns=centres)
    augmented = augmentation.apply(torch.full((3, 1, 8, 8), 9, dtype=torch.uint8), draws)
    zero = [sorted({int(row) for row, _ in (image[0] == 0).nonzero()}) for image in augmented]
    assert zero == [[0, 1], [2, 3, 4, 5], [5, 6, 7]]
    assert [int((image == 0).sum()) for image in augmented] == [4, 16, 9]


def test_cutout_is_zero_after_normalisation_padding_black_before() -> None:
    augmentation = Augmentation(pad=1, flip=False, cutout=1, mean=(0.5,), std=(0.5,))
    ones = torch.ones(1, dtype=torch.int64)
    draws = AugmentationDraws(
        crop_rows=0 * ones, crop_columns=ones, cutout_rows=2 * ones, cutout_columns=ones
    )
    augmented = augmentation.apply(torch.full((1, 1, 3, 3), 255, dtype=torch.uint8), draws)
    expected = torch.tensor([[[[-1.0, -1, -1], [1, 1, 1], [1, 0, 1]]]])
    torch.testing.assert_close(augmented, expected)


def test_same_generator_state_same_images() -> None:
    augmentation = Augmentation(pad=2, flip=True, cutout=3, **IDENTITY)
    images = random_images(32, 1, 8, 8)
    first, again, other = (augmentation(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.is_contiguous()


@pytest.mark.parametrize(("size", "pad"), [(4, 1), (8, 1), (16, 2), (28, 4), (32, 4), (64, 4)])
def test_for_data_padding(make_data, size: int, pad: int) -> None:
    data = make_data(8, size=size)
    augmentation = Augmentation.for_data(data, cutout=3)
    assert (augmentation.pad, augmentation.flip, augmentation.cutout) == (pad, data.flip, 3)
    assert (augmentation.mean, augmentation.std) == (data.mean, data.std)
    plain = Augmentation.for_data(data, augment=False, cutout=3)
    assert (plain.pad, plain.flip, plain.cutout) == (0, False, 0)


def epoch(split: Split, **arguments: object) -> Iterator[list[int]]:
    for images, labels in iterate_batches(split, 4, **arguments):
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
        yield labels.tolist()


def test_batches_in_order_keep_the_last_smaller_one() -> None:
    assert list(epoch(numbered(10))) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(epoch(numbered(10), drop_last=True)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(epoch(numbered(8), drop_last=True)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(epoch(numbered(3), drop_last=True)) == [[0, 1, 2]]
    assert list(epoch(numbered(0))) == []


@pytest.mark.parametrize("num", [0, 1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("drop_last", [False, True])
def test_count_batches(num: int, drop_last: bool) -> None:
    batches = list(epoch(numbered(num), drop_last=drop_last))
    assert count_batches(numbered(num), 4, drop_last=drop_last) == len(batches)


def test_shuffled_epochs_are_permutations_drawn_once_from_the_generator() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.Generator().manual_seed(0)
    for _ in range(2):
        batches = list(epoch(numbered(50), generator=generator))
        assert list(chain(*batches)) == torch.randperm(50, generator=expected).tolist()
    assert torch.equal(generator.get_state(), expected.get_state())


def test_order_and_augmentation_are_independent() -> None:
    split = Split(random_images(30, 1, 6, 6), torch.arange(30))
    augmentation = Augmentation(pad=1, flip=True, cutout=2, **IDENTITY)

    def run(order_seed: int, augmentation_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        batches = list(
            iterate_batches(
                split,
                8,
                generator=torch.Generator().manual_seed(order_seed),
                augmentation=augmentation,
                augmentation_generator=torch.Generator().manual_seed(augmentation_seed),
            )
        )
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    images, labels = run(0, 0)
    same_images, same_labels = run(0, 0)
    other_images, other_labels = run(0, 1)
    assert torch.equal(images, same_images)
    assert torch.equal(labels, same_labels)
    assert torch.equal(labels, other_labels)
    assert not torch.equal(images, other_images)
    assert not torch.equal(labels, run(1, 0)[1])


def test_without_augmentation_generator_only_normalises() -> None:
    split = Split(random_images(6, 1, 5, 5), torch.arange(6))
    augmentation = Augmentation(pad=2, flip=True, cutout=3, mean=(0.4,), std=(0.2,))
    ((images, _),) = iterate_batches(split, 6, augmentation=augmentation)
    torch.testing.assert_close(images, (split.images / 255 - 0.4) / 0.2, atol=1e-5, rtol=0)
    ((images, _),) = iterate_batches(split, 6)
    torch.testing.assert_close(images, split.images / 255)


def test_resuming_in_mid_epoch_gives_the_same_batches() -> None:
    split = Split(random_images(30, 1, 6, 6), torch.arange(30))
    order, augmenting = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    arguments = {"augmentation": Augmentation(pad=1, flip=True, cutout=2, **IDENTITY)}
    before = order.get_state()
    whole = iterate_batches(split, 8, generator=order, augmentation_generator=augmenting, **arguments)
    next(whole), next(whole)
    after_two = augmenting.get_state()
    rest = list(whole)
    order.set_state(before)
    augmenting.set_state(after_two)
    resumed = list(
        iterate_batches(
            split, 8, generator=order, augmentation_generator=augmenting, first_batch=2, **arguments
        )
    )
    assert len(rest) == len(resumed) == 2
    for one, two in zip(rest, resumed, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_the_split_is_left_as_it_was(make_data) -> None:
    data = make_data()
    augmentation = Augmentation.for_data(data, cutout=2)
    list(iterate_batches(data.train, 7, augmentation=augmentation, augmentation_generator=torch.Generator()))
    assert data.train.fingerprint() == make_data().train.fingerprint()


def test_batch_size_of_none() -> None:
    with pytest.raises(UserError, match="The batch size is 0"):
        next(iterate_batches(numbered(4), 0))


@pytest.mark.parametrize(
    "wrong",
    [{"pad": -1}, {"cutout": -2}, {"std": (0.0,)}, {"mean": (0.1, 0.2)}, {"mean": (), "std": ()}],
)
def test_augmentation_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Augmentation(**{"pad": 1, "flip": False, "cutout": 0, "mean": (0.5,), "std": (0.2,), **wrong})


@pytest.mark.gpu
def test_on_a_gpu_as_the_plain_loop() -> None:
    augmentation = Augmentation(pad=2, flip=True, cutout=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    images = random_images(24, 3, 7, 6)
    draws = augmentation.draw(24, height=7, width=6, generator=torch.Generator("cuda").manual_seed(4))
    augmented = augmentation(images.cuda(), torch.Generator("cuda").manual_seed(4))
    assert augmented.is_cuda
    np.testing.assert_allclose(augmented.cpu().numpy(), one_by_one(augmentation, images, draws), atol=1e-5)
    split = Split(images, torch.arange(24)).to("cuda")
    on_gpu = [
        labels.tolist() for _, labels in iterate_batches(split, 5, generator=torch.Generator().manual_seed(0))
    ]
    assert list(chain(*on_gpu)) == torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    with pytest.raises(UserError, match="generator is on cuda"):
        next(iterate_batches(split, 5, generator=torch.Generator("cuda")))
