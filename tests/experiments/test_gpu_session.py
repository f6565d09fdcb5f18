"""The session on a GPU, rehearsed: a crash, an interruption, what is left afterwards, and the table."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_session
import numpy as np
import pytest
from sklearn.metrics import log_loss

from dnas_ens.data import load_data

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
REHEARSAL = ("--rehearse", "--device", "cpu", "--out")
PAIR = "search pair, batch 64"


@pytest.fixture
def ends(read_lines):
    return lambda out: [(line["section"], line["end"]) for line in read_lines(out / "results.jsonl") if "end" in line]


@pytest.mark.slow
def test_what_crashed_or_was_interrupted_is_done_by_resuming_and_tabled(tmp_path, run_script, read_lines, ends):
    first, second = tmp_path / "first", tmp_path / "second"
    only = ("--only", "0", "8", "6")
    command = [sys.executable, EXPERIMENTS / "gpu_session.py", *REHEARSAL, first, "--crash", "8", *only]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = first / "log.txt"
    while not (log.exists() and "--- section 6" in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert ends(first) == [(0, "done"), (8, "crashed"), (6, "interrupted")]
    assert "fails on purpose" in log.read_text()
    stdout, _ = run_script("gpu_session", *REHEARSAL, second, "--resume", first, *only)
    assert "left are sections 1, 2, 3, 4, 5, 7" in stdout
    # What was there is there still, and nothing that was finished is measured again.
    before = read_lines(first / "results.jsonl")
    assert read_lines(second / "results.jsonl")[: len(before)] == before
    assert ends(second)[3:] == [(8, "done"), (6, "done")]

    # The other sections in this process, which spares the imports.
    for number in (1, 3, 7, 4, 5, 2):
        gpu_session.main(["section", str(number), str(second), "200", "cpu", "rehearse"])
    files = list(second.iterdir())
    assert len(files) <= 8
    assert max(file.stat().st_size for file in files) < 16 * 2**20
    output = tmp_path / "table"
    gpu_session.main(["--table", str(second), "--output", str(output)])
    text = output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    measured, published = read_lines(second / "results.jsonl"), read_lines(output.with_suffix(".jsonl"))
    assert published[: len(measured)] == measured
    assert all(line["name"].startswith("scores, ") for line in published[len(measured) :])
    record = next(line for line in read_lines(output.with_suffix(".jsonl")) if line.get("name") == PAIR)
    slow, fast = (record["seconds"][name]["median"] for name in ("textbook, same images", "channels_last bfloat16"))
    assert f"| batch 64, channels_last bfloat16 | {1000 * fast:.1f} | {slow / fast:.1f}× |" in text
    # The mean member's NLL, computed by another library from what was kept.
    labels = load_data("digits").test.labels.numpy()
    with np.load(second / "log-probs.npz") as stored:
        probs = np.exp(stored["random cells, test"].astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    expected = np.mean([log_loss(labels, member) for member in probs])
    # The size is the widest that takes hardly longer, which a rehearsal's two steps say by chance.
    (row,) = re.findall(r"\| random cells, 3 of C=\d \| (.*) \|", text)
    assert float(row.split(" | ")[2]) == pytest.approx(expected, abs=1e-4)


def test_the_published_table_is_that_of_the_published_lines(tmp_path):
    published = EXPERIMENTS / "results" / "gpu.md"
    (tmp_path / "results.jsonl").write_text(published.with_suffix(".jsonl").read_text())
    gpu_session.main(["--table", str(tmp_path), "--output", str(tmp_path / "gpu")])
    assert (tmp_path / "gpu.md").read_text() == published.read_text()


def test_what_does_not_fit_is_skipped_by_name(tmp_path, run_script, ends):
    stdout, stderr = run_script("gpu_session", *REHEARSAL, tmp_path, "--budget", 1, "--only", 0, 6)
    assert ends(tmp_path) == [(0, "skipped"), (6, "skipped")]
    assert "section 6: skipped" in stderr
    assert f"next: python experiments/gpu_session.py --out {tmp_path} --resume {tmp_path}" in stdout
