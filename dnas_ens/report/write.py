"""Writing a report: the page, its figures as SVG and PNG files, and the same as TensorBoard images."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from dnas_ens.figures.style import to_svg
from dnas_ens.report.build import build_report
from dnas_ens.report.page import render
from dnas_ens.report.parts import Picture
from dnas_ens.report.run_files import RunFiles
from dnas_ens.run.files import unwritable, write_atomic
from dnas_ens.run.metrics_log import MetricsLog

PIXELS_PER_INCH = 160
PHASE = "report"


def write(folder: Path) -> Path:
    """Write report.html, figures/ and the TensorBoard images of a run folder; see `dnas_ens.report.write_report`."""
    with warnings.catch_warnings():
        # Names may hold letters that the house font lacks; in the page the reader's own fonts have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return _write(folder)


def _write(folder: Path) -> Path:
    report = build_report(RunFiles.load(folder))
    page = render(report)
    # The search has drawn the cells already, into cells/ and TensorBoard.
    pictures = [picture for picture in report.pictures if picture.shape != "cells"]
    for picture in pictures:
        _write_files(picture, folder / "figures")
    _write_tensorboard(pictures, folder)
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _write_files(picture: Picture, folder: Path) -> None:
    write_atomic(folder / f"{picture.name}.svg", to_svg(picture.figure, title=picture.title).encode())
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH, metadata={"Software": None})
    write_atomic(folder / f"{picture.name}.png", buffer.getvalue())


def _write_tensorboard(pictures: Sequence[Picture], folder: Path) -> None:
    """Replace the images of an earlier report."""
    log = MetricsLog(folder)
    try:
        if (log.tensorboard / PHASE).is_dir():
            shutil.rmtree(log.tensorboard / PHASE)
        for picture in pictures:
            log.add_figure(picture.name, picture.figure, step=0, phase=PHASE)
    except OSError as error:
        raise unwritable(log.tensorboard / PHASE, error) from error
    finally:
        log.close()
