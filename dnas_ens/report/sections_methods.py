"""Sections that set the run beside others: other methods, corrupted images, images of other data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dnas_ens.evaluate.shift import CIFAR10_C
from dnas_ens.report.figures_methods import (
    draw_corruptions,
    draw_cost,
    draw_each_corruption,
    frontier_of,
    mean_by_severity,
)
from dnas_ens.report.parts import Picture, Section
from dnas_ens.report.run_files import RunFiles
from dnas_ens.report.tables import comparison_table, out_of_distribution_table
from dnas_ens.report.wording import NARROW, count, percent

#: Letters of a method's name beside its point.
MAX_LABEL = 46


def our_row(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Position of this run's own ensemble among compared methods; None where it is not there."""
    return next((index for index, row in enumerate(rows) if str(row["name"]).startswith("ours")), None)


def comparison_section(files: RunFiles) -> Section | None:
    """Other methods on the same test images, and what they cost."""
    rows = files.comparison
    if not rows:
        return None
    ours, pictures = our_row(rows), []
    timed = [index for index, row in enumerate(rows) if row.get("cpu_seconds")]
    if len(timed) > 1:
        costs = np.array([float(rows[index]["cpu_seconds"]) for index in timed])
        losses = np.array([float(rows[index]["calibrated_nll"]) for index in timed])
        unbeaten = {timed[place] for place in frontier_of(costs, losses)}
        figure = draw_cost(
            costs,
            losses,
            labels=[_label(rows[index], index, ours=ours, named=index in unbeaten) for index in timed],
            ours=[index == ours for index in timed],
            intervals=[
                tuple(rows[index]["interval"]) if rows[index].get("interval") else None for index in timed
            ],
        )
        pictures.append(
            Picture(
                name="nll-by-cost",
                title="Calibrated NLL against cost",
                caption="Numbers are those of the table. Down is better, left is cheaper; the line joins the methods "
                "that no cheaper one beats. A cost holds all the training a row needs: the search where its cells "
                "come from it, and networks that were trained and not chosen.",
                description=f"Scatter plot of calibrated NLL against CPU seconds of training for {len(timed)} methods.",
                figure=figure,
                shape="wide",
            )
        )
    notes = "All on the same test images. Bold is the lowest calibrated NLL." + (
        f" Below a figure stands its 95{NARROW}% interval over test images."
        if any(r.get("interval") for r in rows)
        else " One training each: differences well within the intervals above may be luck."
    )
    return Section(
        name="comparison",
        title="Beside other methods",
        text=comparison_table(rows, ours) + f'<p class="note">{notes}</p>\n',
        pictures=pictures,
    )


def _label(row: Mapping[str, Any], index: int, *, ours: int | None, named: bool) -> str:
    """A point's number in the table, with its name where it is one to look at."""
    if index == ours:
        return f"{index + 1} ours"
    name = str(row["name"]).split(" (")[0]
    return (
        f"{index + 1} {name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + '…'}"
        if named
        else str(index + 1)
    )


def shift_section(files: RunFiles) -> Section | None:
    """Corrupted test images, and images of other data."""
    rows, others = files.corruptions, files.out_of_distribution
    if not rows and not others:
        return None
    pictures, text, below = [], "", ""
    if rows:
        kinds = len({row["corruption"] for row in rows})
        text = (
            f"<p>The test images spoilt in {count(kinds, 'way')} at five severities; temperatures stay as they were "
            "fitted on clean validation images.</p>"
        )
        public = [row for row in rows if str(row["corruption"]).startswith(CIFAR10_C)]
        pictures = _corruption_pictures(files, [row for row in rows if row not in public])
        pictures += _corruption_pictures(files, public, suffix="-public", source=" of the public CIFAR-10-C")
    if others:
        said = (
            "Images of other data, mixed with the test images: how well uncertainty tells them apart. AUROC is the "
            "chance that an image of the other data is the less sure one of a pair; 0.5 is guessing, 1 is perfect."
        )
        below = f"<h3>Images of other data</h3>\n<p>{said}</p>\n{out_of_distribution_table(others)}"
    return Section(
        name="shift", title="What if the images change?", text=text, pictures=pictures, below=below
    )


def _corruption_pictures(
    files: RunFiles, rows: Sequence[Mapping[str, Any]], *, suffix: str = "", source: str = ""
) -> list[Picture]:
    """Curves of one family of corruptions; none where it has no rows."""
    if not rows:
        return []
    kinds = len({row["corruption"] for row in rows})
    clean = {
        metric: {
            name: float(row[metric])
            for name in dict.fromkeys(row["row"] for row in rows)
            for row in files.rows
            if str(row["name"]).startswith(name)
        }
        for metric in ("accuracy", "calibrated_nll")
    }
    name = next((row["row"] for row in rows if row["row"] == "ensemble"), rows[0]["row"])
    worst = mean_by_severity(rows, name, "accuracy")
    at = f"{percent(worst[max(worst)])} right at severity {max(worst)}"
    mean = f"Mean over {count(kinds, 'corruption')}{source}."
    pictures = [
        Picture(
            name=f"corruption-accuracy{suffix}",
            title="Accuracy",
            caption=f"{mean} The {escape(name)} gets {at}.",
            description=f"Accuracy against severity of corruption; {name}: {at}.",
            figure=draw_corruptions(rows, "accuracy", y_label="accuracy, %", clean=clean["accuracy"]),
        ),
        Picture(
            name=f"corruption-nll{suffix}",
            title="Calibrated NLL",
            caption=f"{mean} Lower is better.",
            description="Calibrated NLL against severity of corruption, for the same predictors.",
            figure=draw_corruptions(
                rows, "calibrated_nll", y_label="calibrated NLL, nats", clean=clean["calibrated_nll"]
            ),
        ),
    ]
    if kinds > 1:
        pictures.append(
            Picture(
                name=f"corruption-each{suffix}",
                title=f"Accuracy under each corruption{source}",
                caption="Accuracy in % against severity 1 to 5; colours as above.",
                description=f"{kinds} small line charts of accuracy against severity, one a corruption.",
                figure=draw_each_corruption(rows),
                shape="wide",
            )
        )
    return pictures
