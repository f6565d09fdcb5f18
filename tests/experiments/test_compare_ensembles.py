import contextlib
import csv
import io
import json
import re
import shutil
import statistics

import compare_ensembles
import numpy as np
import pytest
from comparison_report import provenance
from equal_cost import equal_cost, unspent_sentences
from frontier import Option
from methods.results import Result

from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import per_image_calibrated_nll
from dnas_ens.space.genotype import Genotype

OPTIONS = "--pool-size 3 --population 2 --parents 1 --device cpu --workers 1".split()


def compare(*arguments):
    """Run the script and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compare_ensembles.main([*map(str, arguments), *OPTIONS])
    return printed.getvalue()


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [tiny_run(folder / f"{seed}", "--seed", seed, "--retrain.seed", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def finished(runs):
    output = runs[0].parent / "out"
    return output, compare(*runs, "--epochs-grid", 1, 2, 4, "--output", output)


def rows_of(output):
    with output.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def seconds_of(run, method, count):
    folder = run / "baselines" / method if method else run
    return [
        json.loads((folder / "members" / str(index) / "member.json").read_text())["cpu_seconds"]
        for index in range(count)
    ]


def search_seconds(folder):
    return json.loads((folder / "genotypes.json").read_text())["report"]["cpu_seconds"]


def accuracy_of(run, method, members):
    stored = np.load(run / "baselines" / method / "predictions.npz")
    probs = stored["test_probs"].astype(float)[members].mean(axis=0)
    return (probs.argmax(axis=1) == stored["test_labels"]).mean()


def test_rows_are_mean_and_deviation_of_what_is_stored(finished, runs):
    output, printed = finished
    text = output.with_suffix(".md").read_text()
    assert "3 seeds" not in text
    assert "Search seeds 0, 1, recipe seeds 0, 1" in text
    rows = rows_of(output)
    for name, method, members in (
        ("deep ensemble of the base cell", "base-cell", [0, 1]),
        ("random cells (Random-NES)", "random-cells", [0, 1]),
        ("cells of independent DARTS searches (DartsEns)", "darts-ens", [0, 1]),
        ("its last snapshot alone", "snapshots", [1]),
    ):
        expected = [accuracy_of(run, method, members) for run in runs]
        of_name = [row for row in rows if row["name"] == name]
        assert [int(row["seed"]) for row in of_name] == [0, 1]
        assert [float(row["accuracy"]) for row in of_name] == pytest.approx(expected)
        cell = next(line for line in printed.splitlines() if line.startswith(f"| {name} ")).split("|")[2]
        found = [float(part) for part in cell.split(" ± ")]
        percent = [100 * value for value in expected]
        assert found == pytest.approx([statistics.mean(percent), statistics.stdev(percent)], abs=0.006)


def test_rows_are_worth_so_many_copies_of_the_base_cell(finished):
    record = json.loads(finished[0].with_suffix(".json").read_text())
    for seed in (0, 1):
        rows = [row for row in record["rows"] if row["seed"] == seed]
        curve = sorted(
            (one["members"], one["calibrated_nll"])
            for one in record["options"]
            if one["seed"] == seed
            and one["name"] == "the same at our cost, cell for free"
            and one["epochs"] == 2
        )
        best = np.minimum.accumulate([loss for _, loss in curve])
        for row in rows:
            assert row["interval"][0] <= row["calibrated_nll"] <= row["interval"][1]
            # The whole curve's ensemble is a row too, but for the last digits.
            if row["calibrated_nll"] > best[0] + 1e-9:
                assert (row["dee"], row["dee_relation"]) == (1.0, "<")
            elif row["calibrated_nll"] < best[-1] - 1e-9:
                assert (row["dee"], row["dee_relation"]) == (curve[-1][0], ">")
            else:
                # Linear between the sizes it lies between.
                assert row["dee_relation"] == "="
                reached = np.interp(row["dee"], [size for size, _ in curve], best)
                assert reached == pytest.approx(row["calibrated_nll"])
        whole = next(row for row in rows if row["name"] == "the same at our cost, cell for free")
        assert whole["dee"] <= curve[-1][0]


def test_the_luck_of_searches_and_trainings_is_told_apart(finished, runs):
    found = re.search(
        r"calibrated NLL ([\d.]+), standard deviation ([\d.]+) between search seeds and ([\d.]+) between trainings "
        r"of one cell \(2 × (\d+) networks",
        finished[1],
    )
    trainings = int(found[4])
    values = []
    for run in runs:
        parts = [
            np.load(run / "baselines" / name / "predictions.npz") for name in ("base-cell", "base-cell-more")
        ]
        single = []
        for part in parts:
            for val, test in zip(part["val_probs"], part["test_probs"], strict=True):
                losses = per_image_calibrated_nll(val, part["val_labels"], test, part["test_labels"])
                single.append(losses.mean())
        values.append(single[:trainings])
    within = np.mean([np.var(of_search, ddof=1) for of_search in values])
    between = max(0.0, np.var(np.mean(values, axis=1), ddof=1) - within / trainings)
    expected = [np.mean(values), between**0.5, within**0.5]
    assert [float(found[index]) for index in (1, 2, 3)] == pytest.approx(expected, abs=6e-5)


def test_costs_hold_every_search_and_every_network(finished, runs):
    rows = rows_of(finished[0])

    def cost(name, seed):
        return next(
            float(row["cpu_seconds"])
            for row in rows
            if row["name"].startswith(name) and row["seed"] == str(seed)
        )

    for seed, run in enumerate(runs):
        ours = search_seconds(run) + sum(seconds_of(run, "", 2))
        assert cost("ours", seed) == pytest.approx(ours)
        searches = [search_seconds(run / "baselines" / "darts-ens" / f"search-{index}") for index in (0, 1)]
        assert cost("cells of independent", seed) == pytest.approx(
            sum(searches) + sum(seconds_of(run, "darts-ens", 2))
        )
        assert cost("evolution", seed) == pytest.approx(sum(seconds_of(run, "nes-re", 3)))
        assert cost("greedy choice", seed) == pytest.approx(sum(seconds_of(run, "random-cells", 3)))
        assert cost("deep ensemble of the best found", seed) == pytest.approx(
            ours + sum(seconds_of(run, "best-cell", 2))
        )


def test_further_searches_and_the_evolution_are_what_they_are_called(finished, runs):
    run = runs[0]
    configs = [
        json.loads((run / "baselines" / "darts-ens" / f"search-{index}" / "config.json").read_text())[
            "search"
        ]
        for index in (0, 1)
    ]
    own = json.loads((run / "config.json").read_text())["search"]
    for config in configs:
        assert config["objective"]["penalty"] == "none"
        assert config["objective"]["fixed_lambda"] == 0
        assert (config["bilevel"], config["supernet"], config["data"]) == (
            own["bilevel"],
            own["supernet"],
            own["data"],
        )
    assert len({config["seed"] for config in [*configs, own]}) == 3
    state = json.loads((run / "baselines" / "nes-re" / "evolution.json").read_text())
    parents = [entry["parent"] for entry in state["history"]]
    assert parents[:2] == [None, None]
    assert len(parents) == 3
    assert parents[2] in (0, 1)
    trained = [
        Genotype.from_dict(
            json.loads((run / "baselines" / "nes-re" / "members" / str(index) / "member.json").read_text())[
                "spec"
            ]["genotype"]
        )
        for index in range(3)
    ]
    assert trained == [Genotype.from_dict(entry["genotype"]) for entry in state["history"]]


def test_equal_cost_is_the_best_on_val_that_can_be_paid(finished):
    record = json.loads(finished[0].with_suffix(".json").read_text())
    options, chosen = record["options"], record["equal_cost"]
    budgets = [row["cpu_seconds"] for row in record["rows"] if row["name"].startswith("ours")]
    names = list(dict.fromkeys(option["name"] for option in options))
    assert len(names) == 14
    for name in names:
        best = []
        for seed, budget in enumerate(budgets):
            payable = [
                one
                for one in options
                if one["name"] == name and one["seed"] == seed and one["cpu_seconds"] <= budget
            ]
            best.append(min(payable, key=lambda one: one["val_nll"], default=None))
        found = [row for row in chosen if row["name"] == name]
        if None in best:
            assert not found
            continue
        assert [row["val_nll"] for row in found] == [one["val_nll"] for one in best]
        assert [row["budget"] for row in found] == budgets
    # Finding the best cell takes our whole cost, for which there is but the network it was found by.
    of_best = [row for row in chosen if row["name"] == "deep ensemble of the best found cell"]
    assert [(row["members"], row["cpu_seconds"]) for row in of_best] == [(1, budget) for budget in budgets]


def test_what_one_seed_cannot_pay_for_is_no_row_but_told():
    def row(name, *costs):
        options = [
            Option(
                members=1,
                epochs=1,
                cpu_seconds=cost,
                val_nll=1.0,
                losses=np.linspace(0.1, cost / 50, 8),
                hits=np.ones(8),
                spent="1 × 1",
            )
            for cost in costs
        ]
        return Result(name=name, predictions=None, networks=1, cpu_seconds=costs[0], options=options)

    seeds = [[row("ours", 90), row("dear", 101, 130), row("cheap", 80)] for _ in range(2)]
    rows, text = equal_cost(seeds, {5: [100, 120]})
    assert [row["name"] for row in rows] == ["ours", "ours", "cheap", "cheap"]
    assert re.search(r"^\| dear +\| costs more in itself +\|.*\| 101\.0 ± 0\.0 \|$", text, re.MULTILINE)
    assert "###" not in text
    rows, text = equal_cost(seeds, {5: [100, 120], 8: [110, 120]})
    assert [row["members_of_ours"] for row in rows if row["name"] == "dear"] == [8, 8]
    assert text.count("costs more in itself") == 1
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        f"### The total cost of ours with {size} members" for size in (5, 8)
    ]


def test_commands_are_named_once_with_all_the_revisions_they_ran_at():
    packages = dict.fromkeys(("torch", "numpy", "scipy"), "1.0")

    def entry(command, revision):
        return {
            "command": ["python", command],
            "git_revision": revision,
            "cpu": "Chip",
            "num_cpus": 2,
            "packages": packages,
            "time": "now",
        }

    entries = [
        entry("search.py", "aaa"),
        *(entry("compare.py", revision) for revision in ("aaa", "bbb", "aaa")),
    ]
    said = provenance(entries, device="cpu").splitlines()
    assert said[0] == "Command: `python search.py` (revision aaa)"
    assert said[2] == "Command: `python compare.py` (revisions aaa, bbb)"
    assert "Chip, 2 cores, no GPU used" in said[4]


def test_methods_that_could_have_spent_more_are_named():
    def row(name, cpu_seconds, *options):
        return Result(
            name=name,
            predictions=None,
            networks=1,
            cpu_seconds=cpu_seconds,
            options=[
                Option(members=1, epochs=1, cpu_seconds=cost, val_nll=0.0, losses=None, hits=None, spent="")
                for cost in options
            ],
        )

    seeds = [
        [row("ours", 100, 60, 100), row("short", 70, 70, 35), row("long", 90, 90), row("a part", 100)],
        [row("ours", 200, 120, 200), row("short", 100, 100), row("long", 140, 140), row("a part", 200)],
    ]
    # Shares of the budgets: short (0.7 + 0.5) / 2, long (0.9 + 0.7) / 2, which is enough.
    assert unspent_sentences(seeds, [100, 200]) == (
        "- Of *short* nothing was trained that costs more than 60 % of this; for all of it there might be better.\n"
    )


def test_options_have_other_epochs_where_asked(finished, runs):
    options = json.loads(finished[0].with_suffix(".json").read_text())["options"]

    def split(name):
        return {
            (one["members"], one["epochs"]) for one in options if one["name"] == name and one["seed"] == 0
        }

    assert split("ours (searched ensemble)") == {(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)}
    # Twice as long, half as many of three, rounded up.
    assert split("random cells (Random-NES)") == {(k, e) for k, e in ((1, 4), (2, 4))} | {
        (k, e) for k in (1, 2, 3) for e in (1, 2)
    }
    member = runs[0] / "baselines" / "random-cells-epochs-4" / "members" / "0" / "member.json"
    assert json.loads(member.read_text())["recipe"]["epochs"] == 4
    # All members at the recipe's epochs are the row of the table.
    rows = rows_of(finished[0])
    whole = next(
        one for one in options if one["name"].startswith("ours") and (one["members"], one["epochs"]) == (2, 2)
    )
    row = next(row for row in rows if row["name"].startswith("ours"))
    for figure in ("accuracy", "calibrated_nll", "cpu_seconds"):
        assert whole[figure] == pytest.approx(float(row[figure]))


def test_a_difference_is_that_of_the_rows(finished):
    output, printed = finished
    rows = rows_of(output)

    def mean(name):
        return statistics.mean(float(row["calibrated_nll"]) for row in rows if row["name"] == name)

    line = next(line for line in printed.splitlines() if line.startswith("- Ours") and "(Random-NES)" in line)
    gap = mean("ours (searched ensemble)") - mean("random cells (Random-NES)")
    assert float(re.search(r"\(([-+][\d.]+), over seeds", line)[1]) == pytest.approx(gap, abs=6e-5)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_trained_again(finished, runs):
    output, _ = finished
    files = [file for run in runs for file in run.rglob("metrics.jsonl")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(before) > 60
    compare(runs[0], "--methods", "base-cell", "darts-ens", "nes-re")
    again = [file for run in runs for file in run.rglob("metrics.jsonl")]
    assert {file: file.stat().st_mtime_ns for file in again} == before
    # One run is compared in its own folder, with the same figures.
    alone = rows_of(runs[0] / "comparison")
    both = [row for row in rows_of(output) if row["seed"] == "0"]
    assert alone == [row for row in both if row["name"] in {one["name"] for one in alone}]
    assert (
        "over 359 test images (paired bootstrap) of one search seed"
        in (runs[0] / "comparison.md").read_text()
    )


def test_bad_input_is_refused(finished, runs, tmp_path):
    with pytest.raises(UserError, match="There is no method nothing"):
        compare(runs[0], "--methods", "nothing")
    with pytest.raises(UserError, match="--epochs-grid holds 0"):
        compare(runs[0], "--epochs-grid", 0)
    for sizes, cause in (
        ([4, 3], "--members-grid 4 3 does not rise"),
        ([2, 4], "begins with 2, but ours has 2 members"),
        ([3, 99], r"99 members were asked for, but the search holds \d candidates"),
    ):
        with pytest.raises(UserError, match=cause):
            compare(runs[0], "--members-grid", *sizes)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "ensemble.json", "splits.json"):
        shutil.copy(runs[0] / name, copy)
    with pytest.raises(UserError, match="have the same search seed"):
        compare(runs[0], copy)
    config = json.loads((copy / "config.json").read_text())
    config["search"]["seed"] = 7
    config["retrain"]["epochs"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.retrain\.epochs is 2 in the first and 3 in the second"):
        compare(runs[0], copy)
    config["retrain"]["epochs"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    splits = json.loads((copy / "splits.json").read_text())
    (copy / "splits.json").write_text(json.dumps({**splits, "fingerprint": "other"}))
    with pytest.raises(UserError, match="have other images or splits"):
        compare(runs[0], copy)
    (copy / "ensemble.json").unlink()
    with pytest.raises(UserError, match="not trained"):
        compare(copy)
