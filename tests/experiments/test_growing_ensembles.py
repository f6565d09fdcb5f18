"""Larger ensembles of ours and what else their cost buys: the members, the costs, and what is compared."""

import contextlib
import io
import json
import shutil

import compare_ensembles
import numpy as np
import pytest

from dnas_ens.commands.retrain import main as retrain
from dnas_ens.errors import UserError
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import best_single
from dnas_ens.metrics.calibration import per_image_calibrated_nll

OPTIONS = "--methods base-cell best-cell random-cells --members-grid 3 4 --pool-size 3 --device cpu --workers 1".split()
OURS, BEST = "ours (searched ensemble)", "deep ensemble of the best found cell"


@pytest.fixture(scope="module")
def grown(tiny_run, tmp_path_factory):
    """A run, the record of its comparison at the cost of 3 and 4 members, and what was printed."""
    run = tiny_run(tmp_path_factory.mktemp("runs") / "run")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compare_ensembles.main([str(run), *OPTIONS])
    return run, json.loads((run / "comparison.json").read_text()), printed.getvalue()


def seconds_of(run, method):
    folder = run / "baselines" / method if method else run
    files = sorted((folder / "members").glob("*/member.json"), key=lambda file: int(file.parent.name))
    return [json.loads(file.read_text())["cpu_seconds"] for file in files]


def predictions_of(run, *methods):
    parts = [np.load((run / "baselines" / name if name else run) / "predictions.npz") for name in methods]
    val, test = (np.concatenate([part[f"{name}_probs"] for part in parts]) for name in ("val", "test"))
    return val, parts[0]["val_labels"], test, parts[0]["test_labels"]


def calibrated(members, val, val_labels, test, test_labels):
    """Calibrated NLL of the equal average of some members."""
    averages = (probs[members].astype(float).mean(axis=0) for probs in (val, test))
    of_val, of_test = averages
    return per_image_calibrated_nll(of_val, val_labels, of_test, test_labels).mean()


def options_of(record, name):
    return {one["members"]: one for one in record["options"] if one["name"] == name}


def test_members_beyond_the_chosen_are_the_next_of_the_ranking(grown):
    run, record, _ = grown
    found = json.loads((run / "genotypes.json").read_text())
    for place, candidate in enumerate(found["ranking"][2:4]):
        member = json.loads((run / f"baselines/ours-more/members/{place}/member.json").read_text())
        assert member["spec"]["genotype"] == found["candidates"][candidate]["genotype"]
    seconds = [*seconds_of(run, ""), *seconds_of(run, "ours-more")]
    stored = predictions_of(run, "", "ours-more")
    options = options_of(record, OURS)
    assert list(options) == [1, 2, 3, 4]
    for size, option in options.items():
        assert option["cpu_seconds"] == pytest.approx(found["report"]["cpu_seconds"] + sum(seconds[:size]))
        assert option["calibrated_nll"] == pytest.approx(calibrated(range(size), *stored))


def test_the_best_found_cell_is_one_of_its_copies_and_pays_for_being_found(grown):
    run, record, _ = grown
    ours = json.loads((run / "genotypes.json").read_text())["report"]["cpu_seconds"] + sum(
        seconds_of(run, "")
    )
    best = best_single(Predictions.load(run / "predictions.npz"))
    methods = (
        ["best-cell", "best-cell-more"] if (run / "baselines/best-cell-more").exists() else ["best-cell"]
    )
    copies = [seconds for method in methods for seconds in seconds_of(run, method)]
    # Of as many networks in all as ours, but for what trainings differ in.
    assert len(copies) >= 2
    val, val_labels, test, test_labels = predictions_of(run, "", *methods)
    of_copies = list(range(2, len(val)))
    options = options_of(record, BEST)
    assert list(options) == list(range(1, len(copies) + 2))
    # To the last digit, for the budget of the table is the same sum.
    row_of_ours = next(row for row in record["rows"] if row["name"] == OURS)
    assert options[1]["cpu_seconds"] == row_of_ours["cpu_seconds"] == pytest.approx(ours)
    alone = calibrated([best], val, val_labels, test, test_labels)
    assert options[1]["calibrated_nll"] == pytest.approx(alone)
    pairs = [calibrated([best, copy], val, val_labels, test, test_labels) for copy in of_copies]
    assert options[2]["calibrated_nll"] == pytest.approx(np.mean(pairs))
    assert options[2]["cpu_seconds"] == pytest.approx(ours + np.mean(copies))
    whole = options[len(copies) + 1]
    assert whole["cpu_seconds"] == pytest.approx(ours + sum(copies))
    # The row is M copies, whatever more were trained.
    row = next(row for row in record["rows"] if row["name"] == BEST)
    two = calibrated([2, 3], val, val_labels, test, test_labels)
    assert (row["networks"], row["calibrated_nll"]) == (4, pytest.approx(two))
    assert row["cpu_seconds"] == pytest.approx(ours + sum(copies[:2]))


def test_methods_are_grown_to_the_largest_cost(grown):
    run, record, _ = grown
    largest = options_of(record, OURS)[4]["cpu_seconds"]
    for name, folder, first in (
        ("the same at our cost, cell for free", "base-cell", 2),
        ("random cells (Random-NES)", "random-cells", 3),
    ):
        affordable = round(largest * first / sum(seconds_of(run, folder)))
        assert affordable > first
        assert len(seconds_of(run, f"{folder}-more")) == affordable - first
        assert max(options_of(record, name)) == affordable
    # The choice among random cells is from the pool that was asked for.
    row = next(row for row in record["rows"] if row["name"].startswith("greedy choice of 3"))
    assert row["networks"] == 3
    assert row["cpu_seconds"] == pytest.approx(sum(seconds_of(run, "random-cells")))


def test_each_cost_has_a_table_of_what_val_chooses_for_it(grown):
    run, record, printed = grown
    ours = options_of(record, OURS)
    assert [row["members_of_ours"] for row in record["equal_cost"] if row["name"] == OURS] == [2, 3, 4]
    for row in record["equal_cost"]:
        budget = ours[row["members_of_ours"]]["cpu_seconds"]
        assert row["budget"] == pytest.approx(budget)
        payable = [
            one for one in record["options"] if one["name"] == row["name"] and one["cpu_seconds"] <= budget
        ]
        assert row["val_nll"] == min(one["val_nll"] for one in payable)
    # At our own cost the best found cell is a single network; more of them have to be paid for.
    of_best = [row for row in record["equal_cost"] if row["name"] == BEST]
    assert of_best[0]["members"] == 1
    for size in (2, 3, 4):
        assert f"### The total cost of ours with {size} members" in printed
    assert "Of *greedy choice of 3 random cells (NES-RS)* nothing was trained that costs more than" in printed
    assert (run / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_ensemble_that_has_grown_is_ours_with_all_its_members_and_their_cost(grown, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(grown[0], run, ignore=shutil.ignore_patterns("baselines"))
    # The recipe that the run was trained with.
    recipe = ["--num-cells", "2", "--channels", "4", "--epochs", "2", "--device", "cpu", "--workers", "1"]
    retrain([str(run), "--resume", "--members", "3", *recipe])
    options = ["--methods", "base-cell", "--pool-size", "3", "--device", "cpu", "--workers", "1"]
    compare_ensembles.main([str(run), *options])
    record = json.loads((run / "comparison.json").read_text())
    row = next(row for row in record["rows"] if row["name"] == OURS)
    search = json.loads((run / "genotypes.json").read_text())["report"]["cpu_seconds"]
    assert len(seconds_of(run, "")) == 3
    assert (row["networks"], row["cpu_seconds"]) == (3, pytest.approx(search + sum(seconds_of(run, ""))))
    assert row["calibrated_nll"] == pytest.approx(calibrated([0, 1, 2], *predictions_of(run, "")))
    assert list(options_of(record, OURS)) == [1, 2, 3]
    # Runs of other sizes are not averaged as seeds of one.
    with pytest.raises(UserError, match=r"has 3 members and .* has 2"):
        compare_ensembles.main([str(run), str(grown[0]), *options])
