import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dnas_ens.errors import UserError
from dnas_ens.run import files
from dnas_ens.run.files import (
    as_json,
    load_tensors,
    read_checked,
    read_json,
    remove_leftovers,
    save_tensors,
    write_atomic,
    write_json,
)

ROOT = Path(files.__file__).parents[2]


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
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Cannot write {tmp_path / 'a.json'}: File too large")


def test_write_atomic_makes_folders_and_honours_the_umask(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomic(path, b"x")
    (tmp_path / "plain.txt").write_bytes(b"x")
    assert path.read_bytes() == b"x"
    assert path.stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
    with pytest.raises(UserError, match="Cannot write"):
        write_atomic(path / "below-a-file.txt", b"x")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_content_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int):
        calls.append(("fsync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path):
        calls.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomic(tmp_path / "a", b"new")
    (first, temporary), *rest = calls
    assert first == "fsync"
    assert Path(temporary).parent == tmp_path
    assert rest == [("replace", str(tmp_path / "a")), ("fsync", str(tmp_path))]


def test_json_keeps_order_and_plain_values(tmp_path):
    path = tmp_path / "deep" / "a.json"
    obj = {"z": (1, 2.5), "a": Path("x/y"), 3: np.float64(0.1), "é": None}
    write_json(path, obj)
    assert list(read_json(path).items()) == [("z", [1, 2.5]), ("a", "x/y"), ("3", 0.1), ("é", None)]
    assert as_json(obj) == read_json(path)
    assert path.read_text("utf-8").startswith('{\n  "z": [\n')
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("nan")])
def test_json_refuses_nan_and_leaves_the_old_file(tmp_path, number: Any):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {"loss": [number]})
    with pytest.raises(ValueError, match="JSON"):
        as_json([number])
    assert read_json(tmp_path / "a.json") == 1
    with pytest.raises(TypeError, match="object"):
        write_json(tmp_path / "a.json", object())


@pytest.mark.parametrize("content", [b"", b"{", b"[NaN]", b"\xff\xfe\xfa", b"[" * 100_000])
def test_malformed_json_is_a_users_error(tmp_path, content: bytes):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="No such file"):
        read_json(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"Cannot read .*a\.json"):
        read_json(path)


def test_tensors_round_trip(tmp_path):
    weight = torch.randn(4, 3)
    tensors = {"weight": weight, "tied": weight, "transposed": weight.T, "half": weight.bfloat16()}
    save_tensors(tmp_path / "a.safetensors", tensors, metadata={"kind": "supernet"})
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"kind": "supernet"}


@pytest.mark.parametrize("content", [b"", b"abc", (2**40).to_bytes(8, "little") + b"{}"])
def test_unreadable_tensors_are_a_users_error(tmp_path, content: bytes):
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"Cannot read .*a\.safetensors"):
        load_tensors(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"Cannot read .*a\.safetensors"):
        load_tensors(path)


def test_threads_write_one_file_without_mixing(tmp_path):
    path = tmp_path / "a.json"
    contents = [[number] * 2000 for number in range(4)]
    threads = [threading.Thread(target=write_json, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_json(path) in contents
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("text", "misfit"),
    [
        ('{"name": "a", "sizes": [1, 2], "of": {"part": 1.5}, "more": null}', ""),
        ("[]", "it is not an object"),
        ('{"name": "a", "sizes": []}', "it has no 'of'"),
        ('{"name": 5, "sizes": [], "of": {"part": 1}}', "name is a int"),
        ('{"name": "a", "sizes": 5, "of": {"part": 1}}', "sizes is not a list"),
        ('{"name": "a", "sizes": [1, true], "of": {"part": 1}}', r"sizes\[1\] is a bool"),
        ('{"name": "a", "sizes": [], "of": {}}', "of has no 'part'"),
        ('{"name": "a", "sizes": [], "of": {"part": "1"}}', "of.part is a str"),
    ],
)
def test_a_file_of_another_form_is_told_by_place(tmp_path, text: str, misfit: str):
    (tmp_path / "file.json").write_text(text)
    form = {"name": str, "sizes": [int], "of": {"part": (int, float)}}
    if misfit:
        with pytest.raises(UserError, match=misfit):
            read_checked(tmp_path / "file.json", form)
    else:
        assert read_checked(tmp_path / "file.json", form)["sizes"] == [1, 2]


def test_only_our_own_temporary_files_are_leftovers(tmp_path):
    ours = [tmp_path / ".a.json.0123abcd.tmp", tmp_path / "deep" / "down" / ".b.0123abcd.tmp"]
    others = [
        tmp_path / "a.0123abcd.tmp",
        tmp_path / ".a.tmp",
        tmp_path / ".a.0123abcde.tmp",
        tmp_path / ".a.json",
    ]
    for file in (*ours, *others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    remove_leftovers(tmp_path)
    assert not any(file.exists() for file in ours)
    assert all(file.exists() for file in others)
