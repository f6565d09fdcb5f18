import importlib
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from dnas_ens.data import load_data
from dnas_ens.data.normalisation import normalise
from dnas_ens.errors import UserError
from dnas_ens.files import load_tensors
from dnas_ens.nn.reference_models import reference_model

SCRIPT = Path(__file__).parents[2] / "experiments" / "snapshot_ensemble.py"
TINY = ("--data", "digits", "--model", "small-cnn", "--limit-train", "320", "--learning-rate", "0.05")
SCALE = ("--epochs", "10", "--cycles", "2", "--last", "1")


def study(*arguments):
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    printed = study(*TINY, *SCALE, "--seeds", 2, "--run-dir", folder / "run", "--output", folder / "out")
    return folder, printed


def cells(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def scaled_nll(probs, labels, temperature):
    scaled = softmax(np.log(probs.astype(float)) / temperature, axis=1)
    return -np.log(scaled[np.arange(len(labels)), labels]).mean()


def test_table_is_what_the_stored_predictions_say(finished):
    folder, printed = finished
    text = (folder / "out.md").read_text()
    assert text.rstrip() in printed
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    names = [row["name"] for row in records[0]["rows"]]
    assert len(names) == 5
    for index, name in enumerate(names):
        values = {"accuracy": [], "nll": [], "calibrated": []}
        for seed, record in enumerate(records):
            stored = np.load(folder / "run" / f"seed-{seed}" / "predictions.npz")
            probs, labels = stored["test_probs"][index], stored["test_labels"]
            values["accuracy"].append(100 * (probs.argmax(1) == labels).mean())
            values["nll"].append(scaled_nll(probs, labels, 1.0))
            temperature = record["rows"][index]["temperature"]
            values["calibrated"].append(scaled_nll(probs, labels, temperature))
            # The temperature has the least NLL on val.
            val = [
                scaled_nll(stored["val_probs"][index], stored["val_labels"], temperature * factor)
                for factor in (0.95, 1.0, 1.05)
            ]
            assert val[1] == min(val)
        found = cells(text, name)
        for cell, column, tolerance in zip(found, values.values(), (0.006, 6e-5, 6e-5), strict=False):
            expected = statistics.fmean(column), statistics.stdev(column)
            assert [float(part) for part in cell.split(" ± ")] == pytest.approx(expected, abs=tolerance)
    published = text.split("## Beside the published table")[1]
    assert cells(published, "single best snapshot")[0] == "92.70"
    assert cells(published, "all snapshots, equal weights")[0] == "92.84"
    assert "Scale that was run: small-cnn (14,378 parameters), digits, 320 training" in text
    assert "**not** the published scale" in text
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_difference_is_that_of_the_table(finished):
    text = (finished[0] / "out.md").read_text()
    row = cells(text, "all snapshots, equal weights")
    other = cells(text, "one model, one cosine")
    gap = float(row[2].split()[0]) - float(other[2].split()[0])
    sentence = next(
        line
        for line in text.splitlines()
        if line.startswith("- *all snapshots, equal weights*") and "*one model, one cosine*" in line
    )
    assert float(re.search(r"\(([-+][\d.]+);", sentence)[1]) == pytest.approx(gap, abs=2e-4)


def test_rows_are_the_weighted_snapshots(finished):
    folder, _ = finished
    place = folder / "run" / "seed-1"
    record = json.loads((place / "rows.json").read_text())
    data = load_data("digits", limit_train=320)
    inputs = normalise(data.test.images, mean=data.mean, std=data.std)
    members = []
    for name in ("cycles/snapshot-0", "cycles/snapshot-1", "one-cosine/snapshot-0"):
        model = reference_model("small-cnn", 1, 10, 8).eval()
        model.load_state_dict(load_tensors(place / f"{name}.safetensors"))
        members.append(softmax(model(inputs).detach().double().numpy(), axis=1))
    stored = np.load(place / "predictions.npz")["test_probs"]
    weights = {row["name"]: row["weights"] for row in record["rows"]}
    for index, row in enumerate(record["rows"]):
        expected = np.tensordot(row["weights"], np.stack(members), axes=1)
        np.testing.assert_allclose(stored[index], expected, atol=1e-5)
    assert weights["last 1 snapshots, equal weights"] == [0, 1, 0]
    assert weights["all snapshots, equal weights"] == [0.5, 0.5, 0]
    assert weights["one model, one cosine"] == [0, 0, 1]
    assert weights["single best snapshot"].index(1) == int(np.argmin(record["val"]["single_nll"]))
    seeds = [
        json.loads((folder / "run" / f"seed-{seed}" / training / "training.json").read_text())["seeds"]
        for seed in (0, 1)
        for training in ("cycles", "one-cosine")
    ]
    # The two trainings of a seed differ in the schedule alone; all other seeds are apart.
    assert seeds[0] == seeds[1]
    assert seeds[2] == seeds[3]
    assert len({value for pair in (seeds[0], seeds[2]) for value in pair.values()}) == 6


def test_what_is_finished_is_not_run_again(finished):
    folder, printed = finished
    assert len(re.findall("^trained", printed, re.MULTILINE)) == 4
    where = ("--run-dir", folder / "run", "--output", folder / "again")
    # As if it had been interrupted before the last training and the evaluation of seed 1.
    (folder / "run" / "seed-1" / "rows.json").unlink()
    (folder / "run" / "seed-1" / "one-cosine" / "training.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "run" / "seed-0").rglob("*")}
    printed = study(*TINY, *SCALE, "--seeds", 2, *where)
    assert re.findall(r"^trained .*/(seed-\S+):", printed, re.MULTILINE) == ["seed-1/one-cosine"]
    assert {path: path.stat().st_mtime_ns for path in before} == before

    def timeless(name):
        lines = (folder / name).read_text().splitlines()
        return [re.sub(r'"cpu_seconds": [\d.e-]+', "", line) for line in lines]

    assert timeless("again.jsonl") == timeless("out.jsonl")


def test_other_settings_are_refused(finished, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("snapshot_ensemble")
    where = ("--run-dir", str(finished[0] / "run"), "--output", str(finished[0] / "other"))
    try:
        with pytest.raises(UserError, match="epochs is 10 there and 12 here"):
            module.main([*TINY, "--epochs", "12", *SCALE[2:], *where])
        with pytest.raises(UserError, match="The last 3 of 2 cycles"):
            module.main([*TINY, "--cycles", "2", *where])
    finally:
        for name in ("snapshot_ensemble", "studies", "weight_averaging"):
            sys.modules.pop(name, None)
    assert not (finished[0] / "other.md").exists()
