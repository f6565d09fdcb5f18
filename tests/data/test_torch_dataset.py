import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from dnas_ens.data.folder import load_folder
from dnas_ens.data.torch_dataset import load_torch_dataset
from dnas_ens.errors import UserError


class Listed(list, Dataset):
    """A Dataset of the items it is given."""


class MNIST(Listed):
    """Named as torchvision's."""

    classes = ("zero", "one")


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)


def planes(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize(
    "convert",
    [Image.fromarray, planes, lambda pixels: planes(pixels) / 255, lambda pixels: (planes(pixels) / 255).half()],
)
def test_images_of_every_kind(convert):
    loaded = load_torch_dataset(Listed([(convert(pixels), index % 2) for index, pixels in enumerate(PIXELS)]))
    assert np.array_equal(loaded.images, PIXELS.transpose(0, 3, 1, 2))
    assert (loaded.labels.tolist(), loaded.classes) == ([0, 1, 0, 1], ("0", "1"))
    assert (loaded.num_train, loaded.num_val, loaded.num_test) == (4, 0, 0)


def test_photos_on_their_side_are_turned_as_those_of_a_folder(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    for name, pixels in zip(("a", "b"), PIXELS, strict=False):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png", exif=exif)
    loaded = load_torch_dataset(ImageFolder(tmp_path))
    assert np.array_equal(loaded.images, load_folder(tmp_path).images)
    assert np.array_equal(loaded.images, np.rot90(PIXELS[:2], -1, axes=(1, 2)).transpose(0, 3, 1, 2))


def test_grey_with_and_without_a_channel_and_tensor_labels():
    images = torch.from_numpy(PIXELS[..., 0])
    for given in (images, images[:, None]):
        loaded = load_torch_dataset(TensorDataset(given, torch.tensor([0, 1, 1, 0])))
        assert np.array_equal(loaded.images, images[:, None].numpy())
        assert loaded.labels.tolist() == [0, 1, 1, 0]


def test_images_do_not_share_memory_with_a_buffer_the_dataset_reuses():
    class Reusing(Listed):
        def __getitem__(self, index):
            self.buffer = getattr(self, "buffer", torch.zeros(1, 4, 4, dtype=torch.uint8)).fill_(index)
            return self.buffer, index % 2

    assert load_torch_dataset(Reusing([None] * 4)).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_classes_and_flip_of_the_data_set_inside_a_subset():
    items = [(Image.fromarray(pixels), index % 2) for index, pixels in enumerate(PIXELS)]
    loaded = load_torch_dataset(Subset(Subset(MNIST(items), [3, 2, 1]), [0, 1]))
    assert (loaded.name, loaded.classes, loaded.labels.tolist()) == ("MNIST", ("zero", "one"), [1, 0])
    assert not loaded.flip
    assert load_torch_dataset(Listed(items)).flip
    both = load_torch_dataset(ConcatDataset([Subset(MNIST(items), [3, 2]), MNIST(items)]))
    assert (both.name, both.classes, both.flip) == ("MNIST", ("zero", "one"), False)
    # Where parts call their classes by other names, labels have none; characters are mirrored in no company.
    mixed = load_torch_dataset(ConcatDataset([Listed(items), MNIST(items)]))
    assert (mixed.name, mixed.classes, mixed.flip) == ("ConcatDataset", ("0", "1"), False)


class FashionMNIST(MNIST):
    """Derived from MNIST as torchvision's is."""


class Derived(MNIST):
    pass


class Wrapper(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def test_what_is_derived_from_or_wrapped_around_characters_is_not_mirrored():
    items = [(Image.fromarray(pixels), index % 2) for index, pixels in enumerate(PIXELS)]
    gtsrb, rendered, semeion = (type(name, (Listed,), {}) for name in ("GTSRB", "RenderedSST2", "SEMEION"))
    for kind in (Derived, gtsrb, rendered, semeion, lambda items: Wrapper(Subset(MNIST(items), [0, 1]))):
        assert not load_torch_dataset(kind(items)).flip
    for kind in (FashionMNIST, Listed, lambda items: Wrapper(Listed(items))):
        assert load_torch_dataset(kind(items)).flip


def test_classes_are_named_where_a_dataset_names_them():
    items = [(Image.fromarray(pixels), index % 2) for index, pixels in enumerate(PIXELS)]
    assert not load_torch_dataset(Listed(items)).named
    assert load_torch_dataset(Subset(MNIST(items), [0, 1])).named


def test_files_of_an_image_folder_are_read_as_those_of_a_folder(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    for index, name in enumerate("abab"):
        Image.fromarray(np.dstack([PIXELS[index], np.full((6, 6), 51, np.uint8)])).save(
            tmp_path / name / f"{index}.png"
        )
    Image.fromarray(PIXELS[0, :, :, 0].astype(np.uint16) * 16).save(tmp_path / "b" / "deep.png")
    of_folder, images = load_folder(tmp_path), ImageFolder(tmp_path)
    assert of_folder.deep_bits == 12
    split = ConcatDataset([Subset(images, range(2)), Subset(images, range(2, 5))])
    for given in (images, split):
        loaded = load_torch_dataset(given)
        assert np.array_equal(loaded.images, of_folder.images)
        assert (loaded.labels.tolist(), loaded.deep_bits) == (of_folder.labels.tolist(), 12)
    assert load_torch_dataset(images).paths == of_folder.paths
    images.transform = lambda image: Image.new("L", image.size, 7)
    assert (load_torch_dataset(images).images == 7).all()
    images.transform = None
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a/0\.png cannot be read as an image"):
        load_torch_dataset(images)


def test_photos_of_an_image_folder_have_the_pixels_that_a_folder_has(tmp_path):
    gradient = np.add.outer(np.arange(900) % 251, np.arange(700) % 97).astype(np.uint8)
    for name, shift in (("a", 0), ("b", 40)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.dstack([gradient, gradient + shift, gradient])).save(tmp_path / name / "photo.jpg")
    assert np.array_equal(load_torch_dataset(ImageFolder(tmp_path)).images, load_folder(tmp_path).images)


def test_class_names_may_be_an_array():
    named = Listed([(Image.fromarray(pixels), index % 2) for index, pixels in enumerate(PIXELS)])
    named.classes = np.array(["ant", "bee"])
    for given in (named, Subset(named, [0, 1])):
        assert load_torch_dataset(given).classes == ("ant", "bee")


def test_sizes_and_deep_pil_images_have_one_scale():
    items = [(Image.new("L", (20, 10), 5), 0), (Image.new("L", (8, 8), 5), 1)]
    assert load_torch_dataset(Listed(items)).images.shape == (2, 1, 8, 8)
    assert load_torch_dataset(Listed(items), image_size=9).images.shape == (2, 1, 9, 9)
    values = [np.full((4, 4), value, dtype=np.uint16) for value in (1000, 4000)]
    loaded = load_torch_dataset(Listed([(Image.fromarray(each), label) for label, each in enumerate(values)]))
    assert loaded.images[:, 0, 0, 0].tolist() == [round(1000 * 255 / 4095), round(4000 * 255 / 4095)]
    assert loaded.deep_bits == 12


IMAGE = torch.zeros(1, 4, 4)
GOOD = (IMAGE, 0)


@pytest.mark.parametrize(
    ("dataset", "cause", "remedy"),
    [
        (Endless(), "A Endless has no length", "map-style"),
        (Listed([]), "The Listed is empty", "with items"),
        (Listed([GOOD, IMAGE]), "Item 1 of the Listed is a Tensor, not a pair", "(image, label)"),
        (Listed([GOOD, ("x.png", 1)]), "Image 1 is a str", "PIL images"),
        (Listed([GOOD, (torch.zeros(2, 4, 4), 1)]), "Image 1 is a tensor of shape (2, 4, 4)", "one or three"),
        (Listed([GOOD, (IMAGE + 2.5, 1)]), "Image 1 has values from 2.5 to 2.5", "Normalize"),
        (Listed([GOOD, (IMAGE.long(), 1)]), "tensor of torch.int64", "uint8"),
        (Listed([GOOD, (Image.new("F", (4, 4)), 1)]), "Image 1 is unsuitable: floating-point", "8 or 16 bits"),
        (Listed([GOOD, (IMAGE, "cat")]), "Label 1 is 'cat'", "whole numbers"),
        (Listed([GOOD, (IMAGE, -1)]), "Label 1 is -1", "from 0"),
        (MNIST([GOOD, (IMAGE, 2)]), "Label 2 has no name", "class name"),
        (Listed([GOOD, (IMAGE, 2)]), "Class '1' has no images", "without gaps"),
        (Listed([GOOD, GOOD]), "the one class '0'", "two classes"),
    ],
)
def test_unsuitable_datasets(dataset, cause, remedy):
    with pytest.raises(UserError) as caught:
        load_torch_dataset(dataset)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy
