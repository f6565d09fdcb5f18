import json
import math
import re
import shutil
import statistics

import numpy as np
import pytest
import weight_averaging
from safetensors.numpy import load_file
from scipy.optimize import minimize_scalar

from dnas_ens.errors import UserError

#: EMA's decay is small enough for twelve steps.
TINY = ("--epochs", "6", "--ema-decay", "0.5", "--seeds", "2")
METHODS = 15


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_here):
    """A study of blobs with two seeds."""
    folder = tmp_path_factory.mktemp("study")
    where = ("--run-dir", folder / "run", "--output", folder / "averaging")
    return folder, run_here("weight_averaging", *TINY, *where)


def cross_entropy(logits, labels):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


def recomputed(place):
    """Accuracy, NLL and calibrated NLL of every test point, a method each, from the stored probabilities."""
    stored = np.load(place / "predictions.npz")
    rows = {}
    for name, val, test in zip(stored["methods"], stored["val_probs"], stored["test_probs"], strict=True):
        val, test = np.log(val.astype(float)), np.log(test.astype(float))
        # Over 1 / T, where the package searches over ln T.
        fitted = minimize_scalar(
            lambda inverse, val=val: (
                cross_entropy(inverse * val, stored["val_labels"]).mean() + 2 * np.log(inverse) ** 2 / val.shape[0]
            ),
            bounds=(0.05, 20),
            method="bounded",
            options={"xatol": 1e-9},
        )
        rows[str(name)] = (
            100 * (test.argmax(axis=1) == stored["test_labels"]).mean(),
            cross_entropy(test, stored["test_labels"]).mean(),
            cross_entropy(fitted.x * test, stored["test_labels"]),
        )
    return rows


def table_of(text, schedule):
    part = text.split(f"### Schedule {schedule}\n")[1].split("\n### ")[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[1:]}


def test_table_is_what_the_stored_predictions_say(finished, numbers, t_half_width):
    folder, _ = finished
    text = (folder / "averaging.md").read_text()
    for schedule in ("constant", "cosine"):
        rows = table_of(text, schedule)
        found = [recomputed(folder / "run" / f"mlp-{schedule}-{seed}") for seed in (0, 1)]
        assert list(rows) == list(found[0])
        assert len(rows) == METHODS
        for name, cells in rows.items():
            columns = list(zip(*(seed[name] for seed in found), strict=True))
            columns[2] = [losses.mean() for losses in columns[2]]
            for cell, column, tolerance in zip(cells[1:4], columns, (0.0051, 6e-5, 6e-5), strict=True):
                expected = [statistics.fmean(column), statistics.stdev(column)]
                assert numbers(cell) == pytest.approx(expected, abs=tolerance), name
            if name == "last model":
                assert cells[8:] == ["", ""]
                continue
            differences = np.stack([seed[name][2] - seed["last model"][2] for seed in found])
            if cells[8] == "0":
                assert np.abs(differences).max() < 2e-4
                assert cells[9] == "the same"
                continue
            means = differences.mean(axis=1)
            half = t_half_width(means)
            # Of 1000 points the bootstrap comes close to the normal interval.
            error = 1.96 * differences.mean(axis=0).std() / math.sqrt(differences.shape[1])
            mean = means.mean()
            told, p_value = numbers(cells[8]), float(re.search(r"p ([\d.e-]+)", cells[8])[1])
            assert told[:3] == pytest.approx([mean, mean - half, mean + half], abs=2e-4), name
            assert told[3:5] == pytest.approx([mean - error, mean + error], abs=0.1 * error + 1e-4), name
            if p_value > 0.05:
                assert cells[9] == "not distinguishable at this size"
            else:
                word = "better" if mean < 0 else "worse"
                assert (cells[9] == word) == (abs(mean) > half)
                assert cells[9].startswith(word)
    assert text.count("\n- constant: ") == text.count("\n- cosine: ") > 10
    assert (folder / "averaging.png").read_bytes().startswith(b"\x89PNG")


def test_kept_models_give_averages_and_choices(finished, read_lines):
    folder, _ = finished
    for record in read_lines(folder / "averaging.jsonl"):
        place = folder / "run" / f"mlp-{record['schedule']}-{record['seed']}"
        kept = [load_file(file) for file in sorted((place / "kept").iterdir())]
        assert len(kept) == 3
        swa = load_file(place / "averages" / "swa--equal-average-of-all-kept.safetensors")
        for name, tensor in swa.items():
            np.testing.assert_allclose(tensor, np.mean([state[name] for state in kept], axis=0), atol=1e-6)
        rows, curves = record["rows"], record["curves"]
        assert all(len(values) == 3 for name, values in curves.items() if not name.startswith("barrier"))
        for kind, name in (("equal", "equal"), ("linear", "linearly decaying")):
            name += " average of the last n"
            values = curves[f"{kind}_nll"]
            assert values[0] == curves["single_nll"][0] == curves["ensemble_nll"][0]
            assert rows[name]["num_averaged"] == 1 + values.index(min(values))
            assert rows[name]["val_nll"] == pytest.approx(min(values), abs=1e-6)
        assert rows["best single kept model"]["val_nll"] == pytest.approx(min(curves["single_nll"]), abs=1e-6)
        soup = rows["greedy soup of the kept models"]
        assert soup["val_nll"] <= min(curves["single_nll"]) + 1e-6
        ensemble = rows["ensemble of the last n (n of equal)"]
        assert ensemble["passes"] == rows["equal average of the last n"]["num_averaged"]
        own, branched = (rows[name]["training_cpu_seconds"] for name in ("last model", "uniform soup of the branches"))
        assert branched == own + record["branches_cpu_seconds"]


def test_what_is_finished_is_not_trained_again(finished, tmp_path, capsys, read_lines, timeless):
    folder, printed = finished
    assert len(re.findall(r": trained", printed)) == len(re.findall(r": evaluated", printed)) == 4
    shutil.copytree(folder / "run", tmp_path / "run")
    # One training was interrupted, another finished but not evaluated.
    shutil.rmtree(tmp_path / "run" / "mlp-constant-1")
    (tmp_path / "run" / "mlp-cosine-0" / "predictions.npz").unlink()
    output = tmp_path / "averaging"
    weight_averaging.main([*TINY, "--run-dir", str(tmp_path / "run"), "--output", str(output)])
    printed = capsys.readouterr().out
    done = re.findall(r"^(mlp\S+): (\w+)", printed, re.MULTILINE)
    assert done == [("mlp-cosine-0", "evaluated"), ("mlp-constant-1", "trained"), ("mlp-constant-1", "evaluated")]
    assert timeless(read_lines(output.with_suffix(".jsonl"))) == timeless(read_lines(folder / "averaging.jsonl"))
    for folders in (("run", "new"), ("new", "averaging")):
        options = (f"--{name}={tmp_path / part}" for name, part in zip(("run-dir", "output"), folders, strict=True))
        with pytest.raises(UserError, match="with other settings"):
            weight_averaging.main([*TINY, "--epochs", "7", *options])


def test_images_with_a_cell_and_a_reference_model(tmp_path, read_lines):
    genotypes = tmp_path / "genotypes.json"
    cell = [[["skip_connect", 0], ["max_pool_3x3", 1]]]
    genotypes.write_text(json.dumps({"base": {"genotype": {"normal": cell, "reduction": cell}}}))
    output = tmp_path / "averaging"
    weight_averaging.main(
        [
            *("--data", "digits", "--limit-train", "100", "--epochs", "2", "--seeds", "1", "--branches", "2"),
            *("--genotypes", str(genotypes), "--run-dir", str(tmp_path / "run"), "--output", str(output)),
        ]
    )
    records = {(record["model"], record["schedule"]): record for record in read_lines(output.with_suffix(".jsonl"))}
    assert len(records) == 4
    # Only the cell has BatchNorm.
    assert len(records["cell", "cosine"]["rows"]) == METHODS + 1
    assert len(records["small-cnn", "cosine"]["rows"]) == METHODS
    with pytest.raises(UserError, match="Did you mean small-cnn"):
        weight_averaging.main(["--data", "digits", "--model", "smal-cnn", "--run-dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
    assert "one seed tells nothing" in output.with_suffix(".md").read_text()
