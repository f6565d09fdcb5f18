"""What does a folder of 300 photos take, from the search to a server? Every command that the guide names, timed.

    python experiments/benchmarks/own_pictures.py

300 photos of three classes and 60 new ones are made of the JPEG files of a data set on this machine, enlarged to sides
of 64 to 500 pixels, so that there is as much to read and decode as of photos; how well they are classified says nothing
about photos. The server is the guide's, on loopback: what it answers must be what ``predict`` wrote. Writes
experiments/results/own-pictures.md. Seven minutes on two CPU cores; needs `pip install fastapi uvicorn` and the extra
onnx.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from timing import RESULTS, parse_benchmark
from torchvision.models import resnet18

from dnas_ens.commands.parse import run_main
from dnas_ens.compare.report import markdown_table, provenance, write_results
from dnas_ens.config import require
from dnas_ens.data.large import default_data_root
from dnas_ens.run.files import read_json
from dnas_ens.run.machine import environment

GUIDE = Path(__file__).parents[2] / "docs/guide.md"
CLASSES = ("airplane", "cat", "ship")
COMMANDS = (
    "python -m dnas_ens.search --data photos --run-dir R",
    "python -m dnas_ens.retrain R",
    "python -m dnas_ens.evaluate R",
    "python -m dnas_ens.predict R new --output all.csv",
    "python -m dnas_ens.predict R new --cascade --output cascade.csv",
    "python -m dnas_ens.export R --output ours.onnx",
    "python -m dnas_ens --data photos --budget 1m --run-dir B",
    "python -m dnas_ens --data photos --trunk resnet18:weights.safetensors --budget 1m --run-dir T",
    "python -m dnas_ens.predict T new --output trunk.csv",
)


@dataclass(frozen=True, kw_only=True)
class OwnPictures:
    """Options of the benchmark."""

    pictures: Path | None = None
    """Folder with train/CLASS/*.jpg and test/CLASS/*.jpg; default: cifar10-jpeg below the data root."""
    output: Path = RESULTS / "own-pictures"
    """Where OUTPUT.md goes."""


def make_photos(pictures: Path, folder: Path) -> None:
    """Write 100 photos of each class to photos/CLASS, and 20 to new/."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        for part, count in (("train", 100), ("test", 20)):
            place = folder / ("photos/" + name if part == "train" else "new")
            place.mkdir(parents=True, exist_ok=True)
            files = sorted((pictures / part / name).glob("*.jp*g"))
            require(len(files) >= count, f"{pictures / part / name} has fewer than {count} JPEG files.", "Give others.")
            for number, file in enumerate(files[:count]):
                width, height = (int(side) for side in random.integers(64, 501, size=2))
                with Image.open(file) as image:
                    image.resize((width, height), Image.Resampling.BICUBIC).save(place / f"{name}-{number}.jpg")


def run_timed(command: str, folder: Path) -> tuple[float, float]:
    """Run a command in a folder; return its seconds and its peak memory in MB, of its largest process."""
    argv = [sys.executable, *shlex.split(command)[1:]]
    start = time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(argv, cwd=folder, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {(folder / 'output.txt').read_text()[-2000:]}")
    return time.perf_counter() - start, used.ru_maxrss / 1024


def ask_server(folder: Path, paths: list[Path]) -> tuple[list[dict[str, Any]], float]:
    """Start the guide's server, send it pictures one by one, and return its answers and the seconds of one."""
    (code,) = re.findall(r"^```python\n(# serve\.py.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    (folder / "serve.py").write_text(code.replace("runs/001-photos", "R"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--port", str(port), "--log-level", "error"]
    server = subprocess.Popen(command, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}/predict"
        _answer(address, paths[0].read_bytes(), server)
        start = time.perf_counter()
        answers = [_answer(address, path.read_bytes(), server) for path in paths]
        return answers, (time.perf_counter() - start) / len(paths)
    finally:
        server.terminate()
        server.wait(timeout=30)


def _answer(address: str, picture: bytes, server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Return the answer to a picture; waits until the server is there."""
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, data=picture), timeout=60) as reply:
                found: dict[str, Any] = json.load(reply)
                return found
        except urllib.error.URLError as error:
            if server.poll() is not None or not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("own_pictures", __doc__, OwnPictures(), argv)
    pictures = options.pictures or default_data_root() / "cifar10-jpeg"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_photos(pictures, folder)
        # Random ones take as long as trained ones.
        save_file(resnet18().state_dict(), folder / "weights.safetensors")
        lines = []
        for command in COMMANDS:
            seconds, megabytes = run_timed(command, folder)
            lines.append([f"`{command}`", f"{seconds:.0f}", f"{megabytes:,.0f}"])
            print(f"{command}: {seconds:.0f} s, {megabytes:,.0f} MB", file=sys.stderr, flush=True)
        with (folder / "all.csv").open() as file:
            rows = list(csv.DictReader(file))
        answers, each = ask_server(folder, [folder / row["path"] for row in rows])
        for row, answer in zip(rows, answers, strict=True):
            # One picture at a time and all at once may differ by rounding.
            if row["label"] != answer["label"] or abs(float(row["probability"]) - answer["probability"]) > 1e-4:
                raise RuntimeError(f"{row['path']}: predict wrote {row}, the server answers {answer}")
        right = sum(Path(row["path"]).name.startswith(row["label"]) for row in rows) / len(rows)
        results = {name: read_json(folder / name / "results.json")[-1] for name in ("R", "B")}
        megabytes_of_graph = (folder / "ours.onnx").stat().st_size / 2**20
        size = read_json(folder / "R/ensemble.json")["image_size"]
    text = (
        "# What does a folder of 300 photos take?\n\n"
        + provenance(environment(["python", "experiments/benchmarks/own_pictures.py", *argv]), hardware="no GPU")
        + f"\n\n300 pictures of three classes ({', '.join(CLASSES)}), made by enlarging JPEG files of 32×32 pixels to "
        f"sides of 64 to 500, so how well they are classified says nothing about photos. The commands took squares of "
        f"{size} pixels, on a trunk of 224; its weights are random, for the time alone. Seconds of the wall clock with "
        "loading Python, and memory of the largest process.\n\n"
        + markdown_table(["command", "seconds", "peak memory, MB"], lines, text_columns=(0,))
        + f"\n- The server of the guide answers a picture in {1000 * each:.0f} ms on loopback, one at a time; all "
        f"{len(rows)} answers are those that `predict` wrote.\n"
        f"- The graph `ours.onnx` has {megabytes_of_graph:.1f} MB.\n"
        f"- Of the 60 new pictures {100 * right:.0f} % are labelled right; on the test pictures that were cut off, "
        f"60 too, the search's ensemble has {100 * results['R']['accuracy']:.0f} % and a calibrated NLL of "
        f"{results['R']['calibrated_nll']:.2f}, the budget's {100 * results['B']['accuracy']:.0f} % and "
        f"{results['B']['calibrated_nll']:.2f}. One run each: a difference of a few pictures is luck.\n"
    )
    write_results(options.output, text)
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
