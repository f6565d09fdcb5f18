"""Faults put into real commands: what is saved is finite, a run goes on as the one it was, and damage is told."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.run.checkpoint import first_not_finite, load_state
from dnas_ens.run.files import read_json

SEARCH = (
    "--num-cells 3 --channels 4 --num-nodes 2 --directions 2 --epochs 4 --warmup-epochs 0 --limit-train 130 "
    "--batch-size 32 --drawn-members 2 --penalty-draws 2 --members 2 --pool-size 4 --device cpu"
).split()
RECIPE = "--epochs 4 --channels 4 --num-cells 3 --batch-size 32 --device cpu --workers 1".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

#: Runs a command after a fault was put in: {fault} may use os, signal, sys, torch.
FAULTY = """
import os, signal, sys
from importlib import import_module
import torch
from dnas_ens.commands.parse import run_main
{fault}
sys.exit(run_main(import_module(sys.argv[1] + ".__main__").main, sys.argv[2:]))
"""
NAN_IN_STEP = """
count, step = 0, torch.optim.SGD.step
def with_nan(self, *arguments, **options):
    global count
    count += 1
    if count == {number}:
        next(p for group in self.param_groups for p in group["params"] if p.grad is not None).grad.fill_(float("nan"))
    return step(self, *arguments, **options)
torch.optim.SGD.step = with_nan
"""
KILLED_AFTER_SAVING = """
import dnas_ens.run.checkpoint as checkpoint
save = checkpoint.CheckpointStore.save
def and_die(self, step, state):
    save(self, step, state)
    if (self.name, step) == ({name!r}, {step}):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.CheckpointStore.save = and_die
"""


def command(module, *arguments, cwd, fault=""):
    script = ["-c", FAULTY.format(fault=fault), module]
    return subprocess.run(
        [sys.executable, *script, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=240,
    )


def search(*arguments, cwd, fault="", code=0):
    done = command("dnas_ens.search", *SEARCH, *arguments, cwd=cwd, fault=fault)
    assert done.returncode == code, done.stderr
    return done


def retrain(*arguments, cwd, fault="", code=0):
    done = command("dnas_ens.retrain", *RECIPE, *arguments, cwd=cwd, fault=fault)
    assert done.returncode == code, done.stderr
    return done


def hashes(folder, *patterns):
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def told(done):
    """One line of cause and one of remedy, and no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    cause, remedy = (line for line in done.stderr.splitlines() if line.startswith(("error:", "remedy:")))
    assert remedy.startswith("remedy: ")
    return cause


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    search("--run-dir", "R", cwd=folder)
    return folder / "R"


def copied(searched, tmp_path):
    subprocess.run(["cp", "-r", searched, tmp_path / "R"], check=True)
    return tmp_path / "R"


@pytest.mark.parametrize("number", [6, 7])
def test_a_search_that_met_nan_saves_none_and_goes_on(searched, tmp_path, number):
    # Two steps an epoch: NaN in the last step of an epoch is in no loss of it, in the first step it is.
    done = search("--run-dir", "R", cwd=tmp_path, fault=NAN_IN_STEP.format(number=number), code=2)
    assert "not finite" in told(done)
    assert ("after the last step" in told(done)) == (number == 6)
    states = list((tmp_path / "R/checkpoints").glob("*.safetensors"))
    assert states
    assert not any(first_not_finite(load_state(state)) for state in states)
    search("--run-dir", "R", "--resume", cwd=tmp_path)
    # Without the fault it is the search that never met one.
    files = "supernet.safetensors", "hypernetwork.safetensors"
    assert hashes(tmp_path / "R", *files) == hashes(searched, *files)


def test_a_member_that_met_nan_names_step_and_tensor(searched, tmp_path):
    folder = copied(searched, tmp_path)
    # Four steps an epoch; the second of the third epoch, whose gradient the third step shows.
    done = retrain("R", cwd=tmp_path, fault=NAN_IN_STEP.format(number=10), code=2)
    assert "The gradient of step 3 in epoch 3 of member 0 is not finite; " in told(done)
    assert "stem.0.weight is not finite after it" in told(done)
    assert not (folder / "members/0/member.json").exists()
    retrain("R", "--resume", cwd=tmp_path)


def test_a_learning_rate_that_diverges_is_told_in_two_lines(tmp_path):
    done = search("--run-dir", "R", "--learning-rate", "1e30", cwd=tmp_path, code=2)
    assert "of step " in told(done) or "not finite" in told(done)
    assert "lower the learning rate" in done.stderr


def test_a_member_that_learnt_nothing_says_so(searched, tmp_path):
    copied(searched, tmp_path)
    done = retrain("R", "--learning-rate", "30", "--epochs", "1", cwd=tmp_path)
    assert re.search(
        r"member 0 is far worse than guessing on val: NLL \d+\.\d\d, and ln 10 is 2\.30", done.stderr
    )


def test_a_finished_search_stays_as_it_is(searched, tmp_path):
    folder = copied(searched, tmp_path)
    before = hashes(folder, "*.safetensors", "genotypes.json", "metrics.jsonl", "cells/*", "checkpoints/*")
    done = search("--run-dir", "R", "--resume", cwd=tmp_path)
    assert "is finished" in done.stderr
    assert (
        hashes(folder, "*.safetensors", "genotypes.json", "metrics.jsonl", "cells/*", "checkpoints/*")
        == before
    )


def test_a_search_that_stopped_early_stops_there_again(tmp_path):
    more = "--max-skips 0 --operations skip_connect sep_conv_3x3 --run-dir R".split()
    # Killed after the last state, before the result: the state alone says that the search is over.
    fault = (
        "run = import_module('dnas_ens.search.run')\n"
        "run.conclude = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)"
    )
    search(*more, cwd=tmp_path, fault=fault, code=-signal.SIGKILL)
    states = sorted(os.listdir(tmp_path / "R/checkpoints"))
    search(*more, "--resume", cwd=tmp_path)
    assert sorted(os.listdir(tmp_path / "R/checkpoints")) == states
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "R/metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) < 4


def test_pictures_replaced_between_kill_and_resume_are_refused(tmp_path):
    def draw(seed, count):
        generator = np.random.default_rng(seed)
        for name in "ab":
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index:03d}.png")

    draw(0, 60)
    arguments = "--data pictures --limit-train 60 --run-dir R".split()
    fault = KILLED_AFTER_SAVING.format(name="search", step=1)
    search(*arguments, cwd=tmp_path, fault=fault, code=-signal.SIGKILL)
    splits = (tmp_path / "R/splits.json").read_bytes()
    draw(1, 30)
    done = search(*arguments, "--resume", cwd=tmp_path, code=2)
    assert "are not those R was made with: their fingerprint is" in told(done)
    assert (tmp_path / "R/splits.json").read_bytes() == splits


def test_a_damaged_finished_member_is_never_signed(searched, tmp_path):
    folder = copied(searched, tmp_path)
    retrain(
        "R", cwd=tmp_path, fault=KILLED_AFTER_SAVING.format(name="member-1", step=2), code=-signal.SIGKILL
    )
    file = folder / "members/0/model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-5] + bytes([good[-5] ^ 0x40]) + good[-4:])
    done = retrain("R", "--resume", cwd=tmp_path, code=2)
    assert "members/0/model.safetensors is not the file that member.json was written for" in told(done)
    assert not (folder / "ensemble.json").exists()
    file.write_bytes(good)
    retrain("R", "--resume", cwd=tmp_path)
    # Nor where the ensemble grows, and what is there stays.
    manifest = (folder / "ensemble.json").read_bytes()
    file.write_bytes(good[:-5] + bytes([good[-5] ^ 0x40]) + good[-4:])
    done = retrain("R", "--resume", "--members", "3", cwd=tmp_path, code=2)
    assert "SHA-256 differs" in told(done)
    assert (folder / "ensemble.json").read_bytes() == manifest


def test_a_state_of_another_genotype_is_refused(searched, tmp_path):
    folder = copied(searched, tmp_path)
    retrain(
        "R", cwd=tmp_path, fault=KILLED_AFTER_SAVING.format(name="member-0", step=2), code=-signal.SIGKILL
    )
    found = read_json(folder / "genotypes.json")
    node = found["candidates"][found["selected"][0]]["genotype"]["normal"][1]
    # The same operations, one from another source: every tensor has the shape it had.
    node[0][1] = next(source for source in range(3) if source not in {source for _, source in node})
    (folder / "genotypes.json").write_text(json.dumps(found))
    done = retrain("R", "--resume", cwd=tmp_path, code=2)
    assert "The saved state of member 0 is another one: spec.genotype.normal is" in told(done)


@pytest.mark.parametrize("what", ["search", "retrain"])
def test_no_line_is_logged_twice(searched, tmp_path, what):
    folder = copied(searched, tmp_path) if what == "retrain" else tmp_path / "R"
    fault = """
import dnas_ens.run.metrics_log as log
before = log.MetricsLog.log
def and_die(self, *arguments, **options):
    before(self, *arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
log.MetricsLog.log = and_die
"""
    if what == "search":
        search("--run-dir", "R", cwd=tmp_path, fault=fault, code=-signal.SIGKILL)
        search("--run-dir", "R", "--resume", cwd=tmp_path)
        lines = folder / "metrics.jsonl"
    else:
        retrain("R", cwd=tmp_path, fault=fault, code=-signal.SIGKILL)
        retrain("R", "--resume", cwd=tmp_path)
        lines = folder / "members/0/metrics.jsonl"
    assert [json.loads(line)["epoch"] for line in lines.read_text().splitlines()] == [1, 2, 3, 4]


def test_temporary_files_of_a_killed_process_are_gone_afterwards(tmp_path):
    fault = """
replace = os.replace
def or_die(source, target):
    if str(target).endswith("supernet.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = or_die
"""
    search("--run-dir", "R", cwd=tmp_path, fault=fault, code=-signal.SIGKILL)
    assert list((tmp_path / "R").rglob("*.tmp"))
    search("--run-dir", "R", "--resume", cwd=tmp_path)
    assert not list((tmp_path / "R").rglob("*.tmp"))


def test_an_interruption_is_not_kept_waiting_by_tensorboard(tmp_path):
    # Ctrl-C between a queue's put and its notify: the writer's thread is never woken.
    fault = """
import threading
import dnas_ens.run.metrics_log as log
before, notify, armed = log.MetricsLog.log, threading.Condition.notify, False
def noted(self, *arguments, **options):
    global armed
    armed = options.get("epoch") == 2
    return before(self, *arguments, **options)
def cut(self, n=1):
    global armed
    if armed and threading.current_thread() is threading.main_thread() and sys._getframe(1).f_code.co_name == "put":
        armed = False
        raise KeyboardInterrupt
    return notify(self, n)
log.MetricsLog.log, threading.Condition.notify = noted, cut
"""
    start = time.monotonic()
    search("--run-dir", "R", cwd=tmp_path, fault=fault, code=130)
    # It was two minutes; imports and two epochs take some seconds of it on a busy machine.
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", '{"search": []}'),
        ("config.json", '{"search": {"data": 5}}'),
        ("genotypes.json", "{}"),
        ("genotypes.json", "[]"),
        ("genotypes.json", '{"selected": [0, 99], "candidates": []}'),
        ("splits.json", "{}"),
        ("splits.json", '{"name": "digits", "fingerprint": 5}'),
        ("splits.json", "null"),
        ("env.json", "{}"),
        ("env.json", "[5]"),
        ("metrics.jsonl", "5\n"),
    ],
)
def test_run_files_of_another_form_are_told(searched, tmp_path, name, content, capsys):
    from dnas_ens.commands.parse import run_main
    from dnas_ens.commands.retrain import main as retrain_main
    from dnas_ens.commands.search import main as search_main

    folder = copied(searched, tmp_path)
    (folder / name).write_text(content)
    if name == "metrics.jsonl":
        code = run_main(search_main, [*SEARCH, "--run-dir", str(folder), "--resume"])
    else:
        code = run_main(retrain_main, [str(folder), *RECIPE])
    error = capsys.readouterr().err
    assert code == 2, error
    assert name in error or content == '{"search": {"data": 5}}'
    assert not (folder / "members").exists()


def test_a_damaged_env_file_is_set_aside(searched, tmp_path):
    folder = copied(searched, tmp_path)
    (folder / "env.json").write_bytes(b'[{"time": "2026\xff')
    done = retrain("R", cwd=tmp_path)
    assert "kept as env.damaged.json" in done.stderr
    assert (folder / "env.damaged.json").read_bytes() == b'[{"time": "2026\xff'
    assert len(read_json(folder / "env.json")) == 1


def test_a_full_disk_is_told_wherever_it_is_met(capsys):
    from dnas_ens.commands.parse import run_main

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def write(argv):
        with open("/dev/full", "w") as file:
            file.write("x")

    assert run_main(write, []) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_second_writer_is_refused_without_the_lock_file_too(tmp_path):
    from dnas_ens.errors import UserError
    from dnas_ens.run.folder import RunFolder

    with RunFolder.create(tmp_path / "R", config={"seed": 0}) as first:
        (first.path / "run.lock").unlink()
        with pytest.raises(UserError, match="is in use by process"):
            RunFolder.open(first.path)
    RunFolder.open(first.path).close()


def test_nothing_that_is_not_finite_is_saved_or_loaded(tmp_path, monkeypatch):
    from dnas_ens.errors import DivergedError
    from dnas_ens.run import checkpoint

    store = checkpoint.CheckpointStore(tmp_path)
    store.save(1, {"weights": torch.ones(3), "best": float("inf")})
    bad = {"optimizer": {"state": {0: {"momentum": torch.tensor([1.0, float("inf")])}}}}
    with pytest.raises(
        DivergedError, match=r"optimizer\.state\.0\.momentum of the state of 'state' at step 2"
    ):
        store.save(2, bad)
    # One that an earlier version saved, with a hash that is right.
    monkeypatch.setattr(checkpoint, "_require_finite", lambda state, what: None)
    store.save(2, bad)
    monkeypatch.undo()
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert store.load_newest()[0] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("env.json", "5"),
        ("env.json", '{"a": 1}'),
        ("config.json", '{"search": {"data": []}}'),
        ("genotypes.json", "[5]"),
        ("genotypes.json", '{"selected": [0], "candidates": [], "curve": null}'),
        (
            "genotypes.json",
            '{"selected": [], "candidates": [], "curve": {"lam": [0], "distance_to_base": []}}',
        ),
        ("genotypes.json", '{"selected": [], "candidates": [], "curve": true}'),
        ("members/0/member.json", "{}"),
        ("members/0/member.json", "null"),
        ("ensemble.json", '{"members": 5}'),
        ("comparison.json", '{"rows": [{"name": "a", "accuracy": "x", "calibrated_nll": 1.0}]}'),
        ("shift.json", '{"corruptions": [{}]}'),
    ],
)
def test_a_report_of_files_of_another_form_is_refused(searched, tmp_path, name, content):
    from dnas_ens.errors import UserError
    from dnas_ens.report import write_report

    folder = copied(searched, tmp_path)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(UserError):
        write_report(folder)
    assert not (folder / "report.html").exists()
