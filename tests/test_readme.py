"""The README's Python runs as it stands, with fewer data and a training loop of ours; its commands and links exist."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18

import dnas_ens as de

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def commands() -> dict[str, set[str]]:
    """The flags that every program is given anywhere in the README."""
    code = re.findall(r"`(python [^`\n]+)`|^(python .+)$", README, re.MULTILINE)
    found: dict[str, set[str]] = {}
    for line in (inline or fenced for inline, fenced in code):
        words = shlex.split(line, comments=True)
        if words[1].startswith("experiments/") or (words[1] == "-m" and words[2].startswith("dnas_ens")):
            program = shlex.join(words[1:3] if words[1] == "-m" else words[1:2])
            found.setdefault(program, set()).update(word for word in words if word.startswith("--"))
    return found


def run_each(block: str, names: dict[str, object]) -> Iterator[list[str]]:
    """Run a block statement by statement; after each its targets are told, so that they can be changed."""
    for statement in ast.parse(block).body:
        exec(compile(ast.Module([statement], []), "README.md", "exec"), names)
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        yield [target.id for target in targets if isinstance(target, ast.Name)]


def batches(num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(num)
    return [
        (torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16).remainder(10)) for _ in range(num)
    ]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def test_there_are_commands_with_flags():
    assert len(commands()) >= 6
    assert "--regime" in commands()["-m dnas_ens.search"]


@pytest.fixture(scope="module")
def flags():
    """The flags that the help of a program tells of."""

    @cache
    def told(program: str) -> set[str]:
        command = [sys.executable, *shlex.split(program), "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        return set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))

    return told


@pytest.mark.parametrize("program", commands())
def test_flags_of_commands_exist(program, flags):
    assert commands()[program] <= flags(program)


def test_flags_named_in_the_text_exist(flags):
    code = " ".join(re.findall(r"`([^`\n]+)`", README))
    named = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code))
    assert len(named) > 20
    programs = [*commands(), "experiments/benchmarks/floor.py"]
    # Every program takes --debug, before it reads its own flags.
    assert named - set().union(*map(flags, programs)) == {"--debug"}


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_there_are_two_blocks():
    assert len(python_blocks()) == 2


def test_the_whole_way(few_digits, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((8, 8), 100, dtype=np.uint8)).save("a.png")
    torch.manual_seed(0)
    residual = resnet18(num_classes=10)
    residual.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    names = {"resnet18": residual, "my_network": network}
    for assigned in run_each(python_blocks()[0], names):
        if assigned == ["data"]:
            assert len(names["data"].train.labels) > 1000
            names["data"] = few_digits
    assert len(names["found"].genotypes) == 5
    ensemble = names["ensemble"]
    loaded = de.load("my_ensemble/")
    assert len(ensemble.members) == len(loaded.members) == 5
    probs = ensemble.predict(["a.png"])
    assert np.asarray(loaded.predict(["a.png"])) == pytest.approx(np.asarray(probs))
    # Weights and temperature were fitted, and are found again.
    assert loaded.evaluate(few_digits.test) == pytest.approx(ensemble.evaluate(few_digits.test))


def test_members_of_any_training_loop(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    val_batches, train_batches = batches(2), batches(3)
    names = {
        "de": de,
        "network": network,
        "optimizer": optimizer,
        "val_batches": val_batches,
        "train_batches": train_batches,
    }
    images, labels = train_batches[0]
    for assigned in run_each(python_blocks()[1], names):
        if assigned == ["recorder"]:
            for step in range(40 * 100):
                # Few of the steps move: what is tested is the schedule and what is kept.
                if step % 100 == 0:
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(network(images), labels).backward()
                optimizer.step()
                names["recorder"].step()
    assert len(names["members"]) == 5
    assert names["val_probs"].shape == (5, 32, 10)
    assert sum(names["ensemble"].weights.tolist()) == pytest.approx(1)
    assert names["soup"].model(images).shape == (16, 10)
