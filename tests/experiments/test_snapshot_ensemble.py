import json
import re

import numpy as np
import pytest
import snapshot_ensemble
from scipy.special import softmax

from dnas_ens.data import load_data
from dnas_ens.data.batches import normalise
from dnas_ens.errors import UserError
from dnas_ens.nn.reference_models import reference_model
from dnas_ens.run.files import load_tensors

TINY = ("--data", "digits", "--model", "small-cnn", "--limit-train", "320", "--learning-rate", "0.05")
SCALE = ("--epochs", "10", "--cycles", "2", "--last", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_here):
    folder = tmp_path_factory.mktemp("study")
    where = ("--run-dir", folder / "run", "--output", folder / "out")
    return folder, run_here("snapshot_ensemble", *TINY, *SCALE, "--seeds", 2, *where)


def test_table_is_what_the_stored_predictions_say(finished, check_rows, cells):
    text = check_rows(*finished, num_rows=5)
    published = text.split("## Beside the published table")[1]
    assert cells(published, "single best snapshot")[0] == "92.70"
    assert cells(published, "all snapshots, equal weights")[0] == "92.84"
    row, other = (cells(text, name) for name in ("all snapshots, equal weights", "one model, one cosine"))
    gap = float(row[2].split()[0]) - float(other[2].split()[0])
    said = re.search(
        r"^- \*all snapshots, equal weights\*.*\*one model, one cosine\*.*\(([-+][\d.]+),", text, re.MULTILINE
    )
    assert float(said[1]) == pytest.approx(gap, abs=2e-4)


def test_rows_are_the_weighted_snapshots(finished, read_lines):
    folder, _ = finished
    place = folder / "run" / "seed-1"
    record = read_lines(folder / "out.jsonl")[1]
    data = load_data("digits", limit_train=320)
    inputs = normalise(data.test.images, mean=data.mean, std=data.std)
    members = []
    for name in ("cycles/snapshot-0", "cycles/snapshot-1", "one-cosine/snapshot-0"):
        model = reference_model("small-cnn", 1, 10, 8).eval()
        model.load_state_dict(load_tensors(place / f"{name}.safetensors"))
        members.append(softmax(model(inputs).detach().double().numpy(), axis=1))
    stored = np.load(place / "predictions.npz")["test_probs"]
    weights = {row["name"]: row["weights"] for row in record["rows"]}
    for index, row in enumerate(record["rows"]):
        expected = np.tensordot(row["weights"], np.stack(members), axes=1)
        np.testing.assert_allclose(stored[index], expected, atol=1e-5)
    assert weights["last 1 snapshots, equal weights"] == [0, 1, 0]
    assert weights["all snapshots, equal weights"] == [0.5, 0.5, 0]
    assert weights["one model, one cosine"] == [0, 0, 1]
    assert weights["single best snapshot"].index(1) == int(np.argmin(record["val"]["single_nll"]))
    seeds = [
        json.loads((folder / "run" / f"seed-{seed}" / training / "training.json").read_text())["seeds"]
        for seed in (0, 1)
        for training in ("cycles", "one-cosine")
    ]
    # The two trainings of a seed differ in the schedule alone; all other seeds are apart.
    assert seeds[0] == seeds[1]
    assert seeds[2] == seeds[3]
    assert len({value for pair in (seeds[0], seeds[2]) for value in pair.values()}) == 6


def test_what_is_finished_is_not_run_again(finished, check_resumed):
    folder, printed = finished
    assert len(re.findall("^trained", printed, re.MULTILINE)) == 4
    check_resumed("snapshot_ensemble", folder, (*TINY, *SCALE, "--seeds", 2), lost="one-cosine")


def test_other_settings_are_refused(finished):
    where = ("--run-dir", str(finished[0] / "run"), "--output", str(finished[0] / "other"))
    with pytest.raises(UserError, match="epochs is 10 there and 12 here"):
        snapshot_ensemble.main([*TINY, "--epochs", "12", *SCALE[2:], *where])
    assert not (finished[0] / "other.md").exists()
