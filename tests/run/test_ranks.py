"""Ranks: two processes of torchrun against one, what they refuse, and a rank that is killed."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import two_ranks

from dnas_ens.commands import evaluate, whole_way
from dnas_ens.commands.options import RunOptions, on_every_rank
from dnas_ens.commands.parse import run_main
from dnas_ens.config.fields import with_fields
from dnas_ens.errors import UserError
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import read_json
from dnas_ens.run.ranks import Ranks, _begin, as_typed, is_first, joined, launched
from dnas_ens.search.loop import SearchLoop
from dnas_ens.training.members import train_members

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = (
    "--num-cells 3 --channels 4 --num-nodes 2 --directions 2 --epochs 3 --warmup-epochs 1 --limit-train 128 "
    "--batch-size 32 --drawn-members 2 --penalty-draws 4 --members 2 --pool-size 4 --relaxation softmax --device cpu"
).split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def launch(rank, *command, size=2, port=None, **more):
    """Start a rank as torchrun would."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**ENVIRONMENT, **{name: str(value) for name, value in {**place, **more}.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes, *, seconds=60):
    """Exit codes, and what all of them told, without what torch's own log says."""
    told = [process.communicate(timeout=seconds)[1] for process in processes]
    assert "Traceback" not in "".join(told)
    lines = re.findall("^(?:error|remedy): .*$", "".join(told), re.MULTILINE)
    return [process.returncode for process in processes], lines


@pytest.fixture(scope="module")
def alone():
    return two_ranks.digits()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, alone):
    """What both ranks computed, and the folder of their states."""
    folder = tmp_path_factory.mktemp("ranks")
    loop = SearchLoop(with_fields(two_ranks.SEARCH, epochs=3), alone)
    loop.run_epoch()
    CheckpointStore(folder, name="one").save(1, loop.state_dict())
    script = Path(two_ranks.__file__)
    done = subprocess.run([*TORCHRUN, str(script), str(folder)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [read_json(folder / f"{rank}.json") for rank in (0, 1)], folder


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_close(found[name], value, **tolerance)
        elif isinstance(value, list) and isinstance(value[0], dict):
            for one, other in zip(found[name], value, strict=True):
                assert_close(one, other, **tolerance)
        else:
            np.testing.assert_allclose(found[name], value, err_msg=name, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", two_ranks.SEARCHES)
def test_two_ranks_search_as_one_process(ranks, alone, name):
    first, second = (found["searches"][name] for found in ranks[0])
    assert first == second
    assert_close(first, two_ranks.search(alone, two_ranks.SEARCHES[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", two_ranks.MEMBERS)
def test_two_ranks_train_a_member_as_one_process(ranks, alone, name):
    first, second = (found["members"][name] for found in ranks[0])
    assert first == second
    assert_close(first, two_ranks.member(alone, two_ranks.MEMBERS[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_synchronised_norms_are_batch_norm_of_all_images(ranks):
    plain, pointwise = (two_ranks.norms(None)[name] for name in ("plain", "pointwise"))
    for name, whole in (("plain", plain), ("pointwise", pointwise)):
        first, second = (found["norms"][name] for found in ranks[0])
        np.testing.assert_allclose(first["outputs"] + second["outputs"], whole["outputs"], rtol=1e-10, atol=1e-12)
        assert first["class"] == whole["class"]
        for rank in (first, second):
            for part in ("gradients", "statistics"):
                for one, other in zip(rank[part], whole[part], strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_rank_that_is_changed_by_hand_is_found(ranks):
    told = [found["apart"] for found in ranks[0]]
    assert told == ["The hypernetwork differs between ranks: rank 1 has other parameters than rank 0."] * 2


@pytest.mark.slow
def test_running_statistics_are_each_ranks_own_and_then_those_of_the_first(ranks):
    first, second = (found["local"] for found in ranks[0])
    assert first["before"] != second["before"]
    assert first["after"] == second["after"] == first["before"]


@pytest.mark.slow
def test_a_state_of_one_process_goes_on_on_two_and_back(ranks, alone):
    config = with_fields(two_ranks.SEARCH, epochs=3)
    straight = SearchLoop(config, alone)
    expected = [two_ranks.searched(straight, 1) for _ in range(3)]
    (first, second), folder = ranks
    assert first["gone on"] == second["gone on"]
    assert_close(first["gone on"], expected[1], rtol=1e-3, atol=1e-3)
    back = SearchLoop(config, alone)
    back.load_state_dict(CheckpointStore(folder, name="two").load_newest()[1])
    assert_close(two_ranks.searched(back, 1), expected[2], rtol=1e-2, atol=1e-2)


def children_of(process):
    """The ranks that torchrun has started, by rank."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            environment = dict(
                entry.split("=", 1) for entry in (place / "environ").read_text().split("\0") if "=" in entry
            )
        except OSError:
            continue
        if parent == process.pid and "RANK" in environment:
            found[environment["RANK"]] = int(place.name)
    return found


def content(folder):
    """Hashes of all weights, and the results without what they cost."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("members/*/*.safetensors")])
    rows = [
        {name: value for name, value in row.items() if "seconds" not in name and "cost" not in name}
        for row in read_json(folder / "results.json")
    ]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}, rows


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_a_killed_rank_is_started_again_and_changes_nothing(tmp_path):
    command = [*TORCHRUN, "--max-restarts", "1", "-m", "dnas_ens", *TINY, "--retrain.epochs", "2"]
    command += ["--retrain.channels", "4", "--retrain.batch-size", "32", "--run-dir"]
    straight = subprocess.run([*command, str(tmp_path / "A")], env=ENVIRONMENT, capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr
    folder = tmp_path / "B"
    killed = subprocess.Popen(
        [*command, str(folder)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    # The one that writes and holds the lock, while it trains a member.
    while killed.poll() is None and not (folder / "checkpoints" / "member-0-00000004.json").exists():
        time.sleep(0.005)
    os.kill(children_of(killed)["0"], signal.SIGKILL)
    told = killed.communicate(timeout=200)[1]
    assert killed.returncode == 0, told
    assert told.count("exitcode: -9") == 1
    assert content(folder) == content(tmp_path / "A")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    environment = read_json(folder / "env.json")
    assert [entry["processes"] for entry in environment] == [2, 2]


SEARCH = ["dnas_ens.search", *TINY]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "told"),
    [
        (["--epochs", "4"], "search.bilevel.epochs is 3 on rank 0 and 4 on rank 1"),
        (["--split-seed", "1"], 'data.fingerprint is "'),
    ],
)
def test_ranks_that_cannot_work_together_end_with_one_line(tmp_path, other, told):
    port, folder = free_port(), ["--run-dir", str(tmp_path / "R")]
    started = [
        launch(rank, *SEARCH, *folder, *(other if rank else []), port=port, DNAS_ENS_TIMEOUT=30) for rank in (0, 1)
    ]
    codes, lines = ends(started)
    assert codes == [2, 2]
    assert len([line for line in lines if told in line]) == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch_size": 30}, "2 processes times 2 drawn members do not divide a batch of 30 images"),
        ({"passes": "separate", "batch_size": 4}, "2 processes need 8 images for a step, and there are 4"),
    ],
)
def test_a_batch_must_have_a_share_for_every_rank_and_member(few_digits, monkeypatch, fields, told):
    monkeypatch.setattr("dnas_ens.run.ranks._current", Ranks(0, 2))
    with pytest.raises(UserError, match=told):
        SearchLoop(with_fields(two_ranks.SEARCH, **fields), few_digits)


def test_a_batch_must_have_a_share_for_every_rank(few_digits, monkeypatch):
    monkeypatch.setattr("dnas_ens.run.ranks._current", Ranks(0, 5))
    with pytest.raises(UserError, match="5 processes do not divide a batch of 24 images"):
        two_ranks.member(few_digits, {})


def test_each_rank_has_a_gpu_of_its_own():
    with pytest.raises(UserError, match="2 processes were given one device, cuda:1"):
        _begin(Ranks(0, 2), "cuda:1")


@pytest.mark.slow
def test_nobody_waits_for_ever(tmp_path):
    """An address where nobody is, a rank that does not come, and one that stops in the middle."""
    folder = ["--run-dir", str(tmp_path / "R")]
    waits = {"DNAS_ENS_TIMEOUT": 4}
    missing = [launch(rank, *SEARCH, *folder, port=free_port(), **waits) for rank in (1, 0)]
    port = free_port()
    more = ["--epochs", "200", *folder]
    started = [launch(rank, *SEARCH, *more, port=port, **waits) for rank in (0, 1)]
    while not list(tmp_path.glob("R/checkpoints/search-*.json")) and started[0].poll() is None:
        time.sleep(0.05)
    started[1].send_signal(signal.SIGSTOP)
    try:
        codes, lines = ends(started[:1])
    finally:
        started[1].kill()
        started[1].communicate()
    assert codes == [2]
    assert lines[0] == "error: A process of the 2 has ended, or has not answered for 4 seconds."
    codes, lines = ends(missing)
    assert codes == [2, 2]
    assert sum("The 2 processes did not meet at 127.0.0.1:" in line for line in lines) == 2


@pytest.fixture
def torchrun(monkeypatch):
    """Make this process look like one that torchrun has started."""

    def look(rank=0, size=2, **more):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**place, "MASTER_PORT": free_port(), **more}.items():
            monkeypatch.setenv(name, str(value))

    return look


def test_alone_nothing_is_shared_and_no_group_is_made():
    ranks = Ranks()
    values = object()
    assert not launched()
    assert is_first()
    assert ranks.shared(values) is values
    assert ranks.shared_state(values) is values
    assert ranks.means([values]) == [values]
    assert ranks.own(5) == slice(0, 5)
    with joined("cpu") as found:
        assert (found.size, str(found.device)) == (1, "cpu")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_is_told_by_the_first_rank(torchrun, capsys, rank):
    torchrun(rank)
    assert run_main(evaluate.main, ["R"]) == 2
    told = capsys.readouterr().err
    assert ("torchrun has started 2 processes of a command that is one process's." in told) == (rank == 0)
    assert run_main(whole_way.main, ["--budget", "10s"], shared=True) == 2
    told = capsys.readouterr().err
    assert ("torchrun has started 2 processes, but a budget is spent by one." in told) == (rank == 0)


def test_what_torchrun_says_is_taken_up(torchrun):
    torchrun(LOCAL_WORLD_SIZE=2, TORCHELASTIC_RESTART_COUNT=0)
    prog = "python -m dnas_ens.search"
    assert as_typed(prog, ["--x"]) == "torchrun --nproc-per-node 2 -m dnas_ens.search --x".split()
    options, seen = RunOptions(device="cpu", dry_run=True), []
    on_every_rank(lambda command, ranks, typed: seen.append((command.resume, ranks.size, typed)), options, ["a"])
    torchrun(size=8, LOCAL_WORLD_SIZE=2, TORCHELASTIC_RESTART_COUNT=1)
    assert as_typed(prog, []) == "torchrun --nnodes 4 --nproc-per-node 2 -m dnas_ens.search".split()
    on_every_rank(lambda command, ranks, typed: seen.append((command.resume, ranks.size, typed)), options, ["b"])
    assert seen == [(False, 1, ["a"]), (True, 1, ["b"])]
    torchrun(size=8, RANK=1, LOCAL_WORLD_SIZE=2)
    on_every_rank(lambda *_: seen.append("of another rank"), options, [])
    assert len(seen) == 2
    with joined("cpu", alone=True) as ranks:
        assert ranks.size == 1
    torchrun(DNAS_ENS_TIMEOUT="soon")
    with pytest.raises(UserError, match="DNAS_ENS_TIMEOUT is 'soon'"), joined("cpu"):
        pass


def test_one_process_of_torchrun_is_one_process(torchrun, tmp_path, few_digits):
    torchrun(size=1, DNAS_ENS_TIMEOUT=20)
    with joined("cpu", sync_batch_norm=True) as ranks:
        assert (ranks.size, ranks.sync_batch_norm) == (1, False)
        found = two_ranks.member(few_digits, {})
    assert found == two_ranks.member(few_digits, {})


def test_what_starts_again_needs_a_folder_that_it_finds(torchrun, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torchrun(size=1, TORCHELASTIC_MAX_RESTARTS=1)
    assert run_main(whole_way.main, TINY, shared=True) == 2
    assert "Name it with --run-dir, or leave out --max-restarts." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_ranks_have_no_workers_beside_them(few_digits, monkeypatch):
    monkeypatch.setattr("dnas_ens.run.ranks._current", Ranks(0, 2))
    with pytest.raises(UserError, match="--workers 3 asks for members side by side"):
        train_members([], few_digits, None, workers=3)
