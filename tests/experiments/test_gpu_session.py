"""The session on a GPU, rehearsed: a crash, an interruption, what is left afterwards, and the table."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss

SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu_session.py"


def session(*arguments):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def ends(folder):
    return [(line["section"], line["end"]) for line in lines(folder) if "end" in line]


def wait_for(text, file, process):
    for _ in range(3000):
        if file.exists() and text in file.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{file} never said {text!r}")


def running(folder):
    """The processes of a session's sections."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and b"section" in words:
            found.append(command)
    return found


@pytest.mark.slow
def test_what_crashed_or_was_interrupted_is_done_by_resuming(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    process = session("--rehearse", "--device", "cpu", "--out", first, "--crash", 3)
    wait_for("--- section 5", first / "log.txt", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert ends(first) == [
        (0, "done"), (3, "crashed"), (1, "done"), (7, "done"), (4, "done"), (5, "interrupted")
    ]  # fmt: skip
    assert "fails on purpose" in (first / "log.txt").read_text()
    if Path("/proc").exists():
        assert not running(first)

    process = session("--rehearse", "--device", "cpu", "--out", second, "--resume", first)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert f"next: python experiments/gpu_session.py --table {second}" in stdout
    # What was there is there still, and nothing that was finished is measured again.
    assert lines(second)[: len(lines(first))] == lines(first)
    assert ends(second)[len(ends(first)) :] == [
        (3, "done"),
        (5, "done"),
        (6, "done"),
        (2, "done"),
        (8, "done"),
    ]
    files = list(second.iterdir())
    assert len(files) <= 8
    assert max(file.stat().st_size for file in files) < 16 * 2**20
    assert all(file.is_file() for file in files)
    check_table(second, tmp_path / "table")


def check_table(folder, output):
    process = session("--table", folder, "--output", output)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    text = output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert lines(folder) == [
        json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()
    ]
    record = next(line for line in lines(folder) if line.get("name") == "search pair, batch 64")
    slow, fast = (
        record["seconds"][name]["median"] for name in ("textbook, same images", "channels_last bfloat16")
    )
    assert f"| batch 64, channels_last bfloat16 | {1000 * fast:.1f} | {slow / fast:.1f}× |" in text
    # The mean member's NLL, computed by another library from what was kept.
    from dnas_ens.data import load_data

    labels = load_data("digits").test.labels.numpy()
    with np.load(folder / "log-probs-random-cells.npz") as stored:
        probs = np.exp(stored["test"].astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    expected = np.mean([log_loss(labels, member) for member in probs])
    # The size is the widest that takes hardly longer, which a rehearsal's two steps say by chance.
    (row,) = re.findall(r"\| random cells, size \d \| (.*) \|", text)
    assert float(row.split(" | ")[2]) == pytest.approx(expected, abs=1e-4)


def test_what_does_not_fit_is_skipped_by_name(tmp_path):
    process = session("--rehearse", "--device", "cpu", "--out", tmp_path, "--budget", 1, "--only", 0, 6)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert ends(tmp_path) == [(0, "skipped"), (6, "skipped")]
    assert "section 6: skipped" in stderr
    assert f"next: python experiments/gpu_session.py --out {tmp_path} --resume {tmp_path}" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", 9), "There is no section"),
        (("--budget", 0), "--budget is 0"),
        (("--resume", "nowhere"), "There is no results.jsonl in nowhere"),
        (("--table", "nowhere"), "There is no results.jsonl in nowhere"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    process = session("--out", tmp_path / "out", *arguments)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in stderr
    assert not (tmp_path / "out").exists()
