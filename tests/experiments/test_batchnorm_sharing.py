import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "batchnorm_sharing.py"
SETTINGS = ("slices", "separate")
TINY = ("--epochs", "3", "--limit-train", "160", "--pool", "4", "--candidate-recipe-epochs", "1")
#: 97.5 % quantile of Student's t with one degree of freedom: two seeds.
T_OF_TWO = math.tan(0.475 * math.pi)


def study(*arguments, code=0):
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == code, process.stderr
    return process.stdout, process.stderr


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two seeds with a pool of two random genotypes and two candidates."""
    output = tmp_path_factory.mktemp("study") / "sharing"
    printed, _ = study(*TINY, "--seeds", "2", "--output", output)
    return output, printed


def kendall(first, second):
    """Tau by counting pairs; there are no ties."""
    pairs = list(combinations(range(len(first)), 2))
    signs = [math.copysign(1, (first[i] - first[j]) * (second[i] - second[j])) for i, j in pairs]
    return sum(signs) / len(pairs)


def expected_measures(search, trained):
    pool = search["candidates"]
    supernet = [candidate["supernet_val_nll"] for candidate in pool]
    retrained = [trained[search["seed"], candidate["cells"]] for candidate in pool]
    drawn = [index for index, candidate in enumerate(pool) if candidate["direction"] is None]
    own = [index for index, candidate in enumerate(pool) if candidate["direction"] is not None]
    errors = [
        abs(distance - lam)
        for row in search["distance"]
        for lam, distance in zip(search["lam"], row, strict=True)
        if lam <= 0.7
    ]
    return {
        "Kendall's τ, pool": kendall(supernet, retrained),
        **{
            f"Kendall's τ, {name}": kendall(
                [supernet[index] for index in chosen], [retrained[index] for index in chosen]
            )
            for name, chosen in (("random genotypes", drawn), ("candidates", own))
        },
        "Spearman(λ, D to base)": search["spearman_distance"],
        "Spearman(λ, shared edges)": search["spearman_shared"],
        "mean abs(D−λ), λ ≤ 0.7": statistics.fmean(errors),
        "relaxed val accuracy": search["relaxed_accuracy"],
        "discretisation gap": search["relaxed_accuracy"] - pool[0]["supernet_val_accuracy"],
        "supernet val NLL, random genotypes": statistics.fmean(supernet[index] for index in drawn),
        "supernet val NLL, candidates": statistics.fmean(supernet[index] for index in own),
        "retrained val NLL, candidates": statistics.fmean(retrained[index] for index in own),
        "CPU seconds of the search": search["cpu_seconds"],
    }


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def test_table_is_what_the_records_say(finished):
    output, _ = finished
    records = read(output.with_suffix(".jsonl"))
    trained = {
        (record["seed"], record["cells"]): record["val_nll"]
        for record in records
        if record["kind"] == "training"
    }
    found = {
        (record["setting"], record["seed"]): expected_measures(record, trained)
        for record in records
        if record["kind"] == "search"
    }
    assert sorted(found) == sorted((setting, seed) for setting in SETTINGS for seed in (0, 1))
    text = output.with_suffix(".md").read_text()
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    assert list(rows) == ["measure", *found["slices", 0]]
    for name in found["slices", 0]:
        columns = [[found[setting, seed][name] for seed in (0, 1)] for setting in SETTINGS]
        differences = [ours - exact for ours, exact in zip(*columns, strict=True)]
        half = T_OF_TWO * statistics.stdev(differences) / math.sqrt(2)
        mean = statistics.fmean(differences)
        expected = [
            *(value for column in columns for value in (statistics.fmean(column), statistics.stdev(column))),
            *differences,
            mean,
            mean - half,
            mean + half,
        ]
        # The label "λ ≤ 0.7" is not among the cells.
        assert numbers(" ".join(rows[name])) == pytest.approx(expected, abs=6e-4), name
        apart, alike = text.split("It is not distinguishable from 0 in ")
        assert name in (apart.split("is distinguishable from 0 in ")[1] if abs(mean) > half else alike)
    assert "2 seeds are few" in text
    assert "Command: `python experiments/batchnorm_sharing.py" in text
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_both_settings_rank_the_same_random_genotypes_each_trained_once(finished):
    records = read(finished[0].with_suffix(".jsonl"))
    for seed in (0, 1):
        pools = {
            record["setting"]: record["candidates"]
            for record in records
            if record["kind"] == "search" and record["seed"] == seed
        }
        drawn = [
            [candidate["genotype"] for candidate in pools[setting] if candidate["lam"] is None]
            for setting in SETTINGS
        ]
        assert len(drawn[0]) == 2
        assert drawn[0] == drawn[1]
        trained = [
            record["cells"] for record in records if record["kind"] == "training" and record["seed"] == seed
        ]
        assert sorted(trained) == sorted(
            {candidate["cells"] for pool in pools.values() for candidate in pool}
        )
    searches = [record for record in records if record["kind"] == "search"]
    assert {record["setting"]: record["config"]["objective"]["passes"] for record in searches} == {
        setting: setting for setting in SETTINGS
    }


def test_what_is_finished_is_not_run_again(finished, tmp_path):
    output, printed = finished
    whole = read(output.with_suffix(".jsonl"))
    assert len(re.findall(r"^seed \d", printed, re.MULTILINE)) == len(whole)
    lost = next(record for record in whole if record["kind"] == "training")
    kept = [record for record in whole if record is not lost]
    resumed = tmp_path / "sharing"
    resumed.with_suffix(".jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    printed, _ = study(*TINY, "--seeds", "2", "--output", resumed)
    assert re.findall(r"^seed \d, \w+", printed, re.MULTILINE) == ["seed 0, training"]
    *before, again = read(resumed.with_suffix(".jsonl"))
    assert before == kept
    timeless = [
        {name: value for name, value in record.items() if not name.endswith("_seconds")}
        for record in (lost, again)
    ]
    assert timeless[0] == timeless[1]
    tables = [
        path.with_suffix(".md").read_text().split("Test images were not read.")[1]
        for path in (output, resumed)
    ]
    assert tables[0] == tables[1]

    _, err = study("--epochs", "4", *TINY[2:], "--seeds", "2", "--output", resumed, code=2)
    assert "with other settings" in err


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in Linux's /proc")
def test_an_interrupted_study_leaves_no_worker_behind(tmp_path):
    command = [sys.executable, str(SCRIPT), "--epochs", "500", "--output", str(tmp_path / "x")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while len(workers := children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # the pool has a resource tracker and a worker
    # To the whole group, as a terminal sends it.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
