"""Tables, sentences on differences, where figures come from, and the files of a study.

Legend: S seeds, N test images, R rows.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dnas_ens.compare.records import Records
from dnas_ens.run.files import with_ending, write_atomic, write_json

if TYPE_CHECKING:
    from dnas_ens.metrics.significance import PairedDifference

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One predictor of a unit.

    Args:
        name: The row's name.
        val_probs: (N_val, K), on val, as far as possible on images that did not choose it, for the temperature.
        test_probs: (N, K).
        details: What else its record holds: what was chosen, such as weights, and what it cost.
    """

    name: str
    val_probs: np.ndarray
    test_probs: np.ndarray
    details: dict[str, Any]


def measured_rows(
    rows: Sequence[Row], *, val_labels: np.ndarray, test_labels: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Evaluate predictors on test; called once a unit.

    Returns:
        For each its metrics, with the temperature fitted on val, and its details; and the arrays that are kept, from
        which `losses` and all figures can be computed again.
    """
    from dnas_ens.evaluate.tables import single_row

    # The figures are of what is stored.
    val_probs, test_probs = (
        np.stack(probs).astype(np.float32)
        for probs in ([row.val_probs for row in rows], [row.test_probs for row in rows])
    )
    records = [
        {
            **single_row(
                row.name,
                val_probs=val_probs[index],
                val_labels=val_labels,
                test_probs=test_probs[index],
                test_labels=test_labels,
            ),
            **row.details,
        }
        for index, row in enumerate(rows)
    ]
    arrays = {
        "methods": np.array([row.name for row in rows]),
        "val_probs": val_probs,
        "val_labels": val_labels,
        "test_probs": test_probs,
        "test_labels": test_labels,
    }
    return records, arrays


def losses(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the calibrated NLL of every predictor of `measured_rows` on each test image, (N,) in nats, by its name."""
    from dnas_ens.metrics.calibration import per_image_calibrated_nll

    return {
        str(name): per_image_calibrated_nll(val, arrays["val_labels"], test, arrays["test_labels"])
        for name, val, test in zip(arrays["methods"], arrays["val_probs"], arrays["test_probs"], strict=True)
    }


def losses_over_seeds(records: Records, keys: Iterable[Hashable]) -> dict[str, np.ndarray]:
    """Return the losses of every row over units that have the same rows, a seed each, (S, N) in nats."""
    of_seeds = [losses(records.arrays(key)) for key in keys]
    return {name: np.stack([of_seed[name] for of_seed in of_seeds]) for name in of_seeds[0]}


def compare_pairs(
    losses: Mapping[Name, np.ndarray], pairs: Iterable[tuple[Name, Name]]
) -> dict[tuple[Name, Name], PairedDifference]:
    """Compare predictors pair by pair, the p-values of all pairs corrected together by Holm's procedure.

    Args:
        losses: Of every predictor on each test image of each seed, (S, N) in nats.
        pairs: First and second predictor; a pair that comes twice is one comparison.

    Returns:
        First minus second, in the given order.
    """
    from dnas_ens.metrics.significance import holm, paired_difference

    found = {
        (first, second): paired_difference(losses[first], losses[second]) for first, second in dict.fromkeys(pairs)
    }
    corrected = holm([each.p_value for each in found.values()])
    return {
        pair: replace(each, p_value=p_value) for (pair, each), p_value in zip(found.items(), corrected, strict=True)
    }


def how_to_read(num_comparisons: int) -> str:
    """Say how the sentences and verdicts on calibrated NLL were computed."""
    return (
        "Calibrated NLL on test, first minus second, with 95 % intervals: the paired t interval over seeds and the "
        "paired bootstrap over test images of the mean over seeds; d is the mean over the standard deviation of the "
        "images' differences, p that of a paired permutation test over images, corrected for all "
        f"{num_comparisons} comparisons together (Holm). *Better* and *worse* alone need p below 0.05 and an interval "
        "over seeds that leaves out 0."
    )


def pair_sentences(losses: Mapping[str, np.ndarray], pairs: Iterable[tuple[str, str]]) -> str:
    """Say in one sentence for each pair of rows how their calibrated NLL, (S, N) in nats, differs on test."""
    found = compare_pairs(losses, pairs)
    lines = [f"- {difference.sentence(f'*{first}*', f'*{second}*')}\n" for (first, second), difference in found.items()]
    count = len(next(iter(losses.values())))
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    return f"Over {seeds}. {how_to_read(len(found))}\n\n{''.join(lines)}"


@dataclass(frozen=True)
class Column:
    """A column of mean ± standard deviation over seeds: its name, the factor of its values, and decimals."""

    heading: str
    factor: float = 1.0
    digits: int = 4

    def cell(self, values: Iterable[float | None]) -> str:
        """Return mean ± standard deviation of the values that are known; empty without any."""
        from dnas_ens.metrics.significance import mean_and_deviation

        known = [self.factor * value for value in values if value is not None]
        return mean_and_deviation(known, digits=self.digits) if known else ""


def table_over_seeds(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], columns: Mapping[str, Column], *, heading: str = ""
) -> str:
    """Return mean ± standard deviation over seeds of every row, which has a record a seed, as Markdown."""
    return markdown_table(
        [heading, *(column.heading for column in columns.values())],
        [
            [name, *(column.cell(record[field] for record in records) for field, column in columns.items())]
            for name, records in rows.items()
        ],
    )


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Collection[int] = (0,)
) -> str:
    """Return a Markdown table; of the columns those at ``text_columns`` are set to the left, -1 is the last."""
    left = {position % len(header) for position in text_columns}
    rule = "".join("|:--" if position in left else "|--:" for position in range(len(header))) + "|"
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def provenance(env: Mapping[str, Any], *, hardware: str, packages: Sequence[str] = ("torch", "numpy", "scipy")) -> str:
    """Return command, hardware, versions, revision and date as Markdown.

    Args:
        hardware: What was used beside the CPU, such as "no GPU, one thread".
    """
    return (
        f"Command: `{shlex.join(env['command'])}`\n\n{machine(env, hardware=hardware, packages=packages)} "
        f"Revision: {env['git_revision']}. Date: {env['time']}."
    )


def machine(env: Mapping[str, Any], *, hardware: str, packages: Sequence[str] = ("torch", "numpy", "scipy")) -> str:
    """Return hardware and versions; arguments as in `provenance`."""
    versions = ", ".join(f"{name} {env['packages'][name]}" for name in packages)
    return f"Hardware: {env['cpu']}, {env['num_cpus']} cores, {hardware}. Versions: {versions}."


def write_results(
    path: Path,
    markdown: str,
    *,
    records: Iterable[Mapping[str, Any]] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    columns: Sequence[str] = (),
    document: object = None,
) -> None:
    """Write PATH.md and what is given beside it, each file atomically.

    Records become PATH.jsonl, a line each; rows, with these columns, PATH.csv; and a document PATH.json.
    """
    from dnas_ens.evaluate.tables import to_csv

    write_atomic(with_ending(path, ".md"), markdown.encode(errors="backslashreplace"))
    if records is not None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomic(with_ending(path, ".jsonl"), lines.encode())
    if rows is not None:
        write_atomic(with_ending(path, ".csv"), to_csv([dict(row) for row in rows], columns).encode())
    if document is not None:
        write_json(with_ending(path, ".json"), document)
