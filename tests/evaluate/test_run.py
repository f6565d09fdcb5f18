import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny

from dnas_ens.baselines import random_pool
from dnas_ens.commands.evaluate import main
from dnas_ens.config import RetrainConfig
from dnas_ens.errors import UserError
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.run import predict_folder, write_results
from dnas_ens.run.folder import RunFolder
from dnas_ens.space.search_space import DARTS_OPERATIONS, SearchSpace
from dnas_ens.training.members import train_members


@pytest.fixture
def folder(tmp_path):
    """A run folder of which only the predictions are left."""
    with RunFolder.create(tmp_path / "run", config={"data": {"data": "gone/photos"}}) as run:
        run.write_json("splits.json", {"name": "photos", "fingerprint": ""})
        tiny.predictions(4, 30, 3, sharpness=0.0, flops=[1000] * 4).save(run.file("predictions.npz"))
        return run.path


def test_tables_are_recomputed_from_predictions_alone(folder, capsys):
    expected = write_results(folder, Predictions.load(folder / "predictions.npz"))
    names = ("results.csv", "results.md", "results.json", "ensemble_size.json")
    written = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    main([str(folder), "--from-predictions"])
    assert {name: (folder / name).read_bytes() for name in names} == written
    assert json.loads(written["results.json"]) == expected
    assert written["results.md"].decode() in capsys.readouterr().out
    (folder / "predictions.npz").unlink()
    with pytest.raises(UserError, match="holds no predictions") as caught:
        main([str(folder), "--from-predictions"])
    assert "without --from-predictions" in caught.value.remedy


def test_the_curve_ends_at_the_equally_weighted_ensemble(folder):
    predictions = Predictions.load(folder / "predictions.npz")
    rows = write_results(folder, predictions)
    curve = json.loads((folder / "ensemble_size.json").read_text())
    assert curve[-1]["calibrated_nll"] == pytest.approx(rows[-1]["calibrated_nll"])
    average = next(row for row in rows if row["name"] == "average member")
    assert curve[0]["calibrated_nll"] == pytest.approx(average["calibrated_nll"])
    # It is about the number of members, whatever the combining weights.
    write_results(folder, dataclasses.replace(predictions, weights=[0.7, 0.1, 0.1, 0.1]))
    assert json.loads((folder / "ensemble_size.json").read_text()) == curve


def test_predictions_are_reused_for_the_same_members_and_images_only(few_digits, tmp_path):
    recipe = RetrainConfig(num_cells=1, channels=2, epochs=1, batch_size=32)
    space = SearchSpace.for_stack(1, operations=DARTS_OPERATIONS, num_nodes=2)
    genotypes = random_pool(space, 2, seed=0, edges_per_node=2)
    train_members(genotypes, few_digits, recipe, folder=tmp_path)
    fresh = predict_folder(tmp_path, few_digits)
    # Marked, so that it shows whether they are the kept ones.
    marked = dataclasses.replace(fresh, test_probs=fresh.test_probs[:, ::-1].copy())

    def predicted(data=few_digits, *, reuse=True, **fields):
        dataclasses.replace(marked, **fields).save(tmp_path / "predictions.npz")
        return predict_folder(tmp_path, data, reuse=reuse).test_probs

    assert np.array_equal(predicted(), marked.test_probs)
    others = dataclasses.replace(few_digits, fingerprint="other images")
    for found in (predicted(reuse=False), predicted(device="another device"), predicted(others)):
        assert np.array_equal(found, fresh.test_probs)
    for folder in (tmp_path / "members", tmp_path / "checkpoints"):
        shutil.rmtree(folder)
    train_members(genotypes, few_digits, dataclasses.replace(recipe, seed=1), folder=tmp_path)
    of_others = predicted()
    assert not np.array_equal(of_others, marked.test_probs)
    assert not np.array_equal(of_others, fresh.test_probs)
    # A part of them, or more, is something else.
    assert fresh.of_members([1]).source == fresh.with_members_of(fresh).source == ""
