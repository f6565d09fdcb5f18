"""Each data set of torchvision is read from a small tree that the test writes in torchvision's own layout.

torchvision compares the MD5 of CIFAR's and SVHN's files: the tests put that of their own files in its table.
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
from torchvision import datasets

from dnas_ens.data.sources import load_source
from dnas_ens.errors import UserError

RANDOM = np.random.default_rng(0)
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def random_images(num, *shape):
    return RANDOM.integers(0, 256, (num, *shape), dtype=np.uint8)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_idx(folder):
    """60 training and 20 test images: two zero bytes, type 8, number of dimensions, big-endian sizes, then bytes."""
    folder.mkdir(parents=True)
    images, labels = random_images(80, 28, 28), (np.arange(80) % 10).astype(np.uint8)
    for name, array in zip(IDX_FILES, (images[:60], labels[:60], images[60:], labels[60:]), strict=True):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
        (folder / name).write_bytes(header + array.tobytes())
    return images[:, None], labels


def write_old_pickle(path, content):
    """Protocol 2, with NumPy's dtype as Python 2 wrote it in the published files: align=0, copy=1."""
    new = pickle.dumps(content, protocol=2)
    old = new.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # (False, True) to (0, 1)
    assert (old != new) == (b"numpy" in new)
    path.write_bytes(old)


@pytest.mark.parametrize(
    ("name", "folder", "first_class", "flip"),
    [("fashion-mnist", "FashionMNIST", "T-shirt/top", True), ("mnist", "MNIST", "0", False)],
)
def test_idx_files(tmp_path, name, folder, first_class, flip):
    images, labels = write_idx(tmp_path / folder / "raw")
    # What torchvision wrote before 2020 is not opened.
    (tmp_path / folder / "processed").mkdir()
    for file in ("training.pt", "test.pt"):
        (tmp_path / folder / "processed" / file).write_bytes(b"torch.load would fail on this")
    loaded = load_source(name, tmp_path, download=False)
    assert np.array_equal(loaded.images, images)
    assert np.array_equal(loaded.labels, labels)
    assert (loaded.num_train, loaded.num_val, loaded.num_test, loaded.max_val) == (60, 0, 20, 10_000)
    assert (loaded.classes[0], len(loaded.classes), loaded.flip) == (first_class, 10, flip)


CIFAR10_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@pytest.mark.parametrize(
    ("name", "folder", "files", "meta", "labels_key", "classes_key"),
    [
        ("cifar10", "cifar-10-batches-py", CIFAR10_FILES, "batches.meta", "labels", "label_names"),
        ("cifar100", "cifar-100-python", ["train", "test"], "meta", "fine_labels", "fine_label_names"),
    ],
)
def test_cifar_files(tmp_path, monkeypatch, name, folder, files, meta, labels_key, classes_key):
    torchvision_class = getattr(datasets, name.upper())
    (tmp_path / folder).mkdir()
    num_classes = int(name.removeprefix("cifar"))
    num = 2 * num_classes  # images of a file
    images, labels = random_images(num * len(files), 3, 32, 32), np.arange(num * len(files)) % num_classes
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
    assert (loaded.num_train, loaded.num_test, loaded.flip) == (num * (len(files) - 1), num, True)
    assert loaded.classes == tuple(classes)
    (tmp_path / folder / files[-1]).write_bytes(b"changed after the MD5 was taken")
    with pytest.raises(UserError, match=f"'{name}' is not in"):
        load_source(name, tmp_path, download=False)


def test_svhn_files(tmp_path, monkeypatch):
    images, labels = random_images(80, 3, 32, 32), np.arange(80) % 10
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


def test_absent_files_without_download_and_a_failed_one(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"'cifar100' is not in {tmp_path} and downloading is off") as caught:
        load_source("cifar100", tmp_path, download=False)
    assert all(part in caught.value.remedy for part in (str(tmp_path / "cifar-100-python"), "--data-root"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/"  # once closed, nobody listens there
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
    with pytest.raises(UserError, match=r"'fashion-mnist' is not in .*/root and cannot be downloaded \(.*refused"):
        load_source("fashion-mnist", tmp_path / "root")
    assert socket.getdefaulttimeout() is None


def test_download_happens_once_and_only_if_files_are_absent(tmp_path, monkeypatch):
    images, _ = write_idx(tmp_path / "raw")
    (tmp_path / "served").mkdir()
    resources, asked = [], []
    for name in IDX_FILES:
        packed = tmp_path / "served" / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / "raw" / name).read_bytes()))
        resources.append((packed.name, md5(packed)))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path.strip("/").removesuffix(".gz"))

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served"))) as server:
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        first = load_source("fashion-mnist", tmp_path / "root")
        asked_first, asked[:] = set(asked), []
        second = load_source("fashion-mnist", tmp_path / "root")
        server.shutdown()
        thread.join()
    assert (asked_first, asked) == (set(IDX_FILES), [])
    for loaded in (first, second):
        assert np.array_equal(loaded.images, images)


@pytest.mark.parametrize("damage", [0, 1000, "labels of test"])
def test_damaged_files(tmp_path, damage):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw)
    if damage == "labels of test":
        shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    else:
        path = raw / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:damage])
    with pytest.raises(UserError, match=f"The files of 'fashion-mnist' at {raw} are damaged"):
        load_source("fashion-mnist", tmp_path)
    with pytest.raises(UserError, match="'mnist' is not in"):
        load_source("mnist", raw / "train-images-idx3-ubyte")  # a file, which cannot be written into
