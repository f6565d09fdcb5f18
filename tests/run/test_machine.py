import importlib.metadata
import json
import os
import platform

import pytest
import torch

from dnas_ens.errors import UserError
from dnas_ens.run.machine import describe_device, environment, keep_freed_memory, resolve_device


def test_the_machine_and_the_software_are_named():
    noted = environment(["search", "--seed", "1"])
    assert noted["command"] == ["search", "--seed", "1"]
    assert noted["python"] == platform.python_version()
    assert noted["packages"]["torch"] == importlib.metadata.version("torch")
    assert noted["num_cpus"] == os.cpu_count()
    assert noted["time"].endswith("+00:00")
    assert (noted["cuda_device"] is not None) == torch.cuda.is_available()
    assert json.loads(json.dumps(noted)) == noted
    assert describe_device("cpu").startswith(f"{noted['cpu']}, ")
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = {"auto": "cuda", "cpu": "cpu", "cuda": "cuda", "cuda:1": "cuda:1"}
    assert {name: str(resolve_device(name)) for name in names} == names
    for name, cause in {"tpu": "Unknown device", "cuda:x": "Unknown device", "cuda:2": "offers 2 CUDA dev"}.items():
        with pytest.raises(UserError, match=cause):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(resolve_device("auto")) == "cpu"
