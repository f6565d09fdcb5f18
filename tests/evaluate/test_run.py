import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny

from dnas_ens.commands.evaluate import main
from dnas_ens.config import RetrainConfig
from dnas_ens.errors import UserError
from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.evaluate.run import predict_folder, stored_predictions, write_results
from dnas_ens.run.files import sha256, write_json
from dnas_ens.run.folder import RunFolder
from dnas_ens.training.members import train_members


def test_tables_are_recomputed_from_predictions_alone(tmp_path, capsys):
    predictions = tiny.predictions(4, 30, 3, sharpness=0.0)
    with RunFolder.create(tmp_path / "run", config={"data": {"data": "gone/photos"}}) as run:
        run.write_json("splits.json", {"name": "photos", "fingerprint": ""})
        predictions.save(run.file("predictions.npz"))
    folder = run.path
    rows = write_results(folder, Predictions.load(folder / "predictions.npz"))
    files = [folder / name for name in ("results.csv", "results.md", "results.json", "ensemble_size.json")]
    written = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    main([str(folder), "--from-predictions"])
    assert [file.read_bytes() for file in files] == written
    assert json.loads(written[2]) == rows
    assert written[1].decode() in capsys.readouterr().out
    # The curve ends at the equally weighted ensemble, whatever the combining weights.
    curve, by_name = json.loads(written[3]), {row["name"]: row["calibrated_nll"] for row in rows}
    ends = [curve[at]["calibrated_nll"] for at in (0, -1)]
    assert ends == pytest.approx([by_name["average member"], by_name["ensemble"]])
    write_results(folder, dataclasses.replace(predictions, weights=[0.7, 0.1, 0.1, 0.1]))
    assert [row["nll"] for row in json.loads(files[3].read_text())] == pytest.approx([row["nll"] for row in curve])
    (folder / "predictions.npz").unlink()
    with pytest.raises(UserError, match="holds no predictions"):
        main([str(folder), "--from-predictions"])


def test_predictions_are_reused_for_the_same_members_and_images_only(few_digits, tmp_path, capsys):
    recipe = RetrainConfig(num_cells=1, channels=2, epochs=1, batch_size=32)
    genotypes = [tiny.genotype(seed) for seed in range(2)]
    train_members(genotypes, few_digits, recipe, folder=tmp_path)
    fresh = predict_folder(tmp_path, few_digits)
    # Marked, so that it shows whether they are the kept ones.
    marked = dataclasses.replace(fresh, test_probs=fresh.test_probs[:, ::-1].copy())

    def predicted(data=few_digits, *, reuse=True, **fields):
        dataclasses.replace(marked, **fields).save(tmp_path / "predictions.npz")
        return predict_folder(tmp_path, data, reuse=reuse).test_probs

    assert np.array_equal(predicted(), marked.test_probs)
    write_json(tmp_path / "splits.json", {"name": "digits", "fingerprint": few_digits.fingerprint})
    assert np.array_equal(stored_predictions(tmp_path).test_probs, marked.test_probs)
    others = dataclasses.replace(few_digits, fingerprint="other images")
    for found in (predicted(reuse=False), predicted(device="another device"), predicted(others)):
        assert np.array_equal(found, fresh.test_probs)
    for folder in (tmp_path / "members", tmp_path / "checkpoints"):
        shutil.rmtree(folder)
    train_members(genotypes, few_digits, dataclasses.replace(recipe, seed=1), folder=tmp_path)
    with pytest.raises(UserError, match="has changed since it was evaluated"):
        stored_predictions(tmp_path)
    of_others = predicted()
    assert not np.array_equal(of_others, marked.test_probs)
    assert not np.array_equal(of_others, fresh.test_probs)
    # So is a network that was distilled from others, with a line that says so.
    student = tmp_path / "distilled"
    write_json(student / "ensemble.json", {"members": [{"file": "members/1/model.safetensors", "spec": {}}]})
    fresh.of_members([0]).save(student / "predictions.npz")
    for teacher, rows in ((sha256(tmp_path / "ensemble.json"), 6), ("an earlier one", 5)):
        write_json(student / "members/1/member.json", {"teacher": teacher})
        assert len(write_results(tmp_path, fresh)) == rows
        assert ("run distil again" in capsys.readouterr().err) == (rows == 5)
    # A part of them, or more, is something else.
    assert fresh.of_members([1]).source == fresh.with_members_of(fresh).source == ""
