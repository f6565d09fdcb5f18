import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import processes
import pytest

from dnas_ens.commands import retrain, search
from dnas_ens.commands.parse import run_main
from dnas_ens.errors import UserError
from dnas_ens.training import cluster
from dnas_ens.training.workers import worker_pool

SEARCH = (
    "--num-cells 1 --channels 2 --num-nodes 2 --epochs 1 --warmup-epochs 0 --members 3 --pool-size 4 --limit-train 96 "
    "--batch-size 24 --drawn-members 2 --device cpu"
)
RECIPE = "--num-cells 1 --channels 4 --batch-size 24 --device cpu --workers 2 --epochs".split()
#: Long enough to be interrupted.
EPOCHS = 120

TASKS = """
import os, signal, sys
from functools import partial
from dnas_ens.commands.parse import run_main
from dnas_ens.training.workers import completed, worker_pool

def main(argv):
    tasks = {
        "fine": partial(int, "1"),
        ("no number", 3): partial(int, "four"),
        "killed": partial(signal.raise_signal, signal.SIGKILL),
        "after them": partial(int, "2"),
        "where": os.getcwd,
    }
    with worker_pool(2, engine="ray") as pool:
        for result in completed(pool, tasks):
            print("result", result, flush=True)

if __name__ == "__main__":
    sys.exit(run_main(main))
"""

WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from dnas_ens.commands.parse import run_main
from dnas_ens.commands.retrain import main
sys.exit(run_main(main))
"""

pytest.importorskip("ray")
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in Linux's /proc")


def environment(**more):
    found = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**found, "OMP_NUM_THREADS": "2", "RAY_DEDUP_LOGS": "0", "NO_COLOR": "1", **more}


def start(*arguments, **more):
    """A command in a session of its own, by which its processes are known."""
    return processes.start(*arguments, stderr=subprocess.STDOUT, start_new_session=True, env=environment(**more))


def run(*arguments, **more):
    process = start(*arguments, **more)
    try:
        return process, process.communicate(timeout=240)[0]
    finally:
        process.kill()


def retraining(folder, *more, epochs=EPOCHS):
    return ["-m", "dnas_ens.retrain", folder, *RECIPE, epochs, *more]


def processes_of(session):
    """Those that run, not those that only wait to be reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == session and state != "Z":
            found.append(stat.parent)
    return found


def is_of_ray(process):
    """Whether it is one of the two agents that Ray itself ends within a minute of a killed driver."""
    try:
        return b"Agent" in (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def listening_addresses(session):
    """Hexadecimal addresses on which the processes of a session listen."""
    inodes = set()
    for process in processes_of(session):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(os.readlink(descriptor))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes}


def require_none_of(session, *, but=lambda process: False):
    deadline = time.monotonic() + 90
    while not all(map(but, processes_of(session))):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.1)


def wait_for(process, pattern):
    """Read what it prints up to a line with the pattern; return what was read and the match."""
    read = []
    for line in process.stdout:
        read.append(line)
        if match := re.search(pattern, line):
            return "".join(read), match
    raise AssertionError("".join(read))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster") / "searched"
    assert run_main(search.main, [*SEARCH.split(), "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def by_processes(searched):
    """The members as the engine local trains them, in two processes of a thread each."""
    folder = searched.with_name("by-processes")
    shutil.copytree(searched, folder)
    assert run_main(retrain.main, [*map(str, retraining(folder)[2:])]) == 0
    return members_of(folder)


def members_of(folder):
    """All that is known of trained members but what they took."""
    found = []
    for index in range(3):
        place = folder / "members" / str(index)
        member = json.loads((place / "member.json").read_text())
        # The sum over the whole file holds the seconds too; sha256 is of the weights.
        kept = {name: value for name, value in member.items() if "seconds" not in name and name != "content_sha256"}
        metrics = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        found.append((kept, [{**line, "time": None} for line in metrics]))
    return found, json.loads((folder / "ensemble.json").read_text())["temperature"]


@linux
@pytest.mark.slow
def test_a_killed_worker_goes_on_and_the_members_are_those_of_the_other_engine(searched, by_processes, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(searched, folder)
    process = start(*retraining(folder, "--engine", "ray"))
    before, match = wait_for(process, rf"\(member 0 pid=(\d+)\).* 1 of 3 (1\d)/{EPOCHS} ")
    addresses = listening_addresses(process.pid)
    os.kill(int(match[1]), signal.SIGKILL)
    assert not (folder / "members/0/member.json").exists()
    after = process.communicate(timeout=240)[0]
    assert process.returncode == 0, before + after
    assert members_of(folder) == by_processes
    # 127.0.0.1, by itself and in an address of IPv6: no other machine reaches a port.
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}
    # It was another process, and it did not begin anew.
    pids = re.findall(rf"\(member 0 pid=(\d+)\).* 1 of 3 \d+/{EPOCHS} ", before + after)
    assert len(set(pids)) == 2
    assert len(re.findall(f" 1 of 3 1/{EPOCHS} ", before + after)) == 1
    require_none_of(process.pid)


@linux
@pytest.mark.slow
def test_a_comparison_is_the_same_by_either_engine_though_a_worker_is_killed(tmp_path):
    folder = tmp_path / "local" / "R"
    few = [*SEARCH.split(), "--members", "2", "--pool-size", "2", "--run-dir", str(folder)]
    assert run_main(search.main, few) == 0
    assert run_main(retrain.main, [*map(str, retraining(folder, epochs=10)[2:])]) == 0
    shutil.copytree(tmp_path / "local", tmp_path / "ray")
    options = "--methods random-cells snapshots --pool-size 2 --workers 2 --device cpu --engine"

    def comparing(engine):
        place = tmp_path / engine
        return ["-m", "dnas_ens.compare", place / "R", "--output", place / "c", *options.split(), engine]

    process, printed = run(*comparing("local"))
    assert process.returncode == 0, printed
    process = start(*comparing("ray"))
    before, match = wait_for(process, r"pid=(\d+)\).* [2-5]/10 ")
    os.kill(int(match[1]), signal.SIGKILL)
    after = process.communicate(timeout=240)[0]
    assert process.returncode == 0, before + after
    tables = [rows_but_seconds(tmp_path / engine / "c.csv") for engine in ("local", "ray")]
    assert len(tables[0]) > 4
    assert tables[0] == tables[1]
    require_none_of(process.pid)


def rows_but_seconds(file):
    """The rows of a comparison without what they took."""
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


@linux
@pytest.mark.slow
def test_drivers_that_are_interrupted_and_killed_leave_nothing_behind_and_either_engine_goes_on(
    searched, by_processes, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(searched, folder)
    process = start(*retraining(folder, "--engine", "ray"))
    wait_for(process, rf"member 1 of 3 1\d/{EPOCHS} ")
    # To the whole group, as a terminal sends it.
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 130, told
    assert "continue with: python -m dnas_ens.retrain" in told
    assert "Traceback" not in told
    require_none_of(process.pid)
    with start(*retraining(folder, "--engine", "ray", "--resume")) as process:
        before, match = wait_for(process, rf"member . of 3 (\d+)/{EPOCHS} ")
        # Two drivers on one folder.
        second, told = run(*retraining(folder, "--engine", "ray", "--resume"))
        assert (second.returncode, f"is in use by process {process.pid}" in told) == (2, True), told
        process.kill()
        require_none_of(process.pid, but=is_of_ray)
    assert int(match[1]) > 10, before
    assert not (folder / "ensemble.json").exists()
    process, printed = run(*retraining(folder, "--resume"))
    assert process.returncode == 0, printed
    assert members_of(folder) == by_processes


@linux
@pytest.mark.slow
def test_failed_tasks_are_told_by_name_while_the_others_finish(tmp_path):
    script = tmp_path / "tasks.py"
    script.write_text(TASKS)
    process, printed = run(script)
    assert process.returncode == 2, printed
    assert {line for line in printed.splitlines() if line.startswith("result")} == {
        "result 1",
        "result 2",
        f"result {os.getcwd()}",
    }
    assert "failed: no number, 3: " in printed
    assert re.search("failed: killed: its process died 4 times", printed)
    error, remedy = printed.splitlines()[-2:]
    assert error.startswith("error: 2 of 5 tasks failed, the others are finished and kept. ")
    assert remedy.startswith("remedy: ")
    require_none_of(process.pid)


def test_ray_that_is_not_installed_is_told_in_a_line(searched, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(searched, folder)
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_RAY)
    process, printed = run(script, *retraining(folder, "--engine", "ray")[2:])
    assert process.returncode == 2
    assert printed.splitlines()[-2:] == [
        "error: --engine ray needs a package that is not installed: ray.",
        "remedy: pip install 'dnas_ens[cluster]', or leave --engine out.",
    ]


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_at_which_no_ray_answers_is_refused_in_time(monkeypatch, listens):
    monkeypatch.setattr(cluster, "TIMEOUT", 3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            # Connections are taken, and nothing is ever said.
            taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        cause = f"No Ray cluster can be joined at {address}, which RAY_ADDRESS names: "
        with pytest.raises(UserError, match=cause + ("nothing within 3 seconds" if listens else "Connection refused")):
            worker_pool(2, engine="ray").__enter__()


def test_tasks_that_no_machine_can_take_are_refused():
    small = {"Resources": {"CPU": 4.0, "GPU": 1.0}}
    assert cluster._slots([small, small], {"num_cpus": 2, "num_gpus": 0}) == 4
    assert cluster._slots([small, small], {"num_cpus": 1, "num_gpus": 0.3333}) == 6
    assert cluster._slots([{"Resources": {"machine": 1}}], {"num_cpus": 0, "resources": {"machine": 0.1428}}) == 7
    with pytest.raises(UserError, match="No machine of the Ray cluster has what a task needs: 8 CPU"):
        cluster._slots([small, small], {"num_cpus": 8, "num_gpus": 0})
