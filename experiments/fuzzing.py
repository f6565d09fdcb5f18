"""Does any file bring a reader down? Coverage-guided fuzzing of every format that a user can hand to the package.

    pip install -e '.[fuzz]'
    python experiments/fuzzing.py --workers 2

libFuzzer, by atheris, changes the content of a valid file so that it reaches new lines of the package, and the reader
of the format is called: it may read it, or end with a `UserError`. Anything else is a crash. Of valid JSON every second
change puts something strange in the place of a value. Objects and tensors begin without their SHA-256, and states,
weights and arrays are sealed anew after every change, because otherwise a hash would refuse nearly everything before
the reader has looked at it. Each format has a process and so many seconds of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnas_ens.commands.parse import parse
from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.report import markdown_table, provenance, write_results
from dnas_ens.compare.study import RESULTS, Task, require_positive, run_missing, run_script
from dnas_ens.run.files import with_ending
from dnas_ens.run.machine import environment
from dnas_ens.training.workers import worker_pool

PROG = "python experiments/fuzzing.py"
#: An input that takes longer, or more memory, is a crash.
MOST_SECONDS, MOST_MEGABYTES = 10, 2048


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file that is fuzzed.

    Args:
        valid: Makes a valid file's content from a finished run folder.
        read: Writes a content into a folder and reads it; the folder holds a copy of the run.
    """

    valid: Callable[[Path], bytes]
    read: Callable[[Path, bytes], object]


def _plain_json(name: str) -> Callable[[Path], bytes]:
    """Return what makes a JSON file's content without its hash."""

    def made(folder: Path) -> bytes:
        from dnas_ens.run.files import read_json

        return json.dumps(read_json(folder / name)).encode()

    return made


def _read_by(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    def of(folder: Path, content: bytes) -> object:
        path = folder / name
        path.write_bytes(content)
        return read(path)

    return of


def _configuration(path: Path) -> object:
    from dnas_ens.commands.options import configured

    return configured(["--config", str(path)], prog="search")


def _genotype(path: Path) -> object:
    from dnas_ens.space.genotype import load_genotype

    return load_genotype(path)


def _flat_genotype(folder: Path) -> bytes:
    return (
        b"Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2], "
        b"reduce=[('max_pool_3x3', 0), ('none', 1)], reduce_concat=[2])"
    )


def _search_result(path: Path) -> object:
    from dnas_ens.space.genotype import ranked_genotypes, read_genotypes

    return ranked_genotypes(read_genotypes(path))


def _ensemble(folder: Path) -> object:
    from dnas_ens.ensembles import Ensemble

    return Ensemble.load(folder)


def _tensors(folder: Path) -> bytes:
    from dnas_ens.run.files import load_tensors, tensors_to_bytes

    return tensors_to_bytes(load_tensors(folder / "members/0/model.safetensors"))


def _read_weights(folder: Path, content: bytes) -> object:
    from dnas_ens.run.files import read_json, write_json

    (folder / "members/0/model.safetensors").write_bytes(content)
    manifest = read_json(folder / "ensemble.json")
    manifest["members"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    write_json(folder / "ensemble.json", manifest)
    return _ensemble(folder)


def _state(folder: Path) -> bytes:
    return max((folder / "checkpoints").rglob("*.safetensors"), key=lambda path: path.stat().st_size).read_bytes()


def _read_state(folder: Path, content: bytes) -> object:
    from dnas_ens.run.checkpoint import CheckpointStore

    place = folder / "fuzzed"
    place.mkdir(exist_ok=True)
    (place / "state-00000001.safetensors").write_bytes(content)
    manifest = {"step": 1, "file": "state-00000001.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
    (place / "state-00000001.json").write_text(json.dumps(manifest))
    return CheckpointStore(place).load_newest()


def _array(folder: Path) -> bytes:
    import numpy as np

    with np.load(folder / "predictions.npz") as arrays:
        buffer = io.BytesIO()
        np.save(buffer, arrays["val_probs"])
        return buffer.getvalue()


def _read_predictions(folder: Path, content: bytes) -> object:
    """Read predictions whose probabilities on val are as given; the archive around them is whole."""
    import zipfile

    from dnas_ens.evaluate.predictions import Predictions

    path = folder / "fuzzed.npz"
    with zipfile.ZipFile(folder / "predictions.npz") as valid, zipfile.ZipFile(path, "w") as archive:
        for name in valid.namelist():
            archive.writestr(name, content if name == "val_probs.npy" else valid.read(name))
    return Predictions.load(path)


def _metrics(path: Path) -> object:
    from dnas_ens.run.metrics_log import MetricsLog

    return MetricsLog(path.parent).read()


def _records(path: Path) -> object:
    from dnas_ens.compare.records import Records

    return Records(path, key=("kind", "seed"))


def _some_records(folder: Path) -> bytes:
    return b'{"kind": "a", "seed": 1, "loss": 0.5}\n{"kind": "a", "seed": 2, "loss": 0.25}\n'


def _ledger(path: Path) -> object:
    from dnas_ens.budget.amount import Amount
    from dnas_ens.budget.ledger import Ledger

    return Ledger.read(path, Amount(total=9, unit="epochs"), {"channels": 4})


def _budget(folder: Path) -> bytes:
    unit = {"kind": "first", "number": 0, "cell": 0, "parent": None, "epochs": 2, "learning_rate": 0.05}
    done = {"unit": unit, "epochs": 2, "cost": 2.0, "train_loss": 1.0, "alone": 1.0, "loss": 1.0, "members": [0]}
    done |= {"alone_error": 0.0, "error": 0.0, "at": 2.0, "slots": 1}
    ledger = {"budget": {"total": 9, "unit": "epochs"}, "recipe": {"channels": 4}, "channels": 4, "first_cell": 0}
    ledger["first_epochs"] = 2
    coming = {**unit, "kind": "longer", "number": 1, "parent": 0}
    return json.dumps({**ledger, "epoch_seconds": 0.1, "done": [done], "coming": [coming], "spent": 2.0}).encode()


def _picture(kind: str) -> Callable[[Path], bytes]:
    def made(folder: Path) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.effect_noise((16, 12), 50).save(buffer, kind)
        return buffer.getvalue()

    return made


def _read_picture(path: Path) -> object:
    from dnas_ens.data.images import read_image

    return read_image(path, image_size=16, num_channels=3)


FORMATS = {
    "configuration": Format(valid=_plain_json("config.json"), read=_read_by("given.json", _configuration)),
    "genotype": Format(valid=_plain_json("genotypes.json"), read=_read_by("given.json", _genotype)),
    "genotype of DARTS": Format(valid=_flat_genotype, read=_read_by("given.txt", _genotype)),
    "genotypes.json": Format(valid=_plain_json("genotypes.json"), read=_read_by("genotypes.json", _search_result)),
    "ensemble.json": Format(
        valid=_plain_json("ensemble.json"), read=_read_by("ensemble.json", lambda path: _ensemble(path.parent))
    ),
    "weights of a member": Format(valid=_tensors, read=_read_weights),
    "saved state": Format(valid=_state, read=_read_state),
    "predictions.npz": Format(valid=_array, read=_read_predictions),
    "metrics.jsonl": Format(
        valid=lambda folder: (folder / "metrics.jsonl").read_bytes()[:2000], read=_read_by("metrics.jsonl", _metrics)
    ),
    "records of a study": Format(valid=_some_records, read=_read_by("records.jsonl", _records)),
    "budget.json": Format(valid=_budget, read=_read_by("budget.json", _ledger)),
    "picture, PNG": Format(valid=_picture("png"), read=_read_by("given.png", _read_picture)),
    "picture, JPEG": Format(valid=_picture("jpeg"), read=_read_by("given.jpg", _read_picture)),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    seconds: int = 60
    """Seconds of each format."""
    workers: int = 1
    """Formats side by side, each on one CPU core."""
    output: Path = RESULTS / "fuzzing"
    """Where table and records go: OUTPUT.md and .jsonl."""
    one: tuple[str, Path] | None = None
    """Fuzz one format in this process, in a folder made for it; what the study calls itself with."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds", "workers")


def fuzz(name: str, folder: Path, *, seconds: int) -> None:
    """Fuzz a format in this process, which ends with it; counts go to counts.json in the folder."""
    import atheris
    import numpy as np
    from faults import with_another_value

    # What was imported before is imported again: lines are watched from a module's import on.
    for module in [module for module in sys.modules if module.split(".")[0] == "dnas_ens"]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["dnas_ens"]):
        import dnas_ens.budget.ledger
        import dnas_ens.commands.options
        import dnas_ens.data.images
        import dnas_ens.ensembles.ensemble
        import dnas_ens.evaluate.predictions
        import dnas_ens.run.checkpoint
        import dnas_ens.run.metrics_log  # noqa: F401
        from dnas_ens.errors import UserError
    outcomes: Counter[str] = Counter()
    crashes: dict[str, str] = {}
    slowest, form, began = 0.0, FORMATS[name], time.monotonic()
    written = began

    def write() -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"outcomes": outcomes, "crashes": crashes, "slowest": slowest, "megabytes": peak}
        (folder / "counts.json").write_text(json.dumps(found))

    def try_one(content: bytes) -> None:
        nonlocal slowest, written
        start = time.monotonic()
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                form.read(folder / "R", content)
            outcomes["read"] += 1
        except UserError:
            outcomes["told"] += 1
        except Exception as error:  # what is looked for: anything that is not told
            outcomes["a crash"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} in {Path(place.filename).name}: {place.name}"
            if key not in crashes:
                crashes[key] = f"{str(error)[:200]} ({content[:60]!r})"
                (folder / f"crash-{len(crashes)}").write_bytes(content)
        now = time.monotonic()
        slowest = max(slowest, now - start)
        if now - written > 2.0:
            written = now
            write()

    def changed(content: bytes, most: int, seed: int) -> bytes:
        random = np.random.default_rng(seed)
        if random.random() < 0.5:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(content)
                if with_another_value(value, random):
                    return json.dumps(value).encode()[:most]
        found: bytes = atheris.Mutate(content, most)
        return found

    options = [
        f"-max_total_time={seconds}",
        f"-timeout={MOST_SECONDS}",
        f"-rss_limit_mb={MOST_MEGABYTES}",
        "-seed=1",
        "-max_len=200000",
        "-len_control=0",
    ]
    atheris.Setup([PROG, *options, "-verbosity=0", str(folder / "corpus")], try_one, custom_mutator=changed)
    write()
    atheris.Fuzz()


def run_one(name: str, seconds: int) -> Record:
    """Fuzz a format in a process of its own."""
    from faults import prepared

    with tempfile.TemporaryDirectory(prefix="fuzzing-") as temporary:
        folder = Path(temporary)
        shutil.copytree(prepared("trained"), folder / "R")
        (folder / "corpus").mkdir()
        (folder / "corpus" / "valid").write_bytes(FORMATS[name].valid(folder / "R"))
        FORMATS[name].read(folder / "R", (folder / "corpus" / "valid").read_bytes())
        command = [sys.executable, __file__, "--one", name, str(folder), "--seconds", str(seconds)]
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        found: dict[str, Any] = json.loads((folder / "counts.json").read_text())
    outcomes = Counter(found["outcomes"])
    if process.returncode:
        outcomes["a crash"] += 1
        found["crashes"]["the process"] = process.stderr[-300:]
    return {
        "format": name,
        "seconds": seconds,
        "outcomes": dict(outcomes),
        "crashes": found["crashes"],
        "slowest": found["slowest"],
        "megabytes": found["megabytes"],
    }


def page(records: Records) -> str:
    """Return the table as Markdown."""
    kinds = ("read", "told", "a crash")
    lines = [
        [
            record["format"],
            f"{sum(record['outcomes'].values()):,}",
            *(f"{record['outcomes'].get(kind, 0):,}" for kind in kinds),
            f"{record['slowest']:.2f}",
            f"{record['megabytes']:.0f}",
        ]
        for record in records
    ]
    text = markdown_table(["format", "contents tried", *kinds, "slowest, s", "peak, MB"], lines, text_columns=(0,))
    wrong = [f"- {record['format']}: {what}: {how}" for record in records for what, how in record["crashes"].items()]
    return f"{text}\n## What went wrong\n\n" + ("\n".join(wrong) or "Nothing.") + "\n"


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    if study.one is not None:
        fuzz(*study.one, seconds=study.seconds)
        return
    records = Records(
        with_ending(study.output, ".jsonl"), key=("format",), settings=lambda _: {"seconds": study.seconds}
    )
    tasks: dict[Hashable, Task] = {name: functools.partial(run_one, name, study.seconds) for name in FORMATS}
    with worker_pool(study.workers) as pool:
        run_missing(records, tasks, pool=pool, said=lambda record: f"{record['format']}: {record['outcomes']}")
    text = (
        "# Does any file bring a reader down?\n\n"
        + provenance(environment([*PROG.split(), *argv]), hardware="no GPU, one thread a process")
        + "\n\nRead: the reader took it, as a change of a number allows. Told: it ended with cause and remedy. "
        f"A crash is any other exception, more than {MOST_SECONDS} seconds or more than {MOST_MEGABYTES:,} MB.\n\n"
        + page(records)
    )
    write_results(study.output, text)
    print(text)


if __name__ == "__main__":
    run_script(main)
