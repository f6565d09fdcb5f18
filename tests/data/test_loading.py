import shutil
import unicodedata
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from dnas_ens.data import default_data_root, load_data
from dnas_ens.data.copies import first_alike, first_equal
from dnas_ens.data.loading import mirror_hint
from dnas_ens.errors import UserError


def counts(data):
    return [split.labels.bincount().tolist() for split in data.named_splits().values()]


def test_digits_splits_are_of_scikit_learns_arrays(digits):
    reference = load_digits()
    assert sorted(chain(*digits.splits.values())) == list(range(1797))
    for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        split, indices = getattr(digits, name), digits.splits[name]
        assert np.array_equal(split.images[:, 0].numpy(), np.rint(reference.images[indices] * 255 / 16))
        assert np.array_equal(split.labels.numpy(), reference.target[indices])
        assert np.abs(split.labels.bincount().numpy() - share * np.bincount(reference.target)).max() <= 1
    assert (digits.name, digits.image_size, digits.num_channels, digits.flip) == ("digits", 8, 1, False)


def test_same_seed_same_data_another_seed_other_splits(digits):
    assert load_data("digits", seed=0).fingerprint == digits.fingerprint
    other = load_data("digits", seed=1)
    assert other.fingerprint != digits.fingerprint
    assert all(other.splits[name] != digits.splits[name] for name in digits.splits)
    larger = load_data("digits", image_size=12)
    assert (larger.image_size, larger.splits) == (12, digits.splits)


def test_limit_train_leaves_val_and_test_alone(digits):
    limited = load_data("digits", limit_train=100)
    assert len(limited.train) == 100
    assert set(limited.splits["train"]) < set(digits.splits["train"])
    share = digits.train.labels.bincount() * 100 / len(digits.train)
    assert (limited.train.labels.bincount() - share).abs().max() < 1
    for name in ("val", "test"):
        assert limited.splits[name] == digits.splits[name]
        assert torch.equal(getattr(limited, name).images, getattr(digits, name).images)
    np.testing.assert_allclose(limited.mean[0], limited.train.images.numpy().mean() / 255)
    assert limited.fingerprint == load_data(digits, limit_train=100).fingerprint != digits.fingerprint


def test_image_data_and_torch_datasets(digits):
    assert load_data(digits) is load_data(digits, image_size=8) is digits
    assert load_data(digits, flip=True).flip
    with pytest.raises(UserError, match="loaded at 8 pixels, but 16"):
        load_data(digits, image_size=16)
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    data = load_data(TensorDataset(images, torch.arange(50) % 2))
    assert counts(data) == [[15, 15], [5, 5], [5, 5]]
    assert torch.equal(data.test.images, images[data.splits["test"]])
    # Its classes are numbered for want of names: they are no digits.
    assert data.flip


def test_folder_by_path_by_text_and_by_name_below_the_data_root(tmp_path, write_images, monkeypatch):
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, 10)
    bad = tmp_path / "pets" / "cat" / "99.png"
    bad.write_bytes(b"no image")
    data = load_data(tmp_path / "pets", skip_bad_images=True)
    assert data.describe()["skipped"] == [str(bad)]
    bad.unlink()
    assert counts(data) == [[6, 6], [2, 2], [2, 2]]
    assert (data.name, data.classes, data.flip) == ("pets", ("cat", "dog"), True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DNAS_ENS_DATA", "")
    assert default_data_root() == tmp_path / ".cache" / "dnas_ens" / "data"
    assert load_data("~/pets").fingerprint == data.fingerprint
    assert load_data("pets", data_root=tmp_path).fingerprint == data.fingerprint
    monkeypatch.setenv("DNAS_ENS_DATA", "~")
    assert load_data("pets").fingerprint == data.fingerprint
    monkeypatch.chdir(tmp_path)
    assert load_data("pets/", data_root=tmp_path / "nowhere").fingerprint == data.fingerprint


def test_a_data_sets_name_wins_over_a_folder_of_that_name_and_says_so(tmp_path, monkeypatch, caplog, digits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load_data("digits").fingerprint == digits.fingerprint
    assert "digits is the data set of that name; the folder here is ./digits." in caplog.text
    with pytest.raises(UserError, match="digits has no class folders"):
        load_data("./digits")


@pytest.mark.parametrize(
    ("typed", "nearest"), [("fashion_mnist", "fashion-mnist"), ("CIFAR-10", "cifar10"), ("MINST", "mnist")]
)
def test_unknown_name_lists_the_known_ones_nearest_first(tmp_path, typed, nearest):
    with pytest.raises(UserError, match=f"no data set {typed!r}, nor a folder of that name here") as caught:
        load_data(typed, data_root=tmp_path)
    assert caught.value.remedy.startswith(f"Give one of {nearest}, ")
    assert all(name in caught.value.remedy for name in ("digits", "mnist", "cifar10", "cifar100", "svhn"))


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"data": Path("nowhere"), "data_root": "root"}, "no folder nowhere, nor root/nowhere"),
        ({"data": ""}, "--data is ''"),
        ({"data": (np.zeros(4), np.zeros(4))}, "A tuple was given as data"),
        ({"data": np.zeros(4)}, "A ndarray was given as data"),
        ({"data": None}, "A NoneType was given as data"),
        ({"image_size": 0}, "The image size is 0"),
        ({"seed": -1}, "The seed is -1"),
        ({"limit_train": 9}, "The limit is 9 training images, of 1079 in 10 classes"),
    ],
)
def test_arguments_out_of_range(arguments, cause):
    with pytest.raises(UserError, match=cause):
        load_data(**arguments)


SIDES = (
    *("TurnLeft straight", "turn_left on", "handleft x", "Left-Hand x", "L R", "glove_l glove_r", "links rechts"),
    *("clockwise still", "eye_OD eye_OS", "0 1 2", "b d", "zero one two", "arrow_up x", "text photo"),
    "a b c d e f g h i j k l m n o p q r s t u v w x y z space nothing",
    *("lefteye righteye", "LeftHandle RightHandle", "左转 右转", "왼쪽 오른쪽", "левая правая", "levá pravá"),
    *("kiri kanan", "NE NW SE SW", unicodedata.normalize("NFD", "vänster höger"), "0_-_zero 1_-_one 2_-_two"),
)
NO_SIDES = (
    *("cat dog", "bright dark", "upright fallen", "cleft whole", "copyright free", "class1 class2", "t-shirt boot"),
    *(
        "l_shape round",
        "leftover fresh",
        "righteous leftover",
        "se other",
        "class_1 class_2",
        "room2 room3",
        "0-2 4-6 8-12",
    ),
)


def test_names_that_say_a_mirror_matters():
    assert [names for names in (*SIDES, *NO_SIDES) if mirror_hint(names.split())] == list(SIDES)


@pytest.mark.parametrize(
    ("names", "asked", "flip"), [("left right", None, False), ("left right", True, True), ("cat dog", None, True)]
)
def test_flip_of_a_folder(tmp_path, write_images, caplog, names, asked, flip):
    for seed, name in enumerate(names.split()):
        write_images(tmp_path / name, 5, seed=seed)
    assert load_data(tmp_path, flip=asked).flip == flip
    assert ("--flip" in caplog.text) == (not flip)


def test_a_dataset_is_mirrored_as_a_folder_of_the_same_names(tmp_path, write_images, caplog):
    for name in "01":
        write_images(tmp_path / name, 5, seed=int(name))
    loaded = load_data(ImageFolder(tmp_path))
    assert "'0', '1' are letters or digits" in caplog.text
    assert (loaded.flip, loaded.fingerprint) == (False, load_data(tmp_path).fingerprint)


def shared_images(data, one, other):
    """Images of one split whose bytes are in the other."""
    known = {image.numpy().tobytes() for image in getattr(data, one).images}
    return sum(image.numpy().tobytes() in known for image in getattr(data, other).images)


def test_copies_under_other_names_and_formats_stay_on_one_side(tmp_path, write_images, caplog):
    for seed, name in enumerate(("cat", "ship")):
        write_images(tmp_path / name, 20, seed=seed)
        for path in list((tmp_path / name).iterdir()):
            shutil.copy(path, tmp_path / name / f"copy of {path.name}")
            with Image.open(path) as image:
                image.save(path.with_suffix(".bmp"))
    for seed in range(2):
        data = load_data(tmp_path, seed=seed)
        assert counts(data) == [[36, 36], [12, 12], [12, 12]]
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            assert shared_images(data, one, other) == 0
    assert "80 of 120 images are equal to others" in caplog.text


def test_copies_saved_again_in_another_quality_and_size_stay_on_one_side(tmp_path, caplog):
    photos, generator = load_sample_images().images, np.random.default_rng(0)
    for photo, name in zip(photos, ("china", "flower"), strict=True):
        (tmp_path / name).mkdir()
        for index in range(12):
            y, x = generator.integers(0, 200, 2)
            picture = Image.fromarray(photo[y : y + 220, x : x + 220])
            picture.save(tmp_path / name / f"{index:02}.jpg", quality=92)
            picture.resize((150, 150)).save(tmp_path / name / f"{index:02} sent.jpg", quality=60)
    data = load_data(tmp_path)
    assert "24 of 48 images look like others of their class" in caplog.text
    assert "sent.jpg" in caplog.text
    for indices in data.splits.values():
        assert {index ^ 1 for index in indices} == set(indices)
    assert "images are in" not in caplog.text


@pytest.mark.parametrize("size", [8, 32])
def test_different_pictures_of_plain_classes_are_not_taken_for_copies(size):
    digits = load_digits()
    scans = [Image.fromarray(np.rint(scan * 255 / 16).astype(np.uint8)) for scan in digits.images]
    images = np.stack([np.asarray(scan.resize((size, size), Image.Resampling.BILINEAR)) for scan in scans])[:, None]
    first = first_equal(images)
    assert np.array_equal(first_alike(images, digits.target, first), first)


def test_few_joins_in_sets_without_copies_and_none_between_classes():
    generator = np.random.default_rng(0)
    flat = generator.integers(0, 250, (300, 1, 1, 1)) + generator.integers(0, 3, (300, 1, 32, 32))
    own = np.arange(300)
    assert np.array_equal(first_alike(flat.astype(np.uint8), own * 0, own), own)
    coloured = np.repeat(generator.integers(0, 20, (300, 3, 1)), 32 * 32, axis=2).reshape(300, 3, 32, 32)
    assert np.array_equal(first_alike(coloured.astype(np.uint8), own * 0, own), own)
    gradient = np.add.outer(np.arange(32), np.arange(32)) * 3
    alike = (gradient + generator.integers(0, 3, (300, 1, 32, 32))).astype(np.uint8)
    assert (first_alike(alike, own * 0, own) != own).any()
    assert np.array_equal(first_alike(alike, own, own), own)
    # An object that is in one picture alone.
    alike[150:, :, 8:14, 8:14] += 30
    joined = first_alike(alike, own * 0, own)
    assert np.array_equal(joined >= 150, own >= 150)
    # Copies of copies stay with the first alone.
    assert np.array_equal(joined[joined], joined)


def test_images_shared_by_the_folders_own_splits_are_counted(tmp_path, write_images, caplog):
    for seed, name in enumerate(("a", "b")):
        write_images(tmp_path / "train" / name, 20, seed=seed)
        write_images(tmp_path / "test" / name, 5, seed=10 + seed)
        for file in ("00.png", "01.png", "02.png"):
            shutil.copy(tmp_path / "train" / name / file, tmp_path / "test" / name / f"x{file}")
    data = load_data(tmp_path)
    assert data.splits["test"] == list(range(40, 56))
    assert counts(data)[:2] == [[16, 16], [4, 4]]
    assert shared_images(data, "train", "val") == 0
    shared = {name: shared_images(data, name, "test") for name in ("train", "val")}
    assert sum(shared.values()) == 6
    for name, count in shared.items():
        assert (f"{count} of 16 test images are in {name} too" in caplog.text) == (count > 0)


def test_equal_images_of_two_classes_and_a_class_of_one_image_are_told(tmp_path, write_images, caplog):
    for seed, name in enumerate(("a", "b")):
        write_images(tmp_path / name, 10, seed=seed)
    write_images(tmp_path / "blank", 1, seed=2)
    for index in range(9):
        shutil.copy(tmp_path / "blank" / "00.png", tmp_path / "blank" / f"{index}.png")
    shutil.copy(tmp_path / "a" / "00.png", tmp_path / "b" / "wrong.png")
    assert [split[2] for split in counts(load_data(tmp_path))] == [6, 2, 2]
    assert "10 of 31 images are equal to others" in caplog.text
    assert "1 of them are in another class" in caplog.text
    assert "2 of 6 test images are in train too" in caplog.text


def test_unequal_classes_are_told(tmp_path, write_images, caplog):
    write_images(tmp_path / "cat", 5)
    write_images(tmp_path / "ship", 15, seed=1)
    load_data(tmp_path)
    assert not caplog.records
    write_images(tmp_path / "ship", 45, seed=1)
    load_data(tmp_path)
    assert "45 of 50 images are of class 'ship', 5 of class 'cat'" in caplog.text
    assert "right for 90.0 %" in caplog.text
