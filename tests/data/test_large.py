"""Sets of images that lie in files: in little memory, and equal to those in memory."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.data import Split, large, load_data
from dnas_ens.errors import UserError
from dnas_ens.training.workers import worker_pool

# 1,000 pictures of 128 pixels are 49 MB. Shared maps of files do not count as a process's data.
LIMITED = """
import resource, sys
from dnas_ens.data import iterate_batches, large, load_data
photos, root, small = sys.argv[1:]
large.MOST_IN_MEMORY = int(sys.argv.pop()) if len(sys.argv) > 4 else 2**20
load_data(small, data_root=root, image_size=128)  # threads and their stacks are there
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
limit = 1024 * used + 64 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
data = load_data(photos, data_root=root, image_size=128)
weights, architecture = data.search_halves(seed=0)
total = sum(int((255 * images).sum().round()) for images, _ in iterate_batches(weights, 16))
print(data.fingerprint, len(weights) + len(architecture), total)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """500 pictures in each of two classes, each of its own colour, and a few."""
    folder = tmp_path_factory.mktemp("large")
    for index in range(1000):
        colour = (index % 250, index // 250, 100)
        places = ["photos"] + ["small"] * (index % 100 < 5)
        for place in places:
            file = folder / place / "ab"[index % 2] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (128, 128), colour).save(file, compress_level=1)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_folder_larger_than_memory_is_loaded_and_read(photos, tmp_path):
    environment = os.environ | {"DNAS_ENS_DATA": str(tmp_path)}
    command = [sys.executable, "-c", LIMITED, str(photos / "photos"), str(tmp_path / "root"), str(photos / "small")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    data = load_data(photos / "photos", data_root=tmp_path / "other", image_size=128)
    weights, _ = data.search_halves(seed=0)
    assert found.stdout.split() == [data.fingerprint, "600", str(int(weights.images.sum()))]
    # In memory it does not go.
    plain = subprocess.run([*command, str(2**40)], env=environment, capture_output=True, text=True, check=False)
    assert plain.returncode != 0


def test_workers_read_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DNAS_ENS_DATA", str(tmp_path))
    monkeypatch.setattr(large, "MOST_IN_MEMORY", 1000)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    split = Split(images, torch.arange(40))
    chosen = split.subset([5, 3, 3, 39])
    assert torch.equal(chosen.images, images[[5, 3, 3, 39]])
    assert not chosen.images.is_shared()
    chosen = split.subset(range(39, 0, -1))
    assert torch.equal(chosen.images, images[1:].flip(0))
    assert chosen.images.is_shared()
    # A copy for another process copies nothing.
    assert copy.deepcopy(chosen).images.data_ptr() == chosen.images.data_ptr()
    assert copy.deepcopy(split).images.data_ptr() != split.images.data_ptr()
    with worker_pool(1) as pool:
        pool.submit(_blacken, chosen.images).result()
    assert not chosen.images.any()
    # It has no name, and so goes with the processes.
    assert not any(tmp_path.iterdir())


def _blacken(images):
    images.zero_()


def test_no_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "MOST_IN_MEMORY", 1000)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("DNAS_ENS_DATA", str(tmp_path / "a file"))
    with pytest.raises(UserError, match="find no room"):
        large.room_for(2, 3, 64, 64)
    monkeypatch.setenv("DNAS_ENS_DATA", str(tmp_path))
    with pytest.raises(UserError, match="GiB find no room"):
        large.room_for(2**50)
