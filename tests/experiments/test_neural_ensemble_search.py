import csv
import statistics

import numpy as np
import pytest

from dnas_ens.errors import UserError
from dnas_ens.run.files import read_json
from dnas_ens.space.genotype import Genotype

TINY = (
    "--limit-train 96 --seeds 2 --members 2 --search-channels 2 --channels 4 --search-epochs 2 --epochs 2 --device cpu"
).split()
#: For each row its folder below a seed's run folder, the searches it pays for, and what is published beside it.
ROWS = {
    "one DARTS search, its cell trained once (DARTS)": ("darts-ens", ["darts-ens/search-0"], "46.8 ± 1.7", "1.2"),
    "one random cell (Random)": ("random-cells", [], "", ""),
    "cells of independent DARTS searches (DartsEns)": (
        *("darts-ens", ["darts-ens/search-0", "darts-ens/search-1"], "48.2 ± 1.5", "3.6"),
    ),
    "random cells (Random-NES)": ("random-cells", [], "46.9 ± 5.2", "0"),
    "random deviations of the DARTS cell (RandomD-NES)": (
        *("darts-deviations", ["darts-ens/search-0"], "47.7 ± 3.4", "1.2"),
    ),
    "hypernetwork upon a DARTS cell (EdgeNES)": (
        *("hypernet", ["darts-ens/search-0", "hypernet/search"], "48.1 ± 1.7", "2.1"),
    ),
    "star hypernetwork (ours)": ("..", [".."], "", ""),
}


@pytest.fixture(scope="module")
def study(run_here):
    def run(folder, *options, runs="runs", output="out"):
        where = ("--run-dir", folder / runs, "--output", folder / output)
        return run_here("neural_ensemble_search", *TINY, *options, *where)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, study):
    folder = tmp_path_factory.mktemp("study")
    return folder, study(folder)


def below(folder, seed, place):
    return (folder / "runs" / f"seed-{seed}" / "baselines" / place).resolve()


def table_of(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


def members_of(folder):
    files = sorted((folder / "members").glob("*/member.json"), key=lambda file: int(file.parent.name))
    return [read_json(file) for file in files]


def genotypes_of(folder):
    return [Genotype.from_dict(member["spec"]["genotype"]) for member in members_of(folder)]


def test_rows_are_what_is_stored_with_the_published_table_beside_them(finished):
    folder, printed = finished
    text = (folder / "out.md").read_text()
    assert text.rstrip() in printed
    assert "This is **not** the published scale" in text
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    rows = table_of(folder / "out.csv")
    assert [row["name"] for row in rows] == 2 * list(ROWS)
    for name, (place, searches, *published) in ROWS.items():
        percent = []
        for row in (row for row in rows if row["name"] == name):
            where = below(folder, row["seed"], place)
            stored = np.load(where / "predictions.npz")
            seconds = [member["cpu_seconds"] for member in members_of(where)]
            count = 1 if name.startswith("one ") else len(seconds)
            probs = stored["test_probs"].astype(float)[:count].mean(axis=0)
            percent.append(100 * (probs.argmax(axis=1) == stored["test_labels"]).mean())
            found = [below(folder, row["seed"], search) / "genotypes.json" for search in searches]
            searching = sum(read_json(file)["report"]["cpu_seconds"] for file in found)
            assert float(row["search_cpu_seconds"]) == pytest.approx(searching)
            assert float(row["cpu_seconds"]) == pytest.approx(searching + sum(seconds[:count]))
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        accuracy, *_, published_accuracy, hours = (cell.strip() for cell in line.strip("|").split("|")[1:])
        assert [published_accuracy, hours] == published
        expected = [statistics.mean(percent), statistics.stdev(percent)]
        assert [float(part) for part in accuracy.split(" ± ")] == pytest.approx(expected, abs=0.006)


def test_networks_are_of_the_cells_that_were_found(finished):
    folder, _ = finished
    base = read_json(below(folder, 1, "darts-ens/search-0") / "genotypes.json")
    darts = Genotype.from_dict(base["base"]["genotype"])
    # One cell was searched: both of the stack are of its kind.
    assert darts.cell_types == ("reduction",)
    assert {len(node) for node in darts.reduction} == {1}
    assert genotypes_of(below(folder, 1, "darts-ens"))[0] == darts
    search = below(folder, 1, "hypernet/search")
    config = read_json(search / "config.json")["search"]
    assert config["regime"] == "hypernet"
    assert config["hypernetwork"]["base"] == "baselines/darts-ens/search-0/genotypes.json"
    found = read_json(search / "genotypes.json")
    assert Genotype.from_dict(found["base"]["genotype"]) == darts
    hypernet = genotypes_of(below(folder, 1, "hypernet"))
    chosen = [found["candidates"][index]["genotype"] for index in found["selected"]]
    assert hypernet == [Genotype.from_dict(genotype) for genotype in chosen]
    shared = [one.shared_edges(darts) for one in genotypes_of(below(folder, 1, "darts-deviations"))]
    assert shared == [min(one.shared_edges(darts), darts.num_edges - 1) for one in hypernet]


def test_what_is_finished_is_not_run_again_and_other_settings_are_refused(finished, study):
    folder, _ = finished
    files = [*folder.glob("runs/**/members/*/metrics.jsonl"), *folder.glob("runs/**/genotypes.json")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(before) == 2 * (10 + 4)
    # Moved, and asked for fewer seeds.
    (folder / "runs").rename(folder / "moved")
    try:
        study(folder, "--seeds", "1", runs="moved", output="one")
    finally:
        (folder / "moved").rename(folder / "runs")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    both = table_of(folder / "out.csv")
    assert table_of(folder / "one.csv") == [row for row in both if row["seed"] == "0"]
    with pytest.raises(UserError, match=r"retrain\.epochs is 2 there and 3 here"):
        study(folder, "--epochs", "3", output="other")
    assert not (folder / "other.md").exists()
