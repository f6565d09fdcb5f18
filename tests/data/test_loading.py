from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from dnas_ens.data import ImageData, default_data_root, load_data
from dnas_ens.errors import UserError

FASHION_FILES = default_data_root() / "FashionMNIST" / "raw"


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data()


def test_digits_splits_are_of_scikit_learns_arrays(digits: ImageData) -> None:
    reference = load_digits()
    everything = sorted(chain(*digits.splits.values()))
    assert everything == list(range(1797))
    counts = np.bincount(reference.target)
    for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        split = getattr(digits, name)
        indices = digits.splits[name]
        assert np.array_equal(split.images[:, 0].numpy(), np.rint(reference.images[indices] * 255 / 16))
        assert np.array_equal(split.labels.numpy(), reference.target[indices])
        assert np.abs(split.labels.bincount().numpy() - share * counts).max() <= 1
        assert abs(len(split) - share * 1797) <= 5
    assert (digits.name, digits.image_size, digits.num_channels, digits.flip) == ("digits", 8, 1, False)


def test_normalisation_is_measured_on_the_training_images_only(digits: ImageData) -> None:
    training = np.rint(load_digits().images[digits.splits["train"]] * 255 / 16) / 255
    np.testing.assert_allclose(digits.mean, training.mean(), rtol=1e-12)
    np.testing.assert_allclose(digits.std, training.std(), rtol=1e-9)


def test_same_seed_same_data_another_seed_other_splits(digits: ImageData) -> None:
    assert load_data("digits", seed=0).fingerprint == digits.fingerprint
    other = load_data("digits", seed=1)
    assert other.fingerprint != digits.fingerprint
    assert all(other.splits[name] != digits.splits[name] for name in digits.splits)


def test_limit_train_leaves_val_and_test_alone(digits: ImageData) -> None:
    limited = load_data("digits", limit_train=100)
    assert len(limited.train) == 100
    assert set(limited.splits["train"]) < set(digits.splits["train"])
    share = digits.train.labels.bincount() * 100 / len(digits.train)
    assert (limited.train.labels.bincount() - share).abs().max() < 1
    for name in ("val", "test"):
        assert limited.splits[name] == digits.splits[name]
        assert torch.equal(getattr(limited, name).images, getattr(digits, name).images)
    assert limited.fingerprint == digits.limited(100, seed=0).fingerprint != digits.fingerprint


def test_image_data_comes_back_as_it_is(digits: ImageData) -> None:
    assert load_data(digits) is digits
    assert load_data(digits, image_size=8) is digits
    assert load_data(digits, limit_train=50).fingerprint == load_data("digits", limit_train=50).fingerprint
    with pytest.raises(UserError, match="loaded at 8 pixels, but 16"):
        load_data(digits, image_size=16)


def test_image_size_of_a_named_data_set() -> None:
    data = load_data("digits", image_size=12)
    assert data.image_size == 12
    assert data.splits == load_data("digits").splits


def test_torch_dataset() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)
    data = load_data(TensorDataset(images, torch.arange(50) % 2))
    assert [len(split) for split in (data.train, data.val, data.test)] == [30, 10, 10]
    assert torch.equal(data.test.images, images[data.splits["test"]])


def test_folder_by_path_by_text_and_by_name_below_the_data_root(
    tmp_path: Path, write_images, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, 10)
    data = load_data(tmp_path / "pets")
    assert [len(split) for split in (data.train, data.val, data.test)] == [12, 4, 4]
    assert (data.name, data.classes, data.flip) == ("pets", ("cat", "dog"), True)
    assert load_data(str(tmp_path / "pets")).fingerprint == data.fingerprint
    assert load_data("pets", data_root=tmp_path).fingerprint == data.fingerprint
    monkeypatch.setenv("DNAS_ENS_DATA", str(tmp_path))
    assert load_data("pets").fingerprint == data.fingerprint
    monkeypatch.delenv("DNAS_ENS_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data("~/pets").fingerprint == data.fingerprint
    monkeypatch.chdir(tmp_path)
    assert load_data("pets/", data_root=tmp_path / "nowhere").fingerprint == data.fingerprint


def test_folder_with_its_own_test(tmp_path: Path, write_images) -> None:
    pixels = [
        write_images(tmp_path / part / name, num, seed=index)
        for index, (part, name, num) in enumerate(
            [("train", "a", 20), ("train", "b", 10), ("test", "a", 3), ("test", "b", 4)]
        )
    ]
    data = load_data(tmp_path)
    assert data.splits["test"] == list(range(30, 37))
    assert np.array_equal(data.test.images[:, 0].numpy(), np.concatenate(pixels[2:]))
    assert data.val.labels.bincount().tolist() == [4, 2]
    assert data.train.labels.bincount().tolist() == [16, 8]


def test_folder_skips_bad_images_only_on_request(tmp_path: Path, write_images) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 10)
    bad = tmp_path / "cat" / "99.png"
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 21 images cannot be read"):
        load_data(tmp_path)
    data = load_data(tmp_path, skip_bad_images=True)
    assert data.skipped == (str(bad),)
    assert data.describe()["skipped"] == [str(bad)]


def test_tiny_class_of_a_folder(tmp_path: Path, write_images) -> None:
    write_images(tmp_path / "cat", 10)
    write_images(tmp_path / "dog", 2)
    with pytest.raises(UserError, match=r"class 'dog' \(2\)"):
        load_data(tmp_path)


def test_default_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DNAS_ENS_DATA", "")
    assert default_data_root() == tmp_path / ".cache" / "dnas_ens" / "data"
    monkeypatch.setenv("DNAS_ENS_DATA", "~/elsewhere")
    assert default_data_root() == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("fashion_mnist", "fashion-mnist"), ("CIFAR-10", "cifar10"), ("digit", "digits"), ("MINST", "mnist")],
)
def test_unknown_name_lists_the_known_ones_nearest_first(tmp_path: Path, typed: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        load_data(typed, data_root=tmp_path)
    assert (
        caught.value.cause
        == f"There is no data set {typed!r}, nor a folder of that name here or in {tmp_path}."
    )
    assert caught.value.remedy.startswith(f"Give one of {nearest}, ")
    assert all(name in caught.value.remedy for name in ("digits", "mnist", "cifar10", "cifar100", "svhn"))
    assert caught.value.remedy.endswith("or a path to a folder of images.")


@pytest.mark.parametrize("path", [Path("nowhere"), "some/where"])
def test_missing_path(tmp_path: Path, path: str | Path) -> None:
    with pytest.raises(UserError) as caught:
        load_data(path, data_root=tmp_path)
    assert caught.value.cause == f"There is no folder {path}, nor {tmp_path / path}."
    assert caught.value.remedy == "Check the path given as --data."


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"data": ""}, "--data is ''"),
        ({"image_size": 0}, "The image size is 0"),
        ({"seed": -1}, "The seed is -1"),
        ({"limit_train": 9}, "The limit is 9 training images, of 1079 in 10 classes"),
        ({"limit_train": 1080}, "The limit is 1080"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], cause: str) -> None:
    with pytest.raises(UserError) as caught:
        load_data(**arguments)
    assert cause in caught.value.cause
    assert caught.value.remedy


@pytest.mark.skipif(
    not FASHION_FILES.exists(), reason="needs Fashion-MNIST in the data root; tests download nothing"
)
def test_the_real_fashion_mnist() -> None:
    data = load_data("fashion-mnist", download=False)
    assert [len(split) for split in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    assert data.splits["test"] == list(range(60_000, 70_000))
    for split in (data.train, data.val, data.test):
        assert len(set(split.labels.bincount().tolist())) == 1
    np.testing.assert_allclose(data.mean[0], data.train.images.numpy().mean() / 255, rtol=1e-9)
    np.testing.assert_allclose(data.std[0], data.train.images.numpy().std() / 255, rtol=1e-9)


def test_unequal_classes_are_told(tmp_path: Path, write_images, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "cat", 10)
    write_images(tmp_path / "ship", 30, seed=1)
    load_data(tmp_path)
    assert not caplog.records
    write_images(tmp_path / "ship", 90, seed=1)
    load_data(tmp_path)
    assert "90 of 100 images are of class 'ship', 10 of class 'cat'" in caplog.text
    assert "right for 90.0 %" in caplog.text
