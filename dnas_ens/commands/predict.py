"""Command: ``python -m dnas_ens.predict R IMAGE|DIR ...``: what an ensemble says of pictures, and how sure it is."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from dnas_ens.commands.parse import parse
from dnas_ens.config import require

if TYPE_CHECKING:
    from dnas_ens.ensembles.preprocessing import Preprocessing

PROG = "python -m dnas_ens.predict"
COLUMNS = ("path", "label", "probability", "entropy", "mutual_information", "votes")
#: Written to six digits.
ROUNDED = ("probability", "entropy", "mutual_information")


@dataclass(frozen=True, kw_only=True)
class PredictCommand:
    """Options of the command."""

    folder: Positional[Path]
    """Run folder whose members are trained, or a folder an ensemble was saved in."""
    images: Positional[tuple[Path, ...]]
    """Image files, and folders of them, with the folders inside."""
    output: Path | None = None
    """CSV file for the rows; default: they are printed as CSV."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_size: int = 256
    """Images in memory at once."""
    skip_bad_images: bool = False
    """Leave out files that cannot be read, naming them, instead of stopping."""


def main(argv: list[str]) -> None:
    """Run the command."""
    command = parse(
        PredictCommand,
        argv,
        prog=PROG,
        description="Classify pictures. A row each: label; its probability, in [0, 1]; entropy of the prediction in "
        "nats, how unsure the ensemble is; mutual information of prediction and member in nats, how much of that is "
        "disagreement; votes, members that find the label most probable.",
    )
    from tqdm import tqdm

    from dnas_ens.ensembles.ensemble import Ensemble
    from dnas_ens.ensembles.preprocessing import GIVE_PREPROCESSING
    from dnas_ens.run.files import write_atomic
    from dnas_ens.run.machine import resolve_device

    require(command.batch_size > 0, f"--batch-size is {command.batch_size}.", "Give --batch-size 1 or more.")
    paths = image_files(command.images)
    ensemble = Ensemble.load(command.folder).to(resolve_device(command.device))
    preprocessing = ensemble.preprocessing
    require(
        preprocessing is not None,
        f"{command.folder} does not say how its members want images.",
        GIVE_PREPROCESSING,
    )
    assert preprocessing is not None
    written, classified, skipped = io.StringIO(), 0, 0
    target = written if command.output is not None else sys.stdout
    writer = csv.DictWriter(target, COLUMNS, lineterminator="\n")
    with tqdm(total=len(paths), desc="predicting", unit="image", disable=None, leave=False) as bar:
        for start in range(0, len(paths), command.batch_size):
            chunk = paths[start : start + command.batch_size]
            readable = readable_of(chunk, preprocessing) if command.skip_bad_images else chunk
            rows = ensemble.predict(readable, batch_size=command.batch_size) if readable else []
            if not classified + skipped:
                writer.writeheader()
            writer.writerows({**row, **{name: f"{row[name]:.6g}" for name in ROUNDED}} for row in rows)
            classified, skipped = classified + len(rows), skipped + len(chunk) - len(readable)
            bar.update(len(chunk))
    left_out = f", {skipped} left out" if skipped else ""
    print(f"{classified} images classified by {ensemble.num_members} members{left_out}", file=sys.stderr)
    if command.output is not None:
        write_atomic(command.output, written.getvalue().encode())
        print(f"wrote {command.output}", file=sys.stderr)


def image_files(given: Sequence[Path]) -> list[Path]:
    """Return the files that are given and those in folders that are, in this order.

    Raises:
        UserError: Nothing was given, something does not exist, or a folder holds no images.
    """
    from dnas_ens.data.folder import IMAGE_EXTENSIONS, list_images

    require(bool(given), "No image was given.", "Name image files, or a folder of them.")
    found: list[Path] = []
    for path in given:
        require(path.exists(), f"{path} does not exist.", "Name image files, or a folder of them.")
        inside = [path]
        if path.is_dir():
            images, others = list_images(path)
            inside = [Path(name) for name in images]
            if others:
                told = f"{len(others)} files in {path} are not known as images, such as {others[0]}"
                print(f"left out: {told}", file=sys.stderr)
        require(bool(inside), f"{path} holds no images.", f"Put images ({', '.join(IMAGE_EXTENSIONS)}) into it.")
        found += inside
    return found


def readable_of(paths: Sequence[Path], preprocessing: Preprocessing) -> list[Path]:
    """Return the files that can be read as the ensemble wants them, naming the others on standard error."""
    from dnas_ens.data.images import in_threads, read_image
    from dnas_ens.errors import UserError

    def fault(path: Path) -> str | None:
        """Why a file cannot be read."""
        try:
            read_image(
                path,
                num_channels=preprocessing.num_channels,
                image_size=preprocessing.image_size,
                deep_bits=preprocessing.deep_bits,
            )
        except UserError as error:
            return error.cause
        return None

    readable = []
    for path, told in zip(paths, in_threads(fault, paths), strict=True):
        if told is None:
            readable.append(path)
        else:
            print(f"left out: {told}", file=sys.stderr)
    return readable
