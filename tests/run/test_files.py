import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dnas_ens.errors import UserError
from dnas_ens.run.files import (
    DIGEST,
    as_json,
    load_tensors,
    read_checked,
    read_json,
    remove_leftovers,
    save_tensors,
    write_atomic,
    write_json,
)

FULL_DISK = """
import resource, sys
from pathlib import Path
from dnas_ens.errors import UserError
from dnas_ens.run.files import read_json, write_atomic

path = Path(sys.argv[1])
write_atomic(path, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_atomic(path, b"new" * 1000)
except UserError as error:
    print(error.cause)
assert path.read_bytes() == b"old"
assert list(path.parent.iterdir()) == [path]
assert "torch" not in sys.modules
"""


def test_a_full_disk_is_told_and_the_old_file_survives(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Cannot write {tmp_path / 'a.json'}: File too large")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_content_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor):
        calls.append(("fsync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_replace(source, target):
        calls.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    path = tmp_path / "deep" / "a"
    write_atomic(path, b"new")
    (first, temporary), *rest = calls
    assert (first, Path(temporary).parent) == ("fsync", path.parent)
    assert rest == [("replace", str(path)), ("fsync", str(path.parent))]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UserError, match="Cannot write"):
        write_atomic(path / "below-a-file", b"x")


def test_json_keeps_order_and_plain_values_and_refuses_nan(tmp_path):
    path = tmp_path / "deep" / "a.json"
    obj = {"z": (1, 2.5), "a": Path("x/y"), 3: np.float64(0.1), "é": None}
    write_json(path, obj)
    assert list(read_json(path).items()) == [("z", [1, 2.5]), ("a", "x/y"), ("3", 0.1), ("é", None)]
    assert as_json(obj) == read_json(path)
    assert path.read_text("utf-8").startswith('{\n  "z": [\n')
    # The name of a file that is not UTF-8, as Python has it.
    write_json(path, ["caf\udce9", "é"])
    assert read_json(path) == ["caf\udce9", "é"]
    write_json(path, obj)
    for number in (float("inf"), np.float32("nan")):
        with pytest.raises(ValueError, match=r"a\.json"):
            write_json(path, {"loss": [number]})
        with pytest.raises(ValueError, match="JSON"):
            as_json([number])
    with pytest.raises(TypeError, match="object"):
        write_json(path, object())
    assert as_json(obj) == read_json(path)
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("content", [None, b"", b"[NaN]", b"\xff\xfe\xfa", b"[" * 100_000])
def test_malformed_files_are_a_users_error(tmp_path, content):
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    for read in (read_json, load_tensors):
        with pytest.raises(UserError, match=f"Cannot read {path}"):
            read(path)


def test_tensors_round_trip(tmp_path):
    weight = torch.randn(4, 3)
    tensors = {"weight": weight, "tied": weight, "transposed": weight.T, "half": weight.bfloat16()}
    save_tensors(tmp_path / "a.safetensors", tensors, metadata={"kind": "supernet"})
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize(
    ("text", "misfit"),
    [
        ('{"name": "a", "sizes": [1, 2], "of": {"part": 1.5}, "more": null}', ""),
        ("[]", "it is not an object"),
        ('{"name": "a", "sizes": []}', "it has no 'of'"),
        ('{"name": "a", "sizes": 5, "of": {"part": 1}}', "sizes is not a list"),
        ('{"name": "a", "sizes": [1, true], "of": {"part": 1}}', r"sizes\[1\] is a bool"),
        ('{"name": "a", "sizes": [], "of": {"part": "1"}}', "of.part is a str"),
    ],
)
def test_a_file_of_another_form_is_told_by_place(tmp_path, text, misfit):
    (tmp_path / "file.json").write_text(text)
    form = {"name": str, "sizes": [int], "of": {"part": (int, float)}}
    if misfit:
        with pytest.raises(UserError, match=misfit):
            read_checked(tmp_path / "file.json", form)
    else:
        assert read_checked(tmp_path / "file.json", form)["sizes"] == [1, 2]


def test_only_our_own_temporary_files_are_leftovers(tmp_path):
    ours = [tmp_path / ".a.json.0123abcd.tmp", tmp_path / "deep" / "down" / ".b.0123abcd.tmp"]
    others = [tmp_path / name for name in ("a.0123abcd.tmp", ".a.tmp", ".a.0123abcde.tmp", ".a.json")]
    for file in (*ours, *others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    remove_leftovers(tmp_path)
    assert not any(file.exists() for file in ours)
    assert all(file.exists() for file in others)


def test_no_flipped_bit_of_a_json_file_goes_unseen(tmp_path):
    value = {"temperature": 1.25, "members": [{"file": "a", "weights": [0.5, 0.5]}], "none": None}
    path = tmp_path / "a.json"
    write_json(path, value)
    content = path.read_bytes()
    shortest = '{"members":[{"file":"a","weights":[0.5,0.5]}],"none":null,"temperature":1.25}'
    assert json.loads(content)[DIGEST] == hashlib.sha256(shortest.encode()).hexdigest()
    told = 0
    for position in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert read_json(path) == value
        except UserError:
            told += 1
    # All but those in the name of the field itself, and of spaces that become others.
    assert told > 8 * (len(content) - len(DIGEST) - 2) - content.count(b" ") - content.count(b"\n")


def test_files_written_by_hand_need_no_hash_and_edited_ones_say_so(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    write_json(path, {"a": 1, "b": 2})
    path.write_text(path.read_text().replace(": 1", ": 3"))
    with pytest.raises(UserError, match=r"a\.json is not as it was written") as told:
        read_json(path)
    assert f"take its field {DIGEST} out" in told.value.remedy
    assert read_json(path, by_hand=True) == {"a": 3, "b": 2}
    content = json.loads(path.read_text())
    del content[DIGEST]
    path.write_text(json.dumps(content))
    assert read_json(path) == {"a": 3, "b": 2}
    # Another layout of the same content is no change.
    write_json(path, {"a": 1, "b": [2.5, "ü"]})
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_json(path) == {"a": 1, "b": [2.5, "ü"]}


def test_no_flipped_bit_of_tensors_goes_unseen(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}
    save_tensors(path, tensors, metadata={"format": "pt"})
    content = path.read_bytes()
    for position in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = load_tensors(path)
        except UserError:
            continue
        # Not told where only the name of the hash, or of the text that holds it, was hit.
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
