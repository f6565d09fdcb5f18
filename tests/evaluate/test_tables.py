import csv
import io

import numpy as np
import pytest
from sklearn.metrics import log_loss

from dnas_ens.analysis.calibration import fit_temperature
from dnas_ens.errors import UserError
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.tables import best_single, ensemble_row, result_rows, to_csv, to_markdown


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


def test_predictions_file_round_trip_and_damage(tmp_path):
    given = predictions()
    path = tmp_path / "predictions.npz"
    given.save(path)
    loaded = Predictions.load(path)
    np.testing.assert_allclose(loaded.test_probs, given.test_probs, rtol=1e-6)
    np.testing.assert_array_equal(loaded.val_labels, given.val_labels)
    assert (loaded.classes, loaded.parameters) == (given.classes, given.parameters)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError):
        Predictions.load(path)
    with pytest.raises(UserError):
        Predictions.load(tmp_path / "absent.npz")


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
