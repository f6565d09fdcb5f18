"""The study of a trunk on small pictures: every row runs, and what is told is what was chosen on val."""

import numpy as np
import pytest
import torch
import trunk as study
from PIL import Image


@pytest.fixture
def pictures(tmp_path):
    """Stripes of five directions: two to train the network on, three to tell apart."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :16]
    for part, count in (("train", 16), ("test", 6)):
        for turn, name in enumerate(("bird", "dog", "truck", "cat", "ship")):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for index in range(count):
                wave = np.cos(rows * np.cos(turn) + columns * np.sin(turn) + generator.uniform(0, 6))
                pixels = (127 + 100 * wave + generator.normal(0, 9, wave.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(np.stack([pixels] * 3, axis=2)).save(
                    tmp_path / "pictures" / part / name / f"{index}.png"
                )
    return tmp_path / "pictures"


def test_every_row_is_run_and_told(pictures, tmp_path, monkeypatch, capsys):
    for name, value in (("PICTURES", 10), ("SIDE", 16), ("STRIDE", 4), ("PRETRAINING_EPOCHS", 1)):
        monkeypatch.setattr(study, name, value)
    options = study.Study(pictures=pictures, weights=tmp_path / "resnet.safetensors", seconds=2.0)
    study.pretrain(options)
    assert "% on val" in capsys.readouterr().out
    records = study.Records(tmp_path / "r.jsonl", key=("method", "seed"), arrays=lambda r: tmp_path / r["method"])
    for method in study.METHODS:
        record, arrays = study.run_one(options, method, 3)
        assert arrays["losses"].shape == (len(record["splits"]), 18)
        for split, losses in zip(record["splits"], arrays["losses"], strict=True):
            assert split["calibrated_nll"] == pytest.approx(losses.mean(), rel=1e-5)
        records.add(record, arrays)
    assert [split["spent"].split()[0] for split in records["fine-tuned", 3]["splits"]] == ["1", "2", "4"]
    text, of_seeds = study.table(options, records, range(3, 4))
    for method, (loss,) in of_seeds.items():
        best = min(records[method, 3]["splits"], key=lambda split: split["val_nll"])
        assert loss == best["calibrated_nll"]
        assert f"| {method} | {loss:.4f} |" in text


def test_a_seed_draws_pictures_and_the_head_alone_is_new(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PICTURES", 10)
    one, again, other = (
        study.linked(pictures, list(study.TASK), tmp_path / str(number), seed=seed)
        for number, seed in enumerate((1, 1, 2))
    )
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert len(one.train) + len(one.val) == 30
    assert len(one.test) == 18
    options = study.Study(pictures=pictures, weights=tmp_path / "resnet.safetensors")
    torch.manual_seed(0)
    network = study.resnet18(num_classes=7)
    study.save_model(network, str(options.weights))
    tuned = study._with_new_head(options, seed=1)
    assert tuned.fc.out_features == 3
    kept = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(tuned.state_dict()[name], value) for name, value in kept.items())
