from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from dnas_ens.run.machine import _git_revision, environment


def test_the_machine_and_the_software_are_named() -> None:
    noted = environment(["search", "--seed", "1"])
    assert noted["command"] == ["search", "--seed", "1"]
    assert noted["python"] == platform.python_version()
    assert noted["packages"]["torch"] == importlib.metadata.version("torch")
    assert noted["packages"]["numpy"] == np.__version__
    assert noted["num_cpus"] == os.cpu_count()
    assert noted["cpu"]
    assert noted["time"].endswith("+00:00")
    assert (noted["cuda_device"] is not None) == torch.cuda.is_available()
    assert json.loads(json.dumps(noted)) == noted


def test_git_revision_is_the_tracked_checkouts(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert _git_revision(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "other.py").write_text("x")
    git("add", "other.py")
    git("commit", "--quiet", "-m", "a", "--no-verify")
    (tmp_path / "environment.py").write_text("x")
    # A checkout that does not track the package is somebody else's.
    assert _git_revision(tmp_path) is None
    git("add", "environment.py")
    git("commit", "--quiet", "-m", "b", "--no-verify")
    git("tag", "v1", "-m", "tag")
    assert _git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "environment.py").write_text("y")
    assert _git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
