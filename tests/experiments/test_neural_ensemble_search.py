import contextlib
import csv
import io
import json
import statistics

import neural_ensemble_search
import numpy as np
import pytest

from dnas_ens.errors import UserError
from dnas_ens.space.genotype import Genotype

TINY = (
    "--limit-train 160 --seeds 2 --members 2 --search-channels 2 --channels 4 --search-epochs 2 --epochs 2 "
    "--device cpu"
).split()
#: Rows, and the folder of each below a seed's run folder.
ROWS = {
    "one DARTS search, its cell trained once (DARTS)": "baselines/darts-ens",
    "one random cell (Random)": "baselines/random-cells",
    "cells of independent DARTS searches (DartsEns)": "baselines/darts-ens",
    "random cells (Random-NES)": "baselines/random-cells",
    "random deviations of the DARTS cell (RandomD-NES)": "baselines/darts-deviations",
    "hypernetwork upon a DARTS cell (EdgeNES)": "baselines/hypernet",
    "star hypernetwork (ours)": ".",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        neural_ensemble_search.main(
            [*TINY, "--run-dir", str(folder / "runs"), "--output", str(folder / "out")]
        )
    return folder, printed.getvalue()


def read(file):
    return json.loads(file.read_text())


def cells_of(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def genotypes_of(folder):
    members = sorted((folder / "members").iterdir(), key=lambda place: int(place.name))
    return [Genotype.from_dict(read(place / "member.json")["spec"]["genotype"]) for place in members]


def search_seconds(folder):
    return read(folder / "genotypes.json")["report"]["cpu_seconds"]


def test_table_is_what_the_stored_predictions_say(finished):
    folder, printed = finished
    text = (folder / "out.md").read_text()
    assert text.rstrip() in printed
    for name, place in ROWS.items():
        percent = []
        for seed in (0, 1):
            stored = np.load(folder / "runs" / f"seed-{seed}" / place / "predictions.npz")
            probs = stored["test_probs"].astype(float)
            members = probs[:1] if name.startswith("one ") else probs
            percent.append(100 * (members.mean(axis=0).argmax(axis=1) == stored["test_labels"]).mean())
        found = [float(part) for part in cells_of(text, name)[0].split(" ± ")]
        assert found == pytest.approx([statistics.mean(percent), statistics.stdev(percent)], abs=0.006)
    assert "1 cell searched with C=2 for 2 epochs, 2 stacked with C=4" in text
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_table_stands_beside_ours(finished):
    text = (finished[0] / "out.md").read_text()
    published = {name: tuple(cells_of(text, name)[-2:]) for name in ROWS}
    assert list(published.values()) == [
        ("46.8 ± 1.7", "1.2"),
        ("", ""),
        ("48.2 ± 1.5", "3.6"),
        ("46.9 ± 5.2", "0"),
        ("47.7 ± 3.4", "1.2"),
        ("48.1 ± 1.7", "2.1"),
        ("", ""),
    ]
    assert "This is **not** the published scale" in text
    assert "--data cifar100" in text


def test_search_costs_are_those_of_the_searches(finished):
    folder, _ = finished
    with (folder / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    for seed in (0, 1):
        run = folder / "runs" / f"seed-{seed}"
        darts = [search_seconds(run / "baselines" / "darts-ens" / f"search-{index}") for index in (0, 1)]
        hypernet = search_seconds(run / "baselines" / "hypernet" / "search")
        expected = [darts[0], 0, sum(darts), 0, darts[0], darts[0] + hypernet, search_seconds(run)]
        of_seed = [row for row in rows if row["seed"] == str(seed)]
        assert [row["name"] for row in of_seed] == list(ROWS)
        assert [float(row["search_cpu_seconds"]) for row in of_seed] == pytest.approx(expected)
        for row, place in zip(of_seed, ROWS.values(), strict=True):
            trained = [
                read(member / "member.json")["cpu_seconds"]
                for member in sorted((run / place / "members").iterdir())
            ]
            paid = trained[:1] if row["name"].startswith("one ") else trained
            assert float(row["cpu_seconds"]) == pytest.approx(float(row["search_cpu_seconds"]) + sum(paid))


def test_networks_are_of_the_cells_that_were_found(finished):
    run = finished[0] / "runs" / "seed-1"
    base = read(run / "baselines" / "darts-ens" / "search-0" / "genotypes.json")
    darts = Genotype.from_dict(base["base"]["genotype"])
    # One cell was searched: both of the stack are of its kind.
    assert darts.cell_types == ("reduction",)
    assert {len(node) for node in darts.reduction} == {1}
    assert genotypes_of(run / "baselines" / "darts-ens")[0] == darts
    config = read(run / "baselines" / "hypernet" / "search" / "config.json")["search"]
    assert config["regime"] == "hypernet"
    assert config["hypernetwork"]["base"] == "baselines/darts-ens/search-0/genotypes.json"
    found = read(run / "baselines" / "hypernet" / "search" / "genotypes.json")
    assert Genotype.from_dict(found["base"]["genotype"]) == darts
    hypernet = genotypes_of(run / "baselines" / "hypernet")
    assert hypernet == [
        Genotype.from_dict(found["candidates"][index]["genotype"]) for index in found["selected"]
    ]
    deviations = genotypes_of(run / "baselines" / "darts-deviations")
    most = darts.num_edges - 1
    assert [one.shared_edges(darts) for one in deviations] == [
        min(one.shared_edges(darts), most) for one in hypernet
    ]


def test_what_is_finished_is_not_run_again(finished):
    folder, _ = finished
    files = [*folder.glob("runs/**/members/*/metrics.jsonl"), *folder.glob("runs/**/genotypes.json")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(before) == 2 * (10 + 4)
    # Moved, and asked for fewer seeds.
    (folder / "runs").rename(folder / "moved")
    try:
        neural_ensemble_search.main(
            [*TINY, "--seeds", "1", "--run-dir", str(folder / "moved"), "--output", str(folder / "one")]
        )
    finally:
        (folder / "moved").rename(folder / "runs")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    rows = (folder / "one.csv").read_text().splitlines()
    both = (folder / "out.csv").read_text().splitlines()
    assert rows == [both[0], *(row for row in both[1:] if row.startswith("0,"))]


def test_other_settings_and_bad_values_are_refused(finished):
    where = ["--run-dir", str(finished[0] / "runs"), "--output", str(finished[0] / "other")]
    with pytest.raises(UserError, match=r"retrain\.epochs is 2 there and 3 here"):
        neural_ensemble_search.main([*TINY, "--epochs", "3", *where])
    with pytest.raises(UserError, match="--members is 0"):
        neural_ensemble_search.main([*TINY, "--members", "0", *where])
    assert not (finished[0] / "other.md").exists()
