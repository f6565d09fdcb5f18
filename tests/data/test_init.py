import subprocess
import sys

import pytest

import dnas_ens.data


def test_importing_the_package_or_the_names_does_not_import_torch():
    code = (
        "import sys, dnas_ens.data, dnas_ens.data.names; dnas_ens.data.SOURCE_NAMES; "
        "assert not {'torch', 'torchvision', 'sklearn', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    for name in dnas_ens.data.__all__:
        assert getattr(dnas_ens.data, name) is not None
        assert name in dir(dnas_ens.data)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dnas_ens.data.nothing
