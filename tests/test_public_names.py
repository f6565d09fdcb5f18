"""Public names: seen by dir(), imported at their first use."""

import importlib
import subprocess
import sys

import pytest
import torch

import dnas_ens as de
from dnas_ens.run.folder import held

PUBLIC = [
    *("Ensemble", "EnsembleSearchClassifier", "Genotype", "ImageData", "Split", "UserError"),
    *("evaluate", "load", "load_data", "retrain", "search", "spend"),
]


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_every_public_name_is_seen_and_importing_needs_no_torch():
    script = "import sys, dnas_ens as de; print('torch' in sys.modules, *(n for n in dir(de) if n[0] != '_'))"
    assert run(script).split() == ["False", *PUBLIC]
    assert de.__all__ == PUBLIC
    assert "__version__" in dir(de)


def test_names_that_need_no_torch_are_imported_without_it():
    script = (
        "import sys; from dnas_ens.data import SOURCE_NAMES; from dnas_ens.ensembles import greedy_selection;"
        "print({'torch', 'torchvision', 'sklearn', 'PIL'} & set(sys.modules))"
    )
    assert run(script).strip() == "set()"


@pytest.mark.parametrize("room", ["", ".baselines", ".config", ".data", ".ensembles"])
def test_every_name_of_a_room_exists(room):
    package = importlib.import_module(f"dnas_ens{room}")
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ensembel'"):
        _ = package.ensembel


def test_the_python_interface(few_digits, tiny_search, tmp_path):
    found = de.search(few_digits, config=tiny_search, members=2, device="cpu")
    assert len(found.genotypes) == 2
    assert found.plot().axes
    ensemble = de.retrain(found.genotypes, few_digits, device="cpu", num_cells=1, channels=2, epochs=1)
    assert ensemble.num_members == 2
    kept = de.retrain(
        found.genotypes, few_digits, device="cpu", workers=2, folder=tmp_path, num_cells=1, channels=2, epochs=1
    )
    # Threads round differently.
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(value, ensemble.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert de.load(tmp_path).num_members == kept.num_members
    for use in (
        lambda: de.spend(few_digits, 1, folder=tmp_path),
        lambda: de.retrain(found, few_digits, folder=tmp_path),
    ):
        with held(tmp_path), pytest.raises(de.UserError, match="is in use by process"):
            use()
    one = de.retrain(found, few_digits, members=1, device="cpu", num_cells=1, channels=2, epochs=1)
    images = torch.zeros(1, 1, 8, 8)
    assert torch.equal(one.member_probs(images), ensemble.member_probs(images)[:1])
    with pytest.raises(de.UserError, match="3 members were asked for, but 2 genotypes were given"):
        de.retrain(found.genotypes, few_digits, members=3, device="cpu")
    rows = de.evaluate(ensemble, few_digits, device="cpu")["rows"]
    assert rows[-1]["accuracy"] == ensemble.evaluate(few_digits.test)["accuracy"]
    with pytest.raises(de.UserError, match="no field 'epocs'"):
        de.search(few_digits, epocs=3)
