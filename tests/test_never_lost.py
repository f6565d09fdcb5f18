"""Faults put into real commands: what is saved is finite, a run goes on as the one it was, and damage is told."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dnas_ens.commands import retrain, search
from dnas_ens.commands.parse import run_main
from dnas_ens.errors import UserError
from dnas_ens.report import write_report
from dnas_ens.run.checkpoint import CheckpointStore, first_not_finite
from dnas_ens.run.files import read_json
from dnas_ens.run.folder import RunFolder

SEARCH = (
    "--num-cells 1 --channels 4 --num-nodes 3 --directions 2 --epochs 4 --warmup-epochs 0 --limit-train 130 "
    "--batch-size 32 --drawn-members 2 --penalty-draws 2 --members 2 --pool-size 4 --relaxation softmax --device cpu "
    "--run-dir R"
).split()
RECIPE = "R --epochs 4 --channels 4 --num-cells 1 --batch-size 32 --device cpu --workers 1".split()
COMMANDS = {"search": (search.main, SEARCH), "retrain": (retrain.main, RECIPE)}


class Killed(BaseException):
    """Stands for a killed process, after which nothing more is written."""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(name, *more, code=0):
        main, arguments = COMMANDS[name]
        try:
            ended = run_main(main, [*arguments, *more])
        except Killed:
            ended = "killed"
        err = capsys.readouterr().err
        assert ended == code, err
        if code == 2:
            assert "Traceback" not in err
            assert re.findall("^(error|remedy): ", err, re.MULTILINE) == ["error", "remedy"]
        return err

    return run


@pytest.fixture
def fault():
    """Faults by name, and `over`, which ends them."""
    monkeypatch = pytest.MonkeyPatch()

    def nan_in_step(number):
        count, step = 0, torch.optim.SGD.step

        def with_nan(self, *arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                parameters = (each for group in self.param_groups for each in group["params"])
                next(each for each in parameters if each.grad is not None).grad.fill_(float("nan"))
            return step(self, *arguments, **options)

        monkeypatch.setattr(torch.optim.SGD, "step", with_nan)

    def killed_after_saving(name, times):
        save, count = CheckpointStore.save, 0

        def and_die(self, at, state):
            nonlocal count
            save(self, at, state)
            count += self.name == name
            if count == times:
                raise Killed

        monkeypatch.setattr(CheckpointStore, "save", and_die)

    yield {"nan": nan_in_step, "killed": killed_after_saving, "over": monkeypatch.undo}
    monkeypatch.undo()


#: Runs a command in a process of its own after a fault was put in: {fault} may use os, signal, sys.
FAULTY = """
import os, signal, sys
from dnas_ens.commands.parse import run_main
from dnas_ens.commands.{name} import main
{fault}
sys.exit(run_main(main))
"""


def process(name, *more, cwd, fault, code):
    done = subprocess.run(
        [sys.executable, "-c", FAULTY.format(name=name, fault=fault), *COMMANDS[name][1], *more],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr


def hashes(folder, *patterns):
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "R"
    assert run_main(search.main, [*SEARCH[:-1], str(folder)]) == 0
    return folder


@pytest.fixture
def folder(searched, tmp_path):
    return shutil.copytree(searched, tmp_path / "R")


@pytest.mark.parametrize("number", [6, 7])
def test_a_search_that_met_nan_saves_none_and_goes_on(searched, tmp_path, command, fault, number):
    # Two steps an epoch: NaN in the last step of an epoch is in no loss of it, in the first step it is.
    fault["nan"](number)
    told = command("search", code=2)
    assert "not finite" in told
    assert ("after the last step" in told) == (number == 6)
    _, state = CheckpointStore(tmp_path / "R/checkpoints", name="search").load_newest()
    assert not first_not_finite(state)
    fault["over"]()
    command("search", "--resume")
    # Without the fault it is the search that never met one.
    files = "supernet.safetensors", "hypernetwork.safetensors"
    assert hashes(tmp_path / "R", *files) == hashes(searched, *files)


def test_a_member_that_met_nan_names_step_and_tensor(folder, command, fault):
    # Four steps an epoch; the second of the third epoch, whose gradient the third step shows.
    fault["nan"](10)
    told = command("retrain", code=2)
    assert "The gradient of step 3 in epoch 3 of member 0 is not finite; " in told
    assert "stem.0.weight is not finite after it" in told
    assert not (folder / "members/0/member.json").exists()
    fault["over"]()
    command("retrain", "--resume")


def test_a_learning_rate_that_diverges_is_told(command):
    told = command("search", "--learning-rate", "1e30", code=2)
    assert "not finite" in told
    assert "lower the learning rate" in told


def test_a_member_that_learnt_nothing_says_so(folder, command):
    told = command("retrain", "--learning-rate", "30", "--epochs", "1")
    assert re.search(r"member 0 is far worse than guessing on val: NLL \d+\.\d\d, and ln 10 is 2\.30", told)


def test_a_finished_search_stays_as_it_is(folder, command):
    everything = "*.safetensors", "genotypes.json", "metrics.jsonl", "cells/*", "checkpoints/*"
    before = hashes(folder, *everything)
    assert "is finished" in command("search", "--resume")
    assert hashes(folder, *everything) == before


def test_a_search_that_stopped_early_stops_there_again(tmp_path, command):
    more = "--max-skips 0 --operations skip_connect sep_conv_3x3".split()
    # Killed after the last state, before the result: the state alone says that the search is over.
    fault = "from dnas_ens.search import run\nrun.conclude = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)"
    process("search", *more, cwd=tmp_path, fault=fault, code=-signal.SIGKILL)
    command("search", *more, "--resume")
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "R/metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) < 4


def test_pictures_replaced_between_kill_and_resume_are_refused(tmp_path, command, fault):
    def draw(seed, count):
        generator = np.random.default_rng(seed)
        for name in "ab":
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index:03d}.png")

    draw(0, 60)
    arguments = "--data pictures --limit-train 60".split()
    fault["killed"]("search", 1)
    command("search", *arguments, code="killed")
    splits = (tmp_path / "R/splits.json").read_bytes()
    draw(1, 30)
    told = command("search", *arguments, "--resume", code=2)
    assert "are not those R was made with: their fingerprint is" in told
    assert (tmp_path / "R/splits.json").read_bytes() == splits


def test_a_damaged_finished_member_is_never_signed(folder, command, fault):
    fault["killed"]("member-1", 2)
    command("retrain", code="killed")
    fault["over"]()
    file = folder / "members/0/model.safetensors"
    good = file.read_bytes()
    damaged = good[:-5] + bytes([good[-5] ^ 0x40]) + good[-4:]
    file.write_bytes(damaged)
    told = command("retrain", "--resume", code=2)
    assert "members/0/model.safetensors is not the file that member.json was written for" in told
    assert not (folder / "ensemble.json").exists()
    file.write_bytes(good)
    command("retrain", "--resume")
    # Nor where the ensemble grows, and what is there stays.
    manifest = (folder / "ensemble.json").read_bytes()
    file.write_bytes(damaged)
    assert "SHA-256 differs" in command("retrain", "--resume", "--members", "3", code=2)
    assert (folder / "ensemble.json").read_bytes() == manifest


def test_a_state_of_another_genotype_is_refused(folder, command, fault):
    fault["killed"]("member-0", 2)
    command("retrain", code="killed")
    found = read_json(folder / "genotypes.json")
    node = found["candidates"][found["selected"][0]]["genotype"]["reduction"][2]
    # The same operations, one from another source: every tensor has the shape it had.
    node[0][1] = next(source for source in range(3) if source not in {source for _, source in node})
    (folder / "genotypes.json").write_text(json.dumps(found))
    told = command("retrain", "--resume", code=2)
    assert "The saved state of member 0 is another one: spec.genotype.reduction is" in told


@pytest.mark.parametrize(("name", "log"), [("search", "metrics.jsonl"), ("retrain", "members/0/metrics.jsonl")])
def test_no_line_is_logged_twice(searched, tmp_path, command, name, log):
    fault = """
import dnas_ens.run.metrics_log as log
before = log.MetricsLog.log
def and_die(self, *arguments, **options):
    before(self, *arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
log.MetricsLog.log = and_die
"""
    if name == "retrain":
        shutil.copytree(searched, tmp_path / "R")
    process(name, cwd=tmp_path, fault=fault, code=-signal.SIGKILL)
    command(name, "--resume")
    lines = (tmp_path / "R" / log).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


def test_temporary_files_of_a_killed_process_are_gone_afterwards(tmp_path, command):
    fault = """
replace = os.replace
def or_die(source, target):
    if str(target).endswith("supernet.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = or_die
"""
    process("search", cwd=tmp_path, fault=fault, code=-signal.SIGKILL)
    assert list((tmp_path / "R").rglob("*.tmp"))
    command("search", "--resume")
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
    process("search", cwd=tmp_path, fault=fault, code=130)
    # It was two minutes; imports and two epochs take some seconds of it on a busy machine.
    assert time.monotonic() - start < 60


def test_a_damaged_env_file_is_set_aside(folder, command):
    (folder / "env.json").write_bytes(b'[{"time": "2026\xff')
    assert "kept as env.damaged.json" in command("retrain")
    assert (folder / "env.damaged.json").read_bytes() == b'[{"time": "2026\xff'
    assert len(read_json(folder / "env.json")) == 1


def files(name, *contents):
    return [(name, content) for content in contents]


FILES = [
    *files("config.json", "[]", '{"search": []}', '{"search": {"data": 5}}'),
    *files("genotypes.json", "{}", '{"selected": [0, 99], "candidates": []}'),
    *files("splits.json", "{}", "null"),
    *files("env.json", "[5]"),
    *files("metrics.jsonl", "5\n"),
]
REPORTED = [
    *files("env.json", '{"a": 1}'),
    *files("config.json", '{"search": {"data": []}}'),
    *files(
        "genotypes.json",
        "[5]",
        '{"selected": [0], "candidates": [], "curve": null}',
        '{"selected": [], "candidates": [], "curve": {"lam": [0], "distance_to_base": []}}',
    ),
    *files("members/0/member.json", "null"),
    *files("ensemble.json", '{"members": 5}'),
    *files("comparison.json", '{"rows": [{"name": "a", "accuracy": "x", "calibrated_nll": 1.0}]}'),
    *files("shift.json", '{"corruptions": [{}]}'),
]


@pytest.mark.parametrize(("name", "content"), FILES)
def test_run_files_of_another_form_are_told(folder, command, name, content):
    (folder / name).write_text(content)
    told = command("search", "--resume", code=2) if name == "metrics.jsonl" else command("retrain", code=2)
    assert name in told or content == '{"search": {"data": 5}}'
    assert not (folder / "members").exists()


@pytest.mark.parametrize(("name", "content"), REPORTED)
def test_a_report_of_files_of_another_form_is_refused(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(UserError):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_clock_that_jumps_changes_nothing(searched, tmp_path, command, monkeypatch):
    hours = iter(range(0, -10_000, -1))
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + 3600 * next(hours))
    command("search")
    files = "supernet.safetensors", "hypernetwork.safetensors"
    assert hashes(tmp_path / "R", *files) == hashes(searched, *files)


def test_nothing_reads_or_writes_a_folder_that_a_process_holds(folder, command):
    command("retrain")
    before = hashes(folder, "*.json", "members/*/*")
    with RunFolder.open(folder, command=["a", "search"]):
        for name, more in (("retrain", ["--resume"]), ("search", ["--resume"])):
            assert "R is in use by process" in command(name, *more, code=2)
    assert {name: value for name, value in hashes(folder, "*.json", "members/*/*").items() if name != "env.json"} == {
        name: value for name, value in before.items() if name != "env.json"
    }


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="children are read from /proc")
def test_a_worker_that_is_killed_as_for_want_of_memory_is_told_and_its_member_goes_on(searched, tmp_path, command):
    for name in ("straight", "R"):
        shutil.copytree(searched, tmp_path / name)
    arguments = [argument for argument in RECIPE if argument != "R"]
    arguments[arguments.index("--workers") + 1] = "2"
    arguments[arguments.index("--epochs") + 1] = "40"
    assert run_main(retrain.main, [str(tmp_path / "straight"), *arguments]) == 0
    begun = subprocess.Popen(
        [sys.executable, "-m", "dnas_ens.retrain", "R", *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    while begun.poll() is None and not list(tmp_path.glob("R/checkpoints/member-*.json")):
        time.sleep(0.01)
    children = map(int, Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split())
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, err = begun.communicate(timeout=120)
    assert begun.returncode == 2, err
    assert "A worker process ended before its work was done" in err
    assert not (tmp_path / "R/ensemble.json").exists()
    assert run_main(retrain.main, [str(tmp_path / "R"), *arguments, "--resume"]) == 0
    for index in (0, 1):
        one, other = (hashes(tmp_path / name, f"members/{index}/model.safetensors") for name in ("R", "straight"))
        assert one == other


def without_roots_rights():
    """Take root's right to write where permissions forbid it (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) for good."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: counts from the next exec on.


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="root's rights are dropped by prctl")
def test_a_folder_that_cannot_be_written_is_told_and_keeps_its_files(folder, tmp_path, command):
    def as_others(*arguments):
        command = [sys.executable, *arguments]
        found = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=without_roots_rights
        )
        return found.returncode, found.stdout, found.stderr

    def told(*arguments):
        code, _, err = as_others(*arguments)
        assert code == 2, err
        assert re.findall("^(error|remedy): ", err, re.MULTILINE) == ["error", "remedy"]
        assert "Permission denied" in err

    command("retrain")
    (tmp_path / "locked").mkdir(mode=0o000)
    told("-m", "dnas_ens.search", "--data", "locked/photos")
    (tmp_path / "pictures").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pictures/black.png")
    # The lock names the last process that held it, and is no part of a run.
    before = hashes(folder, "**/*.[!l]*")
    places = [tmp_path, *(path for path in [folder, *folder.rglob("*")] if path.is_dir())]
    for place in places:
        place.chmod(0o555)
    try:
        if as_others("-c", "open('x', 'w')")[0] == 0:
            pytest.skip("this process may write everywhere")
        told("-m", "dnas_ens.search", *SEARCH[:-1], "other")
        told("-m", "dnas_ens.retrain", *RECIPE, "--resume", "--members", "3")
        told("-m", "dnas_ens.evaluate", "R", "--device", "cpu")
        told("-m", "dnas_ens.predict", "R", "pictures", "--output", "predicted.csv", "--device", "cpu")
        code, written, err = as_others("-m", "dnas_ens.predict", "R", "pictures", "--device", "cpu")
        assert (code, written.count("black.png")) == (0, 1), err
    finally:
        for place in places:
            place.chmod(0o755)
    assert hashes(folder, "**/*.[!l]*") == before
