"""Verify, measure and compare everything on a GPU in one call of a few minutes.

    python experiments/gpu_session.py --out runs/gpu --budget 520
    python experiments/gpu_session.py --out runs/gpu --resume runs/gpu --budget 200
    python experiments/gpu_session.py --out runs/gpu-rehearsal --rehearse
    python experiments/gpu_session.py --table runs/gpu

Every section is a process of its own with a time limit, and every figure is written to DIR/results.jsonl as soon as it
is known, so a crash or a time-out costs the rest of one section at most. Sections that no longer fit are skipped by
name; --resume does what is left, and --only what it names. --rehearse tries every line at tiny sizes, on a CPU in two
minutes. --table writes the published table from the files, on any machine.

Sections: 0 machine, 1 tests, 2 recorded against eager, 3 kernels, 4 search, 5 training, 6 side by side, 7 comparison,
8 compiled. DIR holds at most 8 files, each below 16 MB: results.jsonl, log.txt and the log-probabilities of section 7.
Needs Fashion-MNIST in the data root; nothing is downloaded.
Published: experiments/results/gpu.md.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnas_ens.commands.parse import parse, run_main
from dnas_ens.compare.records import append_line, read_lines
from dnas_ens.config import require

#: Seconds a section may take, and the least that it is begun with.
LIMITS = {
    0: (30, 10),
    1: (140, 30),
    2: (60, 25),
    3: (45, 20),
    4: (120, 40),
    5: (70, 30),
    6: (60, 30),
    7: (430, 120),
    8: (150, 60),
}
#: Seconds that a section has to end itself before it is killed.
GRACE = 3.0
ENDING = (signal.SIGINT, signal.SIGTERM)
RESULTS, LOG = "results.jsonl", "log.txt"


@dataclass(frozen=True, kw_only=True)
class GpuSession:
    """Options of the script."""

    out: Path = Path("runs/gpu")
    """Folder of the session; results are appended to what is there."""
    budget: float = 520
    """Seconds for everything."""
    resume: Path | None = None
    """Folder of an earlier session whose finished sections are taken over."""
    only: tuple[int, ...] = (0, 3, 1, 7, 4, 5, 6, 2, 8)
    """Sections to run, in this order."""
    rehearse: bool = False
    """Tiny sizes, to try every line on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    table: Path | None = None
    """Write the table of this folder's session instead of measuring."""
    output: Path = Path("runs/results/gpu")
    """Where --table writes: OUTPUT.md, OUTPUT.png, and the session's lines as OUTPUT.jsonl."""
    crash: int | None = None
    """A section that fails on purpose, for a rehearsal of that."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(LIMITS))
        require(not unknown, f"There is no section {unknown}.", f"Give --only some of {sorted(LIMITS)}.")
        for folder in (self.resume, self.table):
            require(
                folder is None or (folder / RESULTS).exists(),
                f"There is no {RESULTS} in {folder}.",
                "Give the --out of an earlier session.",
            )
        require(self.budget > 0, f"--budget is {self.budget}.", "Give --budget a number of seconds above 0.")


def finished(records: list[dict[str, Any]]) -> set[int]:
    """Return the sections that finished."""
    return {record["section"] for record in records if record.get("end") == "done"}


def run_section(number: int, options: GpuSession, limit: float) -> str:
    """Run a section in a process of its own; return how it ended: done, crashed or timed out."""
    argv = [
        sys.executable,
        "-u",
        __file__,
        "section",
        str(number),
        str(options.out),
        str(limit),
        options.device,
    ]
    argv += ["rehearse"] * options.rehearse + ["crash"] * (options.crash == number)
    with (options.out / LOG).open("a") as log:
        log.write(f"--- section {number}\n")
        log.flush()
        # A signal during the start would leave the section running with nobody to end it. Handlers hold it: with a mask
        # another thread would take it, and Python would raise it here all the same.
        held: list[int] = []
        usual = {sign: signal.signal(sign, lambda number, _: held.append(number)) for sign in ENDING}
        try:
            process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError:
            _handle(usual, held)
            raise
        try:
            _handle(usual, held)
            return "done" if process.wait(limit + GRACE) == 0 else "crashed"
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(process)


def _handle(usual: Mapping[signal.Signals, Any], held: Sequence[int]) -> None:
    """Let signals be handled as before, those that were held too."""
    for sign, handler in usual.items():
        signal.signal(sign, handler)
    for number in held:
        signal.raise_signal(number)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a section with all its processes."""
    for sign, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def run(options: GpuSession) -> None:
    """Run the sections that are asked for and not finished, as far as the budget goes."""
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume is not None and options.resume.resolve() != options.out.resolve():
        for file in options.resume.iterdir():
            if file.is_file():
                shutil.copy2(file, options.out / file.name)
    done = finished(read_lines(options.out / RESULTS))
    for number in dict.fromkeys(options.only):
        left = options.budget - (time.monotonic() - start)
        most, least = LIMITS[number]
        begun, end = time.monotonic(), "interrupted"
        try:
            if number in done:
                end = "done"
                continue
            if left < (5 if options.rehearse else least):
                end = "skipped"
                continue
            end = run_section(number, options, min(most, left - GRACE))
        finally:
            seconds = round(time.monotonic() - begun, 1)
            if number not in done:
                append_line(options.out / RESULTS, {"section": number, "end": end, "seconds": seconds})
            print(f"section {number}: {end}, {seconds} s, {left:.0f} s were left", file=sys.stderr, flush=True)
    rest = sorted(set(LIMITS) - finished(read_lines(options.out / RESULTS)))
    if rest:
        print(f"left are sections {', '.join(map(str, rest))}")
        print(f"next: python experiments/gpu_session.py --out {options.out} --resume {options.out}")
    else:
        print(f"next: python experiments/gpu_session.py --table {options.out}")


def section_main(argv: list[str]) -> None:
    """Run one section in this process."""
    number, out, limit, device_name, *flags = argv
    deadline = time.monotonic() + float(limit)
    from dnas_ens.run.machine import keep_freed_memory

    keep_freed_memory()

    # The benchmarks are scripts that find each other in their own folder.
    sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
    from studies.gpu import comparison, sections

    from dnas_ens.nn.depthwise import native_depthwise
    from dnas_ens.run.machine import resolve_device

    results = Path(out) / RESULTS
    earlier = {record["name"]: record for record in read_lines(results) if "name" in record}

    def keep(name: str, record: dict[str, Any]) -> None:
        line = {"section": int(number), "name": name, **record}
        append_line(results, line)
        earlier[name] = line

    functions = [
        sections.machine,
        sections.gpu_tests,
        sections.recorded_losses,
        sections.kernel_variants,
        sections.search_steps,
        sections.training_step,
        sections.members_side_by_side,
        comparison.compare,
        sections.compiled_member,
    ]
    session = sections.Session(
        out=Path(out),
        device=resolve_device(device_name),
        rehearse="rehearse" in flags,
        deadline=deadline,
        keep=keep,
        earlier=earlier,
    )
    if "crash" in flags:
        raise RuntimeError("a section that fails on purpose")
    # Wrong kernels would make every later figure worthless.
    ours = [record["variants"]["ours"] for record in earlier.values() if record.get("part") == "depthwise"]
    with native_depthwise() if any("failed" in variant for variant in ours) else nullcontext():
        functions[int(number)](session)


def main(argv: list[str]) -> None:
    """Run the session, a section of it, or write its table."""
    if argv[:1] == ["section"]:
        section_main(argv[1:])
        return
    options = parse(
        GpuSession,
        argv,
        prog="python experiments/gpu_session.py",
        description=__doc__ or "",
        default=GpuSession(),
    )
    if options.table is not None:
        from studies.gpu.table import write_table

        write_table(options.table, options.output)
        return
    run(options)


if __name__ == "__main__":
    sys.exit(run_main(main))
