"""From a run folder's content to a report: headline, key figures, and every section that has its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dnas_ens.evaluate.classes import ClassFigures
from dnas_ens.evaluate.tables import best_single
from dnas_ens.metrics.significance import PairedDifference, paired_difference
from dnas_ens.report import wording
from dnas_ens.report.measures import Row, rows_with_intervals
from dnas_ens.report.parts import Report, Section
from dnas_ens.report.provenance import provenance_section
from dnas_ens.report.run_files import RunFiles
from dnas_ens.report.sections_architectures import cells_section, steering_section
from dnas_ens.report.sections_methods import comparison_section, our_row, shift_section
from dnas_ens.report.sections_predictions import (
    calibration_section,
    classes_section,
    difference_section,
    selective_section,
    size_section,
)
from dnas_ens.report.tables import results_table
from dnas_ens.report.wording import NARROW


def build_report(files: RunFiles) -> Report:
    """Make the report of a run from its files."""
    rows: list[Row] = []
    difference = None
    if files.predictions is not None:
        rows = rows_with_intervals(files.predictions, files.rows)
        if files.num_members > 1 and len(rows[-1].losses) > 1:
            difference = paired_difference(rows[-1].losses, _best(rows).losses)
    found = [
        _results(files, rows, difference),
        classes_section(files),
        comparison_section(files),
        cells_section(files),
        steering_section(files),
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
        return wording.headline(
            files.num_members,
            different=_all_different(files),
            accuracy=rows[-1].values["accuracy"],
            num_images=len(rows[-1].losses),
            data=files.data_name,
        )
    members = wording.count(files.num_members, "network")
    if files.members:
        return f"{members.capitalize()} trained on {files.data_name}, not evaluated yet."
    if files.found is not None:
        return f"{members.capitalize()} found for {files.data_name}, not trained yet."
    return f"A run on {files.data_name} that has found nothing yet."


def _all_different(files: RunFiles) -> bool:
    """Whether no two members have the same cells; false where it is not known of all."""
    genotypes = files.genotypes
    return len({genotype.canonical_hash() for genotype in genotypes}) == files.num_members


def _lead(files: RunFiles, rows: Sequence[Row], difference: PairedDifference | None) -> list[str]:
    said: list[str] = []
    if rows:
        ensemble = rows[-1]
        ends = wording.interval(ensemble.accuracy_interval, digits=1, factor=100.0, unit="%")
        if ends:
            said.append(f"For other images of the same kind the 95{NARROW}% interval is {ends}.")
        if (predictions := files.predictions) is not None:
            # The first sentence stands in the section on classes.
            said += ClassFigures.of(predictions).sentences()[1:]
        said.append(wording.calibration(ensemble.values["ece15"], num_members=files.num_members))
    if difference is not None:
        said.append(
            wording.against_best(
                difference,
                num_images=len(rows[-1].losses),
                ours=rows[-1].values["calibrated_nll"],
                other=_best(rows).values["calibrated_nll"],
            )
        )
    paragraphs, said = [" ".join(said)], []
    if rows and (ours := our_row(files.comparison)) is not None:
        said.append(wording.place_among(files.comparison, ours))
    if (seconds := files.seconds()) is not None:
        said.append(wording.cost(*seconds, parameters=rows[-1].values.get("parameters") if rows else None))
    return [paragraph for paragraph in (*paragraphs, " ".join(said)) if paragraph]


def _key_figures(files: RunFiles, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    if not rows:
        return []
    ensemble, several = rows[-1], files.num_members > 1
    best = _best(rows).values
    alone = f"best member {100 * best['accuracy']:.1f}{NARROW}%" if several else ""
    alone_nll = f"best member {best['calibrated_nll']:.4f}" if several else ""
    values = ensemble.values
    figures = [
        ("Accuracy", wording.percent(values["accuracy"]), alone),
        ("Calibrated NLL", f"{values['calibrated_nll']:.4f}", alone_nll or "nats"),
    ]
    if several:
        figures.append(
            ("Disagreement", wording.percent(values["disagreement"]), "of images, mean over pairs of members")
        )
    if (seconds := files.seconds()) is not None:
        figures.append(("Cost", wording.duration(sum(seconds[:2])), f"of {seconds[2]} time, search included"))
    elif values.get("parameters"):
        figures.append(("Size", f"{values['parameters']:,}", "parameters"))
    return figures


def _results(files: RunFiles, rows: Sequence[Row], difference: PairedDifference | None) -> Section | None:
    if not rows:
        return None
    predictions = files.predictions
    assert predictions is not None
    shown = rows if files.num_members > 1 else rows[:1]
    undefined, chosen = "", ""
    if any(math.isnan(row.accuracy_interval[0]) for row in shown):
        undefined = "Where every image is right, resampling says nothing and no interval is given. "
    if files.num_members > 1:
        chosen = " The best single member was chosen on validation images."
    notes = (
        f"On {len(predictions.test_labels):,} test images. Below each figure stands its 95{NARROW}% interval: a "
        "percentile bootstrap over test images. It covers the luck of which images were drawn, <em>not</em> that of "
        f"the search, of the training or of the temperature, which would take several runs to tell. {undefined}"
        "Calibrated NLL is the negative log-likelihood after one temperature T, fitted after averaging on the "
        f"{len(predictions.val_labels):,} validation images; lower is better, and so it is for NLL, Brier score and "
        f"ECE (15 bins).{chosen}"
    )
    tested = ""
    if difference is not None:
        best = f"its best single member, number {best_single(predictions)},"
        sentence = difference.sentence("The ensemble", best)
        tested = (
            f'<p class="note">In calibrated NLL: {escape(wording.minus_signs(sentence))} The figures in '
            "brackets are the mean difference in nats, its interval, the effect size d and the p-value of a paired "
            "permutation test.</p>\n"
        )
    return Section(
        name="results",
        title="Results",
        text=results_table(shown) + f'<p class="note">{notes}</p>\n' + tested,
    )
