from pathlib import Path

import numpy as np
import pytest

from dnas_ens.data.cifar10_c import Cifar10C
from dnas_ens.errors import UserError

NUM_IMAGES = 20


@pytest.fixture
def cifar10(make_data):
    """A data set in the form of CIFAR-10 with 20 test images."""
    return make_data(name="cifar10", channels=3, size=32, classes=10, num_test=NUM_IMAGES)


def write(folder, labels, names=("fog", "gaussian_noise", "spatter")):
    """A folder as CIFAR-10-C.tar unpacks it: uint8 (5 N, 32, 32, 3), severity 1 first; labels five times."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for name in names:
        arrays[name] = rng.integers(0, 256, (5 * len(labels), 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{name}.npy", arrays[name])
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return arrays


def test_blocks_are_severities_and_pixels_come_channels_first(cifar10, tmp_path):
    arrays = write(tmp_path / "CIFAR-10-C", cifar10.test.labels.numpy())
    public = Cifar10C(Path("CIFAR-10-C"), cifar10, data_root=tmp_path)
    # In the paper's order, without those that its mean is not over.
    assert public.names == ("gaussian_noise", "fog")
    stored = arrays["fog"][3 * NUM_IMAGES : 4 * NUM_IMAGES]
    assert np.array_equal(public.images("fog", 4).numpy(), stored.transpose(0, 3, 1, 2))


def test_another_test_split_and_damage_are_told(cifar10, digits, tmp_path):
    folder, labels = tmp_path / "c", cifar10.test.labels.numpy()

    def refused(words, name=None, severity=1, data=cifar10):
        with pytest.raises(UserError, match=words):
            Cifar10C(folder, data, data_root=tmp_path).images(name, severity)

    refused("no folder")
    for wrong in (labels[::-1], labels[:-5]):
        write(folder, wrong)
        refused("not those of the 20 test images of cifar10")
    write(folder, labels)
    refused("not those of the 359 test images of digits", data=digits)
    np.save(folder / "fog.npy", np.zeros((5 * NUM_IMAGES, 16, 16, 3), dtype=np.uint8))
    refused(r"fog\.npy: it holds uint8 of shape", "fog")
    (folder / "gaussian_noise.npy").write_bytes((folder / "gaussian_noise.npy").read_bytes()[:1000])
    refused("gaussian_noise", "gaussian_noise")
    refused("severity is 6", "fog", 6)
    (folder / "labels.npy").unlink()
    refused(r"labels\.npy")
    for file in folder.iterdir():
        file.unlink()
    refused("no corruption")
