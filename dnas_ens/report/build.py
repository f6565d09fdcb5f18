"""From a run folder's content to a report: headline, lead, key figures, and every section that has its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dnas_ens.metrics.scores import ece15
from dnas_ens.metrics.significance import PairedDifference, paired_difference
from dnas_ens.report.architectures import cells_section, steering_section, step_time_section
from dnas_ens.report.budget import budget_section
from dnas_ens.report.members import difference_section
from dnas_ens.report.methods import comparison_section, our_row
from dnas_ens.report.parts import NARROW, Report, count, duration, interval, minus, percent
from dnas_ens.report.predictions import calibration_section, classes_section, selective_section, size_section
from dnas_ens.report.provenance import provenance_section
from dnas_ens.report.results import Row, results_section, rows_with_intervals
from dnas_ens.report.run_files import RunFiles
from dnas_ens.report.shift import shift_section

_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]


def build_report(files: RunFiles) -> Report:
    """Make the report of a run from its files."""
    rows: list[Row] = []
    difference = None
    if files.predictions is not None:
        rows = rows_with_intervals(files)
        if files.num_members > 1 and len(rows[-1].losses) > 1:
            difference = paired_difference(rows[-1].losses, _best(rows).losses)
    found = [
        results_section(files, rows, difference),
        classes_section(files),
        comparison_section(files),
        budget_section(files),
        cells_section(files),
        steering_section(files),
        step_time_section(files),
        calibration_section(files),
        size_section(files),
        difference_section(files),
        selective_section(files),
        shift_section(files),
        provenance_section(files),
    ]
    return Report(
        subject=f"{files.folder.resolve().name} · {files.data_name}",
        headline=_headline(files, rows),
        lead=_lead(files, rows, difference),
        figures=_key_figures(files, rows),
        sections=[section for section in found if section is not None],
    )


def _best(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.role == "best")


def _headline(files: RunFiles, rows: Sequence[Row]) -> str:
    if rows:
        accuracy, num_images = rows[-1].values["accuracy"], len(rows[-1].losses)
        noun = "image" if num_images == 1 else "images"
        right = f"{percent(accuracy)} of {num_images:,} test {noun} of {files.data_name} right"
        if files.num_members == 1:
            return f"One network classifies {right}."
        genotypes = {genotype.canonical_hash() for genotype in files.genotypes}
        # Only where the cells of all members are known.
        kind = "different network" if len(genotypes) == files.num_members else "network"
        return f"{count(files.num_members, kind).capitalize()} together classify {right}."
    members = count(files.num_members, "network")
    if files.members:
        return f"{members.capitalize()} trained on {files.data_name}, not evaluated yet."
    if files.found is not None:
        return f"{members.capitalize()} found for {files.data_name}, not trained yet."
    return f"A run on {files.data_name} that has found nothing yet."


def _lead(files: RunFiles, rows: Sequence[Row], difference: PairedDifference | None) -> list[str]:
    said: list[str] = []
    if rows:
        ensemble = rows[-1]
        ends = interval(ensemble.accuracy_interval, digits=1, factor=100.0, unit="%")
        if ends:
            said.append(f"For other images of the same kind the 95{NARROW}% interval is {ends}.")
        said += files.classes.sentences()[1:]  # the first one stands in the section on classes
        whose = "Its" if files.num_members == 1 else "Their"
        assert files.predictions is not None
        error = 100 * ece15.of(files.stated, files.predictions.test_labels)
        said.append(f"{whose} stated probabilities are off by {error:.1f} percentage points on average.")
    if difference is not None:
        said.append(against_best(difference, ours=rows[-1], best=_best(rows)))
    paragraphs, said = [" ".join(said)], []
    if rows and (ours := our_row(files.comparison)) is not None:
        said.append(place_among(files.comparison, ours))
    if (seconds := files.seconds()) is not None:
        search, training, device = seconds
        parameters = rows[-1].values.get("parameters") if rows else None
        size = f", and they hold {parameters:,} parameters" if parameters else ""
        said.append(
            f"Search and training took {duration(search + training)} of {device} time, {duration(search)} of it for "
            f"the search{size}."
        )
    return [paragraph for paragraph in (*paragraphs, " ".join(said)) if paragraph]


def _key_figures(files: RunFiles, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    if not rows:
        return []
    ensemble, several = rows[-1], files.num_members > 1
    best, values = _best(rows).values, ensemble.values
    alone = f"best member {percent(best['accuracy'])}" if several else ""
    alone_nll = f"best member {best['calibrated_nll']:.4f}" if several else "nats"
    figures = [
        ("Accuracy", percent(values["accuracy"]), alone),
        ("Calibrated NLL", f"{values['calibrated_nll']:.4f}", alone_nll),
    ]
    if several:
        of = "of images, mean over pairs of members"
        figures.append(("Disagreement", percent(values["disagreement"]), of))
    if (seconds := files.seconds()) is not None:
        figures.append(("Cost", duration(sum(seconds[:2])), f"of {seconds[2]} time, search included"))
    elif values.get("parameters"):
        figures.append(("Size", f"{values['parameters']:,}", "parameters"))
    return figures


def against_best(difference: PairedDifference, *, ours: Row, best: Row) -> str:
    """Say whether the ensemble beats its best member, as the paired tests on calibrated NLLs have it."""
    if difference.same:
        return "The ensemble predicts the same as its best member."
    losses = [row.values["calibrated_nll"] for row in (ours, best)]
    figures = f"{losses[0]:.4f} against {losses[1]:.4f} nats of calibrated NLL"
    ends = interval(difference.over_images, digits=4)
    mean = minus(f"{difference.mean:+.4f}")
    spread = f"difference {mean}, 95{NARROW}% interval {ends}, p {difference.p_value:.2g} by a permutation test"
    verdict = difference.verdict
    if verdict.startswith("not"):
        return (
            f"Whether they beat the best one of them alone cannot be told from {len(ours.losses):,} images: "
            f"{figures} ({spread})."
        )
    word = verdict.split()[0]
    beyond = " One search and one training tell nothing beyond these networks." if "seed" in verdict else ""
    return f"Together they are {word} than the best one of them alone: {figures} ({spread}).{beyond}"


def place_among(rows: Sequence[Mapping[str, Any]], ours: int) -> str:
    """Say where one method of a comparison, at the position ``ours``, comes out in calibrated NLL."""
    losses = [float(row["calibrated_nll"]) for row in rows]
    rank = sum(loss < losses[ours] for loss in losses)
    best = rows[min(range(len(rows)), key=losses.__getitem__)]
    place = _ORDINALS[rank] if rank < len(_ORDINALS) else f"number {rank + 1}"
    start = f"Of the {len(rows)} rows compared it comes {place} in calibrated NLL"
    if rank == 0:
        return f"{start} ({losses[ours]:.4f})."
    costs = best.get("cpu_seconds"), rows[ours].get("cpu_seconds")
    times = f", for {costs[0] / costs[1]:.1f} times the CPU time" if costs[0] and costs[1] else ""
    return f"{start} ({losses[ours]:.4f}); the lowest is {min(losses):.4f}, of “{best['name']}”{times}."
