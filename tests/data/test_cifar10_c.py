from pathlib import Path

import numpy as np
import pytest
import torch

from dnas_ens.data import ImageData, Split
from dnas_ens.data.cifar10_c import PUBLISHED_NAMES, Cifar10C
from dnas_ens.errors import UserError

NUM_IMAGES = 20


@pytest.fixture
def cifar10():
    """A data set in the form of CIFAR-10 with 20 test images."""

    def split(count):
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        return Split(images, (7 * torch.arange(count) + 3) % 10)

    return ImageData.from_splits(
        "cifar10",
        tuple("abcdefghij"),
        train=split(30),
        val=split(20),
        test=split(NUM_IMAGES),
        flip=True,
    )


def write(folder, labels, names=("fog", "gaussian_noise", "spatter")):
    """A folder as CIFAR-10-C.tar unpacks it: uint8 (5 N, 32, 32, 3), severity 1 first; labels five times."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for name in names:
        arrays[name] = rng.integers(0, 256, (5 * len(labels), 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{name}.npy", arrays[name])
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return arrays


def test_blocks_are_severities_and_pixels_come_channels_first(cifar10, tmp_path):
    arrays = write(tmp_path / "CIFAR-10-C", cifar10.test.labels.numpy())
    public = Cifar10C(tmp_path / "CIFAR-10-C", cifar10)
    # In the paper's order, without those that its mean is not over.
    assert public.names == ("gaussian_noise", "fog")
    split = public.split("fog", 4)
    assert torch.equal(split.labels, cifar10.test.labels)
    assert split.images.shape == (NUM_IMAGES, 3, 32, 32)
    for image, channel, row, column in ((0, 0, 0, 0), (5, 2, 3, 9), (19, 1, 31, 30)):
        stored = arrays["fog"][3 * NUM_IMAGES + image, row, column, channel]
        assert int(split.images[image, channel, row, column]) == stored


def test_fifteen_corruptions_as_published():
    assert len(set(PUBLISHED_NAMES)) == 15


def test_a_folder_below_the_data_root_is_found(cifar10, tmp_path):
    write(tmp_path / "CIFAR-10-C", cifar10.test.labels.numpy())
    assert Cifar10C(Path("CIFAR-10-C"), cifar10, data_root=tmp_path).folder == tmp_path / "CIFAR-10-C"
    with pytest.raises(UserError, match="no folder"):
        Cifar10C(Path("elsewhere"), cifar10, data_root=tmp_path)


@pytest.mark.parametrize("wrong", ["order", "number", "digits"])
def test_another_test_split_is_refused(cifar10, digits, tmp_path, wrong):
    data = digits if wrong == "digits" else cifar10
    labels = data.test.labels.numpy()
    write(tmp_path / "c", {"order": labels[::-1], "number": labels[:-5], "digits": labels}[wrong])
    with pytest.raises(UserError, match=f"not those of the {len(labels)} test images of {data.name}") as caught:
        Cifar10C(tmp_path / "c", data)
    assert "--data cifar10" in caught.value.remedy


def test_damage_is_told(cifar10, tmp_path):
    folder = tmp_path / "c"
    write(folder, cifar10.test.labels.numpy())
    np.save(folder / "fog.npy", np.zeros((5 * NUM_IMAGES, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"fog\.npy: it holds uint8 of shape"):
        Cifar10C(folder, cifar10).split("fog", 1)
    whole = (folder / "gaussian_noise.npy").read_bytes()
    (folder / "gaussian_noise.npy").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="gaussian_noise"):
        Cifar10C(folder, cifar10).split("gaussian_noise", 1)
    with pytest.raises(UserError, match="severity is 6"):
        Cifar10C(folder, cifar10).split("fog", 6)
    (folder / "labels.npy").unlink()
    with pytest.raises(UserError, match=r"labels\.npy"):
        Cifar10C(folder, cifar10)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no corruption"):
        Cifar10C(folder, cifar10)
