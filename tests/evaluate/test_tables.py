import csv
import dataclasses
import io
import re

import numpy as np
import pytest
import tiny
from sklearn.metrics import log_loss

from dnas_ens.evaluate.tables import COLUMNS, best_single, ensemble_row, result_rows, to_csv, to_markdown, train_seconds
from dnas_ens.metrics.calibration import fit_temperature


def test_rows_against_scikit_learn():
    given = tiny.predictions()
    rows = {row["name"]: row for row in result_rows(given)}
    averaged, labels, ensemble = given.test_probs.mean(0), given.test_labels, rows["ensemble"]
    assert ensemble["nll"] == pytest.approx(log_loss(labels, averaged, labels=range(4)))
    assert ensemble["accuracy"] == pytest.approx((averaged.argmax(-1) == labels).mean())
    members = [rows[f"member {index}"]["nll"] for index in range(3)]
    assert members == pytest.approx([log_loss(labels, probs, labels=range(4)) for probs in given.test_probs])
    assert rows["average member"]["nll"] == pytest.approx(np.mean(members))
    # The temperature is fitted on val alone.
    assert ensemble["temperature"] == pytest.approx(fit_temperature(given.val_probs.mean(0), given.val_labels))
    tempered = averaged ** (1 / ensemble["temperature"])
    tempered /= tempered.sum(-1, keepdims=True)
    assert ensemble["calibrated_nll"] == pytest.approx(log_loss(labels, tempered, labels=range(4)))
    # Selective prediction: the surest images first.
    right = (averaged.argmax(1) == labels)[np.argsort(-averaged.max(1))]
    assert ensemble["selective_accuracy_90"] == pytest.approx(right[:54].mean())
    assert ensemble["aurc"] == pytest.approx(np.mean([1 - right[:n].mean() for n in range(1, 61)]))
    only_last = dataclasses.replace(given, weights=[0.0, 0.0, 1.0])
    assert ensemble_row("x", only_last)["nll"] == pytest.approx(members[2])


def test_best_single_is_chosen_on_val_and_not_on_test():
    given = tiny.predictions()
    of_val, of_test = (
        np.argmin([log_loss(labels, member, labels=range(4)) for member in probs])
        for probs, labels in ((given.val_probs, given.val_labels), (given.test_probs, given.test_labels))
    )
    assert best_single(given) == of_val != of_test


def costed(**fields):
    costs = {"parameters": [10, 20, 30], "flops": [5, 6, 7], "inference_seconds": [0.1, 0.2, 0.4]}
    costs |= {"train_cpu_seconds": [1.0, 2.0, 4.0], "train_gpu_seconds": [0.0, 0.0, 0.0]}
    return tiny.predictions(**{**costs, "search_cpu_seconds": 100.0, "search_gpu_seconds": 0.0, **fields})


def test_costs_of_members_and_ensemble():
    rows = {row["name"]: row for row in result_rows(costed())}
    whole, member = rows["ensemble"], rows["member 1"]
    assert (whole["parameters"], whole["flops"], whole["train_seconds"]) == (60, 18, 107.0)
    assert (member["parameters"], member["flops"], member["train_seconds"]) == (20, 6, 2.0)
    assert whole["inference_seconds"] == pytest.approx(0.7)
    # Which member is best was found out by training all of them.
    assert next(row["train_seconds"] for name, row in rows.items() if "best single" in name) == 107.0


@pytest.mark.parametrize(
    ("costs", "with_search", "without"),
    [
        # GPU seconds come before CPU seconds; seconds of both kinds do not add up.
        ({"train_gpu_seconds": [10.0, 20.0, 40.0], "search_gpu_seconds": 500.0}, 570.0, 70.0),
        ({"search_gpu_seconds": 20.0}, None, 7.0),
        # A search that took no time was done by neither.
        ({"train_gpu_seconds": [1.0, 2.0, 3.0], "search_cpu_seconds": 0.0}, 6.0, 6.0),
        ({"search_cpu_seconds": None, "search_gpu_seconds": None}, 7.0, 7.0),
    ],
)
def test_seconds_of_one_kind_add_up(costs, with_search, without):
    given = costed(**costs)
    assert ensemble_row("x", given)["train_seconds"] == with_search
    assert train_seconds(given, search=False) == without


def test_the_table_a_person_reads_fits_and_the_files_hold_everything():
    rows, unknown = result_rows(costed()), result_rows(tiny.predictions())
    lines = to_markdown(rows).splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 150
    assert f"{100 * rows[-1]['accuracy']:.2f}" in lines[-1]
    shown = to_markdown([{"name": "x", "flops": 2_500_000, "inference_seconds": 0.0012}], COLUMNS)
    assert re.search(r"2\.5 .* 1\.200", shown)
    # What is unknown has no column.
    assert unknown[-1]["flops"] is None
    assert "flops" not in to_markdown(unknown)
    parsed = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [row["name"] for row in parsed] == [row["name"] for row in rows]
    assert float(parsed[-1]["nll"]) == rows[-1]["nll"]
    assert (parsed[0]["disagreement"], parsed[-1]["flops"]) == ("", "18")
