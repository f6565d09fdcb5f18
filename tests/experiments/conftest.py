"""What the tests of studies share: running a script, reading what it wrote, and checks that hold for several."""

import contextlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from studies import search_studies

from dnas_ens.config import presets
from dnas_ens.config.fields import with_fields
from dnas_ens.training import workers

SCRIPTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="session")
def run_script():
    def run(name, *arguments, code=0):
        process = subprocess.run(
            [sys.executable, "-W", "error", str(SCRIPTS / f"{name}.py"), *map(str, arguments)],
            text=True,
            capture_output=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.returncode == code, process.stderr
        return process.stdout, process.stderr

    return run


@pytest.fixture(scope="session")
def read_lines():
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def timeless():
    return lambda records: re.sub(r'"\w*seconds": [\d.e-]+', "", json.dumps(records))


@pytest.fixture(scope="session")
def cells():
    """Return the cells of a table's row by its name."""

    def of_row(text, name):
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        return [cell.strip() for cell in line.strip("|").split("|")[1:]]

    return of_row


@pytest.fixture(scope="session")
def numbers():
    return lambda text: [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


@pytest.fixture(scope="session")
def t_half_width():
    """Half the 95 % t interval of two seeds; Student's quantile with one degree of freedom is in closed form."""
    return lambda two: math.tan(0.475 * math.pi) * statistics.stdev(two) / math.sqrt(2)


def scaled_nll(probs, labels, temperature):
    scaled = softmax(np.log(probs.astype(float)) / temperature, axis=1)
    return -np.log(scaled[np.arange(len(labels)), labels]).mean()


@pytest.fixture(scope="session")
def check_rows(cells, read_lines):
    """Check a seed study's table against the predictions in its run folder, and return the whole text."""

    def check(folder, printed, *, num_rows):
        text = (folder / "out.md").read_text()
        assert text.rstrip() in printed
        records = read_lines(folder / "out.jsonl")
        names = [row["name"] for row in records[0]["rows"]]
        assert len(names) == num_rows
        for index, name in enumerate(names):
            figures = []
            for seed, record in enumerate(records):
                stored = np.load(folder / "run" / f"seed-{seed}" / "predictions.npz")
                assert stored["methods"].tolist() == names
                probs, labels = stored["test_probs"][index], stored["test_labels"]
                temperature = record["rows"][index]["temperature"]
                losses = [scaled_nll(probs, labels, each) for each in (1.0, temperature)]
                figures.append([100 * (probs.argmax(1) == labels).mean(), *losses])
                # The temperature has the least NLL on val and prior, of those from 0.05 to 20.
                near = np.clip(temperature * np.array([0.95, 1.0, 1.05]), 0.05, 20)
                val_probs, val_labels = stored["val_probs"][index], stored["val_labels"]
                val = [
                    scaled_nll(val_probs, val_labels, each) + 2 * math.log(each) ** 2 / len(val_labels) for each in near
                ]
                assert val[1] <= min(val) + 1e-6
            columns = zip(*figures, strict=True)
            for cell, column, tolerance in zip(cells(text, name), columns, (0.006, 6e-5, 6e-5), strict=False):
                expected = statistics.fmean(column), statistics.stdev(column)
                assert [float(part) for part in cell.split(" ± ")] == pytest.approx(expected, abs=tolerance)
        assert "**not** the published scale" in text
        assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
        return text

    return check


@pytest.fixture(scope="session")
def run_here():
    """Run a script in this process, without workers; returns what it printed."""

    def run(name, *arguments):
        printed, script = io.StringIO(), import_module(name)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            for module in (workers, script):
                patch.setattr(module, "worker_pool", lambda *_, **__: contextlib.nullcontext(), raising=False)
            script.main([*map(str, arguments)])
        return printed.getvalue()

    return run


@pytest.fixture(scope="session")
def narrow():
    """Make the presets narrow where a module of searches, and the trainings of its study, take them from."""

    @contextlib.contextmanager
    def made(module, **more):
        fields = {"channels": 4, **more}
        with pytest.MonkeyPatch.context() as patch:
            for place, name in ((module, "search_preset"), (search_studies, "retrain_preset")):
                preset = getattr(presets, name)
                patch.setattr(place, name, lambda *a, _preset=preset, **k: with_fields(_preset(*a, **k), **fields))
            yield

    return made


@pytest.fixture(scope="session")
def check_resumed(run_here, read_lines, timeless):
    """Check that a finished study whose seed 1 lost a training makes that training again, and nothing else."""

    def check(name, folder, arguments, *, lost):
        for file in ("predictions.npz", f"{lost}/training.json"):
            (folder / "run" / "seed-1" / file).unlink()
        before = {path: path.stat().st_mtime_ns for path in (folder / "run" / "seed-0").rglob("*")}
        printed = run_here(name, *arguments, "--run-dir", folder / "run", "--output", folder / "again")
        assert re.findall(r"^trained .*/(seed-\S+):", printed, re.MULTILINE) == [f"seed-1/{lost}"]
        assert {path: path.stat().st_mtime_ns for path in before} == before
        again, out = (timeless(read_lines(folder / f"{stem}.jsonl")) for stem in ("again", "out"))
        assert again == out

    return check
