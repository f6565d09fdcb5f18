"""The pages: their Python runs as it stands, their commands and options exist, and so does all that they name."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18

import dnas_ens as de

ROOT = Path(__file__).parents[1]
NAMES = ["README.md", "CHANGELOG.md", "experiments/results/README.md"]
NAMES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
PAGES = {page: (ROOT / page).read_text() for page in NAMES}
#: Tells of options and files of earlier versions as well.
HISTORY = ("CHANGELOG.md", "docs/log.md")
#: What torchrun is short for.
TORCHRUN = "-m torch.distributed.run"
CURRENT = {page: text for page, text in PAGES.items() if page not in HISTORY}


def python_block(page):
    # A server is tried where one is started, in tests/experiments/test_benchmarks.py.
    (block,) = re.findall(r"```python\n(?!# serve\.py)(.*?)```", PAGES[page], re.DOTALL)
    return block


def code(text):
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands():
    """The flags that every program is given anywhere in the current pages."""
    found: dict[str, set[str]] = {}
    for text in CURRENT.values():
        for inline, fenced in re.findall(
            r"`((?:python|torchrun) [^`\n]+)`|^((?:python|torchrun) .+)$", text, re.MULTILINE
        ):
            words = shlex.split(inline or fenced, comments=True)
            if words[0] == "torchrun":
                place = words.index("-m")
                found.setdefault(TORCHRUN, set()).update(word for word in words[:place] if word.startswith("--"))
                words = ["python", *words[place:]]
            if words[1].startswith("experiments/") or (words[1] == "-m" and words[2].startswith("dnas_ens")):
                program = shlex.join(words[1:3] if words[1] == "-m" else words[1:2])
                found.setdefault(program, set()).update(word for word in words if word.startswith("--"))
    return found


def run_each(page, names):
    """Run a page's Python statement by statement; after each its targets are told, so that they can be changed."""
    for statement in ast.parse(python_block(page)).body:
        exec(compile(ast.Module([statement], []), page, "exec"), names)
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        yield [target.id for target in targets if isinstance(target, ast.Name)]


def batches(num):
    generator = torch.Generator().manual_seed(num)
    return [(torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16).remainder(10)) for _ in range(num)]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 10_000
    assert len(python_block("README.md").splitlines()) <= 12


@pytest.fixture(scope="module")
def flags():
    """The flags that the help of a program tells of."""

    @cache
    def told(program):
        command = [sys.executable, *shlex.split(program), "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        return set(re.findall(r"--[a-z][a-z0-9.-]*[a-z0-9]", done.stdout))

    return told


@pytest.mark.parametrize("program", commands())
def test_commands_exist_with_their_flags(program, flags):
    given = commands()[program]
    if given:
        # Every program takes --debug, before it reads its own flags.
        assert given - {"--debug"} <= flags(program)
    elif program.startswith("-m "):
        assert importlib.util.find_spec(f"{program[3:]}.__main__") or importlib.util.find_spec(program[3:])
    else:
        assert (ROOT / program).exists()


def test_flags_named_in_the_text_exist(flags):
    spans = " ".join(span for text in CURRENT.values() for span in code(text))
    named = set(re.findall(r"(?<!\S)--[a-z][a-z0-9.-]*[a-z0-9]", spans))
    assert len(named) > 30
    programs = [program for program, given in commands().items() if given]
    assert len(programs) >= 7
    assert named - set().union(*map(flags, [*programs, TORCHRUN, "experiments/benchmarks/floor.py"])) == {"--debug"}


def headings(text):
    """The anchors of a page's headings, as the sites that show Markdown make them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in headings(path.read_text()), link


def exists(name):
    folders = ("", "experiments", "experiments/benchmarks", "experiments/results", "docs")
    return any((ROOT / folder / name).exists() for folder in folders)


@pytest.mark.parametrize("page", PAGES)
def test_named_scripts_files_and_results_exist(page):
    named = [word for span in code(PAGES[page]) for word in span.split()]
    files = [word for word in named if re.match(r"(experiments|tests|docs|dnas_ens|benchmarks)/|[\w/]+\.py$", word)]
    stored = [word for word in named if re.fullmatch(r"[\w-]+-(digits|blobs|fashion-mnist[\w-]*)", word)]
    assert [word for word in files if not exists(word)] == []
    assert [word for word in stored if not exists(f"{word}.md")] == []


@pytest.mark.parametrize("page", CURRENT)
def test_named_modules_and_attributes_exist(page):
    for name in set(re.findall(r"`(dnas_ens(?:\.\w+)+)[`(]", PAGES[page])):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name
    for name in set(re.findall(r"\bde\.(\w+)", PAGES[page])):
        assert hasattr(de, name), name


def test_the_tree_in_the_readme_is_the_tree():
    (tree,) = re.findall(r"^```\n(dnas_ens/.*?)^```", PAGES["README.md"], re.DOTALL | re.MULTILINE)
    told = set(re.findall(r"^  (\w+/)", tree, re.MULTILINE))
    there = {f"{path.parent.name}/" for path in (ROOT / "dnas_ens").glob("*/__init__.py")}
    assert told == there
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+/)", tree, re.MULTILINE))


def test_the_whole_way(few_digits, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((8, 8), 100, dtype=np.uint8)).save("a.png")
    torch.manual_seed(0)
    residual = resnet18(num_classes=10)
    residual.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    names = {"resnet18": residual, "my_network": network}
    # As written, with a search and a training of seconds.
    quick = {
        "search": partial(de.search, epochs=2, warmup_epochs=1, channels=4, num_nodes=2),
        "retrain": partial(de.retrain, epochs=1, channels=4),
    }
    for assigned in run_each("README.md", names):
        if "de" in names:
            names["de"] = SimpleNamespace(**{name: getattr(de, name) for name in de.__all__} | quick)
        if assigned == ["data"]:
            assert len(names["data"].train.labels) > 1000
            names["data"] = few_digits
    assert len(names["found"].genotypes) == 5
    ensemble, loaded = names["ensemble"], names["loaded"]
    assert len(ensemble.members) == len(loaded.members) == 5
    assert len(names["mixed"].members) == 2
    probs = ensemble.predict(["a.png"])
    for ours, theirs in zip(probs, loaded.predict(["a.png"]), strict=True):
        assert dict(theirs) == pytest.approx(dict(ours))
    # Weights and temperature were fitted, and are found again.
    assert loaded.evaluate(few_digits.test) == pytest.approx(ensemble.evaluate(few_digits.test))


def test_members_of_any_training_loop(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    val_batches, train_batches = batches(2), batches(3)
    names = {"network": network, "optimizer": optimizer, "val_batches": val_batches, "train_batches": train_batches}
    images, labels = train_batches[0]
    for assigned in run_each("docs/guide.md", names):
        if assigned == ["recorder"]:
            nn.functional.cross_entropy(network(images), labels).backward()
            for _ in range(40 * 100):
                optimizer.step()
                names["recorder"].step()
    assert len(names["members"]) == 5
    assert names["val_probs"].shape == (5, 32, 10)
    assert sum(names["ensemble"].weights.tolist()) == pytest.approx(1)
    assert names["soup"].model(images).shape == (16, 10)
