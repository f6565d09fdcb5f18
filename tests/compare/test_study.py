"""The study engine: what is run, what is kept, and what the tables say."""

import json

import numpy as np
import pytest
from scipy import stats

from dnas_ens.compare.records import Records, append_line, read_lines
from dnas_ens.compare.report import (
    Column,
    Row,
    compare_pairs,
    losses_over_seeds,
    markdown_table,
    measured_rows,
    table_over_seeds,
    write_results,
)
from dnas_ens.compare.study import run_missing, tasks_of
from dnas_ens.errors import UserError
from dnas_ens.metrics.calibration import per_image_calibrated_nll


def made(factor, condition, seed):
    return {"setting": condition, "seed": seed, "epochs": 3, "value": factor * seed}


def store(folder, epochs=3, **options):
    return Records(folder / "study.jsonl", key=("setting", "seed"), settings=lambda _: {"epochs": epochs}, **options)


def test_each_condition_is_run_once_with_each_seed_and_settings_are_not_mixed(tmp_path):
    ran = []

    def run_one(condition, seed):
        ran.append((condition, seed))
        return made(2, condition, seed)

    tasks = tasks_of(run_one, ["a", "b"], range(2))
    run_missing(store(tmp_path), tasks, said=lambda record: f"{record['setting']} {record['seed']}")
    assert ran == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    # More seeds add to what is there.
    again = store(tmp_path)
    run_missing(again, tasks_of(run_one, ["a", "b"], range(3)))
    assert ran[4:] == [("a", 2), ("b", 2)]
    assert [record["value"] for record in again] == [0, 0, 2, 2, 4, 4]
    assert again["b", 2] == read_lines(tmp_path / "study.jsonl")[-1]
    with pytest.raises(UserError, match=r"holds a, 0 with other settings: epochs is 3 there and 4 here"):
        store(tmp_path, epochs=4)


@pytest.mark.parametrize("line", ["2", '{"seed": 1}', '{"setting": [], "seed": 1, "epochs": 3}', "null"])
def test_lines_of_json_that_are_no_records_are_told(tmp_path, line):
    (tmp_path / "study.jsonl").write_text('{"setting": "a", "seed": 0, "epochs": 3}\n' + line + "\n")
    with pytest.raises(UserError, match=r"study\.jsonl: line 2 is no record"):
        store(tmp_path)


def test_an_unfinished_last_line_is_cut_off_and_a_damaged_one_is_told(tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    assert read_lines(file) == []
    append_line(file, {"seed": 0})
    # As a process leaves it that was killed while it wrote.
    with file.open("a") as stream:
        stream.write('{"seed": 1, "lo')
    assert read_lines(file) == [{"seed": 0}]
    assert "the last line is unfinished" in capsys.readouterr().err
    append_line(file, {"seed": 2})
    assert read_lines(file) == [{"seed": 0}, {"seed": 2}]
    assert not capsys.readouterr().err
    file.write_text("{]\n")
    with pytest.raises(UserError, match="Cannot read"):
        read_lines(file)
    with pytest.raises(UserError, match="Cannot write"):
        append_line(file / "below.jsonl", {})


def test_a_unit_without_its_arrays_is_run_again(tmp_path):
    def opened():
        return store(tmp_path, arrays=lambda record: tmp_path / f"{record['seed']}.npz")

    records = opened()
    for seed in (0, 1):
        records.add(made(1, "a", seed), {"probs": np.full(3, seed)})
    np.testing.assert_array_equal(records.arrays(("a", 1))["probs"], [1, 1, 1])
    (tmp_path / "0.npz").unlink()
    left = opened()
    assert ("a", 0) not in left
    assert ("a", 1) in left


def test_rows_and_losses_are_those_of_the_stored_predictions(tmp_path):
    generator = np.random.default_rng(0)
    records = Records(tmp_path / "s.jsonl", key=("seed",), arrays=lambda record: tmp_path / f"{record['seed']}.npz")
    labels = {"val_labels": generator.integers(0, 3, 30), "test_labels": generator.integers(0, 3, 20)}
    given = []
    for seed in (0, 1):
        probs = [[generator.dirichlet(np.ones(3), size).astype(np.float32) for size in (30, 20)] for _ in range(2)]
        given.append(probs)
        rows = [
            Row(name=name, val_probs=val, test_probs=test, details={"cpu_seconds": 1.0})
            for name, (val, test) in zip("ab", probs, strict=True)
        ]
        found, arrays = measured_rows(rows, **labels)
        records.add({"seed": seed, "rows": found}, arrays)
    by_row = losses_over_seeds(records, (0, 1))
    for index, name in enumerate("ab"):
        expected = [
            per_image_calibrated_nll(val, labels["val_labels"], test, labels["test_labels"])
            for val, test in (probs[index] for probs in given)
        ]
        np.testing.assert_allclose(by_row[name], expected)
        row = records[1]["rows"][index]
        assert row["calibrated_nll"] == pytest.approx(np.mean(expected[1]))
        assert (row["name"], row["cpu_seconds"]) == (name, 1.0)


def test_pairs_are_corrected_together():
    generator = np.random.default_rng(0)
    # As few images as let all sign changes be counted.
    losses = {name: generator.normal(loc=shift, size=(2, 12)) for name, shift in (("a", 0), ("b", 1), ("c", 1))}
    pairs = [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b")]
    found = compare_pairs(losses, pairs)
    assert list(found) == pairs[:3]
    raw = [
        stats.permutation_test(
            ((losses[first] - losses[second]).mean(axis=0),), np.mean, permutation_type="samples"
        ).pvalue
        for first, second in pairs[:3]
    ]
    ranked = sorted(raw)
    corrected = [max(min(1.0, (3 - rank) * ranked[rank]) for rank in range(ranked.index(p) + 1)) for p in raw]
    assert [each.p_value for each in found.values()] == pytest.approx(corrected)
    assert found["a", "b"].mean == pytest.approx((losses["a"] - losses["b"]).mean())


def test_tables_and_files(tmp_path):
    assert markdown_table(["a", "b", "c"], [["x", "1", "y"]], text_columns=(0, -1)) == (
        "| a | b | c |\n|:--|--:|:--|\n| x | 1 | y |\n"
    )
    rows = {"one": [{"hit": 0.5, "of": None}, {"hit": 0.7, "of": None}]}
    columns = {"hit": Column("hit %", 100.0, 1), "of": Column("of")}
    assert table_over_seeds(rows, columns).splitlines()[2] == "| one | 60.0 ± 14.1 |  |"
    # An output keeps its dots.
    write_results(tmp_path / "x-0.5", "text", records=[{"a": 1}], rows=[{"a": 1, "b": 2}], columns=("b",), document=[3])
    content = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert content["x-0.5.md"] == "text"
    assert content["x-0.5.jsonl"] == '{"a": 1}\n'
    assert content["x-0.5.csv"] == "b\n2\n"
    assert json.loads(content["x-0.5.json"]) == [3]
