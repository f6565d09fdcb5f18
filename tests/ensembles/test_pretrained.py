"""The ensembles that come with the package: whole, small, offline, and as good as their cards say."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import dnas_ens as de
from dnas_ens.ensembles.storage import PRETRAINED, ensemble_folder, pretrained_names
from dnas_ens.errors import UserError


def test_it_is_found_by_its_name_unless_a_folder_has_it(tmp_path, monkeypatch, own_ensemble):
    monkeypatch.chdir(tmp_path)
    assert pretrained_names() == ["fashion-mnist"]
    assert ensemble_folder("fashion-mnist") == PRETRAINED / "fashion-mnist"
    # A folder of pictures may have the name.
    (tmp_path / "fashion-mnist/test").mkdir(parents=True)
    assert ensemble_folder("fashion-mnist") == PRETRAINED / "fashion-mnist"
    own_ensemble.save("fashion-mnist", overwrite=True)
    assert de.load("fashion-mnist").num_members == own_ensemble.num_members
    with pytest.raises(UserError) as refused:
        de.load("fashion")
    assert "come with the package: fashion-mnist" in refused.value.remedy


@pytest.mark.parametrize("name", pretrained_names())
def test_it_is_small_and_has_a_card(name):
    files = [file for file in (PRETRAINED / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    card = (PRETRAINED / name / "MODEL_CARD.md").read_text()
    for section in ("## Data", "## Results", "## Use", "## Members", "## Limits", "python -m dnas_ens.retrain"):
        assert section in card
    assert not re.search(r"/(tmp|home|root|work)/", card)


def test_it_predicts_from_the_command_line_in_any_folder(tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((40, 30), dtype=np.uint8)).save(tmp_path / "black.png")
    command = [sys.executable, "-m", "dnas_ens.predict", "fashion-mnist", "black.png", "--device", "cpu"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    header, row = found.stdout.splitlines()
    assert header.startswith("path,label,probability")
    assert row.split(",")[1] in de.load("fashion-mnist").classes
    found = subprocess.run([*command, "--coverage", "0.9"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "error: fashion-mnist comes without the predictions of val" in found.stderr


def test_a_file_whose_name_is_not_utf8_is_named_as_it_is(tmp_path, monkeypatch, capsysbinary):
    from PIL import Image

    from dnas_ens.commands import predict
    from dnas_ens.commands.parse import run_main

    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((28, 28), dtype=np.uint8)).save("caf\udce9.png")
    command = ["fashion-mnist", "caf\udce9.png", "--device", "cpu"]
    for more in ([], ["--output", "rows.csv"], ["--output", "rows.jsonl"]):
        assert run_main(predict.main, [*command, *more]) == 0
    printed = capsysbinary.readouterr().out
    assert printed.splitlines()[1].startswith(b"caf\xe9.png,")
    assert (tmp_path / "rows.csv").read_bytes() == printed
    # JSON is UTF-8 whatever is in it.
    assert json.loads((tmp_path / "rows.jsonl").read_text("utf-8"))["path"] == "caf\udce9.png"


def test_its_figures_are_those_of_its_card():
    try:
        data = de.load_data("fashion-mnist", download=False)
    except UserError:
        pytest.skip("Fashion-MNIST is not on this machine")
    card = (PRETRAINED / "fashion-mnist/MODEL_CARD.md").read_text()
    row = re.search(r"\| ensemble of (\d+) \| ([\d.]+) \| ([\d.]+) \|", card)
    ensemble = de.load("fashion-mnist")
    found = ensemble.evaluate(data.test)
    assert ensemble.num_members == int(row[1])
    assert 100 * found["accuracy"] == pytest.approx(float(row[2]), abs=0.02)
    assert found["calibrated_nll"] == pytest.approx(float(row[3]), abs=2e-4)
    assert list(data.classes) == list(ensemble.classes)
