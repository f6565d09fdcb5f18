"""Command: ``python -m dnas_ens.predict R IMAGE|DIR ...``: what an ensemble says of pictures, and how sure it is."""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from dnas_ens.commands.parse import parse
from dnas_ens.config import require
from dnas_ens.errors import UserError

if TYPE_CHECKING:
    from dnas_ens.ensembles.cascade import Cascade
    from dnas_ens.ensembles.ensemble import Ensemble
    from dnas_ens.ensembles.preprocessing import Preprocessing

PROG = "python -m dnas_ens.predict"
#: Columns that are always there, and their order.
COLUMNS = ("path", "label", "probability", "entropy", "mutual_information", "votes")


@dataclass(frozen=True, kw_only=True)
class PredictCommand:
    """Options of the command."""

    folder: Positional[Path]
    """Run folder whose members are trained, a folder an ensemble was saved in, or fashion-mnist, which comes with the
    package."""
    images: Positional[tuple[Path, ...]]
    """Image files, folders of them with the folders inside, and patterns such as "photos/*.jpg"."""
    output: Path | None = None
    """File for the rows: JSON lines where its name ends in .jsonl, else CSV; default: they are printed as CSV.
    Where the command ends early, the rows so far are in NAME.partial.csv."""
    top_k: int = 1
    """Name so many of the most probable classes, each with its probability."""
    abstain_below: float | None = None
    """Leave the label empty where its probability is below this."""
    coverage: float | None = None
    """Add the set of classes that holds the right one with this probability, such as 0.9, on average over pictures
    like those of val (split conformal prediction). Needs an evaluated run."""
    cascade: bool = False
    """Ask one member after the other until the ensemble is sure, which saves most of the work. Needs an evaluated
    run."""
    cascade_loss: float = 0.0
    """How much of the accuracy on val a cascade may lose."""
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
    from dnas_ens.run.files import json_text
    from dnas_ens.run.machine import resolve_device

    require(command.batch_size > 0, f"--batch-size is {command.batch_size}.", "Give --batch-size 1 or more.")
    require(command.top_k > 0, f"--top-k is {command.top_k}.", "Give --top-k 1 or more.")
    sure_from = command.abstain_below
    require(
        sure_from is None or 0 <= sure_from <= 1,
        f"--abstain-below is {sure_from}.",
        "Give a probability from 0 to 1.",
    )
    require(
        command.output is None or not command.output.is_dir(),
        f"--output {command.output} is a folder.",
        "Give a file in it, such as rows.csv.",
    )
    paths = image_files(command.images)
    ensemble = Ensemble.load(command.folder).to(resolve_device(command.device))
    preprocessing = ensemble.preprocessing
    if preprocessing is None:
        raise UserError(f"{command.folder} does not say how its members want images.", GIVE_PREPROCESSING)
    threshold, cascade = fitted_on_val(command, ensemble)
    predicted = functools.partial(
        ensemble.predict, batch_size=command.batch_size, top_k=command.top_k, threshold=threshold, cascade=cascade
    )
    classified, skipped, abstained, asked = 0, 0, 0, 0
    as_json = command.output is not None and command.output.suffix == ".jsonl"
    began = time.perf_counter()
    bar = tqdm(total=len(paths), desc="predicting", unit="image", disable=None, leave=False)
    with bar, rows_into(command.output) as write:
        for start in range(0, len(paths), command.batch_size):
            chunk = paths[start : start + command.batch_size]
            readable = readable_of(chunk, preprocessing) if command.skip_bad_images else chunk
            rows = predicted(readable) if readable else []
            for row in rows:
                asked += row.get("asked", ensemble.num_members)
                if sure_from is not None and row["probability"] < sure_from:
                    row["label"], abstained = None, abstained + 1
            lines = io.StringIO()
            if as_json:
                lines.writelines(json_text(row) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(lines, columns_of(command), lineterminator="\n")
                if not classified + skipped:
                    writer.writeheader()
                writer.writerows(map(flat, rows))
            write(lines.getvalue(), len(rows))
            classified, skipped = classified + len(rows), skipped + len(chunk) - len(readable)
            bar.update(len(chunk))
    seconds = time.perf_counter() - began
    parts = [f"{classified} images classified by {ensemble.num_members} members"]
    parts += [f"{asked / classified:.2f} of them asked on average"] if cascade is not None and classified else []
    parts += [f"{abstained} without a label"] if sure_from is not None else []
    parts += [f"{skipped} left out"] if skipped else []
    print(f"{', '.join(parts)}; {classified / seconds:.0f} images/s", file=sys.stderr)
    if command.output is not None:
        print(f"wrote {command.output}", file=sys.stderr)


@contextlib.contextmanager
def rows_into(output: Path | None) -> Iterator[Callable[[str, int], None]]:
    """Yield what writes the text of so many rows: to standard output, or to a file that appears when all is written.

    Until then the rows are in NAME.partial.csv beside it, which stays where the block ends early and holds any: an
    hour's rows are not lost, and an earlier file of complete rows is not replaced by fewer.

    Raises:
        UserError: The disk is full or the folder cannot be written; so before any row is written.
    """
    from dnas_ens.run.files import writing

    if output is None:
        yield lambda text, _: print(text, end="")
        return
    partial, num_rows = output.with_name(f"{output.stem}.partial{output.suffix}"), 0
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        # A file's name that is not UTF-8 stays as it is.
        file = partial.open("w", encoding="utf-8", errors="surrogateescape", newline="")

    def write(text: str, rows: int) -> None:
        nonlocal num_rows
        with writing(partial):
            file.write(text)
            file.flush()
        num_rows += rows

    try:
        with file:
            yield write
            with writing(partial):
                os.fsync(file.fileno())
        with writing(output):
            os.replace(partial, output)
    except BaseException:
        if num_rows:
            told = f"ended early: the first {num_rows} rows are in {partial}, which the next run replaces"
            print(told, file=sys.stderr)
        else:
            partial.unlink(missing_ok=True)
        raise


def fitted_on_val(command: PredictCommand, ensemble: Ensemble) -> tuple[float | None, Cascade | None]:
    """Fit what the options need on the stored predictions of val: the threshold of sets, and the cascade."""
    if command.coverage is None and not command.cascade:
        return None, None
    from dnas_ens.ensembles.cascade import fit_cascade
    from dnas_ens.ensembles.storage import ensemble_folder
    from dnas_ens.evaluate.run import stored_predictions
    from dnas_ens.metrics.calibration import tempered
    from dnas_ens.metrics.conformal import conformal_threshold

    require(
        ensemble_folder(command.folder) == command.folder,
        f"{command.folder} comes without the predictions of val that --coverage and --cascade are fitted on.",
        "Leave them out, or name a run folder that was evaluated.",
    )
    found = stored_predictions(command.folder)
    require(
        len(found.val_probs) == ensemble.num_members,
        f"{command.folder} was evaluated with {len(found.val_probs)} members and has {ensemble.num_members}.",
        f"Evaluate it again: python -m dnas_ens.evaluate {shlex.quote(str(command.folder))}",
    )
    threshold = cascade = None
    if command.cascade:
        cascade = fit_cascade(
            found.val_probs, found.val_labels, weights=found.weights, accuracy_loss=command.cascade_loss
        )
    if command.coverage is not None:
        probs, _ = ensemble.averaged(found.val_probs, cascade)
        threshold = conformal_threshold(
            tempered(probs, float(ensemble.temperature)), found.val_labels, command.coverage
        )
    return threshold, cascade


def columns_of(command: PredictCommand) -> list[str]:
    """Return the columns of the CSV."""
    names = list(COLUMNS)
    for place in range(2, command.top_k + 1):
        names += [f"label_{place}", f"probability_{place}"]
    return names + ["set"] * (command.coverage is not None) + ["asked"] * command.cascade


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the CSV has it: numbers to six digits, the classes of a set divided by "|"."""
    found = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
    for place, (name, probability) in enumerate(found.pop("top", [])[1:], start=2):
        found |= {f"label_{place}": name, f"probability_{place}": f"{probability:.6g}"}
    if "set" in found:
        found["set"] = "|".join(found["set"])
    return found


def _matching(given: Iterable[Path]) -> Iterable[Path]:
    """Yield paths, and of patterns, which not every shell replaces, what they match."""
    for path in given:
        matches = [] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        yield from map(Path, matches) if matches else (path,)


def image_files(given: Sequence[Path]) -> list[Path]:
    """Return the files that are given and those in folders that are, in this order.

    Raises:
        UserError: Nothing was given, something does not exist, or a folder holds no images.
    """
    from dnas_ens.data.folder import IMAGE_EXTENSIONS, list_images

    require(bool(given), "No image was given.", "Name image files, or a folder of them.")
    found: list[Path] = []
    for path in _matching(given):
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
    from dnas_ens.data.images import in_threads

    def fault(path: Path) -> str | None:
        """Why a file cannot be read."""
        try:
            preprocessing.read(path)
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
