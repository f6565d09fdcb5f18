"""Whatever the labels of the test images say: search, retraining, selection and calibration come out the same."""

import numpy as np
import pytest
import torch
from PIL import Image

import dnas_ens as de
from dnas_ens.commands.whole_way import main
from dnas_ens.data import ImageData, Split
from dnas_ens.ensembles import caruana_weights, fit_weights, greedy_selection
from dnas_ens.evaluate.predictions import predict_splits
from dnas_ens.evaluate.tables import result_rows
from dnas_ens.metrics.calibration import cross_fit
from dnas_ens.run.files import read_json

RECIPE = {"num_cells": 1, "channels": 8, "epochs": 8, "batch_size": 16}
FIGURES = ("accuracy", "nll", "calibrated_nll", "brier", "aurc")


def shuffled(labels, seed=0):
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return labels[order]


@pytest.fixture(scope="module")
def both(few_digits):
    """Digits, and the same with the test labels shuffled."""
    test = Split(images=few_digits.test.images, labels=shuffled(few_digits.test.labels))
    blind = ImageData.from_splits(
        few_digits.name, few_digits.classes, train=few_digits.train, val=few_digits.val, test=test, flip=False
    )
    assert (few_digits.test.labels != test.labels).float().mean() > 0.5
    return few_digits, blind


def whole_way(data, config):
    """Everything from the search to the tables, in Python."""
    found = de.search(data, config=config, device="cpu")
    ensemble = de.retrain(found, data, device="cpu", **RECIPE)
    return found, ensemble, predict_splits(ensemble, data)


def fitted(predictions):
    """What is fitted to predictions of val, and the loss that labels of test make of it."""
    val = predictions.val_probs.astype(np.float64), predictions.val_labels
    crossed = cross_fit(
        *val, predictions.test_probs, predictions.test_labels, fit=lambda *half: fit_weights(*half).weights
    )
    chosen = {
        "weights": fit_weights(*val).weights.tolist(),
        "caruana": caruana_weights(*val).weights.tolist(),
        "selection": greedy_selection(*val, num_members=2),
        "crossed weights": crossed.weights.tolist(),
        "crossed temperatures": crossed.temperatures,
    }
    return chosen, crossed.calibrated_nll


def test_from_python(both, tiny_search):
    (found, ensemble, predictions), (found_blind, ensemble_blind, predictions_blind) = (
        whole_way(data, tiny_search) for data in both
    )
    for name in ("base", "candidates", "selected", "genotypes", "curve", "temperature"):
        assert getattr(found, name) == getattr(found_blind, name), name
    weights, weights_blind = ensemble.state_dict(), ensemble_blind.state_dict()
    assert weights.keys() == weights_blind.keys()
    # Among them the combining weights and the temperature.
    assert {"weights", "temperature"} < weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, weights_blind[name]), name

    np.testing.assert_array_equal(predictions.val_probs, predictions_blind.val_probs)
    np.testing.assert_array_equal(predictions.test_probs, predictions_blind.test_probs)
    (chosen, loss), (chosen_blind, loss_blind) = fitted(predictions), fitted(predictions_blind)
    assert chosen == chosen_blind
    assert loss != loss_blind
    rows, rows_blind = result_rows(predictions), result_rows(predictions_blind)
    for row, row_blind in zip(rows, rows_blind, strict=True):
        assert row["name"] == row_blind["name"]  # names the best single member
        assert row.get("temperature") == row_blind.get("temperature")
        assert row.get("disagreement") == row_blind.get("disagreement")
    assert all(rows[-1][name] != rows_blind[-1][name] for name in FIGURES)
    assert rows[-1]["accuracy"] > rows_blind[-1]["accuracy"]


def write_pictures(root, data, test_labels):
    """Write a data set as a folder of images."""
    splits = {"train": data.train, "val": data.val, "test": Split(data.test.images, test_labels)}
    for name, split in splits.items():
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            place = root / name / data.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{index:03d}.png")


def without_seconds(found):
    report = {name: value for name, value in found["report"].items() if not name.endswith("seconds")}
    return {**found, "report": report}


def test_in_a_run_folder(few_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    search = (
        "--num-cells 1 --channels 2 --num-nodes 2 --directions 3 --epochs 2 --warmup-epochs 1 --batch-size 24 "
        "--drawn-members 2 --members 2 --pool-size 6 --architecture-learning-rate 0.1 --device cpu "
    )
    recipe = "--retrain.num-cells 1 --retrain.channels 4 --retrain.epochs 2 --retrain.batch-size 16 "
    for name, labels in (("seen", few_digits.test.labels), ("blind", shuffled(few_digits.test.labels))):
        write_pictures(tmp_path / name / "photos", few_digits, labels)
        main([*search.split(), *recipe.split(), "--data", f"{name}/photos", "--run-dir", f"{name}/run"])
    capsys.readouterr()
    seen, blind = tmp_path / "seen/run", tmp_path / "blind/run"

    def read(name):
        return [read_json(run / name) for run in (seen, blind)]

    found, found_blind = read("genotypes.json")
    assert without_seconds(found) == without_seconds(found_blind)
    for name in (
        *("hypernetwork.safetensors", "supernet.safetensors", "ensemble.json"),
        *(f"members/{index}/model.safetensors" for index in range(2)),
    ):
        assert (seen / name).read_bytes() == (blind / name).read_bytes(), name
    with np.load(seen / "predictions.npz") as ours, np.load(blind / "predictions.npz") as theirs:
        np.testing.assert_array_equal(ours["val_probs"], theirs["val_probs"])
        np.testing.assert_array_equal(ours["weights"], theirs["weights"])
        # Files of a split are read class by class, so the same pictures come in another order.
        np.testing.assert_allclose(
            np.sort(ours["test_probs"], axis=1), np.sort(theirs["test_probs"], axis=1), atol=1e-5
        )
    rows, rows_blind = read("results.json")
    assert [row.get("temperature") for row in rows] == [row.get("temperature") for row in rows_blind]
    assert [row["name"] for row in rows] == [row["name"] for row in rows_blind]
    assert all(rows[-1][name] != rows_blind[-1][name] for name in ("nll", "calibrated_nll", "brier"))
