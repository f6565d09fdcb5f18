import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dnas_ens.commands.evaluate import main
from dnas_ens.config import SearchConfig
from dnas_ens.config.fields import to_dict
from dnas_ens.data import ImageData, Split
from dnas_ens.data.corruptions import corrupt
from dnas_ens.ensembles import Ensemble
from dnas_ens.ensembles.preprocessing import Preprocessing
from dnas_ens.errors import UserError
from dnas_ens.evaluate.compute_cost import count_flops
from dnas_ens.evaluate.predictions import Predictions, predict_splits
from dnas_ens.evaluate.shift import ShiftOptions, ShiftPredictions, predict_shift
from dnas_ens.evaluate.shift_tables import shift_markdown, shift_tables
from dnas_ens.nn.reference_models import reference_model
from dnas_ens.run.files import read_json
from dnas_ens.run.folder import RunFolder


def test_the_files_hold_what_they_should(digits, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    members = [reference_model("mlp", 1, 10, 8) for _ in range(2)]
    preprocessing = Preprocessing(image_size=8, num_channels=1, mean=digits.mean, std=digits.std)
    ensemble = Ensemble(members, weights=[0.75, 0.25], classes=digits.classes, preprocessing=preprocessing)
    with RunFolder.create(tmp_path / "run", config=to_dict(SearchConfig()), command=["test"]) as run:
        run.write_json("splits.json", {**digits.describe(), "indices": digits.splits})
        ensemble.save(run.path)
    run_dir = run.path
    monkeypatch.setenv("DNAS_ENS_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr("dnas_ens.commands.evaluate.write_report", str)
    main([str(run_dir), "--device", "cpu", *"--shift --corruptions jpeg rotation --severities 5 1".split()])
    told = capsys.readouterr()
    assert "mean corruption error" in told.out
    assert re.search(r"shift 3/3 .*photographs", told.err)
    assert "without images of fashion-mnist" in told.err
    clean, stored = Predictions.load(run_dir / "predictions.npz"), ShiftPredictions.load(run_dir / "shift.npz")
    assert (stored.corruptions, stored.severities) == (["jpeg", "jpeg", "rotation", "rotation"], [1, 5, 1, 5])
    np.testing.assert_array_equal(stored.labels, digits.test.labels)
    expected = ensemble.predict_probs(corrupt(digits.test.images, "rotation", 5))
    np.testing.assert_array_equal(stored.probs[3], expected)
    written = read_json(run_dir / "shift.json")
    assert written == {**shift_tables(clean, stored), "source": clean.source}
    averaged = np.average(expected, axis=0, weights=[0.75, 0.25])
    last = next(row for row in written["corruptions"][9:] if (row["row"], row["severity"]) == ("ensemble", 5))
    assert last["accuracy"] == pytest.approx((averaged.argmax(-1) == stored.labels).mean())
    assert {row["name"] for row in written["out_of_distribution"]} == {"photographs"}
    first, second = written["out_of_distribution"]
    assert (first["row"], first["num_images"], second["auroc_mutual_information"]) == ("ensemble", 520, None)
    scores = []
    for probs in (clean.test_probs, stored.foreign["photographs"]):
        mean = np.average(probs.astype(float), axis=0, weights=[0.75, 0.25])
        scores.append(-(mean * np.log(mean)).sum(-1))
    expected = roc_auc_score(np.repeat([0, 1], [len(each) for each in scores]), np.concatenate(scores))
    assert first["auroc_entropy"] == pytest.approx(expected)

    # The tables can be written again from the predictions alone.
    tables = {name: (run_dir / name).read_bytes() for name in ("shift.json", "shift.md")}
    for name in (*tables, "ensemble.json"):
        (run_dir / name).unlink()
    again = [str(run_dir), "--from-predictions", "--shift"]
    main(again)
    assert {name: (run_dir / name).read_bytes() for name in tables} == tables
    replace(stored, source="another").save(run_dir / "shift.npz")
    with pytest.raises(UserError, match="of an earlier ensemble"):
        main(again)
    (run_dir / "shift.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="shift"):
        main(again)
    (run_dir / "shift.npz").unlink()
    with pytest.raises(UserError, match="holds no predictions under shift"):
        main(again)


def test_public_files_are_predicted_beside_our_own_corruptions(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(20) % 10
    split = Split(torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), labels)
    data = ImageData.from_splits("cifar10", tuple("abcdefghij"), train=split, val=split, test=split, flip=True)
    stored = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "CIFAR-10-C").mkdir()
    np.save(tmp_path / "CIFAR-10-C" / "contrast.npy", stored)
    np.save(tmp_path / "CIFAR-10-C" / "labels.npy", np.tile(labels.numpy(), 5).astype(np.uint8))
    preprocessing = Preprocessing(image_size=32, num_channels=3, mean=data.mean, std=data.std)
    ensemble = Ensemble([reference_model("mlp", 3, 10, 32) for _ in range(2)], preprocessing=preprocessing)
    asked = {"corruptions": ("contrast",), "severities": (2, 5), "ood": ("photographs",)}
    options = ShiftOptions(shift=True, cifar10_c=Path("CIFAR-10-C"), **asked)
    shift = predict_shift(ensemble, data, options, data_root=tmp_path)
    assert shift.corruptions == ["contrast", "contrast", "cifar10-c/contrast", "cifar10-c/contrast"]
    ours = ensemble.predict_probs(corrupt(data.test.images, "contrast", 2))
    public = ensemble.predict_probs(torch.from_numpy(stored[80:].transpose(0, 3, 1, 2).copy()))
    np.testing.assert_array_equal(shift.probs[0], ours)
    np.testing.assert_array_equal(shift.probs[3], public)
    clean = predict_splits(ensemble, data)
    assert clean.flops == [count_flops(member, (3, 32, 32)) for member in ensemble.members]
    assert min(clean.inference_seconds) > 0
    text = shift_markdown(clean, shift, shift_tables(clean, shift))
    # The two are not averaged together.
    assert text.count("Means over 1 corruption;") == 2
    nothing = predict_shift(ensemble, data, ShiftOptions(shift=True, corruptions=(), ood=()), data_root=tmp_path)
    assert nothing.probs.shape == (0, 2, 20, 10)
    tables = shift_tables(clean, nothing)
    assert tables == {"corruptions": [], "out_of_distribution": []}
    assert "Corruptions" not in shift_markdown(clean, nothing, tables)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": True, "corruptions": ("fogg",)}, "no corruption 'fogg'"),
        ({"shift": True, "severities": (1, 9)}, "severity is 9"),
        ({"shift": True, "severities": ()}, "--severities is empty"),
        ({"ood": ("mnist",)}, "--ood is an option of --shift"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(UserError, match=message):
        ShiftOptions(**options)
