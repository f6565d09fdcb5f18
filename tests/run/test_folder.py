"""The run folder: numbered or named, one configuration, one writer, nothing overwritten."""

import json
import os
import signal
import subprocess
import sys

import pytest

from dnas_ens.errors import UserError
from dnas_ens.run.files import read_json, write_json
from dnas_ens.run.folder import RunFolder

CONFIG = {
    "seed": 0,
    "data": {"name": "digits", "root": None},
    "bilevel": {"epochs": 5, "rate": 0.5, "augment": True, "knots": (0.0, 1.0)},
}


def changed(**bilevel):
    return {**CONFIG, "bilevel": {**CONFIG["bilevel"], **bilevel}}


def start_python(script, *arguments):
    script = f"import sys, time\nfrom pathlib import Path\nfrom dnas_ens.run.folder import RunFolder\n{script}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def refused(call, *more):
    with pytest.raises(UserError) as caught:
        call()
    assert all(text in caught.value.remedy for text in more)
    return caught.value.cause


def test_folders_are_numbered_afresh(tmp_path):
    (tmp_path / "007-other").mkdir()
    (tmp_path / "12-not-ours").mkdir()
    for number in ("008", "009"):
        with RunFolder.create(None, config=CONFIG, name="search", root=tmp_path) as run:
            assert run.path == tmp_path / f"{number}-search"
            assert read_json(run.file("config.json")) == {"search": json.loads(json.dumps(CONFIG))}
    cause = refused(
        lambda: RunFolder.create(None, config=CONFIG, resume=True, root=tmp_path),
        f"--run-dir {tmp_path / '009-search'}",
    )
    assert "does not say which run" in cause


def test_processes_that_start_at_once_get_a_folder_each(tmp_path):
    script = """
for _ in range(20):
    with RunFolder.create(None, config={}, root=Path(sys.argv[1])) as run:
        print(run.path)
sys.exit("torch" in sys.modules)
"""
    processes = [start_python(script, tmp_path) for _ in range(3)]
    paths = [path for process in processes for path in process.communicate(timeout=60)[0].split()]
    assert len(paths) == len(set(paths)) == 60
    assert sorted(paths) == sorted(map(str, tmp_path.iterdir()))
    assert not any(process.returncode for process in processes)


@pytest.mark.parametrize("left", [None, ".config.json.0123abcd.tmp"])
def test_a_given_folder_is_made_and_then_reopened(tmp_path, left):
    folder = tmp_path / "mine"
    if left:
        # What a killed start left behind is no obstacle.
        folder.mkdir()
        (folder / left).touch()
    with RunFolder.create(folder, config=CONFIG) as run:
        run.write_json("genotypes.json", [1])
    cause = refused(lambda: RunFolder.create(folder, config=CONFIG), "--resume", "--run-dir")
    assert "already holds a search of this configuration" in cause
    # A whole number may be written either way, and a field of a later version left open was open before.
    same = {**CONFIG, "seed": 0.0, "flip": None, "bilevel": {**CONFIG["bilevel"], "knots": [0, 1]}}
    with RunFolder.create(folder, config=same, resume=True) as run:
        assert run.read_json("genotypes.json") == [1]


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (changed(epochs=6), "search.bilevel.epochs is 5 there and 6 here"),
        (changed(augment=1), "search.bilevel.augment is true there and 1 here"),
        (changed(knots=(0.0, 2.0)), "search.bilevel.knots is [0.0, 1.0] there and [0.0, 2.0] here"),
        (changed(new="x"), 'search.bilevel.new is absent there and "x" here'),
        ({"seed": 0, "data": CONFIG["data"]}, "search.bilevel is given there and absent here"),
    ],
)
def test_another_configuration_is_refused_by_its_first_field(tmp_path, config, difference):
    RunFolder.create(tmp_path, config=CONFIG).close()
    before = (tmp_path / "config.json").read_bytes()
    for resume in (False, True):
        assert difference in refused(lambda resume=resume: RunFolder.create(tmp_path, config=config, resume=resume))
    assert (tmp_path / "config.json").read_bytes() == before
    # The refusal has released the lock.
    RunFolder.create(tmp_path, config=CONFIG, resume=True).close()


def test_images_and_a_base_may_have_moved(tmp_path):
    def config(place, base):
        data = {"data": f"{place}/photos", "data_root": place, "trunk": f"resnet18:{place}/weights.pt", "flip": True}
        return {"seed": 0, "data": data, "hypernetwork": {"base": base, "directions": 3}}

    RunFolder.create(tmp_path / "R", config=config("/old", "/old/base.json")).close()
    RunFolder.create(tmp_path / "R", config=config("/new", "base.json"), resume=True).close()
    cause = refused(lambda: RunFolder.create(tmp_path / "R", config=config("/new", None), resume=True))
    assert "search.hypernetwork.base is true there and false here" in cause


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for attempt in (
        lambda: RunFolder.create(tmp_path, config=CONFIG, resume=True),
        lambda: RunFolder.create(tmp_path / "thesis.tex", config=CONFIG),
        lambda: RunFolder.open(tmp_path),
        lambda: RunFolder.open(tmp_path / "absent"),
    ):
        assert "is not a run folder" in refused(attempt)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_each_command_has_its_section(tmp_path):
    RunFolder.create(tmp_path, config=CONFIG).close()
    with RunFolder.open(tmp_path) as run:
        run.record_recipe({"epochs": 2})
        # With the first one nothing could be trained.
        run.record_recipe({"epochs": 3})
        write_json(tmp_path / "members/0/member.json", {})
    with RunFolder.open(tmp_path) as run:
        assert list(run.config) == ["search", "retrain"]
        assert "already holds a retrain" in refused(lambda: run.record_recipe({"epochs": 3}))
        run.record_recipe({"epochs": 3}, resume=True)
        cause = refused(lambda: run.record_recipe({"epochs": 4}, resume=True))
        assert "retrain.epochs is 3 there and 4 here" in cause
        run.replace_config("retrain", {"epochs": 5})
    assert read_json(tmp_path / "config.json")["retrain"] == {"epochs": 5}
    # The search's own folder does not take another study's configuration in.
    cause = refused(lambda: RunFolder.create(tmp_path, config={"a": 1}, section="study", resume=True))
    assert "study is absent there and given here" in cause
    for content in ("[1]", "{"):
        (tmp_path / "config.json").write_text(content)
        assert "config.json" in refused(lambda: RunFolder.open(tmp_path))


def test_no_file_name_leads_out_of_the_folder(tmp_path):
    with RunFolder.create(tmp_path / "run", config=CONFIG) as run:
        for name in ("../a", "/etc/passwd", "members/../../a", ".."):
            assert "leads out of" in refused(lambda name=name: run.file(name))
        assert run.file("members/3/a..b.json") == run.path / "members" / "3" / "a..b.json"


def test_one_writer_at_a_time_and_a_stale_lock_is_taken_over(tmp_path):
    script = "run = RunFolder.create(Path(sys.argv[1]), config={})\nprint('held', flush=True)\ntime.sleep(60)"
    with start_python(script, tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        assert f"in use by process {process.pid}." in refused(lambda: RunFolder.open(tmp_path), "--run-dir")
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with RunFolder.open(tmp_path) as run:
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
        # The folder itself is locked: without the file, too.
        (tmp_path / "run.lock").unlink()
        assert "in use by process that has just started" in refused(lambda: RunFolder.open(tmp_path))
        run.close()
        RunFolder.open(tmp_path).close()
    # On NFS a process of another machine is seen to hold the file alone.
    RunFolder.open(tmp_path).close()
    held = "held = open(Path(sys.argv[1]) / 'run.lock')\nimport fcntl\nfcntl.flock(held, fcntl.LOCK_EX)\n"
    with start_python(f"{held}print('held', flush=True)\ntime.sleep(60)", tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        assert "in use by process" in refused(lambda: RunFolder.open(tmp_path), "--run-dir")
        process.kill()
    RunFolder.open(tmp_path).close()


def test_closing_unlocks_even_while_a_child_lives(tmp_path):
    run = RunFolder.create(tmp_path, config=CONFIG)
    for descriptor in run._lock:
        os.set_inheritable(descriptor, True)
    # The child holds the same open file, as a forked data worker does.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        run.close()
        RunFolder.open(tmp_path).close()
        child.communicate(b"\n", timeout=30)


def test_every_command_is_noted(tmp_path):
    RunFolder.create(tmp_path, config=CONFIG).close()
    commands = (["search", "--seed", "1"], None)
    for command in commands:
        with RunFolder.open(tmp_path, command=command) as run:
            run.write_env({"data": {"name": "digits"}})
    entries = read_json(tmp_path / "env.json")
    assert [entry["command"] for entry in entries] == [command or sys.argv for command in commands]
    assert all(entry["data"] == {"name": "digits"} for entry in entries)
