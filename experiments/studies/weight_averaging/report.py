"""What the seeds of a model say together: OUTPUT.md with its tables and sentences, and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.compare.records import Records
from dnas_ens.compare.report import (
    Column,
    compare_pairs,
    how_to_read,
    losses_over_seeds,
    markdown_table,
    provenance,
)
from studies.weight_averaging.study import CELL, SCHEDULES, Problem, Study, Task
from studies.weight_averaging.trainings import ACROSS, EQUAL, EXPONENTIAL, KINDS, LAST, LINEAR, PAIRS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dnas_ens.metrics.significance import PairedDifference

#: To which a calibrated NLL is given.
DECIMALS = 4
COLUMNS = {
    "accuracy": Column("accuracy %", factor=100, digits=2),
    "nll": Column("NLL"),
    "calibrated_nll": Column("calibrated NLL"),
    "val_nll": Column("val NLL"),
}
#: A method under a schedule.
Entry = tuple[str, str]
Pair = tuple[Entry, Entry]


class Group:
    """The finished seeds of one model under both schedules.

    Args:
        store: All records, with predictions.
        model: The model.
    """

    def __init__(self, store: Records, model: str) -> None:
        self.model = model
        self.seeds = sorted(
            seed
            for seed in {record["seed"] for record in store}
            if all(Task(model, schedule, seed) in store for schedule in SCHEDULES)
        )
        self.records = {schedule: [store[Task(model, schedule, seed)] for seed in self.seeds] for schedule in SCHEDULES}
        self.methods = list(self.records[SCHEDULES[0]][0]["rows"]) if self.seeds else []
        #: The calibrated NLL of every method on each test input, (S, N).
        losses: dict[Entry, np.ndarray] = {}
        for schedule in SCHEDULES if self.seeds else ():
            tasks = [Task(model, schedule, seed) for seed in self.seeds]
            losses |= {(schedule, name): of for name, of in losses_over_seeds(store, tasks).items()}
        self.differences = compare_pairs(losses, self._pairs()) if self.seeds else {}

    def _pairs(self) -> Iterator[Pair]:
        """Yield what is compared: every method with the last model, `PAIRS`, and `ACROSS` schedules."""
        constant, cosine = SCHEDULES
        for schedule in SCHEDULES:
            yield from (((schedule, method), (schedule, LAST)) for method in self.methods if method != LAST)
            yield from (((schedule, first), (schedule, second)) for first, second in PAIRS)
        yield from (((constant, method), (cosine, LAST)) for method in ACROSS)

    def rows(self, schedule: str, method: str) -> list[dict[str, Any]]:
        """Return a method's rows, a seed each."""
        return [record["rows"][method] for record in self.records[schedule]]

    def to_last(self, schedule: str, method: str) -> PairedDifference:
        """Return how a method compares with the last model of its schedule."""
        return self.differences[(schedule, method), (schedule, LAST)]


def groups_of(study: Study, store: Records) -> list[Group]:
    """Return the models of which seeds are finished, those of the options first."""
    models = dict.fromkeys([*study.models, *sorted(record["model"] for record in store)])
    return [group for model in models if (group := Group(store, model)).seeds]


def report(study: Study, problem: Problem, groups: Sequence[Group], env: Mapping[str, Any]) -> tuple[str, str]:
    """Return what OUTPUT.md begins with, and its tables."""
    recipe, (train_size, val_size, test_size) = study.recipe, problem.sizes
    seeds = "; ".join(f"{group.model} {', '.join(map(str, group.seeds))}" for group in groups)
    cells = "a given genotype" if study.genotypes else "a random genotype (seed 0)"
    header = (
        f"# Averages of the weights of the last models of a training: {Path(study.data).name}\n\n"
        f"{provenance(env, hardware='no GPU, one thread')} Seeds of initialisation, order and augmentation, "
        f"each from its own stream: {seeds}; split seed 0, the same for all, so "
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
        + (
            f"Cells: {cells}, {recipe.num_cells} cells, C={recipe.channels}. "
            if any(group.model == CELL for group in groups)
            else ""
        )
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
    return header, "\n".join(section(group) for group in groups)


def table(group: Group, schedule: str) -> str:
    """Return every method of a schedule as Markdown."""
    lines = []
    for method in group.methods:
        rows = group.rows(schedule, method)
        counts = [row["num_averaged"] for row in rows]
        cells = [
            method,
            "" if None in counts else ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1])),
            *(column.cell(row[name] for row in rows) for name, column in COLUMNS.items()),
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
    header = (
        "method",
        "models, a seed",
        *(column.heading for column in COLUMNS.values()),
        "passes",
        "CPU s training",
        "CPU s after it",
        "calibrated NLL minus last model's",
        "verdict",
    )
    return markdown_table(header, lines, text_columns=(0, -2, -1))


def comparisons(group: Group) -> str:
    """Return one sentence for each comparison of `PAIRS` and `ACROSS` as a Markdown list."""
    sentences = [
        f"{schedule}: " + group.differences[(schedule, first), (schedule, second)].sentence(f"*{first}*", f"*{second}*")
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
    """Say in one sentence how all methods compare with the last model."""
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
    parts = [f"## {group.model}, {group.records[SCHEDULES[0]][0]['parameters']:,} parameters\n"]
    for schedule in SCHEDULES:
        oldest, branch = (
            Column("").cell(record["curves"][name] for record in group.records[schedule])
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


def plot(groups: Sequence[Group], path: Path) -> None:
    """Draw a row a model: val NLL over i under both schedules, and every method's difference on test."""
    from dnas_ens.figures.style import font, new_figure

    height = 70 + 290 * len(groups)
    figure = new_figure(960, height)
    # Unlike tight_layout it lets columns differ in the room their labels take.
    figure.set_layout_engine("constrained", rect=(0, 50 / height, 1, 1 - 56 / height), wspace=0.04, hspace=0.06)
    axes = figure.subplots(len(groups), 3, squeeze=False, width_ratios=(1, 1, 1.1))
    for row, group in zip(axes, groups, strict=True):
        row[1].sharey(row[0])
        row[1].tick_params(labelleft=False)
        for axis, schedule in zip(row, SCHEDULES, strict=False):
            _plot_curves(axis, group, schedule)
        _plot_differences(row[2], group)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=3, frameon=False, prop=font(9))
    handles, labels = axes[0, 2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", ncols=1, frameon=False, prop=font(9))
    figure.savefig(path, dpi=110)


def _plot_curves(axis: Axes, group: Group, schedule: str) -> None:
    """Draw val NLL over i minus that of the same training's last model: mean and standard deviation over seeds."""
    from matplotlib.ticker import MaxNLocator

    from dnas_ens.figures.style import BLUE, GREEN, MUTED_COLOUR, PURPLE, VERMILION
    from studies.plotting import panel

    lines = {
        "single": ("model i from the end, alone", MUTED_COLOUR, "-"),
        "equal": ("equal average of the last i", BLUE, "-"),
        "linear": ("linearly decaying average", VERMILION, (0, (6, 2))),
        "exponential": ("exponentially decaying average", GREEN, (0, (2, 1.5))),
        "ensemble": ("ensemble of the last i (predictions averaged)", PURPLE, (0, (8, 2, 2, 2))),
    }
    records = group.records[schedule]
    for name, (label, colour, style) in lines.items():
        values = np.array([record["curves"][f"{name}_nll"] for record in records])
        # A seed's own level would hide what averaging does to it.
        values -= np.array([record["curves"]["single_nll"][:1] for record in records])
        models, mean, spread = np.arange(1, values.shape[1] + 1), values.mean(axis=0), values.std(axis=0)
        axis.fill_between(models, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axis.plot(models, mean, color=colour, linestyle=style, linewidth=1.8, label=label)
    level = statistics.fmean(record["curves"]["single_nll"][0] for record in records)
    constant = schedule == SCHEDULES[0]
    panel(
        axis,
        f"{group.model}, {'constant rate' if constant else 'cosine to 0'}\nlast model {level:.3f} nats",
        x_label="i, models from the end of the training",
        y_label="val NLL minus the last model's, nats" if constant else "",
    )
    axis.set_xlim(1, None)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, prune="lower"))


def _plot_differences(axis: Axes, group: Group) -> None:
    """Draw each method's calibrated NLL on test minus the last model's, with both intervals."""
    from dnas_ens.figures.style import BLUE, MUTED_COLOUR, TEXT_COLOUR, VERMILION, font
    from studies.plotting import panel

    methods = [method for method in group.methods if method != LAST]
    ends = []
    for schedule, colour, offset in zip(SCHEDULES, (BLUE, VERMILION), (-0.17, 0.17), strict=True):
        for position, method in enumerate(methods):
            found = group.to_last(schedule, method)
            label = schedule if position == 0 else None
            axis.plot(found.mean, position + offset, "o", color=colour, markersize=4.5, label=label)
            axis.plot(found.over_images, [position + offset] * 2, color=colour, linewidth=3, alpha=0.55)
            axis.plot(found.over_seeds, [position + offset] * 2, color=colour, linewidth=0.9)
            ends += [*found.over_images, found.mean]
    axis.axvline(0, color=MUTED_COLOUR, linewidth=1, linestyle="--")
    panel(
        axis,
        f"{group.model}, 95 % intervals\nthick: test points, thin: seeds",
        x_label="test: calibrated NLL minus last model's",
    )
    # An interval over few seeds may be far wider than anything else in the panel.
    margin = 0.35 * (max(ends) - min(ends)) + 1e-6
    axis.set_xlim(min(ends) - margin, max(ends) + margin)
    axis.locator_params(axis="x", nbins=5)
    axis.set_yticks(range(len(methods)), methods, fontproperties=font(8), color=TEXT_COLOUR)
    axis.invert_yaxis()
