import csv
import dataclasses
import io

import numpy as np
import pytest
from sklearn.metrics import log_loss

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import (
    COLUMNS,
    best_single,
    ensemble_row,
    result_rows,
    to_csv,
    to_markdown,
    train_seconds,
)
from dnas_ens.metrics.calibration import fit_temperature


def predictions(num_members=3, seed=0):
    generator = np.random.default_rng(seed)
    val_labels, test_labels = generator.integers(0, 4, 80), generator.integers(0, 4, 60)

    def probs(labels, sharpness):
        logits = generator.normal(size=(num_members, len(labels), 4))
        logits[:, np.arange(len(labels)), labels] += sharpness
        odds = np.exp(logits)
        return odds / odds.sum(-1, keepdims=True)

    return Predictions(
        val_probs=probs(val_labels, 1.5),
        val_labels=val_labels,
        test_probs=probs(test_labels, 1.5),
        test_labels=test_labels,
        classes=["a", "b", "c", "d"],
        weights=[1 / num_members] * num_members,
        parameters=[10, 20, 30][:num_members],
    )


def test_rows_against_scikit_learn():
    given = predictions()
    rows = {row["name"]: row for row in result_rows(given)}
    averaged = given.test_probs.mean(0)
    assert rows["ensemble"]["nll"] == pytest.approx(log_loss(given.test_labels, averaged, labels=range(4)))
    assert rows["ensemble"]["accuracy"] == pytest.approx((averaged.argmax(-1) == given.test_labels).mean())
    assert rows["ensemble"]["parameters"] == 60
    assert rows["member 1"]["nll"] == pytest.approx(
        log_loss(given.test_labels, given.test_probs[1], labels=range(4))
    )
    members = [rows[f"member {index}"]["nll"] for index in range(3)]
    assert rows["average member"]["nll"] == pytest.approx(np.mean(members))
    # Jensen: the average of the probabilities is never worse than the average member.
    assert rows["ensemble"]["nll"] <= np.mean(members)


def test_temperature_is_fitted_on_val_alone():
    given = predictions()
    row = ensemble_row("ensemble", given)
    assert row["temperature"] == pytest.approx(fit_temperature(given.val_probs.mean(0), given.val_labels))
    tempered = given.test_probs.mean(0) ** (1 / row["temperature"])
    tempered /= tempered.sum(-1, keepdims=True)
    assert row["calibrated_nll"] == pytest.approx(log_loss(given.test_labels, tempered, labels=range(4)))


def test_weights_count():
    given = predictions()
    only_last = Predictions(**{**vars(given), "weights": [0.0, 0.0, 1.0]})
    expected = log_loss(given.test_labels, given.test_probs[2], labels=range(4))
    assert ensemble_row("x", only_last)["nll"] == pytest.approx(expected)


def test_best_single_is_chosen_on_val_and_not_on_test():
    given = predictions()
    scores = [log_loss(given.val_labels, probs, labels=range(4)) for probs in given.val_probs]
    assert best_single(given) == int(np.argmin(scores))
    spoilt = Predictions(**{**vars(given), "test_probs": given.test_probs[:, ::-1]})
    assert best_single(spoilt) == best_single(given)


def test_tables_are_readable_by_machine_and_by_eye():
    rows = result_rows(predictions())
    parsed = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [row["name"] for row in parsed] == [row["name"] for row in rows]
    assert float(parsed[-1]["nll"]) == rows[-1]["nll"]
    assert parsed[0]["disagreement"] == ""
    lines = to_markdown(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].startswith("| ensemble")
    assert f"{100 * rows[-1]['accuracy']:.2f}" in lines[-1]


def test_selective_columns_against_scikit_learn():
    given = predictions()
    row = ensemble_row("ensemble", given)
    averaged = given.test_probs.mean(0)
    order = np.argsort(-averaged.max(1))
    right = (averaged.argmax(1) == given.test_labels)[order]
    assert row["selective_accuracy_90"] == pytest.approx(right[:54].mean())
    assert row["aurc"] == pytest.approx(np.mean([1 - right[:n].mean() for n in range(1, 61)]))


def costed(**fields):
    costs = {
        "flops": [5, 6, 7],
        "inference_seconds": [0.1, 0.2, 0.4],
        "train_cpu_seconds": [1.0, 2.0, 4.0],
        "train_gpu_seconds": [0.0, 0.0, 0.0],
        "search_cpu_seconds": 100.0,
        "search_gpu_seconds": 0.0,
    }
    return dataclasses.replace(predictions(), **{**costs, **fields})


def test_costs_of_members_and_ensemble():
    rows = {row["name"]: row for row in result_rows(costed())}
    whole, member = rows["ensemble"], rows["member 1"]
    assert (whole["parameters"], whole["flops"], whole["train_seconds"]) == (60, 18, 107.0)
    assert whole["inference_seconds"] == pytest.approx(0.7)
    assert (member["parameters"], member["flops"], member["train_seconds"]) == (20, 6, 2.0)
    # Which member is best was found out by training all of them.
    best = next(row for name, row in rows.items() if name.startswith("best single"))
    assert best["train_seconds"] == 107.0
    assert best["flops"] in (5, 6, 7)


def test_gpu_seconds_come_before_cpu_seconds():
    on_gpu = costed(train_gpu_seconds=[10.0, 20.0, 40.0], search_gpu_seconds=500.0)
    assert ensemble_row("x", on_gpu)["train_seconds"] == 570.0
    assert train_seconds(on_gpu, search=False) == 70.0


def test_seconds_of_both_kinds_do_not_add_up():
    mixed = costed(search_gpu_seconds=20.0)
    assert ensemble_row("x", mixed)["train_seconds"] is None
    assert train_seconds(mixed, search=False) == 7.0
    assert train_seconds(costed(train_gpu_seconds=[10.0, 0.0, 0.0]), search=False) is None
    # A search that took no time was done by neither.
    drawn = costed(train_gpu_seconds=[1.0, 2.0, 3.0], search_cpu_seconds=0.0)
    assert train_seconds(drawn, search=True) == 6.0


def test_what_is_unknown_stays_empty():
    rows = result_rows(dataclasses.replace(predictions(), parameters=()))
    for column in ("parameters", "flops", "inference_seconds", "train_seconds"):
        assert rows[-1][column] is None
        assert column not in to_markdown(rows)
    assert ensemble_row("x", costed(search_cpu_seconds=None, search_gpu_seconds=None))["train_seconds"] == 7.0


def test_the_table_a_person_reads_fits_and_the_files_hold_everything():
    rows = result_rows(costed())
    table = to_markdown(rows)
    header = table.splitlines()[0]
    assert header.count("|") - 1 <= 12
    assert len(header) <= 150
    assert set(rows[-1]) == set(COLUMNS)
    shown = to_markdown([{"name": "x", "flops": 2_500_000, "inference_seconds": 0.0012}], COLUMNS)
    assert "2.5" in shown
    assert "1.200" in shown
    parsed = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert parsed[-1]["flops"] == "18"
