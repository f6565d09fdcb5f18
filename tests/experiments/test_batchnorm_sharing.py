import json
import re
import statistics

import batchnorm_sharing
import numpy as np
import pytest
from scipy.stats import kendalltau

from dnas_ens.errors import UserError

SETTINGS = ("slices", "separate")
TINY = ("--epochs", "3", "--limit-train", "96", "--pool", "4", "--candidate-recipe-epochs", "1")


@pytest.fixture(scope="module", autouse=True)
def small(narrow):
    with narrow(batchnorm_sharing, num_cells=1):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_here, small):
    """A study of two seeds with a pool of two random genotypes and two candidates."""
    output = tmp_path_factory.mktemp("study") / "sharing"
    return output, run_here("batchnorm_sharing", *TINY, "--seeds", "2", "--output", output)


def tau(first, second):
    return kendalltau(first, second).statistic


def expected_measures(search, trained):
    pool = search["candidates"]
    supernet = np.array([candidate["supernet_val_nll"] for candidate in pool])
    retrained = np.array([trained[search["seed"], candidate["cells"]] for candidate in pool])
    drawn = np.array([candidate["direction"] is None for candidate in pool])
    lam, distance = np.array(search["lam"]), np.array(search["distance"])
    return {
        "Kendall's τ, pool": tau(supernet, retrained),
        "Kendall's τ, random genotypes": tau(supernet[drawn], retrained[drawn]),
        "Kendall's τ, candidates": tau(supernet[~drawn], retrained[~drawn]),
        "Spearman(λ, D to base)": search["spearman_distance"],
        "Spearman(λ, shared edges)": search["spearman_shared"],
        "mean abs(D−λ), λ ≤ 0.7": abs(distance - lam)[:, lam <= 0.7].mean(),
        "relaxed val accuracy": search["relaxed_accuracy"],
        "discretisation gap": search["relaxed_accuracy"] - pool[0]["supernet_val_accuracy"],
        "supernet val NLL, random genotypes": supernet[drawn].mean(),
        "supernet val NLL, candidates": supernet[~drawn].mean(),
        "retrained val NLL, candidates": retrained[~drawn].mean(),
        "CPU seconds of the search": search["cpu_seconds"],
    }


@pytest.fixture
def units(finished, read_lines):
    """Records of searches by setting and seed, and val NLLs of trainings by seed and cells."""
    records = read_lines(finished[0].with_suffix(".jsonl"))
    searches = {(record["setting"], record["seed"]): record for record in records if record["kind"] == "search"}
    trainings = [record for record in records if record["kind"] == "training"]
    trained = {(record["seed"], record["cells"]): record["val_nll"] for record in trainings}
    # Each isomorphism class is trained once.
    assert len(trained) == len(trainings)
    return searches, trained


def test_table_is_what_the_records_say(finished, units, numbers, t_half_width):
    output, _ = finished
    searches, trained = units
    found = {key: expected_measures(search, trained) for key, search in searches.items()}
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
        half = t_half_width(differences)
        mean = statistics.fmean(differences)
        spread = [value for column in columns for value in (statistics.fmean(column), statistics.stdev(column))]
        expected = [*spread, *differences, mean, mean - half, mean + half]
        # The label "λ ≤ 0.7" is not among the cells.
        assert numbers(" ".join(rows[name])) == pytest.approx(expected, abs=6e-4), name
        apart, alike = text.split("It is not distinguishable from 0 in ")
        assert name in (apart.split("is distinguishable from 0 in ")[1] if abs(mean) > half else alike)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_both_settings_rank_the_same_random_genotypes(units):
    searches, trained = units
    for seed in (0, 1):
        pools = [searches[setting, seed]["candidates"] for setting in SETTINGS]
        drawn = [[candidate["genotype"] for candidate in pool if candidate["lam"] is None] for pool in pools]
        assert len(drawn[0]) == 2
        assert drawn[0] == drawn[1]
        ranked = {candidate["cells"] for pool in pools for candidate in pool}
        assert {cells for trained_seed, cells in trained if trained_seed == seed} == ranked
    assert all(record["config"]["objective"]["passes"] == setting for (setting, _), record in searches.items())


def test_what_is_finished_is_not_run_again(finished, tmp_path, run_here, read_lines, timeless):
    output, printed = finished
    whole = read_lines(output.with_suffix(".jsonl"))
    assert len(re.findall(r"^seed \d", printed, re.MULTILINE)) == len(whole)
    lost = next(record for record in whole if record["kind"] == "training")
    kept = [record for record in whole if record is not lost]
    resumed = tmp_path / "sharing"
    resumed.with_suffix(".jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    printed = run_here("batchnorm_sharing", *TINY, "--seeds", "2", "--output", resumed)
    assert re.findall(r"^seed \d, \w+", printed, re.MULTILINE) == ["seed 0, training"]
    *before, again = read_lines(resumed.with_suffix(".jsonl"))
    assert before == kept
    assert timeless(lost) == timeless(again)
    tables = [path.with_suffix(".md").read_text().split("Test images were not read.")[1] for path in (output, resumed)]
    assert tables[0] == tables[1]

    other = ("--epochs", "4", *TINY[2:], "--seeds", "2", "--output", resumed)
    with pytest.raises(UserError, match="with other settings"):
        run_here("batchnorm_sharing", *other)
