"""Each data set of torchvision is read from a small tree that the test writes in torchvision's own layout.

torchvision refuses CIFAR and SVHN files whose MD5 is not that of the published ones. The tests put the MD5 of
their own files in its table, so that the comparison itself runs; nothing else is replaced.
"""

import gzip
import hashlib
import pickle
import shutil
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets

from dnas_ens.data import default_data_root
from dnas_ens.data.sources import load_source
from dnas_ens.errors import UserError

RANDOM = np.random.default_rng(0)
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def random_images(num, *shape):
    return RANDOM.integers(0, 256, (num, *shape), dtype=np.uint8)


def labels_in_turn(num, classes=10):
    return np.arange(num) % classes


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def read_idx(path):
    """The IDX format: two zero bytes, type 8, number of dimensions, big-endian sizes, then bytes."""
    raw = path.read_bytes()
    assert raw[:3] == bytes([0, 0, 8])
    sizes = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def write_idx(folder, num_train=60, num_test=20):
    folder.mkdir(parents=True)
    arrays = {}
    for part, num in (("train", num_train), ("t10k", num_test)):
        arrays[f"{part}-images-idx3-ubyte"] = random_images(num, 28, 28)
        arrays[f"{part}-labels-idx1-ubyte"] = labels_in_turn(num).astype(np.uint8)
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
        (folder / name).write_bytes(header + array.tobytes())
    return arrays


def write_old_pickle(path, content):
    """Protocol 2, with NumPy's dtype as Python 2 wrote it in the published files: align=0, copy=1."""
    new = pickle.dumps(content, protocol=2)
    old = new.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # (False, True) to (0, 1)
    assert (old != new) == (b"numpy" in new)
    path.write_bytes(old)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine for the files in tmp_path / "served"; its address and the paths asked for."""
    served = tmp_path / "served"
    served.mkdir()
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served))) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/", asked
        running.shutdown()
        thread.join()


def test_digits_are_those_of_scikit_learn(tmp_path):
    loaded = load_source("digits", tmp_path)
    reference = load_digits()
    assert loaded.images.shape == (1797, 1, 8, 8)
    assert np.array_equal(loaded.images[:, 0], np.floor(reference.images / 16 * 255 + 0.5))
    assert (loaded.images.min(), loaded.images.max()) == (0, 255)
    assert np.array_equal(loaded.labels, reference.target)
    assert loaded.classes == tuple("0123456789")
    assert not loaded.flip
    assert load_source("digits", tmp_path, image_size=16).images.shape == (1797, 1, 16, 16)


@pytest.mark.parametrize(
    ("name", "folder", "first_class", "flip"),
    [("fashion-mnist", "FashionMNIST", "T-shirt/top", True), ("mnist", "MNIST", "0", False)],
)
def test_idx_files(tmp_path, name, folder, first_class, flip):
    written = write_idx(tmp_path / folder / "raw")
    # What torchvision wrote before 2020 is not opened.
    (tmp_path / folder / "processed").mkdir()
    for file in ("training.pt", "test.pt"):
        (tmp_path / folder / "processed" / file).write_bytes(b"torch.load would fail on this")
    loaded = load_source(name, tmp_path, download=False)
    expected = np.concatenate([written["train-images-idx3-ubyte"], written["t10k-images-idx3-ubyte"]])
    assert np.array_equal(loaded.images, expected[:, None])
    assert loaded.labels.tolist() == [*labels_in_turn(60), *labels_in_turn(20)]
    assert (loaded.num_train, loaded.num_val, loaded.num_test) == (60, 0, 20)
    assert loaded.max_val == 10_000
    assert (loaded.classes[0], len(loaded.classes), loaded.flip) == (first_class, 10, flip)


@pytest.mark.parametrize(
    ("name", "folder", "files", "meta", "labels_key", "classes_key"),
    [
        (
            "cifar10",
            "cifar-10-batches-py",
            [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"],
            "batches.meta",
            "labels",
            "label_names",
        ),
        ("cifar100", "cifar-100-python", ["train", "test"], "meta", "fine_labels", "fine_label_names"),
    ],
)
def test_cifar_files(tmp_path, monkeypatch, name, folder, files, meta, labels_key, classes_key):
    torchvision_class = getattr(datasets, name.upper())
    (tmp_path / folder).mkdir()
    num_classes = int(name.removeprefix("cifar"))
    num = 2 * num_classes  # images of a file
    images, labels = random_images(num * len(files), 3, 32, 32), labels_in_turn(num * len(files), num_classes)
    for index, file in enumerate(files):
        part = slice(num * index, num * (index + 1))
        content = {"data": images[part].reshape(num, 3072), labels_key: labels[part].tolist()}
        write_old_pickle(tmp_path / folder / file, content)
    classes = [f"class {number}" for number in range(num_classes)]
    write_old_pickle(tmp_path / folder / meta, {classes_key: classes})
    checked = [[file, md5(tmp_path / folder / file)] for file in files]
    monkeypatch.setattr(torchvision_class, "train_list", checked[:-1])
    monkeypatch.setattr(torchvision_class, "test_list", checked[-1:])
    monkeypatch.setitem(torchvision_class.meta, "md5", md5(tmp_path / folder / meta))
    loaded = load_source(name, tmp_path, download=False)
    assert np.array_equal(loaded.images, images)
    assert np.array_equal(loaded.labels, labels)
    assert (loaded.num_train, loaded.num_test) == (num * (len(files) - 1), num)
    assert loaded.classes == tuple(classes)
    assert loaded.flip
    resized = load_source(name, tmp_path, image_size=16, download=False).images
    assert resized.shape == (len(images), 3, 16, 16)
    (tmp_path / folder / files[-1]).write_bytes(b"changed after the MD5 was taken")
    with pytest.raises(UserError, match=f"'{name}' is not in"):
        load_source(name, tmp_path, download=False)


def test_svhn_files(tmp_path, monkeypatch):
    images = random_images(80, 3, 32, 32)
    labels = labels_in_turn(80)
    table = dict(datasets.SVHN.split_list)
    for name, part in (("train", slice(0, 60)), ("test", slice(60, 80))):
        path = tmp_path / f"{name}_32x32.mat"
        # The files hold (H, W, C, N), and call the digit 0 ten.
        written = np.where(labels[part] == 0, 10, labels[part]).astype(np.uint8)[:, None]
        savemat(path, {"X": images[part].transpose(2, 3, 1, 0), "y": written})
        table[name] = [table[name][0], path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    loaded = load_source("svhn", tmp_path, download=False)
    assert np.array_equal(loaded.images, images)
    assert np.array_equal(loaded.labels, labels)
    assert (loaded.num_train, loaded.num_test, loaded.flip) == (60, 20, False)
    assert loaded.classes == tuple("0123456789")


def test_absent_files_without_download(tmp_path):
    with pytest.raises(UserError) as caught:
        load_source("cifar100", tmp_path, download=False)
    assert caught.value.cause == f"'cifar100' is not in {tmp_path} and downloading is off."
    for part in (str(tmp_path / "cifar-100-python"), "--data-root", "--data digits"):
        assert part in caught.value.remedy


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "svhn"])
def test_failed_download(tmp_path, monkeypatch, name):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/"  # once closed, nobody listens there
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}cifar.tar.gz")
    table = {part: [f"{address}{row[1]}", *row[1:]] for part, row in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    with pytest.raises(UserError) as caught:
        load_source(name, tmp_path / "root")
    assert f"'{name}' is not in {tmp_path / 'root'} and cannot be downloaded (" in caught.value.cause
    assert "refused" in caught.value.cause
    assert "\n" not in str(caught.value)
    assert "--data-root" in caught.value.remedy
    assert socket.getdefaulttimeout() is None


def test_download_happens_once_and_only_if_files_are_absent(tmp_path, monkeypatch, server):
    address, asked = server
    written = write_idx(tmp_path / "raw")
    resources = []
    for name in IDX_FILES:
        packed = tmp_path / "served" / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / "raw" / name).read_bytes()))
        resources.append((packed.name, md5(packed)))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    loaded = load_source("fashion-mnist", tmp_path / "root")
    assert np.array_equal(loaded.images[:60, 0], written["train-images-idx3-ubyte"])
    assert {path.strip("/").removesuffix(".gz") for path in asked} == set(IDX_FILES)
    asked.clear()
    assert np.array_equal(load_source("fashion-mnist", tmp_path / "root").images, loaded.images)
    assert asked == []


def test_a_data_root_that_cannot_be_written(tmp_path):
    (tmp_path / "root").write_text("a file in its place")
    with pytest.raises(UserError, match="'mnist' is not in"):
        load_source("mnist", tmp_path / "root")


@pytest.mark.parametrize("damage", [0, 3, 1000, "labels of test"])
def test_damaged_files(tmp_path, damage):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw)
    if damage == "labels of test":
        shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    else:
        path = raw / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:damage])
    with pytest.raises(UserError) as caught:
        load_source("fashion-mnist", tmp_path)
    assert f"The files of 'fashion-mnist' at {raw} are damaged" in caught.value.cause
    assert "Delete them" in caught.value.remedy


@pytest.mark.skipif(
    not (default_data_root() / "FashionMNIST" / "raw" / IDX_FILES[0]).exists(),
    reason="needs Fashion-MNIST in the data root; tests download nothing",
)
def test_the_real_fashion_mnist():
    loaded = load_source("fashion-mnist", default_data_root(), download=False)
    raw = default_data_root() / "FashionMNIST" / "raw"
    images = np.concatenate([read_idx(raw / name) for name in IDX_FILES[::2]])
    labels = np.concatenate([read_idx(raw / name) for name in IDX_FILES[1::2]])
    assert np.array_equal(loaded.images[:, 0], images)
    assert np.array_equal(loaded.labels, labels)
    assert (loaded.num_train, loaded.num_test) == (60_000, 10_000)
    assert images[:60_000].mean() / 255 == pytest.approx(0.28604, abs=1e-5)
