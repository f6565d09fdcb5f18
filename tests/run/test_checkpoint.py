"""Saved states come back bit-equal, damaged ones are passed over, and a killed process leaves a valid one."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dnas_ens.errors import DivergedError, UserError
from dnas_ens.run import checkpoint
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import tensors_to_bytes

DTYPES = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
]


def bits(value):
    """A state in which equal means bit-equal and of the same types; dicts in their order, 1 apart from "1"."""
    if isinstance(value, torch.Tensor):
        flat = value.flatten().clone(memory_format=torch.contiguous_format)
        return value.dtype, value.shape, flat.view(torch.uint8).tolist() if len(flat) else []
    if isinstance(value, dict):
        return [(bits(key), bits(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return type(value)(map(bits, value))
    is_number = isinstance(value, float) and value == value
    return type(value), struct.pack("d", value) if is_number else str(value)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = 1 if dtype == torch.bool else torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    value = raw[..., 0] > 127 if dtype == torch.bool else raw.view(dtype).reshape(shape)
    how = draw(st.sampled_from(["plain", "transposed", "expanded", "sliced"]))
    if how == "transposed":
        value = value.permute(tuple(reversed(range(value.ndim))))
    if how == "expanded":
        value = value.unsqueeze(0).expand(2, *value.shape)
    return value[::2] if how == "sliced" and value.ndim else value


SHARED = torch.arange(6.0)
STATES = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensors()),
        st.sampled_from([SHARED, SHARED[2:], SHARED.view(2, 3).T]),
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def reloaded(folder, state):
    CheckpointStore(folder).save(7, state)
    step, found = CheckpointStore(folder).load_newest()
    assert step == 7
    return found


@settings(max_examples=60)
@given(state=STATES)
def test_any_nested_state_comes_back_bit_equal(state):
    # Of any bits, NaN among them, which no training leaves.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_require_finite", lambda state, what: None)
        assert bits(reloaded(Path(folder), state)) == bits(state)
        assert sorted(os.listdir(folder)) == ["state-00000007.json", "state-00000007.safetensors"]


def test_names_that_read_alike_stay_apart_and_tied_weights_come_back_apart(tmp_path):
    weight = torch.arange(6.0)
    state = {1: torch.tensor(1), "1": torch.tensor(2), "a": {"b": torch.tensor(3)}, "a.b": torch.tensor(4)}
    state |= {"1#": torch.tensor(5), "__metadata__": torch.tensor(6), "epoch": 3, "tied": [weight, weight, weight[2:]]}
    loaded = reloaded(tmp_path, state)
    assert bits(loaded) == bits(state)
    loaded["tied"][0].zero_()
    assert torch.equal(loaded["tied"][1], weight)
    # Plain safetensors, for other programs.
    with safe_open(tmp_path / "state-00000007.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("state.a.b"), torch.tensor(3))


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": [1, {2, 3}]}, r"state\.a\.1 is a set"),
        ({"a": {(1, 2): 1}}, r"state\.a has the key \(1, 2\)"),
        ({"a": torch.eye(2).to_sparse()}, r"state\.a is sparse"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "type torch.complex128"),
    ],
)
def test_what_cannot_be_held_is_named(tmp_path, state, place):
    with pytest.raises(TypeError, match=place):
        CheckpointStore(tmp_path).save(1, state)
    assert not list(tmp_path.iterdir())


def test_nothing_that_is_not_finite_is_saved_or_loaded(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, {"weights": torch.ones(3), "best": float("inf")})
    bad = {"optimizer": {"state": {0: {"momentum": torch.tensor([1.0, float("inf")])}}}}
    with pytest.raises(DivergedError, match=r"optimizer\.state\.0\.momentum of the state of 'state' at step 2"):
        store.save(2, bad)
    # One that an earlier version saved, with a hash that is right.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_require_finite", lambda state, what: None)
        store.save(2, bad)
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert store.load_newest()[0] == 1


def test_store_keeps_the_newest_two_and_drops_an_abandoned_course(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", name="search")
    assert store.load_newest() is None
    for step in (3, 12, 123456789):
        store.save(step, step)
    assert store.load_newest() == (123456789, 123456789)
    files = [f"search-{step}.{end}" for step in ("00000012", "123456789") for end in ("json", "safetensors")]
    assert sorted(os.listdir(store.folder)) == files
    store.save(15, 15)
    assert store.steps() == [12, 15]
    for name, step in (("../a", 1), (".a", 1), ("a", -1)):
        with pytest.raises(ValueError, match="must be"):
            CheckpointStore(tmp_path, name=name).save(step, "state")


def test_stores_in_one_folder_leave_each_other_alone(tmp_path):
    short, long = CheckpointStore(tmp_path, name="a"), CheckpointStore(tmp_path, name="a-b")
    left = [tmp_path / f".{name}-00000009.safetensors.0123abcd.tmp" for name in ("a", "a-b")]
    left[0].touch()
    for step in (1, 2, 3, 4):
        long.save(step, "long")
    assert left[0].exists()
    left[1].touch()
    for step in (5, 6, 7):
        short.save(step, "short")
    assert (short.steps(), long.steps()) == ([6, 7], [3, 4])
    assert [file.exists() for file in left] == [False, True]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def without_last_byte(path):
    os.truncate(path, path.stat().st_size - 1)


def as_state(content):
    """Other content, with a manifest of its own."""

    def replace(path):
        path.write_bytes(content)
        path.with_suffix(".json").write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))

    return replace


STRUCTURE = {"format": "dnas_ens-state-1", "structure": '{"pickle": "x"}'}


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("safetensors", flip),
        ("safetensors", Path.unlink),
        ("json", without_last_byte),
        ("json", lambda path: path.write_text("{}")),
        ("json", Path.unlink),
        ("safetensors", as_state(b"")),
        ("safetensors", as_state(tensors_to_bytes({"a": torch.ones(2)}))),
        ("safetensors", as_state(tensors_to_bytes({}, metadata=STRUCTURE))),
    ],
)
def test_damaged_state_falls_back_loudly(tmp_path, suffix, damage):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {"x": torch.full((5,), float(step))})
    damage(tmp_path / f"state-00000002.{suffix}")
    with pytest.warns(RuntimeWarning, match=r"state-00000002\.safetensors is passed over"):
        loaded = store.load_newest()
    assert bits(loaded) == bits((1, {"x": torch.ones(5)}))
    store.save(2, "again")
    assert store.load_newest() == (2, "again")
    for step in (1, 2):
        flip(tmp_path / f"state-{step:08d}.safetensors")
    with (
        pytest.warns(RuntimeWarning, match="SHA-256"),
        pytest.raises(UserError, match="None of the 2 saved states of 'state'"),
    ):
        store.load_newest()


KILLED_WHILE_SAVING = """
import os, shutil, signal, sys, warnings
from pathlib import Path
import torch
from dnas_ens.run.checkpoint import CheckpointStore

folder = Path(sys.argv[1])
state = lambda step: {"x": torch.full((4,), float(step))}

def kill_at(point):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(("checkpoint.py", "files.py")):
            return None
        if event == "line" and frame.f_code.co_name in ("write_atomic", "save", "_drop_all_but"):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

before = folder.with_name("before")
for step in (1, 2):
    CheckpointStore(before).save(step, state(step))
store = CheckpointStore(folder)
killed, found = 0, []
warnings.simplefilter("ignore")
while True:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(before, folder)
    child = os.fork()
    if child == 0:
        kill_at(killed + 1)
        store.save(3, state(3))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    killed += 1
    step, loaded = store.load_newest()
    assert torch.equal(loaded["x"], state(step)["x"])
    found.append(step)
    store.save(3, state(3))
    assert store.load_newest()[0] == 3 and len(os.listdir(folder)) == 4, os.listdir(folder)
assert found == sorted(found) and set(found) == {2, 3}, found
print(killed)
"""


@pytest.mark.slow
def test_killed_at_any_line_of_saving_the_newest_valid_state_loads(tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
