"""Commands: ``python -m dnas_ens.evaluate R`` and ``python -m dnas_ens.report R``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from dnas_ens.commands.options import data_of_run, print_next, read_splits
from dnas_ens.commands.parse import parse
from dnas_ens.evaluate.shift import ShiftOptions
from dnas_ens.report import write_report

PROG = "python -m dnas_ens.evaluate"


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Options of the command."""

    run_dir: Positional[Path]
    """Run folder whose members are trained."""
    data: str | None = None
    """Where the images of the run are now, if they have moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    from_predictions: bool = False
    """Recompute the tables from predictions.npz (and with --shift from shift.npz), without images or networks."""
    under_shift: OmitArgPrefixes[ShiftOptions] = field(default_factory=ShiftOptions)


def main(argv: list[str]) -> None:
    """Run the command."""
    command = parse(
        EvaluateCommand,
        argv,
        prog=PROG,
        description="Measure every member, the best single one and the ensemble on the test images.",
    )
    from dnas_ens.evaluate.run import evaluate_folder, stored_predictions, write_results
    from dnas_ens.evaluate.shift import predict_run_shift, stored_shift
    from dnas_ens.evaluate.shift_tables import write_shift
    from dnas_ens.run.folder import RunFolder

    with RunFolder.open(command.run_dir, command=[*PROG.split(), *argv]) as run:
        comparable = run.has_a_network_a_genotype
        if command.from_predictions:
            predictions = stored_predictions(run.path)
            run.write_env()
            write_results(run.path, predictions)
            shifted = ""
            if command.under_shift.shift:
                shifted = write_shift(run.path, stored_shift(run.path, source=predictions.source))
            name = read_splits(run)["name"]
            num_val, num_test = len(predictions.val_labels), len(predictions.test_labels)
        else:
            from dnas_ens.run.machine import resolve_device

            device = resolve_device(command.device)
            data = data_of_run(run, moved_to=command.data)
            run.write_env({"device": str(device), "data": data.describe()})
            evaluate_folder(run.path, data, device=device)
            shifted = ""
            if command.under_shift.shift:
                shifted = write_shift(run.path, predict_run_shift(run, data, command.under_shift, device=device))
            name, num_val, num_test = data.name, len(data.val), len(data.test)
        print(f"{name}, {num_test} test images; temperatures fitted on {num_val} of val")
        print(run.file("results.md").read_text() + shifted, end="")
        print(f"report: {write_report(run.path)}")
        if comparable:
            print_next(run.path, "dnas_ens.compare")


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Options of the report's command."""

    run_dir: Positional[Path]
    """Run folder, evaluated or not."""


def report_main(argv: list[str]) -> None:
    """Run the report's command."""
    command = parse(
        ReportCommand,
        argv,
        prog="python -m dnas_ens.report",
        description="Write report.html and figures/ of a run folder again, from the files in it.",
    )
    print(f"report: {write_report(command.run_dir)}")
