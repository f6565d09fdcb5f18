"""Is one training in several cycles, all its snapshots combined, better than the same training in one cosine?

    OMP_NUM_THREADS=1 python experiments/snapshot_ensemble.py --data digits --model wrn-10-1 --epochs 100
    python experiments/snapshot_ensemble.py --device cuda

Snapshot ensembles (Huang et al., arXiv 1704.00109): the learning rate follows M cosine cycles, and the model at the
end of each is a member. For every seed one such training, and one of the same model for the same epochs by one cosine.
Rows: the snapshot that is best on val, the last k with equal weights, all with equal weights, all with weights fitted
by log-loss on val (SLSQP), and the one model. Published elsewhere (CIFAR-10, WRN-16-4): single best 92.70 %, equal
weights and optimised weights 92.84 %.

Choices and weights are made on val; the temperature is fitted on val predictions that are cross-fitted in two halves,
so that no image both chose a predictor and calibrates it; test is then predicted once. Cost of the first command: about
a minute of one core for three seeds; of the second (200 epochs, 5 cycles, three seeds, two trainings each) hours on one
GPU. Finished trainings are in the run folder and are not run again. Results: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from studies.plotting import panel
from studies.reference_models import Bench, SeedStudy, StudyOptions, finished, table, train

from dnas_ens.commands.parse import parse
from dnas_ens.compare.records import Record
from dnas_ens.compare.report import Row, markdown_table
from dnas_ens.compare.study import Unit, run_script
from dnas_ens.config import require
from dnas_ens.data.splits import alternating_halves
from dnas_ens.ensembles.selection import greedy_selection
from dnas_ens.ensembles.snapshot import CosineCycles
from dnas_ens.ensembles.weighting import fit_weights
from dnas_ens.figures.style import (
    BLACK,
    BLUE,
    CYCLE,
    MUTED_COLOUR,
    VERMILION,
    font,
    new_figure,
)
from dnas_ens.metrics.scores import accuracy, nll
from dnas_ens.run.progress import CostMeter

PROG = "python experiments/snapshot_ensemble.py"
STUDY = "snapshot-ensemble"
SINGLE = "single best snapshot"
EQUAL = "all snapshots, equal weights"
FITTED = "all snapshots, weights fitted by log-loss"
ONE = "one model, one cosine"
PUBLISHED = {SINGLE: "92.70", EQUAL: "92.84", FITTED: "92.84"}


@dataclass(frozen=True, kw_only=True)
class Study(StudyOptions):
    """Options of the study."""

    cycles: int = 5
    """M, cycles and snapshots."""
    last: int = 3
    """k of the row of the last k snapshots."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.last <= self.cycles <= self.epochs,
            f"The last {self.last} of {self.cycles} cycles in {self.epochs} epochs were asked for.",
            "Give --last at most --cycles, and --cycles at most --epochs.",
        )

    @property
    def last_name(self) -> str:
        """Name of the row of the last k."""
        return f"last {self.last} snapshots, equal weights"


Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]


def rules(study: Study) -> dict[str, Rule]:
    """Return how each row weighs M snapshots and, last, the one model: from (M + 1, N, K) and labels to (M + 1,)."""
    cycles = study.cycles

    def last(count: int) -> Rule:
        weights = np.array([0.0] * (cycles - count) + [1 / count] * count + [0.0])
        return lambda *_: weights

    return {
        SINGLE: lambda probs, labels: np.eye(cycles + 1)[greedy_selection(probs[:cycles], labels, num_members=1)[0]],
        study.last_name: last(study.last),
        EQUAL: last(cycles),
        FITTED: lambda probs, labels: np.append(fit_weights(probs[:cycles], labels).weights, 0.0),
        ONE: lambda *_: np.eye(cycles + 1)[cycles],
    }


def cross_fitted(rule: Rule, probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return val predictions (N, K) in which every image is weighted by what the other half of val chose."""
    predicted = np.empty(probs.shape[1:])
    first, second = alternating_halves(labels)
    for fitted_on, applied_to in ((first, second), (second, first)):
        weights = rule(probs[:, fitted_on], labels[fitted_on])
        predicted[applied_to] = np.tensordot(weights, probs[:, applied_to], axes=1)
    return predicted


def run_one(study: Study, bench: Bench, folder: Path, seed: int) -> Unit:
    """Train both models of a seed, choose on val, evaluate on test."""

    def schedule(cycles: int) -> CosineCycles:
        return CosineCycles(epochs=study.epochs, num_cycles=cycles, initial_learning_rate=study.learning_rate)

    # The same seeds, so that the two differ in the learning rate alone.
    cyclic = train(bench, folder / "cycles", schedule(study.cycles), root=seed, member=0)
    plain = train(bench, folder / "one-cosine", schedule(1), root=seed, member=0)
    states = [*cyclic.states, *plain.states]
    labels = bench.data.val.labels.cpu().numpy()
    val = bench.predict(states, bench.data.val)
    chosen, val_probs, seconds = {}, {}, {}
    for name, rule in rules(study).items():
        cost = CostMeter()
        chosen[name] = rule(val, labels)
        seconds[name] = cost.seconds()["cpu_seconds"] + (plain if name == ONE else cyclic).cpu_seconds
        val_probs[name] = cross_fitted(rule, val, labels)
    test = bench.predict(states, bench.data.test)
    rows = [
        Row(
            name=name,
            val_probs=val_probs[name],
            test_probs=np.tensordot(weights, test, axes=1),
            details={"cpu_seconds": seconds[name], "weights": weights.tolist()},
        )
        for name, weights in chosen.items()
    ]
    snapshots = val[: study.cycles]
    last = [snapshots[-count:].mean(axis=0) for count in range(1, study.cycles + 1)]
    return finished(
        bench,
        seed,
        rows,
        val={
            "single_nll": [nll(probs, labels) for probs in snapshots],
            "single_accuracy": [accuracy(probs, labels) for probs in snapshots],
            "last_nll": [nll(probs, labels) for probs in last],
            "last_accuracy": [accuracy(probs, labels) for probs in last],
            "one_cosine_nll": nll(val[-1], labels),
            "one_cosine_accuracy": accuracy(val[-1], labels),
        },
    )


def published_table(records: Sequence[Record]) -> str:
    """Return the published accuracies beside ours as Markdown."""
    rows = []
    for index, row in enumerate(records[0]["rows"]):
        mean = np.mean([record["rows"][index]["accuracy"] for record in records])
        rows.append([row["name"], PUBLISHED.get(row["name"], ""), f"{100 * mean:.2f}"])
    return markdown_table(["accuracy %", "published: CIFAR-10, WRN-16-4", "ours"], rows)


def plot(study: Study, records: Sequence[Record], path: Path) -> None:
    """Draw val NLL of each snapshot and of the last k over k, and the rows' calibrated NLL on test."""
    figure = new_figure(800, 300)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    numbers = np.arange(1, study.cycles + 1)
    for key, colour, label in (
        ("single_nll", MUTED_COLOUR, "snapshot i alone"),
        ("last_nll", BLUE, "last i snapshots, equal weights"),
    ):
        curves = np.array([record["val"][key] for record in records])
        left.plot(numbers, curves.T, color=colour, alpha=0.25, linewidth=0.8)
        left.plot(numbers, curves.mean(axis=0), color=colour, linewidth=2, marker="o", label=label)
    one = np.mean([record["val"]["one_cosine_nll"] for record in records])
    left.axhline(one, color=VERMILION, linestyle="--", linewidth=1.5, label=ONE)
    panel(left, "Snapshots on val, thick: mean over seeds", x_label="i, snapshots", y_label="val NLL, nats")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False, prop=font(8))
    names = [row["name"] for row in records[0]["rows"]]
    values = np.array([[row["calibrated_nll"] for row in record["rows"]] for record in records])
    heights = np.arange(len(names))[::-1]
    for position, line in enumerate(values):
        right.plot(line, heights, "o", color=CYCLE[position % len(CYCLE)], alpha=0.6, markersize=5)
    right.plot(values.mean(axis=0), heights, "|", color=BLACK, markersize=18, markeredgewidth=2.5)
    panel(right, "Dot: a seed, bar: their mean", x_label="calibrated NLL on test, nats")
    right.set_yticks(heights, [name.replace(", ", ",\n") for name in names])
    right.set_ylim(-0.5, len(names) - 0.5)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    with SeedStudy.open(STUDY, study, [*PROG.split(), *argv]) as seeds:
        records = seeds.records(lambda folder, seed: run_one(study, seeds.bench, folder, seed))
        pairs = [
            *((name, ONE) for name in (EQUAL, FITTED, study.last_name, SINGLE)),
            (FITTED, EQUAL),
            *([(study.last_name, EQUAL)] if study.last < study.cycles else []),
            (EQUAL, SINGLE),
        ]
        seeds.write(
            records,
            title="Snapshot ensembles",
            body=f"{study.cycles} cycles, a snapshot at the end of each, against one cosine over the same epochs from "
            "the same initial weights, order and augmentation. Chosen and fitted on val; temperatures on cross-fitted "
            "val predictions; test was predicted once, after that. Mean ± standard deviation over seeds on test; NLL "
            "in nats. CPU seconds: the whole training that a row needs, and fitting; without prediction.\n\n"
            f"{table(records)}\n## Beside the published table\n\n{published_table(records)}\n"
            f"## Comparisons\n\n{seeds.comparisons(records, pairs)}",
            waiting="Figures are not comparable with the published ones. The published scale, WRN-16-4 on CIFAR-10 "
            f"for 200 epochs, waits for a GPU: `{PROG} --device cuda`",
            figure=lambda path: plot(study, records, path),
        )


if __name__ == "__main__":
    run_script(main)
