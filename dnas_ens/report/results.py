"""The section with the results: every row with its intervals, and whether the ensemble beats its best member."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from dnas_ens.metrics.calibration import tempered
from dnas_ens.metrics.scores import per_image_nll
from dnas_ens.metrics.significance import CONFIDENCE, PairedDifference
from dnas_ens.report.parts import NARROW, Section, interval, minus_signs, table
from dnas_ens.report.run_files import RunFiles
from dnas_ens.types import FloatArray

#: Resamples for the intervals of the table: a fifth of a test's, since a page should take seconds.
NUM_RESAMPLES = 2_000
GLYPH_WIDTH, GLYPH_HEIGHT, GLYPH_MARGIN = 128.0, 14.0, 5.0

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the results with its intervals over test images; NaN where resampling is impossible.

    Args:
        values: The stored figures.
        role: "member", "best", "average" or "ensemble".
        losses: Calibrated NLL of each test image in nats, (N,).
        accuracy_interval: Of the accuracy, in [0, 1].
        calibrated_nll_interval: Of the calibrated NLL, in nats.
    """

    values: Mapping[str, Any]
    role: str
    losses: FloatArray
    accuracy_interval: Interval
    calibrated_nll_interval: Interval


def rows_with_intervals(files: RunFiles) -> list[Row]:
    """Give every row of the results a percentile bootstrap over test images.

    All rows are resampled together, with the same images; the temperature stays as it was fitted.

    Args:
        files: Of a run with predictions, its rows as ``result_rows`` returns them.
    """
    rows, predictions = files.rows, files.predictions
    assert predictions is not None
    labels, members = predictions.test_labels, files.num_members
    probs = [np.asarray(each, dtype=np.float64) for each in predictions.test_probs]
    probs.append(files.averaged)
    temperatures = [rows[index]["temperature"] for index in (*range(members), -1)]
    losses = np.stack(
        [
            per_image_nll.of(tempered(each, temperature), labels)
            for each, temperature in zip(probs, temperatures, strict=True)
        ]
    )
    correct = np.stack([(each.argmax(axis=1) == labels).astype(np.float64) for each in probs])

    def arranged(values: FloatArray) -> FloatArray:
        """Bring values of members and ensemble, (M+1, N), into the order of the rows."""
        return np.concatenate([values[:-1], values[files.best][None], values[:-1].mean(axis=0)[None], values[-1][None]])

    losses, correct = arranged(losses), arranged(correct)
    loss_intervals, correct_intervals = _intervals(losses), _intervals(correct)
    roles = ["member"] * members + ["best", "average", "ensemble"]
    return [
        Row(
            values=row,
            role=role,
            losses=losses[index],
            accuracy_interval=correct_intervals[index],
            calibrated_nll_interval=loss_intervals[index],
        )
        for index, (row, role) in enumerate(zip(rows, roles, strict=True))
    ]


def _intervals(values: FloatArray) -> list[Interval]:
    """Return the interval of the mean of each row of (R, N); NaN for a row that does not vary."""
    if values.shape[1] < 2:
        return [(math.nan, math.nan)] * len(values)
    found = bootstrap(
        (values,),
        np.mean,
        axis=1,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, 10_000_000 // values.size),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [
        (float(low), float(high)) if low < high else (math.nan, math.nan)
        for low, high in np.column_stack([found.low, found.high])
    ]


def results_section(files: RunFiles, rows: Sequence[Row], difference: PairedDifference | None) -> Section | None:
    """Every row's figures, and the ensemble against its best member."""
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
        f"On {len(predictions.test_labels):,} test images. Below each figure is its 95{NARROW}% interval: a "
        "percentile bootstrap over test images. It covers the luck of which images were drawn, <em>not</em> that of "
        f"the search, of the training or of the temperature, which would take several runs to tell. {undefined}"
        "Calibrated NLL is the negative log-likelihood after one temperature T, fitted after averaging on the "
        f"{len(predictions.val_labels):,} validation images; lower is better, and so it is for NLL, Brier score and "
        f"ECE (15 bins).{chosen}"
    )
    tested = ""
    if difference is not None:
        best = f"its best single member, number {files.best},"
        sentence = difference.sentence("The ensemble", best)
        tested = (
            f'<p class="note">In calibrated NLL: {escape(minus_signs(sentence))} The figures in '
            "brackets are the mean difference in nats, its interval, the effect size d and the p-value of a paired "
            "permutation test.</p>\n"
        )
    return Section(
        name="results",
        title="Results",
        text=results_table(shown) + f'<p class="note">{notes}</p>\n' + tested,
    )


def results_table(rows: Sequence[Row]) -> str:
    """Return the table of members, best single, average and ensemble, with intervals."""
    ends = [end for row in rows for end in row.calibrated_nll_interval if not math.isnan(end)]
    values = [float(row.values["calibrated_nll"]) for row in rows]
    scale = (min([*ends, *values]), max([*ends, *values]))
    headings = (
        "",
        "accuracy, %",
        "calibrated NLL, nats",
        f'<span class="scale"><span>{scale[0]:.3f}</span><span>{scale[1]:.3f}</span></span>',
        "NLL",
        "Brier",
        "ECE",
        "T",
        "parameters",
    )
    body = []
    for row in rows:
        found = row.values
        parameters, temperature = found.get("parameters"), found.get("temperature")
        cells = [
            escape(_row_name(row)),
            _with_interval(100 * found["accuracy"], row.accuracy_interval, digits=2, factor=100.0, interval_digits=1),
            _with_interval(found["calibrated_nll"], row.calibrated_nll_interval, digits=4, interval_digits=3),
            _glyph(found["calibrated_nll"], row.calibrated_nll_interval, scale),
            f"{found['nll']:.4f}",
            f"{found['brier']:.4f}",
            f"{found['ece15']:.4f}",
            "" if temperature is None else f"{temperature:.2f}",
            "" if parameters is None else f"{parameters:,}",
        ]
        body.append((row.role, cells))
    return table(headings, body, label="Results on the test images")


def _row_name(row: Row) -> str:
    name = str(row.values["name"])
    member = re.search(r"member \d+", name)
    return f"best single: {member[0]}" if row.role == "best" and member else name


def _with_interval(value: float, ends: Interval, *, digits: int, interval_digits: int, factor: float = 1.0) -> str:
    below = interval(ends, digits=interval_digits, factor=factor)
    return f"{value:.{digits}f}" + (f"<small>{below}</small>" if below else "")


def _glyph(value: float, ends: Interval, scale: tuple[float, float]) -> str:
    """Return a dot with its interval on a scale that all rows share."""
    span = max(scale[1] - scale[0], 1e-12)

    def place(of: float) -> float:
        return GLYPH_MARGIN + (of - scale[0]) / span * (GLYPH_WIDTH - 2 * GLYPH_MARGIN)

    middle = GLYPH_HEIGHT / 2
    said = f"{value:.4f}"
    line = ""
    if not math.isnan(ends[0]):
        said += f", interval {interval(ends, digits=4)}"
        line = f'<line x1="{place(ends[0]):.1f}" x2="{place(ends[1]):.1f}" y1="{middle}" y2="{middle}"/>'
    return (
        f'<svg class="glyph" role="img" aria-label="{said}" width="{GLYPH_WIDTH:.0f}" height="{GLYPH_HEIGHT:.0f}" '
        f'viewBox="0 0 {GLYPH_WIDTH:.0f} {GLYPH_HEIGHT:.0f}">{line}'
        f'<circle cx="{place(value):.1f}" cy="{middle}" r="3.6"/></svg>'
    )
