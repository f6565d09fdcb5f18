"""Command: ``python -m dnas_ens.report R``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from dnas_ens.commands.parse import parse
from dnas_ens.report import write_report

PROG = "python -m dnas_ens.report"


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Options of the command."""

    run_dir: Positional[Path]
    """Run folder, evaluated or not."""


def main(argv: list[str]) -> None:
    """Run the command."""
    command = parse(
        ReportCommand,
        argv,
        prog=PROG,
        description="Write report.html and figures/ of a run folder again, from the files that lie in it.",
        default=ReportCommand(run_dir=tyro.MISSING),
    )
    print(f"report: {write_report(command.run_dir)}")
