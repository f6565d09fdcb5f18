from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dnas_ens.errors import UserError
from dnas_ens.run import folder as runs
from dnas_ens.run.files import read_json
from dnas_ens.run.folder import RunFolder

ROOT = Path(runs.__file__).parents[2]
CONFIG: dict[str, Any] = {
    "seed": 0,
    "data": {"name": "digits", "root": None},
    "bilevel": {"epochs": 5, "rate": 0.5, "augment": True, "knots": (0.0, 1.0)},
}


def changed(**bilevel: Any) -> dict[str, Any]:
    return {**CONFIG, "bilevel": {**CONFIG["bilevel"], **bilevel}}


def start_python(script: str, *arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_folders_are_numbered_afresh(tmp_path: Path) -> None:
    (tmp_path / "007-other").mkdir()
    (tmp_path / "12-not-ours").mkdir()
    for number in ("008", "009"):
        with RunFolder.create(None, config=CONFIG, name="search", root=tmp_path) as run:
            assert run.path == tmp_path / f"{number}-search"
            assert read_json(run.file("config.json")) == {"search": json.loads(json.dumps(CONFIG))}


CREATE_MANY = """
import sys
from pathlib import Path
from dnas_ens.run.folder import RunFolder
for _ in range(20):
    with RunFolder.create(None, config={}, root=Path(sys.argv[1])) as run:
        print(run.path)
"""


def test_processes_that_start_at_once_get_a_folder_each(tmp_path: Path) -> None:
    processes = [start_python(CREATE_MANY, str(tmp_path)) for _ in range(3)]
    paths = [path for process in processes for path in process.communicate(timeout=60)[0].split()]
    assert len(paths) == len(set(paths)) == 60
    assert sorted(paths) == sorted(map(str, tmp_path.iterdir()))


def test_resume_without_a_folder_names_the_newest(tmp_path: Path) -> None:
    for name in ("001-search", "002-search"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError) as caught:
        RunFolder.create(None, config=CONFIG, resume=True, root=tmp_path)
    assert f"--run-dir {tmp_path / '002-search'}" in caught.value.remedy


@pytest.mark.parametrize("prepare", [lambda path: None, Path.mkdir])
def test_a_given_folder_is_made_and_then_reopened(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    folder = tmp_path / "mine"
    prepare(folder)
    with RunFolder.create(folder, config=CONFIG) as run:
        run.write_json("genotypes.json", [1])
    with pytest.raises(UserError, match="already holds a search of this configuration") as caught:
        RunFolder.create(folder, config=CONFIG)
    assert "--resume" in caught.value.remedy
    assert "--run-dir" in caught.value.remedy
    # A whole number may be written either way, and a field of a later version left open was open before.
    same = {**CONFIG, "seed": 0.0, "flip": None, "bilevel": {**CONFIG["bilevel"], "knots": [0, 1]}}
    with RunFolder.create(folder, config=same, resume=True) as run:
        assert run.read_json("genotypes.json") == [1]


def test_what_a_killed_start_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    (tmp_path / ".config.json.0123abcd.tmp").touch()
    with RunFolder.create(tmp_path, config=CONFIG) as run:
        assert run.config["search"]["seed"] == 0


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (changed(epochs=6), "search.bilevel.epochs is 5 there and 6 here"),
        (changed(rate=0.25), "search.bilevel.rate is 0.5 there and 0.25 here"),
        (changed(augment=1), "search.bilevel.augment is true there and 1 here"),
        (changed(knots=(0.0, 2.0)), "search.bilevel.knots is [0.0, 1.0] there and [0.0, 2.0] here"),
        (changed(new="x"), 'search.bilevel.new is absent there and "x" here'),
        ({"seed": 0, "data": CONFIG["data"]}, "search.bilevel is given there and absent here"),
        (
            {**CONFIG, "data": {"name": "digits", "root": "absent"}},
            'search.data.root is null there and "absent" here',
        ),
    ],
)
def test_another_configuration_is_refused_by_its_first_field(
    tmp_path: Path, config: dict[str, Any], difference: str, resume: bool
) -> None:
    RunFolder.create(tmp_path, config=CONFIG).close()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as caught:
        RunFolder.create(tmp_path, config=config, resume=resume)
    assert difference in caught.value.cause
    assert "--run-dir" in caught.value.remedy
    assert (tmp_path / "config.json").read_bytes() == before
    # The refusal has let go of the lock.
    RunFolder.create(tmp_path, config=CONFIG, resume=True).close()


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for attempt in (
        lambda: RunFolder.create(tmp_path, config=CONFIG, resume=True),
        lambda: RunFolder.create(tmp_path / "thesis.tex", config=CONFIG),
        lambda: RunFolder.open(tmp_path),
        lambda: RunFolder.open(tmp_path / "absent"),
    ):
        with pytest.raises(UserError, match="is not a run folder"):
            attempt()
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_each_command_has_its_section(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config=CONFIG).close()
    with RunFolder.open(tmp_path) as run:
        run.record_config("retrain", {"epochs": 3})
    with RunFolder.open(tmp_path) as run:
        assert list(run.config) == ["search", "retrain"]
        with pytest.raises(UserError, match="already holds a retrain"):
            run.record_config("retrain", {"epochs": 3})
        run.record_config("retrain", {"epochs": 3}, resume=True)
        with pytest.raises(UserError, match=r"retrain\.epochs is 3 there and 4 here"):
            run.record_config("retrain", {"epochs": 4}, resume=True)
    assert read_json(tmp_path / "config.json")["retrain"] == {"epochs": 3}
    # The search's own folder does not take another study's configuration in.
    with pytest.raises(UserError, match="study is absent there and given here"):
        RunFolder.create(tmp_path, config={"a": 1}, section="study", resume=True)


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config=CONFIG).close()
    for content in ("[1]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json"):
            RunFolder.open(tmp_path)
        with pytest.raises(UserError, match=r"config\.json"):
            RunFolder.create(tmp_path, config=CONFIG, resume=True)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "members/../../a", ".."])
def test_no_file_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with RunFolder.create(tmp_path / "run", config=CONFIG) as run:
        with pytest.raises(UserError, match="leads out of"):
            run.file(name)
        assert run.file("members/3/a..b.json") == run.path / "members" / "3" / "a..b.json"


HOLD = """
import sys, time
from pathlib import Path
from dnas_ens.run.folder import RunFolder
run = RunFolder.create(Path(sys.argv[1]), config={})
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with start_python(HOLD, str(folder)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_one_writer_at_a_time_and_a_stale_lock_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        for attempt in (
            lambda: RunFolder.open(tmp_path),
            lambda: RunFolder.create(tmp_path, config={}, resume=True),
        ):
            with pytest.raises(UserError, match=rf"in use by process {process.pid}\.") as caught:
                attempt()
            assert "--run-dir" in caught.value.remedy
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        with RunFolder.open(tmp_path) as run:
            assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
            # The folder itself is locked: without the file, too.
            (tmp_path / "run.lock").unlink()
            with pytest.raises(UserError, match="in use by process that has just started"):
                RunFolder.open(tmp_path)
            run.close()
            RunFolder.open(tmp_path).close()


def test_closing_unlocks_even_while_a_child_lives(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config=CONFIG)
    assert run._lock is not None
    os.set_inheritable(run._lock, True)
    # The child holds the same open file, as a forked data worker does.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        run.close()
        RunFolder.open(tmp_path).close()
        child.communicate(b"\n", timeout=30)


def test_metrics_and_checkpoints_lie_in_the_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config=CONFIG) as run:
        run.metrics.log({"loss": 1.0}, step=1, epoch=0, phase="search")
        run.checkpoints("search").save(1, {"epoch": 1})
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["step"], line["loss"]) == (1, 1.0)
    assert (tmp_path / "checkpoints" / "search-00000001.safetensors").is_file()
    assert (tmp_path / "tensorboard" / "search").is_dir()


def test_env_holds_an_entry_a_command(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config=CONFIG).close()
    for command in (["search", "--seed", "1"], ["retrain", "R"]):
        with RunFolder.open(tmp_path, command=command) as run:
            run.write_env({"data": {"name": "digits"}})
    entries = read_json(tmp_path / "env.json")
    assert [entry["command"] for entry in entries] == [["search", "--seed", "1"], ["retrain", "R"]]
    for entry in entries:
        assert entry["data"] == {"name": "digits"}
        assert entry["python"] == platform.python_version()
    with RunFolder.open(tmp_path) as run:
        run.write_env()
    assert read_json(tmp_path / "env.json")[-1]["command"] == sys.argv


def test_a_replaced_section_is_what_the_folder_holds(tmp_path):
    with RunFolder.create(tmp_path / "run", config={"data": "old"}) as run:
        run.replace_config("search", {"data": "new"})
    with RunFolder.open(tmp_path / "run") as run:
        assert run.config == {"search": {"data": "new"}}
