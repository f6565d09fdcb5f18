import os

import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.data import decoded, folder, load_data
from dnas_ens.errors import UserError


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


def test_a_file_that_changes_or_goes_while_others_are_read(photos, tmp_path, counted, monkeypatch):
    load_data(photos, data_root=tmp_path / "root")
    (photos / "b/1.png").unlink()
    (photos / "b/1.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"1 of 17 images cannot be read: .*b/1\.png"):
        load_data(photos, data_root=tmp_path / "root")
    (photos / "b/1.png").unlink()
    decode_all = folder._decode_all

    def meanwhile(*arguments, **options):
        found = decode_all(*arguments, **options)
        Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(photos / "b/0.png")
        (photos / "b/2.png").unlink()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(folder, "_decode_all", meanwhile)
        load_data(photos, data_root=tmp_path / "new")
    counted.clear()
    load_data(photos, data_root=tmp_path / "new")
    assert counted == ["b/0.png"]


def test_what_was_decoded_otherwise_is_not_used(photos, tmp_path, counted, monkeypatch):
    for number in (1, 2):
        monkeypatch.setattr(decoded, "DECODING", number)
        counted.clear()
        load_data(photos, data_root=tmp_path / "root")
        assert len(counted) == 17
    assert len(list((tmp_path / "root/decoded").iterdir())) == 2


def test_names_that_are_not_utf8(photos, tmp_path, counted):
    (photos / "a/0.png").rename(photos / "a/0\udce9.png")
    (photos / "a").rename(photos / "caf\udce9")
    folder = photos.rename(tmp_path / "photos\udce9")
    first = load_data(folder, data_root=tmp_path / "root")
    # What goes into reports is text.
    assert (first.name, first.classes) == (r"photos\xe9", ("b", r"caf\xe9"))
    counted.clear()
    assert same(load_data(folder, data_root=tmp_path / "root"), first)
    assert not counted


def test_what_is_damaged_is_decoded_again(photos, tmp_path, counted):
    root = tmp_path / "root"
    first = load_data(photos, data_root=root)
    index, pixels = sorted((root / "decoded").iterdir())
    # Every picture has a place of the size of a coloured one.
    content = bytearray(pixels.read_bytes())
    assert len(content) == 17 * 3 * 16 * 16
    content[2 * 3 * 16 * 16] ^= 1
    pixels.write_bytes(content)
    counted.clear()
    assert same(load_data(photos, data_root=root), first)
    assert counted == ["a/2.png"]
    counted.clear()
    assert same(load_data(photos, data_root=root), first)
    assert not counted
    for file, damaged in ((pixels, b""), (pixels, content[:100]), (index, b"{"), (index, b"[]")):
        file.write_bytes(damaged)
        counted.clear()
        assert same(load_data(photos, data_root=root), first)
        assert len(counted) == 17


def test_what_a_full_disk_does_not_hold_is_held_in_memory(photos, tmp_path, counted, monkeypatch):
    first = load_data(photos, data_root=tmp_path / "other")
    write, written = os.pwrite, []

    def full(file, data, place):
        written.append(place)
        return write(file, data, place) if len(written) < 5 else 7

    monkeypatch.setattr(os, "pwrite", full)
    assert same(load_data(photos, data_root=tmp_path / "root"), first)
    assert not any((tmp_path / "root/decoded").iterdir())
    # Also where most are known, and the disk is full when they are written again.
    monkeypatch.setattr(os, "pwrite", write)
    load_data(photos, data_root=tmp_path / "root")
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(photos / "b/0.png")
    changed = load_data(photos, data_root=tmp_path / "another")
    written.clear()
    monkeypatch.setattr(os, "pwrite", full)
    assert same(load_data(photos, data_root=tmp_path / "root"), changed)


def test_nothing_is_kept_of_what_is_read_quickly_or_cannot_be_written(photos, tmp_path, counted, monkeypatch):
    (tmp_path / "a file").write_text("")
    load_data(photos, data_root=tmp_path / "a file")
    monkeypatch.setattr(decoded, "LEAST_SECONDS", 60.0)
    load_data(photos, data_root=tmp_path / "root")
    assert not any(path.is_file() for path in (tmp_path / "root").rglob("*"))
