"""Public names: seen by dir(), imported at their first use."""

import importlib
import subprocess
import sys

import pytest

import dnas_ens

PUBLIC = "Ensemble Genotype ImageData Split UserError evaluate load load_data retrain search".split()


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_every_public_name_is_seen_and_importing_needs_no_torch():
    script = "import sys, dnas_ens as de; print('torch' in sys.modules, *(n for n in dir(de) if n[0] != '_'))"
    assert run(script).split() == ["False", *PUBLIC]
    assert dnas_ens.__all__ == PUBLIC
    assert "__version__" in dir(dnas_ens)


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
