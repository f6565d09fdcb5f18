"""Tables, where figures come from, and the files of results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.run.files import with_ending
from studies.comparisons import compare_pairs, how_to_read
from studies.predictors import losses

if TYPE_CHECKING:
    from dnas_ens.run.folder import RunFolder
    from studies.bench import Bench


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, num_text_columns: int = 1) -> str:
    """Return a Markdown table.

    Args:
        header: Column names.
        rows: As many cells each.
        num_text_columns: How many columns, the first and then the last ones, are set to the left.
    """
    rule = "|:--" + "|--:" * (len(header) - num_text_columns) + "|:--" * (num_text_columns - 1) + "|"
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def provenance(env: Mapping[str, Any], *, hardware: str) -> str:
    """Return command, hardware, versions, revision and date as Markdown.

    Args:
        env: From `dnas_ens.run.machine.environment`.
        hardware: What was used beside the CPU, such as "no GPU, one thread".
    """
    versions = ", ".join(f"{name} {env['packages'][name]}" for name in ("torch", "numpy", "scipy"))
    return (
        f"Command: `{shlex.join(env['command'])}`\n\n"
        f"Hardware: {env['cpu']}, {env['num_cpus']} cores, {hardware}. Versions: {versions}. "
        f"Revision: {env['git_revision']}. Date: {env['time']}."
    )


def write_results(path: Path, markdown: str, records: Iterable[Mapping[str, Any]] | None = None) -> None:
    """Write OUTPUT.md and, a line a record, OUTPUT.jsonl.

    Args:
        path: Output without suffix.
        markdown: The whole text.
        records: None where the study appends to its .jsonl as it goes.
    """
    from dnas_ens.run.files import write_atomic

    write_atomic(with_ending(path, ".md"), markdown.encode())
    if records is not None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomic(with_ending(path, ".jsonl"), lines.encode())


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return mean ± standard deviation over seeds of every row on test as Markdown."""
    from dnas_ens.metrics.significance import mean_and_deviation

    #: Factor and decimals of a column.
    columns = {
        "accuracy": ("accuracy %", 100.0, 2),
        "nll": ("NLL", 1.0, 4),
        "calibrated_nll": ("calibrated NLL", 1.0, 4),
        "temperature": ("T", 1.0, 2),
        "cpu_seconds": ("CPU seconds", 1.0, 1),
    }
    rows = [
        [
            row["name"],
            *(
                mean_and_deviation(
                    [factor * record["rows"][index][column] for record in records], digits=digits
                )
                for column, (_, factor, digits) in columns.items()
            ),
        ]
        for index, row in enumerate(records[0]["rows"])
    ]
    return markdown_table(["", *(heading for heading, _, _ in columns.values())], rows)


def comparisons(run: RunFolder, records: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> str:
    """Say in one sentence for each pair of rows how their calibrated NLL on test differs."""
    names = [row["name"] for row in records[0]["rows"]]
    by_seed = [losses(run.file(f"seed-{record['seed']}"), names) for record in records]
    found = compare_pairs({name: np.stack([seed[name] for seed in by_seed]) for name in names}, pairs)
    lines = [
        f"- {difference.sentence(f'*{first}*', f'*{second}*')}\n"
        for (first, second), difference in found.items()
    ]
    seeds = f"{len(records)} seed{'s' if len(records) > 1 else ''}"
    return f"Over {seeds}. {how_to_read(len(found))}\n\n{''.join(lines)}"


def write_report(
    study: str,
    run: RunFolder,
    bench: Bench,
    records: Sequence[dict[str, Any]],
    *,
    title: str,
    body: str,
    waiting: str,
) -> None:
    """Write OUTPUT.md with all that is needed to repeat it, and OUTPUT.jsonl, a line a seed.

    Args:
        study: The study's name.
        run: Its run folder.
        bench: Data and options.
        records: A record a seed.
        title: The heading.
        body: Tables and sentences.
        waiting: What is said where options are not at their defaults: the run that waits for a GPU.
    """
    from dnas_ens.run.files import read_json

    options, data = bench.options, bench.data
    sittings = run.read_json("env.json")
    env = sittings[-1]
    hardware = env["cuda_device"] or "no GPU" if bench.device.type == "cuda" else "no GPU used"
    trained = next(run.path.glob("seed-0/*/training.json"))
    parameters = read_json(trained)["parameters"]
    header = (
        f"# {title}: {data.name}, {options.model}\n\n"
        f"{provenance(env, hardware=hardware)} "
        f"Seeds {', '.join(str(record['seed']) for record in records)}, from each of which initialisation, order and "
        "augmentation of every training have seeds of their own; split seed 0.\n\n"
        f"**Scale that was run: {options.model} ({parameters:,} parameters), {data.name}, {len(data.train)} training, "
        f"{len(data.val)} val and {len(data.test)} test images of {data.image_size} x {data.image_size}, "
        f"{options.epochs} epochs.** SGD in batches of {options.batch_size}, learning rate from "
        f"{options.learning_rate:g}, momentum {options.momentum:g}, weight decay {options.weight_decay:g}, "
        f"{'with' if options.augment else 'without'} augmentation.\n\n"
    )
    if not options.is_published:
        header += f"This is **not** the published scale. {waiting}\n\n"
    path = options.path(study)
    write_results(path, header + body, records)
    print(f"{header}{body}\nwrote {path}.md, .png and .jsonl")
