"""The studies of faults at a tiny size: what they try begins from something whole, and what is wrong is seen."""

import shutil

import faults
import fuzzing
import numpy as np
import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    # A state that was being written is passed over, as it must be.
    pytest.mark.filterwarnings("ignore:Checkpoint .* is passed over:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def trained():
    return faults.prepared("trained")


@pytest.mark.parametrize("name", list(fuzzing.FORMATS))
def test_what_is_fuzzed_can_be_read_before(trained, tmp_path, name):
    shutil.copytree(trained, tmp_path / "R")
    form = fuzzing.FORMATS[name]
    content = form.valid(tmp_path / "R")
    assert form.read(tmp_path / "R", content) is not None
    assert len(content) > 50


def test_a_command_goes_on_from_before_a_write(monkeypatch):
    monkeypatch.setattr(faults, "SHARES", 90)
    record = faults.writes_one("retrain", 40)
    assert (record["tried"], record["wrong"]) == (1, [])
    # Shares of one process are those of several: every write belongs to one of them, whichever was tried before.
    there = {int(path.name) for path in faults._before_writes("retrain").glob("[0-9]*")}
    assert there == set(range(1, faults.straight("retrain")[1] + 1)) - {40}
    tried = []
    monkeypatch.setattr(faults, "_gone_on", lambda name, place: tried.append(int(place.name)) or {"code": 1})
    monkeypatch.setattr(faults, "SHARES", 3)
    for share in range(3):
        faults.writes_one("retrain", share)
    assert sorted(tried) == sorted(there)


def test_a_run_that_ends_otherwise_is_seen(trained, tmp_path, monkeypatch):
    expected = faults.compared("retrain", trained)
    monkeypatch.setattr(faults, "straight", lambda name: ({**expected, "members/0/member.json": "other"}, 9, 1.0))
    shutil.copytree(trained, tmp_path / "R")
    outcome = faults._gone_on("retrain", tmp_path)
    assert outcome["code"] == 0
    assert "members/0/member.json" in outcome["different"]
    (line,) = faults._wrong({"kind": "writes", "subject": "retrain", "seed": 0, "wrong": [{"write": 3, **outcome}]})
    assert "before write 3" in line


@pytest.mark.parametrize("kind", faults.DAMAGES)
def test_a_damage_changes_a_file(trained, tmp_path, kind):
    shutil.copytree(trained, tmp_path / "R")
    path = tmp_path / "R/ensemble.json"
    before = path.read_bytes()
    assert faults.damaged(path, kind, np.random.default_rng(0))
    assert not path.exists() or path.read_bytes() != before
