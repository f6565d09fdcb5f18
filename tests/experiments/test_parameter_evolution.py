import re

import numpy as np
import pytest
import torch
from scipy.special import softmax

from dnas_ens.data import load_data
from dnas_ens.data.batches import normalise
from dnas_ens.nn.reference_models import reference_model
from dnas_ens.run.files import load_tensors

TINY = (
    *("--data", "digits", "--model", "small-cnn", "--limit-train", 320, "--learning-rate", 0.05),
    *("--population", 5, "--generations", 1, "--curve-points", 3, "--cycle-epochs", 2),
    *("--networks", 2, "--epochs", 8, "--seeds", 2),
)
KINDS = ("independent", "snapshots")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_here):
    folder = tmp_path_factory.mktemp("study")
    where = ("--run-dir", folder / "run", "--output", folder / "out")
    return folder, run_here("parameter_evolution", *TINY, *where)


def nll(probs, labels):
    return -np.log(probs[np.arange(len(labels)), labels]).mean()


def predicted(state, split, data):
    model = reference_model("small-cnn", 1, 10, 8).eval()
    model.load_state_dict(state)
    inputs = normalise(split.images, mean=data.mean, std=data.std)
    with torch.no_grad():
        return softmax(model(inputs).double().numpy(), axis=1)


def networks(place, kind):
    """The two networks of a kind, as the study saved them."""
    parts = {"independent": ("network-0", 0, "network-1", 0), "snapshots": ("snapshots", 0, "snapshots", 1)}
    first, index, second, other = parts[kind]
    files = (place / first / f"snapshot-{index}", place / second / f"snapshot-{other}")
    return [load_tensors(file.with_suffix(".safetensors")) for file in files]


def between(states, share):
    first, second = states
    return {name: share * first[name] + (1 - share) * second[name] for name in first}


def test_table_is_what_the_stored_predictions_say(finished, check_rows, cells):
    text = check_rows(*finished, num_rows=14)
    published = text.split("## Beside the published table")[1]
    rows = ("network 1", "network 2", "evolved, two networks", "mean of predictions, two")
    assert [cells(published, row)[0] for row in rows] == ["63.23", "63.42", "63.35", "64.92"]


def test_rows_and_curve_are_those_of_the_combined_weights(finished, read_lines):
    place = finished[0] / "run" / "seed-1"
    _, record = read_lines(finished[0] / "out.jsonl")
    stored = np.load(place / "predictions.npz")
    data = load_data("digits", limit_train=320)
    labels = data.val.labels.numpy()
    # Every other image of each class judged, classes taking turns in which is the first.
    judging = sorted(
        index
        for label in range(10)
        for position, index in enumerate(np.flatnonzero(labels == label))
        if (position + label) % 2 == 0
    )
    judged = data.val.subset(judging)
    rows = {row["name"]: (index, row) for index, row in enumerate(record["rows"])}
    for kind in KINDS:
        states, curve = networks(place, kind), record["kinds"][kind]
        assert curve["e"] == [0.0, 0.5, 1.0]
        expected = [nll(predicted(between(states, e), judged, data), labels[judging]) for e in curve["e"]]
        assert curve["nll"] == pytest.approx(expected, abs=1e-4)
        assert curve["barrier"] == pytest.approx(max(0.0, expected[1] - (expected[0] + expected[2]) / 2), abs=2e-4)
        index, evolved = rows[f"{kind}: evolved, two networks"]
        share = evolved["coefficients"][0]
        found = predicted(between(states, share), data.test, data)
        np.testing.assert_allclose(stored["test_probs"][index], found, atol=1e-4)
        # It was judged by half of val alone, and is no worse there than what it started from.
        assert evolved["judged_nll"] <= min(curve["nll"]) + 1e-9
        index, _ = rows[f"{kind}: mean of predictions, two"]
        mean = np.mean([predicted(state, data.test, data) for state in states], axis=0)
        np.testing.assert_allclose(stored["test_probs"][index], mean, atol=1e-5)


def test_what_is_finished_is_not_run_again(finished, check_resumed):
    folder, printed = finished
    assert len(re.findall("^trained", printed, re.MULTILINE)) == 6
    # As if it had been interrupted in the training on of seed 1.
    check_resumed("parameter_evolution", folder, TINY, lost="snapshots")
