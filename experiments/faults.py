"""Is a run ever lost, or damaged without a word? Real processes killed at random and at writes, files damaged.

    python experiments/faults.py --workers 2

Kills: each command, at a tiny size on digits, is killed up to three times: at a random moment by SIGKILL, SIGTERM or
SIGINT, or by SIGKILL before one of its writes to the run folder (a file opened for writing, renamed or removed), which
takes turns over all of them. Then it goes on with --resume to its end, and every network, genotype, prediction, figure
and metric must equal, bit by bit, that of a run that was not killed; measured seconds are left out. In every second
run states are saved after every step instead of every minute.

Every write: a kill before a write leaves the folder as it then is, so the folder of one run is copied before each of
its writes, and the command goes on from every copy. Left to the kills: the whole way, which does what search and
retrain do, and the comparison with its thousand writes.

Damages: one file of a finished run is damaged, one command that reads it is run. It must end with the lines `error` and
`remedy` and exit code 2, or with what it gives without the damage.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnas_ens.commands import compare, evaluate, predict, retrain, search, whole_way
from dnas_ens.commands.parse import parse, run_main
from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.report import markdown_table, provenance, write_results
from dnas_ens.compare.study import RESULTS, Task, require_positive, run_missing, run_script
from dnas_ens.data import load_data
from dnas_ens.run import checkpoint
from dnas_ens.run.files import read_json, with_ending
from dnas_ens.run.machine import environment
from dnas_ens.training.workers import worker_pool

PROG = "python experiments/faults.py"
Main = Callable[[list[str]], None]

SEARCH = shlex.split(
    "--num-cells 1 --channels 4 --num-nodes 3 --directions 2 --epochs 4 --warmup-epochs 1 --limit-train 130 "
    "--batch-size 32 --drawn-members 2 --penalty-draws 2 --members 2 --pool-size 4 --device cpu"
)
RECIPE = shlex.split("--epochs 4 --channels 4 --num-cells 1 --batch-size 32 --workers 1 --device cpu")
INNER = shlex.split("--retrain.epochs 2 --retrain.channels 4 --retrain.num-cells 1 --retrain.batch-size 32 --workers 1")
COMPARED = shlex.split(
    "--methods snapshots averaged-weights evolved-network nes-re --pool-size 3 --population 2 --parents 1 --workers 1"
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A command that is killed.

    Args:
        arguments: Without the run folder.
        prepared: The folder that it begins in, by the name in `FOLDERS`; empty for none.
        resumes: Whether it takes --resume; else the same command goes on.
        is_path: Whether the folder is a plain argument instead of --run-dir.
    """

    main: Main
    arguments: list[str]
    prepared: str = ""
    resumes: bool = True
    is_path: bool = False

    def argv(self, *, again: bool) -> list[str]:
        """Return all arguments."""
        place = ["R"] if self.is_path else ["--run-dir", "R"]
        return [*place, *self.arguments, *(["--resume"] if again and self.resumes else [])]


SUBJECTS = {
    "search, soft": Subject(main=search.main, arguments=[*SEARCH, "--space", "darts", "--relaxation", "softmax"]),
    "search, hard paths": Subject(main=search.main, arguments=SEARCH),
    "retrain": Subject(main=retrain.main, arguments=RECIPE, prepared="searched", is_path=True),
    "the whole way": Subject(main=whole_way.main, arguments=[*SEARCH, *INNER]),
    "a budget": Subject(
        main=whole_way.main,
        arguments=[*SEARCH, *INNER, "--budget-epochs", "14"],
    ),
    "comparison": Subject(main=compare.main, arguments=COMPARED, prepared="trained", resumes=False, is_path=True),
}
#: Commands that read a finished run, and what of their output must be as without a damage.
READERS: dict[str, tuple[Main, list[str]]] = {
    "evaluate": (evaluate.main, ["R", "--device", "cpu"]),
    "predict": (predict.main, ["R", "pictures", "--output", "predicted.csv", "--device", "cpu"]),
    "retrain --resume": (retrain.main, ["R", *RECIPE, "--resume"]),
    "report": (evaluate.report_main, ["R"]),
}
#: Every so many-th write belongs to a unit of the study.
SHARES = 8
#: What commands import when they need it, here before they are forked.
IMPORTED_ONCE = (
    "dnas_ens.figures.cells",
    "dnas_ens.report.build",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.utils.tensorboard",
)
#: Fields that are measured, or say when and by what something was made.
MEASURED = re.compile(r"seconds|^(wall_)?time$|^content_sha256$|^command$|^execution$")


def launch(
    main: Main,
    argv: list[str],
    *,
    cwd: Path,
    before_write: Callable[[int], object] = lambda count: None,
    every_step: bool = False,
) -> int:
    """Run a command in a process of its own, forked, so that nothing has to be imported again; return its number.

    Args:
        before_write: Called in the process before every write below the folder, with its number from 1. The number of
            writes goes to the file `writes` beside it.
        every_step: Save states after every step.
    """
    for module in IMPORTED_ONCE:
        importlib.import_module(module)
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.chdir(cwd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        if every_step:
            checkpoint.SECONDS_BETWEEN_STATES = 0.0
        writes = _count_writes(cwd / "R", before_write)
        code = run_main(main, argv)
        (cwd / "writes").write_text(str(writes[0]))
    finally:
        os._exit(code)


def _count_writes(folder: Path, before_write: Callable[[int], object]) -> list[int]:
    """Count what changes a folder from now on, and call a function before each change."""
    count, place = [0], str(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not writes or not isinstance(path, str | os.PathLike):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir"):
            path = arguments[0]
            if isinstance(path, int):
                # What is open already.
                return
        else:
            return
        if os.path.abspath(os.fspath(path)).startswith(place):
            count[0] += 1
            before_write(count[0])

    sys.addaudithook(watch)
    return count


def _killed_before(write: int, count: int) -> None:
    if count == write:
        os.kill(os.getpid(), signal.SIGKILL)


def _copied(folder: Path, copies: Path, count: int) -> None:
    place = copies / str(count)
    place.mkdir()
    if folder.exists():
        shutil.copytree(folder, place / "R")


def ended(number: int) -> int:
    """Wait for a process and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def content(folder: Path, *patterns: str) -> dict[str, str]:
    """Return a digest of every file that says what a run came to, without what was measured in seconds.

    Args:
        patterns: Of the files; all of them where none is given.
    """
    found = {}
    for path in sorted({path for pattern in patterns or ("**/*",) for path in folder.glob(pattern)}):
        name = str(path.relative_to(folder))
        # States hold seconds, and which are kept depends on when a process ended.
        if not path.is_file() or {"checkpoints", "tensorboard"} & {*path.parts} or path.name == "env.json":
            continue
        parts: Iterator[bytes]
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                kept = [key for key in sorted(arrays.files) if not MEASURED.search(key)]
                parts = iter([arrays[key].tobytes() for key in kept])
        elif path.suffix == ".safetensors":
            parts = iter([path.read_bytes()])
        elif path.suffix == ".json":
            parts = iter([_plain(read_json(path))])
        elif path.suffix == ".jsonl":
            parts = iter([_plain(json.loads(line)) for line in path.read_text().splitlines()])
        else:
            continue
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        found[name] = digest.hexdigest()
    return found


def _plain(value: Any) -> bytes:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(part) for key, part in value.items() if not MEASURED.search(key)}
        return [without(part) for part in value] if isinstance(value, list) else value

    return json.dumps(without(value), sort_keys=True).encode()


def compared(name: str, folder: Path) -> dict[str, str]:
    """Return what must be the same after a kill.

    Of a comparison the networks and predictions: how many more copies equal cost pays for is a matter of seconds.
    """
    found = content(folder)
    if name == "comparison":
        kept = (".safetensors", ".npz", "metrics.jsonl")
        return {file: digest for file, digest in found.items() if file.endswith(kept) and "-more/" not in file}
    return found


@functools.cache
def prepared(kind: str) -> Path:
    """Return a finished run folder, made once in this process: searched, or trained too and evaluated."""
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    if kind == "trained":
        shutil.copytree(prepared("searched"), place / "R")
        commands: list[tuple[Main, list[str]]] = [(retrain.main, ["R", *RECIPE]), READERS["evaluate"]]
    else:
        commands = [(search.main, ["--run-dir", "R", *SEARCH])]
    for main, argv in commands:
        if code := ended(launch(main, argv, cwd=place)):
            raise RuntimeError(f"{argv} ended with {code}: {(place / 'output.txt').read_text()[-2000:]}")
    return place / "R"


@functools.cache
def straight(name: str) -> tuple[dict[str, str], int, float]:
    """Return what a command comes to when nothing kills it, how often it writes, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        place, subject = Path(folder), SUBJECTS[name]
        if subject.prepared:
            shutil.copytree(prepared(subject.prepared), place / "R")
        start = time.monotonic()
        code = ended(launch(subject.main, subject.argv(again=False), cwd=place))
        seconds = time.monotonic() - start
        if code:
            raise RuntimeError(f"{name} ended with {code}: {(place / 'output.txt').read_text()[-2000:]}")
        return compared(name, place / "R"), int((place / "writes").read_text()), seconds


def kill_one(name: str, seed: int) -> Record:
    """Kill a command up to three times, let it end, and compare."""
    _, writes, seconds = straight(name)
    random, subject = np.random.default_rng([seed, *name.encode()]), SUBJECTS[name]
    kills, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if subject.prepared:
            shutil.copytree(prepared(subject.prepared), place / "R")
        every_step, code = bool(seed % 2), 1
        for turn in range(1 + int(random.integers(3))):
            again = turn > 0 and (place / "R/config.json").exists()
            run = functools.partial(launch, subject.main, subject.argv(again=again), cwd=place, every_step=every_step)
            if seed % 4 < 2:
                write = 1 + 7 * seed % writes if turn == 0 else 1 + turn * 5
                code = ended(run(before_write=functools.partial(_killed_before, write)))
                kind = "before a write"
            else:
                kind = ("SIGKILL", "SIGTERM", "SIGINT")[int(random.integers(3))]
                number = run()
                time.sleep(float(random.uniform(0.05, 0.6 * seconds)))
                sent = time.monotonic()
                os.kill(number, getattr(signal, kind))
                code = ended(number)
                if kind != "SIGKILL" and code in (130, 143):
                    slowest = max(slowest, time.monotonic() - sent)
            if code not in (-signal.SIGKILL, 130, 143):
                break
            kills.append(kind)
        outcome = _gone_on(name, place)
    return {"kind": "kill", "subject": name, "seed": seed, "kills": kills, "slowest": slowest, **outcome}


def _gone_on(name: str, place: Path) -> Record:
    """Let a command end in a folder, and compare what it comes to with a run that nothing interrupted."""
    expected, writes, _ = straight(name)
    subject = SUBJECTS[name]
    again = (place / "R/config.json").exists()
    code = ended(launch(subject.main, subject.argv(again=again), cwd=place))
    found = compared(name, place / "R") if code == 0 else {}
    return {
        "code": code,
        "different": sorted(file for file in {*expected, *found} if expected.get(file) != found.get(file)),
        "left": sorted(str(path.relative_to(place)) for path in (place / "R").rglob("*.tmp")),
        "said": (place / "output.txt").read_text()[-1500:] if code else "",
        "writes": writes,
    }


@functools.cache
def _before_writes(name: str) -> Path:
    """Return copies of a run's folder as it was before each of its writes, by number, made once in this process."""
    place, subject = Path(tempfile.mkdtemp(prefix="faults-")), SUBJECTS[name]
    if subject.prepared:
        shutil.copytree(prepared(subject.prepared), place / "R")
    copied = functools.partial(_copied, place / "R", place)
    if code := ended(launch(subject.main, subject.argv(again=False), cwd=place, before_write=copied)):
        raise RuntimeError(f"{name} ended with {code}: {(place / 'output.txt').read_text()[-2000:]}")
    return place


def writes_one(name: str, share: int) -> Record:
    """Go on from the states before the writes of one of `SHARES` shares; return what did not end as it must."""
    wrong, tried = [], 0
    for place in sorted(_before_writes(name).glob("[0-9]*"), key=lambda path: int(path.name)):
        if int(place.name) % SHARES != share:
            continue
        outcome, tried = _gone_on(name, place), tried + 1
        if outcome["code"] or outcome["different"] or outcome["left"]:
            wrong.append({"write": int(place.name), **outcome})
        shutil.rmtree(place)
    return {"kind": "writes", "subject": name, "seed": share, "tried": tried, "wrong": wrong}


def damaged(path: Path, kind: str, random: np.random.Generator) -> bool:
    """Damage a file; False where it cannot be in this way."""
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return True
    if not content:
        return False
    if kind == "flipped":
        content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
    elif kind == "truncated":
        del content[int(random.integers(len(content))) :]
    elif kind == "empty":
        content.clear()
    elif kind == "other bytes":
        content = bytearray(random.bytes(int(random.integers(1, 4096))))
    elif kind == "giant header":
        content[:8] = int(random.integers(2**40, 2**62)).to_bytes(8, "little")
    elif kind == "another value":
        if path.suffix != ".json":
            return False
        value = read_json(path)
        if not with_another_value(value, random):
            return False
        content = bytearray(json.dumps(value).encode("utf-8", "surrogatepass"))
    path.write_bytes(content)
    return True


def with_another_value(value: Any, random: np.random.Generator) -> bool:
    """Put something strange into a list or object at a random place; False where it has none."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(value)
    if not places:
        return False
    strange: list[Any] = [None, True, -1, 10**30, 1e308, "", "\ud800", "x" * 5000, [], {}, [[[[]]]]]
    part, key = places[int(random.integers(len(places)))]
    part[key] = strange[int(random.integers(len(strange)))]
    return True


DAMAGES = ("flipped", "truncated", "empty", "missing", "other bytes", "giant header", "another value")


def _pictures(place: Path) -> None:
    from PIL import Image

    (place / "pictures").mkdir()
    for index, image in enumerate(load_data("digits").test.images[:8]):
        Image.fromarray(image[0].numpy()).save(place / f"pictures/{index}.png")


#: Files of the run folder that each reader leaves.
LEFT = {
    "evaluate": ("results.json", "predictions.npz", "ensemble_size.json"),
    "retrain --resume": ("members/*/model.safetensors", "ensemble.json"),
}


def _outcome(reader: str, place: Path) -> dict[str, str]:
    """Return a digest of what a reader has made."""
    found = content(place / "R", *LEFT[reader]) if reader in LEFT else {}
    if reader == "predict":
        found["predicted.csv"] = hashlib.sha256((place / "predicted.csv").read_bytes()).hexdigest()
    return found


@functools.cache
def unharmed(reader: str) -> dict[str, str]:
    """Return what a reader gives without a damage."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(prepared("trained"), place / "R")
        _pictures(place)
        if code := ended(launch(*READERS[reader], cwd=place)):
            raise RuntimeError(f"{reader} ended with {code}: {(place / 'output.txt').read_text()[-2000:]}")
        return _outcome(reader, place)


def damage_one(reader: str, seed: int) -> Record:
    """Damage a file of a finished run, and see what a reader makes of it."""
    random = np.random.default_rng([seed, *reader.encode()])
    expected = unharmed(reader)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(prepared("trained"), place / "R")
        _pictures(place)
        endings = (".json", ".jsonl", ".npz", ".safetensors")
        files = sorted(path for path in (place / "R").rglob("*") if path.suffix in endings)
        while True:
            path = files[int(random.integers(len(files)))]
            kind = DAMAGES[int(random.integers(len(DAMAGES)))]
            if damaged(path, kind, random):
                break
        name = str(path.relative_to(place / "R"))
        start = time.monotonic()
        code = ended(launch(*READERS[reader], cwd=place))
        seconds = time.monotonic() - start
        said = (place / "output.txt").read_text()
        lines = re.findall("^(error|remedy): ", said, re.MULTILINE)
        if code == 2 and lines == ["error", "remedy"]:
            outcome = "told"
        elif code == 0:
            outcome = "as without it" if _outcome(reader, place) == expected else "another result"
        else:
            outcome = "a crash"
        changed = []
        if outcome == "another result":
            found = _outcome(reader, place)
            changed = [file for file in {*found, *expected} if found.get(file) != expected.get(file)]
    return {
        "kind": "damage",
        "subject": reader,
        "seed": seed,
        "file": re.sub(r"\d{4,}|(?<=-)\d+", "N", name),
        "damage": kind,
        "outcome": outcome,
        "seconds": seconds,
        "changed": changed,
        "said": "" if outcome in ("told", "as without it") else said[-1500:],
    }


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    kills: int = 100
    """How many runs are killed, in turns over the commands."""
    every_write: bool = True
    """Whether commands go on from before each of their writes as well."""
    damages: int = 400
    """How many files are damaged, in turns over the commands that read them."""
    workers: int = 1
    """Units side by side, each on one CPU core."""
    output: Path = RESULTS / "faults"
    """Where tables and records go: OUTPUT.md and .jsonl."""

    def __post_init__(self) -> None:
        require_positive(self, "kills", "damages", "workers")


def run_one(kind: str, subject: str, seed: int) -> Record:
    """Run one unit."""
    return {"kill": kill_one, "writes": writes_one, "damage": damage_one}[kind](subject, seed)


def page(records: Records) -> str:
    """Return the tables as Markdown."""
    lines = []
    for name in SUBJECTS:
        found = [record for record in records if (record["kind"], record["subject"]) == ("kill", name)]
        if not found:
            continue
        kinds = Counter(kind for record in found for kind in record["kills"])
        lines.append(
            [
                name,
                str(found[0]["writes"]),
                str(len(found)),
                *(str(kinds[kind]) for kind in ("before a write", "SIGKILL", "SIGTERM", "SIGINT")),
                str(sum(record["code"] == 0 and not record["different"] for record in found)),
                str(sum(record["code"] == 0 and bool(record["different"]) for record in found)),
                str(sum(record["code"] != 0 for record in found)),
                str(sum(bool(record["left"]) for record in found)),
                f"{max(record['slowest'] for record in found):.1f}",
            ]
        )
    header = ["command", "writes", "runs", "killed before a write", "SIGKILL", "SIGTERM", "SIGINT"]
    header += ["ended equal", "ended different", "did not go on", "files left over", "slowest end, s"]
    text = f"## Kills\n\n{markdown_table(header, lines, text_columns=(0,))}\n"
    text += "Slowest end: seconds from SIGTERM or SIGINT to the end of the process, with two commands on two cores.\n\n"
    rows = []
    for name in SUBJECTS:
        if found := [record for record in records if (record["kind"], record["subject"]) == ("writes", name)]:
            tried, wrong = (
                sum(record["tried"] for record in found),
                [each for record in found for each in record["wrong"]],
            )
            equal = tried - sum(each["code"] != 0 or bool(each["different"]) for each in wrong)
            stopped, left = sum(each["code"] != 0 for each in wrong), sum(bool(each["left"]) for each in wrong)
            rows.append([name, *map(str, (tried, equal, tried - equal - stopped, stopped, left))])
    if rows:
        header = ["command", "writes", "ended equal", "ended different", "did not go on", "files left over"]
        text += f"## Gone on from before every write\n\n{markdown_table(header, rows, text_columns=(0,))}\n"
    damages = [record for record in records if record["kind"] == "damage"]
    outcomes = ("told", "as without it", "another result", "a crash")

    def counted(name: str, found: list[Record]) -> list[str]:
        counts = Counter(record["outcome"] for record in found)
        return [name, str(len(found)), *(str(counts[outcome]) for outcome in outcomes)]

    rows = [counted(kind, [record for record in damages if record["damage"] == kind]) for kind in DAMAGES]
    rows.append(counted("all", damages))
    text += f"## Damaged files\n\n{markdown_table(['damage', 'files', *outcomes], rows, text_columns=(0,))}\n"
    files = sorted({record["file"] for record in damages})
    rows = [counted(file, [record for record in damages if record["file"] == file]) for file in files]
    text += f"\n{markdown_table(['file', 'damages', *outcomes], rows, text_columns=(0,))}\n"
    wrong = [line for record in records for line in _wrong(record)]
    return text + "\n## What went wrong\n\n" + ("\n".join(wrong) or "Nothing.") + "\n"


def _wrong(record: Record) -> Iterator[str]:
    """Yield a line for everything in a unit that did not end as it must."""
    start = f"- {record['subject']}, seed {record['seed']}: "
    if record["kind"] == "damage":
        if record["outcome"] in ("another result", "a crash"):
            changed = ", ".join(record["changed"])
            yield f"{start}{record['damage']} {record['file']}: {record['outcome']} {changed}"
        return
    writes = record["kind"] == "writes"
    for each in record["wrong"] if writes else [record]:
        how = f"before write {each['write']}" if writes else f"killed {', '.join(each['kills'])}"
        if each["code"] or each["different"] or (writes and each["left"]):
            yield f"{start}{how}; exit code {each['code']}; {', '.join(each['different'] + each['left'])}"


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    records = Records(with_ending(study.output, ".jsonl"), key=("kind", "subject", "seed"))
    tasks: dict[Hashable, Task] = {}
    units = [("kill", study.kills, list(SUBJECTS)), ("damage", study.damages, list(READERS))]
    if study.every_write:
        written = [name for name in SUBJECTS if name not in ("the whole way", "comparison")]
        units.insert(1, ("writes", SHARES * len(written), written))
    for kind, count, names in units:
        for number in range(count):
            key = kind, names[number % len(names)], number // len(names)
            tasks[key] = functools.partial(run_one, *key)

    def said(record: Record) -> str:
        if record["kind"] == "damage":
            return f"{record['subject']}: {record['damage']} {record['file']}: {record['outcome']}"
        if record["kind"] == "writes":
            return (
                f"{record['subject']}: {record['tried']} writes, {len(record['wrong'])} of them NOT EQUAL or unfinished"
            )
        ended = "equal" if record["code"] == 0 and not record["different"] else f"NOT EQUAL {record['different']}"
        return f"{record['subject']}, seed {record['seed']}: killed {', '.join(record['kills'])}; {ended}"

    with worker_pool(study.workers) as pool:
        run_missing(records, tasks, pool=pool, said=said)
    text = (
        "# Is a run ever lost, or damaged without a word?\n\n"
        + provenance(environment([*PROG.split(), *argv]), hardware="no GPU, one thread a process")
        + "\n\n"
        + page(records)
    )
    write_results(study.output, text)
    print(text)


if __name__ == "__main__":
    run_script(main)
