"""Command: ``python -m dnas_ens.compare R ...``."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from dnas_ens.commands.options import print_next
from dnas_ens.commands.parse import parse
from dnas_ens.compare.methods import METHODS, Budget
from dnas_ens.config import require
from dnas_ens.config.settings import Engine

PROG = "python -m dnas_ens.compare"
DESCRIPTION = """\
Compare a searched ensemble with the alternatives, for as many members and for the same total cost.

Trains the chosen methods with the recipe of the run and seeds of their own, predicts val and test, and reports both
budgets. Equal number of members: one table with the cost of each, and what the difference to ours is worth (paired by
seed and test image, Holm-corrected). Equal total cost: the frontier, calibrated NLL against total training cost, where
each method splits its budget between members and epochs as is best on val, as a figure and as a table at our own cost.
Our cost does not pay for a deep ensemble of the best found cell, for finding it takes our trained members:
--members-grid compares at the cost of larger ensembles of ours. Several run folders are search seeds of one
configuration: figures are then mean ± standard deviation over them.

Cost: about 70 trainings of one member and M + 1 further searches for five members, a quarter of an hour on digits;
another epoch count about 25 trainings of that length, another size N of ours four for each member more. What is
finished is kept, predictions too: run it again after an interruption, or with more methods.
"""


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Options of the command."""

    run_dirs: Positional[tuple[Path, ...]]
    """Run folders whose members are trained, of one configuration, each with a search's and a recipe's own seed."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods to compare with."""
    budget: OmitArgPrefixes[Budget] = field(default_factory=Budget)
    data: str | None = None
    """Where the images of the runs are now, if they have moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 0
    """Members trained side by side on a CPU, each on its share of the cores, as one that is trained alone; 0 for one a
    core."""
    engine: Engine = "local"
    """local, or ray (pip install 'dnas_ens[cluster]'): tasks of the Ray cluster that RAY_ADDRESS names, else of a Ray
    of this machine; --workers then share a machine's threads, or a GPU."""
    plan: bool = False
    """Print how many networks each method trains and what that takes, from a short trial on this device, then stop."""
    price_per_hour: float | None = None
    """What an hour of all machines costs, for the price that --plan prints."""
    output: Path | None = None
    """Where the results go, OUTPUT.md, .csv, .json and .png; default: into the run folder of one, beside several."""

    def __post_init__(self) -> None:
        for name in self.methods:
            require(name in METHODS, f"There is no method {name}.", f"Choose from {', '.join(METHODS)}.")

    @property
    def path(self) -> Path:
        """Where the results go, without ending."""
        if self.output is not None:
            return self.output
        first, *others = self.run_dirs
        names = "-".join(path.name for path in self.run_dirs)
        return first.parent / f"comparison-{names}" if others else first / "comparison"


def main(argv: list[str], *, prog: str = PROG, description: str = DESCRIPTION) -> None:
    """Run the command, by default under its own name."""
    command = parse(CompareCommand, argv, prog=prog, description=description)
    from dnas_ens.compare.run import compare_runs

    require(bool(command.run_dirs), "No run folder was given.", "Name one or more whose members are trained.")
    compare_runs(command, typed=[*prog.split(), *argv])
    run = command.run_dirs[0]
    if command.plan:
        # From any folder.
        places = {
            str(path) for path in (*command.run_dirs, command.output, command.data) if path and Path(path).exists()
        }
        words = [os.path.abspath(word) if word in places else word for word in argv if word != "--plan"]
        print(f"next: {shlex.join([*prog.split(), *words])}")
    elif command.path.parent == run:
        from dnas_ens.report import write_report

        print(f"report: {write_report(run)}")
        print_next(run, "dnas_ens.report")
