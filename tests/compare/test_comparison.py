"""A comparison of tiny runs, beside what is stored in their folders."""

import contextlib
import csv
import io
import json
import re
import shutil
import statistics
from dataclasses import replace

import numpy as np
import pytest

from dnas_ens.commands.compare import main
from dnas_ens.commands.retrain import main as retrain
from dnas_ens.commands.whole_way import main as whole_way
from dnas_ens.compare.methods import METHODS, Budget
from dnas_ens.compare.methods.comparison import Comparison
from dnas_ens.compare.plan import planned_work
from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.config.fields import override
from dnas_ens.data import load_data
from dnas_ens.errors import UserError
from dnas_ens.evaluate import compute_cost
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import best_single
from dnas_ens.metrics.calibration import per_image_calibrated_nll
from dnas_ens.metrics.ensemble_size import deep_ensemble_equivalent
from dnas_ens.run.files import read_json
from dnas_ens.space.genotype import Genotype

#: A search and a training of seconds.
TINY = (
    "--limit-train 96 --num-cells 1 --channels 2 --num-nodes 2 --epochs 2 --warmup-epochs 1 --members 2 "
    "--pool-size 6 --directions 2 --architecture-learning-rate 0.1 --batch-size 24 --retrain.batch-size 48 "
    "--retrain.num-cells 2 --retrain.channels 2 --retrain.epochs 2 --device cpu --workers 1"
).split()
OPTIONS = "--pool-size 3 --population 2 --parents 1 --device cpu --workers 1".split()
OURS = "ours (searched ensemble)"
BASE = "deep ensemble of the base cell"
FREE = "the same at our cost, cell for free"
BEST = "deep ensemble of the best found cell"
RANDOM = "random cells (Random-NES)"


@pytest.fixture(scope="module", autouse=True)
def untimed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_cost, "inference_seconds", lambda *_, **__: 0.001)
        yield


def compare(*arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*map(str, arguments), *OPTIONS])
    return printed.getvalue()


def table_of(output):
    with output.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        with contextlib.redirect_stdout(io.StringIO()):
            whole_way([*TINY, "--run-dir", str(folder / seed), "--seed", seed, "--retrain.seed", seed])
        # A search that is worth three trainings, however fast this machine is just now: the others have room to grow.
        found = read_json(folder / seed / "genotypes.json")
        found["report"]["cpu_seconds"] = 3 * statistics.mean(seconds_of(folder / seed, ""))
        (folder / seed / "genotypes.json").write_text(json.dumps(found))
    return [folder / "0", folder / "1"]


@pytest.fixture(scope="module")
def finished(runs):
    """A run in whose own folder all methods were compared, the record of it, and what was printed."""
    printed = compare(runs[0], "--epochs-grid", 2, 4)
    return runs[0], read_json(runs[0] / "comparison.json"), printed


@pytest.fixture(scope="module")
def both(runs):
    """Two runs as seeds of one configuration: where it was written, the record, and what was printed."""
    output = runs[0].parent / "out"
    printed = compare(*runs, "--methods", "base-cell", "random-cells", "--output", output)
    return output, read_json(output.with_suffix(".json")), printed


@pytest.fixture(scope="module")
def grown(finished):
    """A run, the record of its comparison at the cost of 3 members, and what was printed."""
    run, _, _ = finished
    output = run.parent / "grown"
    methods = ("base-cell", "best-cell", "random-cells")
    printed = compare(run, "--methods", *methods, "--members-grid", 3, "--output", output)
    return run, read_json(output.with_suffix(".json")), printed


def folder_of(run, method):
    return run / "baselines" / method if method else run


def seconds_of(run, *methods):
    """CPU seconds of the networks of some methods, in the order of their training; "" is ours."""
    return [
        read_json(member)["cpu_seconds"]
        for method in methods
        for member in sorted(
            (folder_of(run, method) / "members").glob("*/member.json"), key=lambda file: int(file.parent.name)
        )
    ]


def search_seconds(folder):
    return read_json(folder / "genotypes.json")["report"]["cpu_seconds"]


def predictions_of(run, *methods):
    parts = [np.load(folder_of(run, name) / "predictions.npz") for name in methods]
    val, test = (np.concatenate([part[f"{name}_probs"] for part in parts]) for name in ("val", "test"))
    return val, parts[0]["val_labels"], test, parts[0]["test_labels"]


def calibrated(members, val, val_labels, test, test_labels):
    """Calibrated NLL of the equal average of some members."""
    of_val, of_test = (probs[members].astype(float).mean(axis=0) for probs in (val, test))
    return per_image_calibrated_nll(of_val, val_labels, of_test, test_labels).mean()


def accuracy_of(run, method, members):
    _, _, test, labels = predictions_of(run, method)
    return (test.astype(float)[members].mean(axis=0).argmax(axis=1) == labels).mean()


def row_of(record, name, seed=0):
    return next(row for row in record["rows"] if row["name"].startswith(name) and row["seed"] == seed)


def options_of(record, name):
    """Options by their number of members."""
    return {one["members"]: one for one in record["options"] if one["name"] == name}


def test_rows_are_mean_and_deviation_of_what_is_stored(both, runs):
    output, _, printed = both
    assert "Search seeds 0, 1, recipe seeds 0, 1" in output.with_suffix(".md").read_text()
    for name, method in ((BASE, "base-cell"), (RANDOM, "random-cells")):
        expected = [accuracy_of(run, method, [0, 1]) for run in runs]
        of_name = [row for row in table_of(output) if row["name"] == name]
        assert [int(row["seed"]) for row in of_name] == [0, 1]
        assert [float(row["accuracy"]) for row in of_name] == pytest.approx(expected)
        cell = next(line for line in printed.splitlines() if line.startswith(f"| {name} ")).split("|")[2]
        percent = [100 * value for value in expected]
        found = [float(part) for part in cell.split(" ± ")]
        assert found == pytest.approx([statistics.mean(percent), statistics.stdev(percent)], abs=0.006)
    losses = {
        name: statistics.mean(float(row["calibrated_nll"]) for row in table_of(output) if row["name"] == name)
        for name in (OURS, RANDOM)
    }
    line = next(line for line in printed.splitlines() if line.startswith("- Ours") and "(Random-NES)" in line)
    gap = float(re.search(r"\(([-+][\d.]+), over seeds", line)[1])
    assert gap == pytest.approx(losses[OURS] - losses[RANDOM], abs=6e-5)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_worth_so_many_copies_of_the_base_cell(finished):
    _, record, _ = finished
    curve = sorted(
        (one["members"], one["calibrated_nll"])
        for one in record["options"]
        if (one["name"], one["epochs"]) == (FREE, 2)
    )
    sizes, losses = zip(*curve, strict=True)
    for row in record["rows"]:
        assert row["interval"][0] <= row["calibrated_nll"] <= row["interval"][1]
        worth = deep_ensemble_equivalent(row["calibrated_nll"], losses, sizes=sizes)
        assert (row["dee"], row["dee_relation"]) == (worth.value, worth.relation)


def test_the_luck_of_searches_and_trainings_is_told_apart(both, runs):
    found = re.search(
        r"by itself: calibrated NLL ([\d.]+), .* (\d+\.\d+) between trainings .*2 × (\d+) networks", both[2]
    )
    values = [
        [calibrated([index], *predictions_of(run, "base-cell", "base-cell-more")) for index in range(int(found[3]))]
        for run in runs
    ]
    within = np.mean(np.var(values, axis=1, ddof=1)) ** 0.5
    assert [float(found[1]), float(found[2])] == pytest.approx([np.mean(values), within], abs=6e-5)


def test_costs_hold_every_search_and_every_network(finished):
    run, record, _ = finished
    ours = search_seconds(run) + sum(seconds_of(run, ""))
    searches = [search_seconds(run / "baselines" / "darts-ens" / f"search-{index}") for index in (0, 1)]
    for name, expected in {
        OURS: ours,
        "cells of independent": sum(searches) + sum(seconds_of(run, "darts-ens")),
        "evolution": sum(seconds_of(run, "nes-re")),
        "greedy choice": sum(seconds_of(run, "random-cells")),
        BEST: ours + sum(seconds_of(run, "best-cell")[:2]),
    }.items():
        assert row_of(record, name)["cpu_seconds"] == pytest.approx(expected), name
    assert row_of(record, "its last snapshot alone")["accuracy"] == pytest.approx(accuracy_of(run, "snapshots", [1]))


def test_further_searches_and_the_evolution_are_what_they_are_called(finished):
    run, _, _ = finished
    configs = [
        read_json(run / "baselines" / "darts-ens" / f"search-{index}" / "config.json")["search"] for index in (0, 1)
    ]
    own = read_json(run / "config.json")["search"]
    for config in configs:
        assert (config["objective"]["penalty"], config["objective"]["fixed_lambda"]) == ("none", 0)
        assert all(config[part] == own[part] for part in ("bilevel", "supernet", "data"))
    assert len({config["seed"] for config in [*configs, own]}) == 3
    history = read_json(run / "baselines" / "nes-re" / "evolution.json")["history"]
    parents = [entry["parent"] for entry in history]
    assert (parents[:2], len(parents)) == ([None, None], 3)
    assert parents[2] in (0, 1)
    for index, entry in enumerate(history):
        member = read_json(run / "baselines" / "nes-re" / "members" / str(index) / "member.json")
        assert Genotype.from_dict(member["spec"]["genotype"]) == Genotype.from_dict(entry["genotype"])


def test_a_plan_counts_what_the_methods_train(finished):
    run, _, _ = finished
    comparison = Comparison(
        folder=run,
        search=override(SearchConfig(), read_json(run / "config.json")["search"]),
        found=read_json(run / "genotypes.json"),
        data=load_data("digits"),
        recipe=override(RetrainConfig(), read_json(run / "config.json")["retrain"]),
        device="cpu",
        budget=Budget(epochs_grid=(2, 4), pool_size=3, population=2, parents=1),
    )
    # As measured in the comparison, for how many networks a cost pays depends on it.
    cpu_of = {
        kind: statistics.mean(seconds_of(run, folder)[:2])
        for kind, folder in (("base", "base-cell"), ("member", "best-cell"), ("random", "random-cells"))
    }
    held = override(RetrainConfig(), read_json(run / "baselines/wider/members/0/member.json")["recipe"])
    for channels, name in ((held.channels, "wider"), (held.channels + 2, "wider-of-2")):
        found = comparison._room_for("wider", comparison.base, replace(held, channels=channels))
        assert found == run / "baselines" / name
    planned = planned_work(comparison, tuple(METHODS), cpu_of)
    assert list(planned) == list(METHODS)
    for method, work in planned.items():
        folders = (run / "baselines").glob("*")
        own = [folder for folder in folders if re.fullmatch(rf"{method}(-more|-epochs-\d+)?", folder.name)]
        members = [read_json(file) for folder in own for file in folder.glob("members/*/member.json")]
        # A long training is one of a single network, as long as two members.
        long = 2 * 2 if method in ("snapshots", "averaged-weights") else 0
        assert work.networks == len(members) + bool(long), method
        assert work.epochs == sum(member["epochs"] for member in members) + long, method
    assert planned["darts-ens"].searches == len(list(run.glob("baselines/darts-ens/search-*")))


def test_a_plan_is_printed_and_nothing_is_trained(runs):
    before = sorted(runs[1].rglob("member.json"))
    printed = compare(runs[1], "--methods", "deviations", "--plan", "--price-per-hour", 3)
    assert re.search(r"^\| deviations +\| +2 \| +4 \| +0 \|", printed, re.MULTILINE)
    assert re.search(r"^1 run: time \d+:\d\d, CPU-hours .*, price \d+\.\d\d$", printed, re.MULTILINE)
    assert printed.splitlines()[-1].startswith(f"next: python -m dnas_ens.compare {runs[1]} --methods deviations ")
    assert "--plan" not in printed.splitlines()[-1]
    assert sorted(runs[1].rglob("member.json")) == before


def test_equal_cost_is_the_best_on_val_that_can_be_paid(finished):
    _, record, _ = finished
    budget = row_of(record, OURS)["cpu_seconds"]
    names = list(dict.fromkeys(option["name"] for option in record["options"]))
    assert len(names) == 14
    for name in names:
        payable = [one["val_nll"] for one in record["options"] if one["name"] == name and one["cpu_seconds"] <= budget]
        found = [(row["val_nll"], row["budget"]) for row in record["equal_cost"] if row["name"] == name]
        assert found == ([(min(payable), budget)] if payable else [])
    # Finding the best cell takes our whole cost, for which there is but the network it was found by.
    of_best = [row for row in record["equal_cost"] if row["name"] == BEST]
    assert [(row["members"], row["cpu_seconds"]) for row in of_best] == [(1, budget)]


def test_options_have_other_epochs_where_asked(finished):
    run, record, _ = finished

    def split(name):
        return {(one["members"], one["epochs"]) for one in record["options"] if one["name"] == name}

    assert split(OURS) == {(1, 2), (2, 2), (1, 4)}
    # Twice as long, half as many of three, rounded up.
    assert split(RANDOM) == {(1, 2), (2, 2), (3, 2), (1, 4), (2, 4)}
    assert read_json(run / "baselines/random-cells-epochs-4/members/0/member.json")["recipe"]["epochs"] == 4
    # All members at the recipe's epochs are the row of the table.
    whole = next(one for one in record["options"] if (one["name"], one["members"], one["epochs"]) == (OURS, 2, 2))
    for figure in ("accuracy", "calibrated_nll", "cpu_seconds"):
        assert whole[figure] == pytest.approx(row_of(record, OURS)[figure])


def test_members_beyond_the_chosen_are_the_next_of_the_ranking(grown):
    run, record, _ = grown
    found = read_json(run / "genotypes.json")
    member = read_json(run / "baselines/ours-more/members/0/member.json")
    assert member["spec"]["genotype"] == found["candidates"][found["ranking"][2]]["genotype"]
    seconds, stored = seconds_of(run, "", "ours-more"), predictions_of(run, "", "ours-more")
    options = options_of(record, OURS)
    assert list(options) == [1, 2, 3]
    for size, option in options.items():
        assert option["cpu_seconds"] == pytest.approx(search_seconds(run) + sum(seconds[:size]))
        assert option["calibrated_nll"] == pytest.approx(calibrated(range(size), *stored))


def test_the_best_found_cell_is_one_of_its_copies_and_pays_for_being_found(grown):
    run, record, _ = grown
    ours = search_seconds(run) + sum(seconds_of(run, ""))
    best = best_single(Predictions.load(run / "predictions.npz"))
    more = ["best-cell-more"] if (run / "baselines/best-cell-more").exists() else []
    copies = seconds_of(run, "best-cell", *more)
    val, val_labels, test, test_labels = predictions_of(run, "", "best-cell", *more)
    options = options_of(record, BEST)
    assert list(options) == list(range(1, len(copies) + 2))
    # To the last digit, for the budget of the table is the same sum.
    assert options[1]["cpu_seconds"] == row_of(record, OURS)["cpu_seconds"] == pytest.approx(ours)
    stored = val, val_labels, test, test_labels
    assert options[1]["calibrated_nll"] == pytest.approx(calibrated([best], *stored))
    pairs = [calibrated([best, copy], *stored) for copy in range(2, len(val))]
    assert options[2]["calibrated_nll"] == pytest.approx(np.mean(pairs))
    assert options[2]["cpu_seconds"] == pytest.approx(ours + np.mean(copies))
    assert options[len(copies) + 1]["cpu_seconds"] == pytest.approx(ours + sum(copies))
    # The row is M copies, whatever more were trained.
    row = row_of(record, BEST)
    assert (row["networks"], row["calibrated_nll"]) == (4, pytest.approx(calibrated([2, 3], *stored)))
    assert row["cpu_seconds"] == pytest.approx(ours + sum(copies[:2]))


def test_methods_are_grown_to_the_largest_cost(grown):
    run, record, printed = grown
    ours = options_of(record, OURS)
    for name, folder, first in ((FREE, "base-cell", 2), (RANDOM, "random-cells", 3)):
        affordable = round(ours[3]["cpu_seconds"] * first / sum(seconds_of(run, folder)))
        assert affordable > first
        assert max(options_of(record, name)) == affordable
    # The choice among random cells is from the pool that was asked for.
    row = row_of(record, "greedy choice of 3")
    assert (row["networks"], row["cpu_seconds"]) == (3, pytest.approx(sum(seconds_of(run, "random-cells"))))
    # Each cost has a table of what val chooses for it.
    assert [row["members_of_ours"] for row in record["equal_cost"] if row["name"] == OURS] == [2, 3]
    for row in record["equal_cost"]:
        assert row["budget"] == pytest.approx(ours[row["members_of_ours"]]["cpu_seconds"])
    for size in (2, 3):
        assert f"### The total cost of ours with {size} members" in printed
    assert "Of *greedy choice of 3 random cells (NES-RS)* nothing was trained that costs more than" in printed


def test_an_ensemble_that_has_grown_is_ours_with_all_its_members_and_their_cost(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[1], run, ignore=shutil.ignore_patterns("baselines"))
    compare(run, "--methods", "wider", "snapshots")
    before = (run / "baselines/snapshots/predictions.npz").read_bytes()
    recipe = "--num-cells 2 --channels 2 --epochs 2 --batch-size 48 --seed 1 --device cpu --workers 1"
    retrain([str(run), "--resume", "--members", "3", *recipe.split()])
    # One network as large may now be another one, and three cycles are: what was there is not taken for them.
    compare(run, "--methods", "ours", "wider", "snapshots")
    record = read_json(run / "comparison.json")
    assert row_of(record, "its last snapshot alone", seed=1)["networks"] == 1
    assert len(np.load(run / "baselines/snapshots-of-3/predictions.npz")["val_probs"]) == 3
    assert (run / "baselines/snapshots/predictions.npz").read_bytes() == before
    row = row_of(record, OURS, seed=1)
    seconds = seconds_of(run, "")
    assert (row["networks"], len(seconds)) == (3, 3)
    assert row["cpu_seconds"] == pytest.approx(search_seconds(run) + sum(seconds))
    assert row["calibrated_nll"] == pytest.approx(calibrated([0, 1, 2], *predictions_of(run, "")))
    assert list(options_of(record, OURS)) == [1, 2, 3]
    # Runs of other sizes are not averaged as seeds of one.
    with pytest.raises(UserError, match=r"has 3 members and .* has 2"):
        compare(run, runs[0])


def test_what_is_finished_is_not_trained_again(finished, both):
    run, record, _ = finished
    before = {file: file.stat().st_mtime_ns for file in run.rglob("metrics.jsonl")}
    assert len(before) > 30
    again = run.parent / "again"
    methods = ("base-cell", "darts-ens", "nes-re", "snapshots", "averaged-weights")
    compare(run, "--methods", *methods, "--output", again)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("metrics.jsonl")} == before
    rows = {row["name"]: row for row in record["rows"]}
    # What a row is worth is read off from the base cell's curve, which may have grown since.
    for row in read_json(again.with_suffix(".json"))["rows"]:
        for field in ("accuracy", "nll", "calibrated_nll", "cpu_seconds", "networks"):
            assert row[field] == rows[row["name"]][field]
    assert "over 359 test images (paired bootstrap) of one search seed" in again.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--methods", "nothing"], "There is no method nothing"),
        (["--epochs-grid", 0], "--epochs-grid holds 0"),
        (["--members-grid", 2, 4], "begins with 2, but ours has 2 members"),
        (["--members-grid", 3, 99], r"99 members were asked for, but the search holds \d candidates"),
        (["--pool-size", 1], "A pool of 1 is too small for 2 members"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused(runs, arguments, cause):
    with pytest.raises(UserError, match=cause):
        main([str(runs[0]), *map(str, arguments), "--device", "cpu"])


def test_runs_that_are_not_alike_are_refused(runs, tmp_path):
    copy = tmp_path / "a copy"
    copy.mkdir()
    for name in ("config.json", "ensemble.json", "splits.json"):
        shutil.copy(runs[0] / name, copy)

    def changed(name, change):
        content = read_json(copy / name)
        change(content)
        (copy / name).write_text(json.dumps(content))

    def refused(cause):
        with pytest.raises(UserError, match=cause):
            compare(runs[0], copy)

    refused("have the same search seed")
    changed("config.json", lambda config: config["search"].update(seed=7))
    refused("have the same recipe's seed")
    changed("config.json", lambda config: config["retrain"].update(seed=7, epochs=3))
    refused(r"config\.retrain\.epochs is 2 in the first and 3 in the second")
    changed("config.json", lambda config: config["retrain"].update(epochs=2))
    changed("splits.json", lambda splits: splits.update(fingerprint="other"))
    refused("have other images or splits")
    changed("config.json", lambda config: config["retrain"].update(cycles=1))
    with pytest.raises(UserError, match="ends of cycles"):
        compare(copy)
    changed("config.json", lambda config: config["retrain"].update(cycles=0))
    (copy / "budget.json").write_text("{}")
    with pytest.raises(UserError, match="those of a budget"):
        compare(copy)
    (copy / "budget.json").unlink()
    (copy / "ensemble.json").unlink()
    with pytest.raises(UserError, match="not trained"):
        compare(copy)
