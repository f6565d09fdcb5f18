"""OUTPUT.md with its tables and sentences and all that is needed to repeat it; its picture and records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnas_ens.run.files import with_ending
from studies.comparisons import how_to_read
from studies.report import markdown_table, provenance, write_results
from studies.weight_averaging.figure import plot
from studies.weight_averaging.methods import ACROSS, EQUAL, EXPONENTIAL, KINDS, LAST, LINEAR, PAIRS, SCHEDULES
from studies.weight_averaging.options import CELL, Study, Task
from studies.weight_averaging.problem import Problem
from studies.weight_averaging.records import Group

#: To which a calibrated NLL is given.
DECIMALS = 4


def report(
    study: Study, problem: Problem, records: Mapping[Task, dict[str, Any]], command: Sequence[str]
) -> str:
    """Write OUTPUT.md, .png and .jsonl and return the tables."""
    from dnas_ens.run.machine import environment

    models = dict.fromkeys([*study.models, *(task.model for task in sorted(records))])
    groups = [group for model in models if (group := Group(records, model, study.folder)).seeds]
    env = environment(command)
    recipe, (train_size, val_size, test_size) = study.recipe, problem.sizes
    seeds = "; ".join(f"{group.model} {', '.join(map(str, group.seeds))}" for group in groups)
    cells = "a given genotype" if study.genotypes else f"a random genotype (seed {study.genotype_seed})"
    header = (
        f"# Averages of the weights of the last models of a training: {Path(study.data).name}\n\n"
        f"{provenance(env, hardware='no GPU, one thread')} Seeds of initialisation, order and augmentation, "
        f"each from its own stream: {seeds}; split seed {study.split_seed}, the same for all, so "
        "that intervals over seeds cover the luck of training and not that of the draw of the data.\n\n"
        "**No published table exists for this study.** What the literature expects: SWA generalises better than the "
        "end of a conventional training, when the learning rate stays constant or cycles (arXiv 1803.05407); soups of "
        "models fine-tuned from one pre-trained network beat their best ingredient at the cost of one (arXiv "
        "2203.05482). Both were shown on far larger networks and data than these.\n\n"
        f"Scale: {train_size} training, {val_size} val and {test_size} test inputs; {recipe.epochs} epochs in batches "
        f"of {recipe.batch_size}, SGD with momentum {recipe.momentum:g} and weight decay {recipe.weight_decay:g}; "
        f"the models after the last {study.kept} epochs are kept. Learning rate from {study.learning_rate:g}: "
        f"*constant* falls by half a cosine to {study.averaging_rate:g}, where it stays over the kept epochs; "
        "*cosine* falls to 0 over the whole training. Both are run because a model at the end of a constant rate has "
        "not settled: an average that only makes up for that gains nothing against the cosine's last model, which is "
        "what the comparisons *across schedules* ask. Where models get worse towards the end, an average also gains by "
        "reaching back before that; a single earlier model does so too, hence the comparisons with the *best single "
        "kept model*. "
        + (f"Cells: {cells}, {recipe.num_cells} cells, C={recipe.channels}. " if CELL in models else "")
        + "\n\nBatchNorm statistics are recomputed on training data for every row but the one that says otherwise, "
        f"and for single models too. n, by val NLL, is chosen separately for each rule; the exponential decay is "
        f"{study.decay:g} a model, the EMA's {study.ema_decay:g} a step. SWA takes every kept epoch, so it is the "
        "equal average without a choice of n, and would be a uniform soup of the kept models too. Branches: "
        f"{study.branches} trainings of the kept epochs from one start, which differ in order and augmentation alone "
        "(the paper's soups also vary hyper-parameters). Everything is chosen on val; temperatures are fitted on val; "
        "test was predicted once, after that. Mean ± standard deviation over seeds; NLL in nats. *Passes*: forward "
        "passes a prediction. CPU seconds: training includes the running averages with their pass for BatchNorm and, "
        "for soups and ensembles of branches, the other branches; *after it* is BatchNorm statistics and "
        "choosing on val.\n\n"
    )
    text = "\n".join(section(group) for group in groups)
    write_results(study.results, header + text, [records[task] for task in sorted(records)])
    plot(groups, with_ending(study.results, ".png"))
    return text


def table(group: Group, schedule: str) -> str:
    """Return every method of a schedule as Markdown."""
    from dnas_ens.metrics.significance import mean_and_deviation

    header = (
        "method",
        "models, a seed",
        "accuracy %",
        "NLL",
        "calibrated NLL",
        "val NLL",
        "passes",
        "CPU s training",
        "CPU s after it",
        "calibrated NLL minus last model's",
        "verdict",
    )
    lines = []
    for method in group.methods:
        rows = group.rows(schedule, method)
        counts = [row["num_averaged"] for row in rows]
        cells = [
            method,
            "" if None in counts else ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1])),
            mean_and_deviation([100 * row["accuracy"] for row in rows], digits=2),
            *(
                mean_and_deviation([row[name] for row in rows], digits=DECIMALS)
                for name in ("nll", "calibrated_nll", "val_nll")
            ),
            f"{statistics.fmean(row['passes'] for row in rows):.3g}",
            *(
                f"{statistics.fmean(row[f'{name}_cpu_seconds'] for row in rows):.1f}"
                for name in ("training", "choosing")
            ),
        ]
        if method == LAST:
            lines.append([*cells, "", ""])
        else:
            difference = group.to_last(schedule, method)
            figures = "0" if difference.same else difference.figures(digits=DECIMALS)
            lines.append([*cells, figures, difference.verdict])
    return markdown_table(header, lines, num_text_columns=3)


def comparisons(group: Group) -> str:
    """Return one sentence for each comparison of `PAIRS` and `ACROSS` as a Markdown list."""
    sentences = [
        f"{schedule}: "
        + group.differences[(schedule, first), (schedule, second)].sentence(f"*{first}*", f"*{second}*")
        for schedule in SCHEDULES
        for first, second in PAIRS
    ]
    constant, cosine = SCHEDULES
    sentences += [
        "across schedules: "
        + group.differences[(constant, method), (cosine, LAST)].sentence(
            f"*{method}*, {constant},", f"*{LAST}*, {cosine},"
        )
        for method in ACROSS
    ]
    return "".join(f"- {sentence}\n" for sentence in sentences)


def summary(group: Group, schedule: str) -> str:
    """Say in one sentence how all methods stand to the last model."""
    by_verdict: dict[str, list[str]] = {}
    for method in group.methods:
        if method != LAST:
            verdict = group.to_last(schedule, method).verdict
            by_verdict.setdefault(verdict, []).append(f"*{method}*")
    told = "; ".join(f"**{verdict}**: {', '.join(methods)}" for verdict, methods in by_verdict.items())
    return f"Against the last model of the schedule {schedule}: {told}."


def bounded(group: Group, schedule: str) -> str:
    """Say in how many trainings the best n is the largest there is, so that a larger one may be better still."""
    told = []
    for name, method in zip(KINDS, (EQUAL, LINEAR, EXPONENTIAL), strict=True):
        pairs = zip(group.records[schedule], group.rows(schedule, method), strict=True)
        at_bound = [row["num_averaged"] == len(record["curves"]["single_nll"]) for record, row in pairs]
        told.append(f"{sum(at_bound)} ({name})")
    return f"Of {len(group.seeds)} trainings, n is the largest there is in {', '.join(told)}."


def section(group: Group) -> str:
    """Return everything on one model as Markdown."""
    from dnas_ens.metrics.significance import mean_and_deviation

    parts = [f"## {group.model}, {group.records[SCHEDULES[0]][0]['parameters']:,} parameters\n"]
    for schedule in SCHEDULES:
        oldest, branch = (
            mean_and_deviation(
                [record["curves"][name] for record in group.records[schedule]], digits=DECIMALS
            )
            for name in ("barrier_to_oldest_kept", "barrier_to_branch")
        )
        parts += [
            f"### Schedule {schedule}\n",
            table(group, schedule),
            f"{summary(group, schedule)}\n",
            f"Loss barrier on val, five points on the line: from the last model to the oldest kept {oldest}, to "
            f"another branch's end {branch} nats. {bounded(group, schedule)}\n",
        ]
    parts += [
        f"### Comparisons\n\nSeeds {', '.join(map(str, group.seeds))}. {how_to_read(len(group.differences))}\n",
        comparisons(group),
    ]
    return "\n".join(parts)
