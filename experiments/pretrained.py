"""Search, train and pack the ensemble that comes with the package: de.load("fashion-mnist").

    python experiments/pretrained.py --run-dir runs/fashion-mnist-shipped

Runs the three commands that its card names, goes on where an earlier run was interrupted, and writes
dnas_ens/pretrained/fashion-mnist. Cells by the star alone around a residual block, as a budget has them. 20 minutes on
two CPU cores.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import dnas_ens as de
from dnas_ens.commands.parse import parse
from dnas_ens.compare.report import machine
from dnas_ens.compare.study import run_script
from dnas_ens.config import require
from dnas_ens.ensembles.card import CARD
from dnas_ens.ensembles.storage import MANIFEST, PRETRAINED
from dnas_ens.run.files import read_json

PROG = "python experiments/pretrained.py"
NAME = "fashion-mnist"
COMMANDS = (
    "dnas_ens.search --data fashion-mnist --base resnet --likelihood none --max-lambda 0.3 --members 5 --run-dir {run}",
    "dnas_ens.retrain {run} --epochs 25 --workers 2",
    "dnas_ens.evaluate {run}",
)
#: What a package may hold.
MOST_BYTES = 2 * 10**6


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the script."""

    run_dir: Path = Path("runs/fashion-mnist-shipped")
    """The run folder."""
    output: Path = PRETRAINED / NAME
    """Where the ensemble is packed."""


def notes(run: Path, commands: tuple[str, ...]) -> str:
    """Return what the card says of images, training and results."""
    rows = {row["name"]: row for row in read_json(run / "results.json")}
    ensemble, environment = rows["ensemble"], read_json(run / "env.json")[-1]
    single = [row for name, row in rows.items() if name.startswith("member")]
    mean = {field: sum(row[field] for row in single) / len(single) for field in ("accuracy", "calibrated_nll")}
    typed = "\n".join(f"python -m {command.format(run='R')}" for command in commands)
    return (
        "## Data\n\nFashion-MNIST (Xiao et al., arXiv 1708.07747; MIT licence): grey pictures of one article of "
        "clothing each, white on black, 28×28 pixels. 50,000 trained the members, 10,000 of the training images fitted "
        "the temperature, the 10,000 test images were read by the evaluation alone. Photographs, or dark clothes on "
        "white, are other pictures: invert them, and do not trust the probabilities.\n\n"
        "## Results\n\nOn the test images:\n\n"
        "| | accuracy, % | calibrated NLL | ECE |\n|:--|--:|--:|--:|\n"
        f"| ensemble of {len(single)} | {100 * ensemble['accuracy']:.2f} | {ensemble['calibrated_nll']:.4f} | "
        f"{ensemble['ece15']:.4f} |\n"
        f"| one member, mean | {100 * mean['accuracy']:.2f} | {mean['calibrated_nll']:.4f} | |\n\n"
        f"Found and trained by\n\n```sh\n{typed}\n```\n\n{machine(environment, hardware='no GPU')} "
        f"Revision {environment['git_revision']}, {environment['time'][:10]}. The cells are by the star alone, around "
        "a residual block, at λ of at most 0.3: no search has looked at images."
    )


def main(argv: list[str]) -> None:
    """Run the script."""
    options = parse(Options, argv, prog=PROG, description=__doc__ or "", default=Options())
    run = options.run_dir
    for command, done in zip(COMMANDS, ("genotypes.json", "ensemble.json", "results.json"), strict=True):
        if not (run / done).exists():
            words = shlex.split(command.format(run=shlex.quote(str(run))))
            goes_on = ["--resume"] if (run / "config.json").exists() and done != "results.json" else []
            subprocess.run([sys.executable, "-m", *words, *goes_on], check=True)
    found = de.load(run)
    if (options.output / MANIFEST).exists():
        # Of another one.
        shutil.rmtree(options.output)
    found.save(options.output, notes=notes(run, COMMANDS))
    card = options.output / CARD
    # Whoever reads it there has it by its name.
    card.write_text(card.read_text().replace("FOLDER", NAME))
    shutil.copy(run / "genotypes.json", options.output)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    require(size <= MOST_BYTES, f"{options.output} takes {size:,} bytes.", f"Pack less than {MOST_BYTES:,}.")
    print(f"wrote {options.output}: {size:,} bytes")


if __name__ == "__main__":
    run_script(main)
