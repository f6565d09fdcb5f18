"""The session on a GPU, rehearsed: a crash, an interruption, what is left afterwards, and the table."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss

from dnas_ens.data import load_data

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
REHEARSAL = ("--rehearse", "--device", "cpu", "--out")


@pytest.fixture
def lines(read_lines):
    return lambda folder: read_lines(folder / "results.jsonl")


@pytest.fixture
def ends(lines):
    return lambda folder: [(line["section"], line["end"]) for line in lines(folder) if "end" in line]


@pytest.mark.slow
def test_what_crashed_or_was_interrupted_is_done_by_resuming(tmp_path, run_script, lines, ends):
    first, second = tmp_path / "first", tmp_path / "second"
    command = [sys.executable, EXPERIMENTS / "gpu_session.py", *REHEARSAL, first, "--crash", "3"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = first / "log.txt"
    while not (log.exists() and "--- section 5" in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert ends(first) == [
        (0, "done"), (3, "crashed"), (1, "done"), (7, "done"), (4, "done"), (5, "interrupted")
    ]  # fmt: skip
    assert "fails on purpose" in log.read_text()

    stdout, _ = run_script("gpu_session", *REHEARSAL, second, "--resume", first)
    assert f"next: python experiments/gpu_session.py --table {second}" in stdout
    # What was there is there still, and nothing that was finished is measured again.
    assert lines(second)[: len(lines(first))] == lines(first)
    assert ends(second)[len(ends(first)) :] == [(number, "done") for number in (3, 5, 6, 2, 8)]
    files = list(second.iterdir())
    assert len(files) <= 8
    assert max(file.stat().st_size for file in files) < 16 * 2**20
    assert all(file.is_file() for file in files)

    output = tmp_path / "table"
    run_script("gpu_session", "--table", second, "--output", output)
    text = output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert output.with_suffix(".jsonl").read_text() == (second / "results.jsonl").read_text()
    record = next(line for line in lines(second) if line.get("name") == "search pair, batch 64")
    slow, fast = (record["seconds"][name]["median"] for name in ("textbook, same images", "channels_last bfloat16"))
    assert f"| batch 64, channels_last bfloat16 | {1000 * fast:.1f} | {slow / fast:.1f}× |" in text
    # The mean member's NLL, computed by another library from what was kept.
    labels = load_data("digits").test.labels.numpy()
    with np.load(second / "log-probs-random-cells.npz") as stored:
        probs = np.exp(stored["test"].astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    expected = np.mean([log_loss(labels, member) for member in probs])
    # The size is the widest that takes hardly longer, which a rehearsal's two steps say by chance.
    (row,) = re.findall(r"\| random cells, size \d \| (.*) \|", text)
    assert float(row.split(" | ")[2]) == pytest.approx(expected, abs=1e-4)


def test_the_published_table_is_that_of_the_published_lines(tmp_path, run_script):
    published = EXPERIMENTS / "results" / "gpu.md"
    (tmp_path / "results.jsonl").write_text(published.with_suffix(".jsonl").read_text())
    run_script("gpu_session", "--table", tmp_path, "--output", tmp_path / "gpu")
    assert (tmp_path / "gpu.md").read_text() == published.read_text()


def test_what_does_not_fit_is_skipped_by_name(tmp_path, run_script, ends):
    stdout, stderr = run_script("gpu_session", *REHEARSAL, tmp_path, "--budget", 1, "--only", 0, 6)
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
def test_mistakes(arguments, message, tmp_path, run_script):
    assert message in run_script("gpu_session", "--out", tmp_path / "out", *arguments, code=2)[1]
    assert not (tmp_path / "out").exists()
