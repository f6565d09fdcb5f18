import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "diversity_control.py"


def study(*arguments, code=0):
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], text=True, capture_output=True, timeout=240
    )
    assert process.returncode == code, process.stderr
    return process.stdout, process.stderr


def test_study_writes_table_and_plot_and_goes_on_where_it_stopped(tmp_path):
    output = tmp_path / "control"
    settings = ("--settings", "js-pairwise, R=1", "edge-overlap (EdgeNES v2), R=1", "--epochs", "3")
    study(*settings, "--seeds", "1", "--output", output)
    runs = [json.loads(line) for line in (tmp_path / "control.jsonl").read_text().splitlines()]
    assert [run["setting"] for run in runs] == ["js-pairwise, R=1", "edge-overlap (EdgeNES v2), R=1"]
    first = runs[0]
    assert len(first["lam"]) == len(first["distance"][0]) == len(first["shared"][0]) == 21
    assert first["distance"][0][0] == 0.0
    assert first["shared"][0][0] == 16
    errors = [abs(d - x) for d, x in zip(first["distance"][0], first["lam"], strict=True) if x <= 0.7]
    assert abs(first["tracking_error"] - sum(errors) / len(errors)) < 1e-9
    table = (tmp_path / "control.md").read_text()
    assert f"{first['tracking_error']:.3f}" in table
    assert "Command: `python experiments/diversity_control.py" in table
    assert (tmp_path / "control.png").read_bytes().startswith(b"\x89PNG")

    again, _ = study(*settings, "--seeds", "1", "--output", output)
    assert "Spearman 1" not in again.split("|")[0]
    assert len((tmp_path / "control.jsonl").read_text().splitlines()) == 2
    _, err = study(*settings[:3], "--epochs", "4", "--seeds", "1", "--output", output, code=2)
    assert "with other settings" in err


def test_table_is_mean_and_deviation_over_seeds():
    spec = importlib.util.spec_from_file_location("diversity_control", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["diversity_control"] = module
    spec.loader.exec_module(module)
    runs = [
        {
            **dict.fromkeys(module.COLUMNS, value),
            "setting": "none, R=4",
            "seed": seed,
            "between_over_lambda": None,
        }
        for seed, value in ((0, 1.0), (1, 2.0), (2, 3.0), (5, 7.0), (6, 9.0))
    ]
    row, fresh = module.table(runs).splitlines()[2:]
    assert row.startswith("| none, R=4 | 3 | 2.000 ± 1.000 |")
    assert "|  |" in row
    assert fresh.startswith("| none, R=4, fresh seeds | 2 | 8.000 ± 1.414 |")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in Linux's /proc")
def test_a_terminated_study_leaves_no_worker_behind(tmp_path):
    command = [sys.executable, str(SCRIPT), "--epochs", "500", "--output", str(tmp_path / "x")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while len(workers := children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # the pool has a resource tracker and a worker
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
