from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from dnas_ens.errors import DivergedError, UserError
from dnas_ens.run import checkpoint
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import tensors_to_bytes

ROOT = Path(checkpoint.__file__).parents[2]
DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.bool,
)


def same(first: Any, second: Any) -> bool:
    """Bit-equal, and of the same types throughout."""
    if isinstance(first, torch.Tensor):
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        # Cloned: a tensor of one element counts as contiguous whatever its stride is.
        flat = [tensor.reshape(-1).clone(memory_format=torch.contiguous_format) for tensor in (first, second)]
        return not first.numel() or torch.equal(*(tensor.view(torch.uint8) for tensor in flat))
    if type(first) is not type(second):
        return False
    if isinstance(first, float):
        return (first != first and second != second) or struct.pack("d", first) == struct.pack("d", second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        # In this order, and the key 1 is not the key "1".
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if dtype == torch.bool:
        value = torch.randint(0, 2, shape, generator=generator).bool()
    else:
        size = torch.empty(0, dtype=dtype).element_size()
        bits = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
        value = bits.view(dtype).reshape(shape)
    how = draw(st.sampled_from(["plain", "transposed", "expanded", "sliced"]))
    if how == "transposed":
        value = value.permute(tuple(reversed(range(value.ndim))))
    if how == "expanded":
        value = value.unsqueeze(0).expand(2, *value.shape)
    return value[::2] if how == "sliced" and value.ndim else value


SHARED = torch.arange(6.0)
STATES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | tensors()
    | st.sampled_from([SHARED, SHARED[2:], SHARED.view(2, 3).T]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def reloaded(folder: Path, state: Any) -> Any:
    store = CheckpointStore(folder)
    store.save(7, state)
    found = store.load_newest()
    assert found is not None
    assert found[0] == 7
    return found[1]


@settings(max_examples=80)
@given(state=STATES)
def test_any_nested_state_comes_back_bit_equal(state: Any) -> None:
    # Of any bits, NaN among them, which no training leaves.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_require_finite", lambda state, what: None)
        assert same(reloaded(Path(folder), state), state)
        assert sorted(os.listdir(folder)) == ["state-00000007.json", "state-00000007.safetensors"]


def test_names_that_read_alike_stay_apart_and_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    state = {
        1: torch.tensor(1),
        "1": torch.tensor(2),
        "a": {"b": torch.tensor(3)},
        "a.b": torch.tensor(4),
        "1#": torch.tensor(5),
        "__metadata__": torch.tensor(6),
        "epoch": 3,
    }
    assert same(reloaded(tmp_path, state), state)
    with safe_open(tmp_path / "state-00000007.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("state.a.b"), torch.tensor(3))
        assert "epoch" in file.metadata()["structure"]


def test_tied_weights_are_kept_twice(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    loaded = reloaded(tmp_path, [weight, weight, weight[2:], weight.view(2, 3)])
    assert same(loaded, [weight, weight, weight[2:], weight.view(2, 3)])
    loaded[0].zero_()
    assert same(loaded[1], weight)


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": [1, {2, 3}]}, r"state\.a\.1 is a set"),
        ({"a": {True: 1}}, r"state\.a has the key True"),
        ({"a": {(1, 2): 1}}, r"state\.a has the key \(1, 2\)"),
        ([lambda: None], r"state\.0 is a function"),
        ({"a": torch.eye(2).to_sparse()}, r"state\.a is sparse"),
        ({"a": torch.ones(2, device="meta")}, r"state\.a is sparse or without data"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "type torch.complex128"),
    ],
)
def test_what_cannot_be_held_is_named(tmp_path: Path, state: Any, place: str) -> None:
    with pytest.raises(TypeError, match=place):
        CheckpointStore(tmp_path).save(1, state)
    assert not list(tmp_path.iterdir())


def test_nothing_that_is_not_finite_is_saved_or_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"weights": torch.ones(3), "best": float("inf")})
    bad = {"optimizer": {"state": {0: {"momentum": torch.tensor([1.0, float("inf")])}}}}
    with pytest.raises(
        DivergedError, match=r"optimizer\.state\.0\.momentum of the state of 'state' at step 2"
    ):
        store.save(2, bad)
    # One that an earlier version saved, with a hash that is right.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_require_finite", lambda state, what: None)
        store.save(2, bad)
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert store.load_newest()[0] == 1  # type: ignore[index]


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.99), amsgrad=True),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    ],
)
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path, make: Any) -> None:
    def build() -> dict[str, Any]:
        module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
        optimiser = make(module.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=20)
        return {"module": module, "optimiser": optimiser, "schedule": schedule}

    def train(parts: dict[str, Any], steps: int) -> None:
        for _ in range(steps):
            parts["optimiser"].zero_grad()
            parts["module"](torch.randn(8, 4)).square().mean().backward()
            parts["optimiser"].step()
            parts["schedule"].step()

    def state(parts: dict[str, Any]) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in parts.items()}
        return {**states, "module": dict(states["module"]), "rng": torch.get_rng_state()}

    torch.manual_seed(0)
    straight = build()
    train(straight, steps=4)
    loaded = reloaded(tmp_path, state(straight))
    train(straight, steps=5)

    expected = state(straight)
    torch.manual_seed(123)
    resumed = build()
    for name, part in resumed.items():
        part.load_state_dict(loaded[name])
    torch.set_rng_state(loaded["rng"])
    train(resumed, steps=5)
    assert same(state(resumed), expected)


def test_store_keeps_the_newest_two(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", name="search")
    assert store.load_newest() is None
    for step in (3, 12, 123456789):
        path = store.save(step, {"step": torch.tensor(step)})
    assert path.name == "search-123456789.safetensors"
    assert store.steps() == [12, 123456789]
    assert sorted(os.listdir(store.folder)) == [
        "search-00000012.json",
        "search-00000012.safetensors",
        "search-123456789.json",
        "search-123456789.safetensors",
    ]
    manifest = json.loads((store.folder / "search-00000012.json").read_text())
    content = (store.folder / "search-00000012.safetensors").read_bytes()
    assert manifest["sha256"] == hashlib.sha256(content).hexdigest()
    newest = store.load_newest()
    assert newest is not None
    assert same(newest, (123456789, {"step": torch.tensor(123456789)}))


def test_stores_in_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
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


def test_saving_drops_the_later_states_of_an_abandoned_course(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 15):
        store.save(step, step)
    assert store.steps() == [10, 15]
    assert store.load_newest() == (15, 15)


@pytest.mark.parametrize(("name", "step"), [("../a", 1), ("", 1), ("a/b", 1), (".a", 1), ("a", -1)])
def test_store_refuses(tmp_path: Path, name: str, step: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        CheckpointStore(tmp_path, name=name).save(step, "state")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("safetensors", flip),
    ("safetensors", truncate),
    ("safetensors", empty),
    ("safetensors", Path.unlink),
    ("json", truncate),
    ("json", empty),
    ("json", lambda path: path.write_text("[1]") and None),
    ("json", lambda path: path.write_text("{}") and None),
    ("json", Path.unlink),
]


@pytest.mark.parametrize(("suffix", "damage"), DAMAGE)
def test_damaged_state_falls_back_loudly(tmp_path: Path, suffix: str, damage: Callable[[Path], None]) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {"x": torch.full((5,), float(step))})
    damage(tmp_path / f"state-00000002.{suffix}")
    with pytest.warns(RuntimeWarning, match=r"state-00000002\.safetensors is passed over"):
        loaded = store.load_newest()
    assert loaded is not None
    assert same(loaded, (1, {"x": torch.ones(5)}))

    store.save(2, "again")
    assert store.load_newest() == (2, "again")


def test_no_valid_state_is_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, name="search")
    for step in (1, 2):
        flip(store.save(step, torch.ones(5)))
    with (
        pytest.warns(RuntimeWarning, match="SHA-256"),
        pytest.raises(UserError, match="None of the 2 saved states of 'search'") as caught,
    ):
        store.load_newest()
    assert "--run-dir" in caught.value.remedy


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (2**40).to_bytes(8, "little") + b"{}",
        tensors_to_bytes({"a": torch.ones(2)}),
        tensors_to_bytes({}, metadata={"format": "dnas_ens-state-1", "structure": '{"pickle": "x"}'}),
        tensors_to_bytes({}, metadata={"format": "dnas_ens-state-1", "structure": '{"tensor": "x"}'}),
    ],
)
def test_a_file_that_is_no_state_is_passed_over(tmp_path: Path, content: bytes) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, 1)
    path = store.save(2, 2)
    path.write_bytes(content)
    manifest = {"sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert store.load_newest() == (1, 1)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step, loaded = store.load_newest()
    assert torch.equal(loaded["x"], state(step)["x"])
    found.append(step)
    assert set(store.steps()) <= set(store._steps("safetensors")), os.listdir(folder)
    store.save(3, state(3))
    assert store.load_newest()[0] == 3 and len(os.listdir(folder)) == 4, os.listdir(folder)
assert found == sorted(found) and set(found) == {2, 3}, found
print(killed)
"""


@pytest.mark.slow
def test_killed_at_any_line_of_saving_the_newest_valid_state_loads(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "checkpoints")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
