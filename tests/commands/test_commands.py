"""The commands as a user types them, in processes of their own, on real digits."""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import start

import dnas_ens as de
from dnas_ens.commands import compare, distil, evaluate, export, predict, retrain, search, whole_way
from dnas_ens.commands.parse import run_main
from dnas_ens.run.checkpoint import CheckpointStore
from dnas_ens.run.files import read_json

TINY = (
    "--num-cells 1 --channels 2 --num-nodes 2 --directions 3 --epochs 3 --warmup-epochs 1 --limit-train 96 "
    "--batch-size 24 --drawn-members 2 --members 3 --pool-size 9 --architecture-learning-rate 0.1 --device cpu"
).split()
TINY_RECIPE = "--num-cells 1 --channels 4 --epochs 2 --batch-size 16 --device cpu".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
#: What is typed behind the command that is named as next, to keep it short.
MORE = {"dnas_ens.retrain": TINY_RECIPE, "dnas_ens.compare": ["--methods", "ours"]}
MAINS = {
    "dnas_ens.retrain": retrain.main,
    "dnas_ens.evaluate": evaluate.main,
    "dnas_ens.compare": compare.main,
    "dnas_ens.report": evaluate.report_main,
}


def run(*arguments, cwd, code=0):
    process = start(*arguments, cwd=cwd, env=ENVIRONMENT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"{arguments}\n{out}\n{err}"
    return out, err


def refused(main, arguments, capsys):
    """Run a command that ends with one line of cause and one of remedy, in this process; return both."""
    assert run_main(main, arguments) == 2
    printed = capsys.readouterr()
    cause, remedy = printed.err.strip().splitlines()[-2:]
    assert (cause[:7], remedy[:8]) == ("error: ", "remedy: "), printed.err
    assert "Traceback" not in printed.out + printed.err
    return cause, remedy


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder that went the whole way, and what each command printed; after the search in this process."""
    folder = tmp_path_factory.mktemp("whole")
    printed = []
    command = ["-m", "dnas_ens.search", *TINY]
    while command:
        name, *arguments = command[1:]
        if name == "dnas_ens.search":
            out, _ = run(*command, cwd=folder)
        else:
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as stream:
                assert run_main(MAINS[name], arguments) == 0
            out = stream.getvalue()
        printed.append(out)
        # Exactly what the command said to type next.
        told = re.search(r"^next: python (.*)$", out, re.MULTILINE)
        following = shlex.split(told[1]) if told else []
        command = [*following, *next((more for name, more in MORE.items() if name in following), [])]
    return folder / "runs" / "001-digits", printed


def test_the_run_folder_holds_what_the_contract_says(finished):
    run_dir, printed = finished
    assert len(printed) == 5
    assert f"next: python -m dnas_ens.compare {run_dir}" in printed[2]
    assert f"next: python -m dnas_ens.report {run_dir}" in printed[3]
    names = (
        "config.json env.json splits.json metrics.jsonl genotypes.json hypernetwork.safetensors "
        "supernet.safetensors ensemble.json MODEL_CARD.md predictions.npz results.csv results.md results.json "
        "cells/base.svg cells/diversity.svg cells/member-2.svg members/2/model.safetensors members/2/metrics.jsonl "
        "report.html"
    )
    for name in names.split():
        assert (run_dir / name).stat().st_size > 0, name
    config = json.loads((run_dir / "config.json").read_text())
    assert config["search"]["bilevel"]["epochs"] == 3
    assert config["retrain"]["channels"] == 4
    splits = json.loads((run_dir / "splits.json").read_text())
    assert len(splits["indices"]["train"]) == 96


def test_an_ensemble_grows_and_shrinks_without_another_search(finished, tmp_path, capsys):
    folder = tmp_path / "grown"
    shutil.copytree(finished[0], folder)
    resumed = ["grown", "--resume", *TINY_RECIPE, "--members"]
    found = read_json(folder / "genotypes.json")
    assert found["ranking"][:3] == found["selected"]
    images = torch.zeros(2, 1, 8, 8)
    chosen = de.load(folder).member_probs(images)
    logs = [folder / f"members/{index}/metrics.jsonl" for index in range(3)]
    before = [file.stat().st_mtime_ns for file in logs]
    assert run_main(retrain.main, [*resumed, "4"]) == 0
    assert [file.stat().st_mtime_ns for file in logs] == before
    fourth = json.loads((folder / "members/3/member.json").read_text())["spec"]["genotype"]
    assert fourth == found["candidates"][found["ranking"][3]]["genotype"]
    assert fourth not in [found["candidates"][index]["genotype"] for index in found["selected"]]
    grown = de.load(folder).member_probs(images)
    assert len(grown) == 4
    assert torch.equal(grown[:3], chosen)
    assert run_main(retrain.main, [*resumed, "2"]) == 0
    assert torch.equal(de.load(folder).member_probs(images), grown[:2])
    capsys.readouterr()
    cause, _ = refused(retrain.main, [*resumed, "99"], capsys)
    assert f"99 members were asked for, but the search holds {len(found['ranking'])} candidates" in cause

    # An earlier version's search is ranked by the remedy that is named.
    del found["ranking"]
    (folder / "genotypes.json").write_text(json.dumps(found))
    cause, remedy = refused(retrain.main, [*resumed, "4"], capsys)
    assert "no ranking" in cause
    assert "--resume" in remedy
    assert run_main(search.main, [*TINY, "--run-dir", "grown", "--resume"]) == 0
    again, first = (read_json(one / "genotypes.json") for one in (folder, finished[0]))
    for one in (again, first):
        one["report"] = {key: value for key, value in one["report"].items() if not key.endswith("seconds")}
    assert again == first


def test_results_can_be_recomputed_from_predictions_or_the_folder_alone(finished, digits):
    run_dir, printed = finished
    with np.load(run_dir / "predictions.npz") as arrays:
        probs, labels = arrays["test_probs"], arrays["test_labels"]
    assert probs.shape == (3, 359, 10)
    rows = {row["name"]: row for row in json.loads((run_dir / "results.json").read_text())}
    averaged = probs.astype(np.float64).mean(0)
    nll = -np.log(averaged[np.arange(359), labels]).mean()
    assert rows["ensemble"]["nll"] == pytest.approx(nll, rel=1e-5)
    assert rows["ensemble"]["accuracy"] == (averaged.argmax(1) == labels).mean()
    assert rows["ensemble"]["nll"] <= rows["average member"]["nll"]
    assert f"{rows['ensemble']['nll']:.4f}" in printed[2]
    ensemble = de.load(run_dir)
    np.testing.assert_allclose(ensemble.predict_probs(digits.test), probs, atol=1e-5)
    assert ensemble.evaluate(digits.test)["accuracy"] == rows["ensemble"]["accuracy"]


def test_predict_writes_a_row_for_every_picture(finished, tmp_path, digits, capsys):
    run_dir, _ = finished
    for index in range(5):
        path = tmp_path / "pictures" / ("more" if index > 2 else "") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.test.images[index, 0].numpy()).save(path)
    (tmp_path / "pictures" / "broken.png").write_text("no image")
    (tmp_path / "pictures" / "notes.txt").write_text("no image either")
    command = [str(run_dir), "pictures"]
    assert "broken.png cannot be read" in refused(predict.main, command, capsys)[0]
    command.append("--skip-bad-images")
    assert run_main(predict.main, [*command, "--batch-size", "2"]) == 0
    printed, err = capsys.readouterr()
    assert "left out: pictures/broken.png cannot be read" in err
    assert "5 images classified by 3 members, 1 left out" in err
    assert run_main(predict.main, [*command, "--output", "out/labels.csv"]) == 0
    assert (tmp_path / "out/labels.csv").read_text() == printed
    rows = list(csv.DictReader(printed.splitlines()))
    names = [f"pictures/{name}" for name in ("0.png", "1.png", "2.png", "more/3.png", "more/4.png")]
    assert [row["path"] for row in rows] == names
    ensemble = de.load(run_dir)
    probs = ensemble.predict_probs(digits.test.images[:5]).astype(float)
    averaged = probs.mean(axis=0) ** (1 / float(ensemble.temperature))
    averaged /= averaged.sum(axis=1, keepdims=True)
    assert [int(row["label"]) for row in rows] == averaged.argmax(axis=1).tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(averaged.max(axis=1), abs=1e-4)
    entropy = -(averaged * np.log(averaged)).sum(axis=1)
    assert [float(row["entropy"]) for row in rows] == pytest.approx(entropy, abs=1e-4)
    votes = (probs.argmax(axis=2) == averaged.argmax(axis=1)).sum(axis=0)
    assert [int(row["votes"]) for row in rows] == votes.tolist()


def test_rows_are_kept_where_predict_ends_early(finished, tmp_path, digits, capsys):
    for index in range(5):
        Image.fromarray(digits.test.images[index, 0].numpy()).save(tmp_path / f"{index}.png")
    command = [str(finished[0]), *(f"{index}.png" for index in range(5)), "--batch-size", "2", "--output", "rows.csv"]
    assert run_main(predict.main, command) == 0
    complete = (tmp_path / "rows.csv").read_text()
    assert not (tmp_path / "rows.partial.csv").exists()
    (tmp_path / "4.png").write_bytes(b"no image")
    capsys.readouterr()
    assert run_main(predict.main, command) == 2
    told, *error = capsys.readouterr().err.splitlines()
    assert told == "ended early: the first 4 rows are in rows.partial.csv, which the next run replaces"
    assert "4.png cannot be read" in error[0]
    assert (tmp_path / "rows.partial.csv").read_text().splitlines() == complete.splitlines()[:5]
    assert (tmp_path / "rows.csv").read_text() == complete
    # Nothing is left of a run without a row.
    (tmp_path / "0.png").write_bytes(b"no image")
    assert "0.png cannot be read" in refused(predict.main, command, capsys)[0]
    assert not (tmp_path / "rows.partial.csv").exists()


@pytest.mark.parametrize(("output", "cause"), [("out", "--output out is a folder"), ("0.png/rows", "Cannot write")])
def test_where_rows_cannot_go_is_told_before_a_picture_is_read(finished, tmp_path, capsys, output, cause):
    (tmp_path / "out").mkdir()
    (tmp_path / "0.png").write_bytes(b"no image")
    assert cause in refused(predict.main, [str(finished[0]), "0.png", "--output", output], capsys)[0]


def test_a_distilled_network_stands_beside_the_ensemble(finished, tmp_path, capsys):
    shutil.copytree(finished[0], "R")
    assert run_main(distil.main, ["R", "--epochs", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"the ensemble of 3 ([\d.]+), member (\d) ([\d.]+), the network distilled .* ([\d.]+)\n", printed)
    notes = [read_json(tmp_path / f"R/members/{index}/member.json") for index in range(3)]
    best = min(range(3), key=lambda index: notes[index]["val_nll"])
    assert int(found[2]) == best
    assert float(found[3]) == pytest.approx(notes[best]["val_nll"], abs=1e-4)
    student = de.load("R/distilled")
    assert student.num_members == 1
    assert student.members[0].spec() == notes[best]["spec"]
    assert "already" in refused(distil.main, ["R"], capsys)[0]
    before = (tmp_path / f"R/distilled/members/{best}/model.safetensors").read_bytes()
    assert run_main(distil.main, ["R", "--epochs", "2", "--device", "cpu", "--resume"]) == 0
    assert (tmp_path / f"R/distilled/members/{best}/model.safetensors").read_bytes() == before
    assert run_main(evaluate.main, ["R", "--device", "cpu"]) == 0
    names = [row["name"] for row in read_json(tmp_path / "R/results.json")]
    assert names[-2:] == ["distilled", "ensemble"]
    # A student costs its teacher too.
    seconds = {row["name"]: row.get("train_seconds") for row in read_json(tmp_path / "R/results.json")}
    own = read_json(tmp_path / f"R/distilled/members/{best}/member.json")["cpu_seconds"]
    assert seconds["distilled"] == pytest.approx(seconds["ensemble"] + own)
    assert run_main(evaluate.main, ["R", "--from-predictions"]) == 0
    assert [row["name"] for row in read_json(tmp_path / "R/results.json")] == names
    assert "Member 3 was asked for" in refused(distil.main, ["R", "--member", "3", "--resume"], capsys)[0]
    # Its file would be compared on images of the run.
    exported = export.ExportCommand(folder=Path("R/distilled"), output=Path("d.pt2"))
    assert len(export.compared_images(exported, student)) == export.NUM_COMPARED


def test_what_is_distilled_from_cycles_is_trained_as_long_as_they_all_are(finished, capsys):
    shutil.copytree(finished[0], "R", ignore=shutil.ignore_patterns("members", "checkpoints", "ensemble.json"))
    assert run_main(retrain.main, ["R", *TINY_RECIPE, "--cycles", "1", "--cycle-epochs", "1"]) == 0
    assert run_main(distil.main, ["R", "--device", "cpu"]) == 0
    note = read_json(next(Path("R/distilled/members").glob("*/member.json")))
    assert (note["epochs"], note["recipe"]["learning_rate"]) == (3, 0.05)


def test_predict_names_more_classes_sets_and_abstains(finished, tmp_path, digits, capsys):
    run_dir, _ = finished
    (tmp_path / "pictures").mkdir()
    for index in range(40):
        Image.fromarray(digits.test.images[index, 0].numpy()).save(tmp_path / f"pictures/{index:02d}.png")
    ensemble = de.load(run_dir)
    with np.load(run_dir / "predictions.npz") as arrays:
        val_probs, val_labels = arrays["val_probs"].astype(float), arrays["val_labels"]

    def tempered(probs):
        scaled = probs.mean(axis=0) ** (1 / float(ensemble.temperature))
        return scaled / scaled.sum(axis=1, keepdims=True)

    of_right = np.sort(tempered(val_probs)[np.arange(len(val_labels)), val_labels])[::-1]
    threshold = of_right[int(np.ceil((len(val_labels) + 1) * 0.8)) - 1]
    probs = tempered(ensemble.predict_probs(digits.test.images[:40]).astype(float))
    limit = f"{np.median(probs.max(axis=1)):.5f}"
    command = [str(run_dir), "pictures/*.png", "--top-k", "3", "--coverage", "0.8", "--abstain-below", limit]
    assert run_main(predict.main, [*command, "--output", "rows.jsonl"]) == 0
    err = capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row, each in zip(rows, probs, strict=True):
        order = np.argsort(-each)
        assert [name for name, _ in row["top"]] == [str(label) for label in order[:3]]
        assert [share for _, share in row["top"]] == pytest.approx(each[order[:3]], abs=1e-4)
        assert row["label"] == (str(order[0]) if each.max() >= float(limit) else None)
        assert row["set"] == [str(k) for k in range(10) if each[k] >= threshold or k == order[0]]
    left = sum(row["label"] is None for row in rows)
    assert left == 20
    assert f"40 images classified by 3 members, {left} without a label; " in err
    assert "images/s" in err
    # The same as CSV.
    assert run_main(predict.main, command) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["set"] for row in table] == ["|".join(row["set"]) for row in rows]
    assert [row["label_3"] for row in table] == [row["top"][2][0] for row in rows]


def test_predict_by_a_cascade_asks_fewer_members(finished, tmp_path, digits, capsys):
    run_dir, _ = finished
    (tmp_path / "pictures").mkdir()
    for index in range(60):
        Image.fromarray(digits.test.images[index, 0].numpy()).save(tmp_path / f"pictures/{index:02d}.png")
    command = [str(run_dir), "pictures", "--cascade", "--cascade-loss", "0.1", "--coverage", "0.9"]
    assert run_main(predict.main, command) == 0
    printed, err = capsys.readouterr()
    rows = list(csv.DictReader(printed.splitlines()))
    asked = np.array([int(row["asked"]) for row in rows])
    assert f"{asked.mean():.2f} of them asked on average" in err
    assert 1 <= asked.mean() < 3
    assert all(int(row["votes"]) <= int(row["asked"]) for row in rows)
    # A folder that was not evaluated has nothing to fit on.
    de.load(run_dir).save(tmp_path / "saved")
    cause, remedy = refused(predict.main, ["saved", "pictures", "--cascade"], capsys)
    assert "saved/predictions.npz" in cause or "no predictions" in cause
    assert "evaluate" in remedy


def test_predict_refuses_what_it_cannot_classify(finished, tmp_path, capsys):
    for given, cause in {
        "": "No image was given",
        "nowhere.png": "nowhere.png does not exist",
        ".": ". holds no images",
        ". --batch-size 0": "--batch-size is 0",
        ". --top-k 0": "--top-k is 0",
        ". --abstain-below 1.5": "--abstain-below is 1.5",
        "*.jpg": "*.jpg does not exist",
    }.items():
        assert cause in refused(predict.main, [str(finished[0]), *given.split()], capsys)[0]


def test_nothing_is_overwritten(finished, monkeypatch, capsys):
    run_dir, _ = finished
    monkeypatch.chdir(run_dir.parent.parent)
    again = [*TINY, "--run-dir", "runs/001-digits"]
    cause, remedy = refused(search.main, again, capsys)
    assert "already holds a search" in cause
    assert "--resume" in remedy
    assert "search.seed is 0 there and 5 here" in refused(search.main, [*again, "--seed", "5"], capsys)[0]
    before = (run_dir / "members/0/model.safetensors").read_bytes()
    assert run_main(retrain.main, ["runs/001-digits", *TINY_RECIPE, "--resume"]) == 0
    assert (run_dir / "members/0/model.safetensors").read_bytes() == before


def test_an_interrupted_search_resumes_to_the_same_genotypes(finished, tmp_path):
    run_dir, _ = finished
    process = start("-m", "dnas_ens.search", *TINY, env=ENVIRONMENT)
    while process.poll() is None and not list(tmp_path.glob("runs/001-*/checkpoints/search-*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # What it says is what goes on with it, the numbered folder named.
    python, *told = shlex.split(re.search(r"interrupted; continue with: (.*)", err)[1])
    assert (python, told[-3:]) == ("python", ["--run-dir", "runs/001-digits", "--resume"])
    assert run_main(search.main, told[2:]) == 0
    again = tmp_path / "runs/001-digits"
    ours, theirs = (json.loads((folder / "genotypes.json").read_text()) for folder in (again, run_dir))
    assert ours["candidates"] == theirs["candidates"]
    assert ours["selected"] == theirs["selected"]
    lines = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["phase"] == "search"] == [1, 2, 3]


def test_the_whole_way_in_one_command_with_a_file_and_a_dry_run(tmp_path, capsys):
    settings = {
        "search": {
            "supernet": {"num_cells": 1, "channels": 2, "num_nodes": 2},
            "bilevel": {"epochs": 2, "warmup_epochs": 0, "architecture_learning_rate": 0.1},
            "candidates": {"members": 2, "pool_size": 4},
            "data": {"limit_train": 96},
        },
        "retrain": {"num_cells": 1, "channels": 2, "epochs": 1},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command = "--config settings.json --retrain.batch-size 24 --device cpu".split()
    assert run_main(whole_way.main, [*command, "--dry-run", "--price-per-hour", "3600"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^in all: time: 0:\d\d, CPU-hours: .*, price: \d+\.\d\d$", out, re.MULTILINE)
    assert '"batch_size": 24' in out
    assert "memory mib" in out
    assert not (tmp_path / "runs").exists()
    assert run_main(whole_way.main, command) == 0
    out = capsys.readouterr().out
    assert "| ensemble " in out
    assert f"next: python -m dnas_ens.compare {tmp_path}/runs/001-digits" in out
    stored = json.loads((tmp_path / "runs/001-digits/config.json").read_text())
    assert stored["retrain"]["batch_size"] == 24
    assert stored["search"]["supernet"]["channels"] == 2
    # The same file for one command, and a dry run of it.
    assert run_main(retrain.main, ["runs/001-digits", "--config", "settings.json", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parameters a member" in out
    assert "CPU-hours: " in out


def test_given_genotypes_are_trained_without_a_search(finished, tmp_path, capsys):
    recipe = "--limit-train 60 --retrain.channels 4 --retrain.num-cells 1 --retrain.epochs 1 --device cpu".split()
    assert run_main(whole_way.main, [*recipe, "--genotypes", str(finished[0]), "--run-dir", "again"]) == 0
    out = capsys.readouterr().out
    assert f"next: python -m dnas_ens.compare {tmp_path}/again" in out
    assert "cells: again/cells" in out
    assert len(list(Path("again/cells").glob("member-*.svg"))) == 3
    searched, trained = (read_json(folder / "ensemble.json")["members"] for folder in (finished[0], Path("again")))
    assert [m["spec"]["genotype"] for m in trained] == [m["spec"]["genotype"] for m in searched]
    assert len(list(Path("again/members").iterdir())) == 3
    # A list of genotypes, one of them twice; of another number of nodes than the settings have.
    cell = read_json(finished[0] / "genotypes.json")["base"]["genotype"]
    Path("cells.json").write_text(json.dumps([cell, cell]))
    assert run_main(whole_way.main, [*recipe, "--genotypes", "cells.json", "--dry-run"]) == 0
    assert "members: 2" in capsys.readouterr().out
    assert run_main(whole_way.main, [*recipe, "--genotypes", "cells.json", "--run-dir", "twice"]) == 0
    assert {json.dumps(m["spec"]["genotype"]) for m in read_json(Path("twice/ensemble.json"))["members"]} == {
        json.dumps(cell)
    }
    Path("none.json").write_text("[]")
    for arguments, cause, remedy in (
        (["none.json"], "holds no genotype", "one or more"),
        (["cells.json", "--space", "darts"], "cells of the space efficient", "Give --space efficient"),
        (["cells.json", "--budget", "5m"], "Genotypes and a budget", "Give --genotypes or a budget"),
        (["absent.json"], "Cannot read the genotype absent.json", "JSON file of genotypes"),
        (["cells.json", "--members=3"], "--members was given", "Leave --members out"),
    ):
        said = refused(whole_way.main, [*recipe, "--run-dir", "no", "--genotypes", *arguments], capsys)
        assert cause in said[0]
        assert remedy in said[1]
    assert not Path("no").exists()


BUDGET = "--limit-train 96 --retrain.channels 4 --retrain.batch-size 16 --device cpu".split()


def test_a_budget_is_spent_evaluated_and_raised_by_what_is_printed(tmp_path, monkeypatch, capsys):
    assert run_main(whole_way.main, [*BUDGET, "--budget-epochs", "12"]) == 0
    out, err = capsys.readouterr()
    assert "budget: first network: ensemble of 1, calibrated NLL on val" in err
    assert "| ensemble " in out
    folder = tmp_path / "runs/001-digits"
    assert "Where the budget went" in (folder / "report.html").read_text()
    members = read_json(folder / "ensemble.json")["members"]
    assert len(list((folder / "cells").glob("member-*.svg"))) == len(members)
    given = ["--genotypes", str(folder / "ensemble.json"), *BUDGET, "--dry-run"]
    assert run_main(whole_way.main, given) == 0
    assert f"members: {len(members)}" in capsys.readouterr().out
    # Without its budget it is not taken for a run that was interrupted.
    said = refused(whole_way.main, [*BUDGET, "--run-dir", str(folder), "--resume"], capsys)
    assert "are those of a budget" in said[0]
    searched = ["--limit-train", "96", "--device", "cpu", "--run-dir", str(folder), "--resume"]
    assert "are those of a budget" in refused(search.main, searched, capsys)[0]
    assert not (folder / "genotypes.json").exists()
    spent = json.loads((folder / "budget.json").read_text())["spent"]
    assert 8 < spent <= 12
    costs = [json.loads(path.read_text())["cpu_seconds"] for path in folder.glob("members/*/member.json")]
    row = json.loads((folder / "results.json").read_text())[-1]
    assert row["train_seconds"] == pytest.approx(sum(costs), rel=0.01)
    following = shlex.split(re.search(r"next, to spend more: (.*)", out)[1])
    assert following[-5:] == ["--budget-epochs", "24", "--run-dir", str(folder), "--resume"]
    # As a process leaves it that was killed between a unit and its line.
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"budget"' in line]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:-1]))
    # From any folder.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_main(whole_way.main, following[3:]) == 0
    monkeypatch.chdir(tmp_path)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    done = json.loads((folder / "budget.json").read_text())["done"]
    assert [line["val_nll"] for line in logged if line["phase"] == "budget"] == [unit["loss"] for unit in done]
    assert 12 < json.loads((folder / "budget.json").read_text())["spent"] <= 24
    # It is an ensemble like any other, but its networks are not one a genotype.
    capsys.readouterr()
    assert run_main(evaluate.main, ["runs/001-digits"]) == 0
    assert "dnas_ens.compare" not in capsys.readouterr().out


def test_ctrl_c_keeps_what_a_budget_has_bought(tmp_path, capsys):
    process = start("-m", "dnas_ens", *BUDGET, "--budget", "2m", "--run-dir", "bought", env=ENVIRONMENT)
    said = ""
    while "budget: the best network" not in said and "budget: another" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "holds the best ensemble so far" in rest
    assert "--run-dir bought --resume" in rest
    assert run_main(evaluate.main, [str(tmp_path / "bought")]) == 0
    assert "| ensemble " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (["--budget", "soon"], "'soon' is no time", "90s, 30m"),
        (["--budget", "5m", "--budget-epochs", "3"], "A budget of time and one of epochs", "--budget or"),
        (["--budget-epochs", "0"], "--budget-epochs is 0", "1 or more"),
        (["--budget-epochs", "9", "--retrain.seed", "-1"], "--seed is -1", "Give --seed"),
        (["--budget", "0.001s"], "more than the budget", "or more, or fewer images"),
        (["--budget", "5m", "--engine", "ray"], "--engine is ray", "Leave --engine out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_budgets_that_cannot_be(tmp_path, capsys, arguments, cause, remedy):
    said = refused(whole_way.main, [*BUDGET, *arguments], capsys)
    assert cause in said[0]
    assert remedy in said[1]


def test_the_price_of_a_budget(capsys):
    assert run_main(whole_way.main, [*BUDGET, "--budget", "90m", "--dry-run", "--price-per-hour", "3"]) == 0
    out = capsys.readouterr().out
    assert "budget: 0:00 of 1:30:00" in out
    assert "price: 4.50" in out


def test_members_have_the_stem_of_their_search(tmp_path, capsys):
    # At 24 pixels the default is a stride of 2.
    write_photos(tmp_path / "photos", {"dark": 40, "light": 200}, 12, shape=(24, 24, 3))
    searched = "--data photos --likelihood none --star-steps 2 --members 2 --pool-size 6 --stem-stride 1".split()
    recipe = "--num-cells 3 --channels 4 --epochs 1 --device cpu --workers 1".split()
    assert run_main(search.main, [*searched, "--num-cells", "3", "--run-dir", "found", "--device", "cpu"]) == 0
    for more, stride in (([], 1), (["--stem-stride", "2", "--resume"], 2)):
        assert run_main(retrain.main, ["found", *recipe, *more]) == 0
        members = read_json(Path("found/ensemble.json"))["members"]
        assert {member["spec"]["stem_stride"] for member in members} == {stride}
        shutil.rmtree("found/members")
        shutil.rmtree("found/checkpoints")


def write_photos(folder, shades, count, shape=(8, 8, 3)):
    generator = np.random.default_rng(0)
    for label, shade in shades.items():
        (folder / label).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(max(0, shade - 40), shade + 40, shape).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")


def test_pictures_in_a_folder_go_the_whole_way_and_may_move(tmp_path, monkeypatch, capsys):
    write_photos(tmp_path / "photos", {"dark": 40, "light": 200}, 30, (20, 24, 3))
    arguments = [*TINY, "--data", "photos", "--image-size", "16", "--limit-train", "36", "--batch-size", "8"]
    assert run_main(search.main, arguments) == 0
    run_dir = str(tmp_path / "runs/001-photos")
    assert run_main(retrain.main, [run_dir, *TINY_RECIPE]) == 0
    # Continued from another directory, and after the folder has moved, of which the run takes note.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_main(evaluate.main, [run_dir]) == 0
    assert "photos, 12 test images" in capsys.readouterr().out
    (tmp_path / "photos").rename(tmp_path / "my photos")
    cause, remedy = refused(evaluate.main, [run_dir], capsys)
    assert f"are not at {tmp_path}/photos any more" in cause
    assert "--data" in remedy
    moved = ["--data", str(tmp_path / "my photos")]
    assert run_main(search.main, [*arguments, *moved, "--run-dir", run_dir, "--resume"]) == 0
    (tmp_path / "my photos").rename(tmp_path / "our photos")
    assert run_main(compare.main, [run_dir, "--methods", "ours", "--data", str(tmp_path / "our photos")]) == 0
    (tmp_path / "our photos").rename(tmp_path / "my photos")
    assert run_main(evaluate.main, [run_dir, *moved]) == 0
    assert run_main(evaluate.main, [run_dir]) == 0
    capsys.readouterr()
    assert "are not those" in refused(evaluate.main, [run_dir, "--data", "digits"], capsys)[0]
    # The same folder with another picture is another data set.
    Image.new("RGB", (24, 20)).save(tmp_path / "my photos/light/more.png")
    assert "are not those" in refused(evaluate.main, [run_dir], capsys)[0]


def test_what_is_printed_as_next_runs_for_a_folder_with_a_space_and_keeps_the_flip(tmp_path, capsys, caplog):
    write_photos(tmp_path / "my photos", {"left": 128, "right": 128}, 12)
    tiny = [word for word in TINY if word not in ("--limit-train", "96")]
    tiny[tiny.index("--batch-size") + 1] = "4"
    command = [*tiny, "--data", "my photos", "--run-dir"]
    assert run_main(search.main, [*command, "my run"]) == 0
    out = capsys.readouterr().out
    assert "does not mirror" in caplog.text
    for following, main in MAINS.items():
        told = shlex.split(re.search(r"^next: (.*)$", out, re.MULTILINE)[1])
        assert told == ["python", "-m", following, str(tmp_path / "my run")]
        assert run_main(main, told[3:] + MORE.get(told[2], [])) == 0
        out = capsys.readouterr().out
    # What the search was told holds for what follows.
    assert run_main(search.main, [*command, "mirrored", "--flip"]) == 0
    assert run_main(retrain.main, ["mirrored", *TINY_RECIPE]) == 0
    for folder, flips in (("my run", [False] * 4), ("mirrored", [True] * 2)):
        entries = json.loads((tmp_path / folder / "env.json").read_text())
        assert [entry["data"]["flip"] for entry in entries] == flips


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (["photos"], "Unexpected argument 'photos'", "--data photos"),
        (["--data", "fashion-mnits"], "fashion-mnits", "fashion-mnist"),
        (["--operations", "sep_conv_3x3", "warp"], "Unknown operation 'warp'", "Known are"),
        (["--seed", "-1"], "--seed is -1", "Give --seed"),
        (["--members", "50"], "50 members are more than the 30 candidates", "--pool-size"),
        (["--device", "cuda:77"], "cuda:77 is not there", "--device cpu"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_of_cause_and_one_of_remedy(tmp_path, capsys, arguments, cause, remedy):
    said = refused(search.main, arguments, capsys)
    assert cause in said[0]
    assert remedy in said[1]
    assert not list(tmp_path.glob("runs/*/genotypes.json"))


def test_other_commands_refuse_what_is_no_run_folder(tmp_path, capsys):
    for main in (retrain.main, evaluate.main):
        assert "not a run folder" in refused(main, [str(tmp_path)], capsys)[0]
        assert "Run folder" in refused(main, [], capsys)[0]


def test_every_regime_of_the_guide_runs_as_written(tmp_path, capsys):
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    regimes = re.findall(r"^\| (\w+):.*`python -m dnas_ens\.search ?(.*?)` \|$", guide, re.MULTILINE)
    assert [name for name, _ in regimes] == ["optimal", "edges", "random", "hypernet", "js", "star"]
    # Small, and one member, since some regimes are about one architecture; the rest is the regime's own.
    scale = (
        "--num-cells 1 --channels 2 --num-nodes 2 --epochs 2 --warmup-epochs 1 --limit-train 48 --members 1 "
        "--batch-size 24 --drawn-members 2 --architecture-learning-rate 0.1 --device cpu"
    )
    for regime, options in regimes:
        search.main([*options.split(), *scale.split()])
        assert "next: python -m dnas_ens.retrain" in capsys.readouterr().out, regime
    found = json.loads(next(tmp_path.glob("runs/*-digits/genotypes.json")).read_text())
    base = json.loads((tmp_path / "runs/base/genotypes.json").read_text())["base"]
    assert found["base"] == base


def test_the_star_alone_goes_the_whole_way(tmp_path, capsys):
    star = [*TINY, "--likelihood", "none", "--star-steps", "60", "--run-dir", "star"]
    assert run_main(search.main, star) == 0
    assert "inherited weights -" in capsys.readouterr().out
    assert not (tmp_path / "star/supernet.safetensors").exists()
    assert (tmp_path / "star/cells/diversity.svg").exists()
    found = tmp_path / "star/genotypes.json"
    first = json.loads(found.read_text())
    # As if it had been interrupted before the end.
    found.unlink()
    newest = CheckpointStore(tmp_path / "star/checkpoints", name="search").steps()[-1]
    for file in tmp_path.glob(f"star/checkpoints/search-{newest:08d}.*"):
        file.unlink()
    assert run_main(search.main, [*star, "--resume"]) == 0
    again = json.loads(found.read_text())
    assert (again["candidates"], again["ranking"]) == (first["candidates"], first["ranking"])
    assert run_main(retrain.main, ["star", *TINY_RECIPE]) == 0
    assert run_main(evaluate.main, ["star"]) == 0
    assert run_main(compare.main, ["star", "--methods", "ours"]) == 0
    assert "Does λ steer diversity?" in (tmp_path / "star/report.html").read_text()
