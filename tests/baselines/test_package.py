import subprocess
import sys

import pytest


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, dnas_ens.baselines as b; assert 'torch' not in sys.modules; dir(b)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_where_it_is_said_to_be() -> None:
    import dnas_ens.baselines as package

    assert set(package.__all__) == set(package._HOME)
    for name in package.__all__:
        home = package._HOME[name]
        value = getattr(package, name)
        if hasattr(value, "__module__") and name not in ("TrainFunction",):
            assert value.__module__ == f"dnas_ens.baselines.{home}"
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing
