import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.data import decoded, folder, load_data


@pytest.fixture
def photos(tmp_path):
    """Colours, greys and greys of 12 bits; one side is not the common one."""
    generator = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(8):
            shape = (20, 16, 3) if index % 2 else (16, 16)
            pixels = generator.integers(0, 255, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"photos/{label}/{index}.png")
    deep = generator.integers(0, 4096, (16, 16)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "photos/a/deep.png")
    return tmp_path / "photos"


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """The files that are decoded; everything is kept."""
    monkeypatch.setenv("DNAS_ENS_DATA", str(tmp_path / "default"))
    monkeypatch.setattr(decoded, "LEAST_SECONDS", 0.0)
    found, decode = [], folder.decode_or_error

    def noted(path, *, image_size):
        found.append(path.rsplit("/", 2)[-2] + "/" + path.rsplit("/", 1)[-1])
        return decode(path, image_size=image_size)

    monkeypatch.setattr(folder, "decode_or_error", noted)
    return found


def same(one, other):
    parts = zip(one.named_splits().values(), other.named_splits().values(), strict=True)
    return one.fingerprint == other.fingerprint and all(torch.equal(a.images, b.images) for a, b in parts)


def test_pictures_are_decoded_once_and_again_where_a_file_has_changed(photos, tmp_path, counted):
    root = tmp_path / "root"
    first = load_data(photos, data_root=root)
    assert len(counted) == 17
    assert same(load_data(photos), first)  # another root knows nothing of them
    counted.clear()
    again = load_data(photos, data_root=root)
    assert not counted
    assert same(again, first)
    assert again.deep_bits == first.deep_bits == 12
    # Another side is another file.
    load_data(photos, data_root=root, image_size=8)
    assert len(counted) == 17
    counted.clear()
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(photos / "b/0.png")
    changed = load_data(photos, data_root=root)
    assert counted == ["b/0.png"]
    assert changed.fingerprint != first.fingerprint
    counted.clear()
    assert same(load_data(photos, data_root=root), changed)
    assert not counted


def test_a_damaged_file_of_them_is_not_used(photos, tmp_path, counted):
    root = tmp_path / "root"
    first = load_data(photos, data_root=root)
    (file,) = (root / "decoded").iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    counted.clear()
    assert same(load_data(photos, data_root=root), first)
    assert len(counted) == 17


def test_nothing_is_kept_of_what_is_read_quickly_or_cannot_be_written(photos, tmp_path, counted, monkeypatch):
    (tmp_path / "a file").write_text("")
    load_data(photos, data_root=tmp_path / "a file")
    monkeypatch.setattr(decoded, "LEAST_SECONDS", 60.0)
    load_data(photos, data_root=tmp_path / "root")
    assert not (tmp_path / "root").exists()
