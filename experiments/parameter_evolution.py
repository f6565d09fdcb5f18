"""Can one network, found between the weights of several, replace the mean of their predictions?

    OMP_NUM_THREADS=1 python experiments/parameter_evolution.py --data digits --model wrn-10-1 --epochs 60
    python experiments/parameter_evolution.py --device cuda

Differential evolution (scipy) looks for e in w = e w_o + (1 - e) w_p of two networks, and for a point of the simplex
over k networks, beside the best single network and the mean of the same networks' predictions. Two kinds of networks:

- *independent*: trained from seeds of their own. Between them is a barrier of loss (arXiv 1912.05671).
- *snapshots*: the first independent network, trained on by the cycles of fast geometric ensembling (arXiv 1802.10026),
  leaves a snapshot in the middle of each. They stay in one valley, so that a straight line connects them.

Published elsewhere (without data, network and recipe): networks 63.23 % and 63.42 %, evolved 63.35 %, averaged
predictions 64.92 %. Half of val judges the candidates and chooses the best single network, the whole of it fits every
temperature (the other half alone may hold no error, and a temperature then says nothing); test is predicted after that.
Cost of the first command: about two minutes of one core for three seeds; of the second hours on one GPU. Finished
trainings, and every candidate that was evaluated, are kept in the run folder and not run again. Results: OUTPUT.md,
OUTPUT.png (accuracy and NLL over e), OUTPUT.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from studies.reference_models import Bench, SeedStudy, StudyOptions, all_starts, finished, table, train

from dnas_ens.commands.parse import parse
from dnas_ens.compare.records import Record
from dnas_ens.compare.report import Column, Row, markdown_table
from dnas_ens.compare.study import Unit, run_script
from dnas_ens.config import require
from dnas_ens.data.splits import alternating_halves

if TYPE_CHECKING:
    from dnas_ens.ensembles.evolution import Evolution

PROG = "python experiments/parameter_evolution.py"
STUDY = "parameter-evolution"
KINDS = ("independent", "snapshots")
PUBLISHED = {
    "network 1": "63.23",
    "network 2": "63.42",
    "evolved, two networks": "63.35",
    "mean of predictions, two": "64.92",
}


@dataclass(frozen=True, kw_only=True)
class Study(StudyOptions):
    """Options of the study."""

    networks: int = 3
    """k, networks of each kind; the line is between the first two independent, the first and last snapshot."""
    cycle_epochs: int = 4
    """Epochs of a cycle that leaves a snapshot."""
    cycle_learning_rate: float = 0.02
    """Highest learning rate of those cycles; the lowest is a hundredth of it."""
    criterion: Literal["nll", "accuracy"] = "nll"
    """What candidates are judged by on val; accuracy breaks ties by the NLL."""
    population: int = 12
    """Candidates of a generation."""
    generations: int = 10
    """Generations after the first."""
    curve_points: int = 21
    """Points of the curve over e."""
    batch_norm_batches: int = 20
    """Batches of 256 training images for the BatchNorm statistics of a candidate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.networks > 1, f"--networks is {self.networks}.", "Give --networks 2 or more to average.")


def networks(study: Study, bench: Bench, folder: Path, seed: int) -> dict[str, tuple[list[Any], list[float]]]:
    """Train the networks of a seed; return states and, for each, the CPU seconds up to it, by kind."""
    from dnas_ens.ensembles.snapshot import CosineCycles, TriangularCycles

    cosine = CosineCycles(epochs=study.epochs, num_cycles=1, initial_learning_rate=study.learning_rate)
    independent = [
        train(bench, folder / f"network-{index}", cosine, root=seed, member=index) for index in range(study.networks)
    ]
    cycles = TriangularCycles(
        epochs_per_cycle=study.cycle_epochs,
        highest_learning_rate=study.cycle_learning_rate,
        lowest_learning_rate=study.cycle_learning_rate / 100,
    )
    cyclic = train(
        bench,
        folder / "snapshots",
        cycles,
        root=seed,
        member=study.networks,
        epochs=study.networks * study.cycle_epochs,
        start=independent[0].states[-1],
    )
    steps = cyclic.record["snapshot_steps"]
    per_step = cyclic.cpu_seconds / (steps[-1] + steps[0])
    return {
        KINDS[0]: ([one.states[-1] for one in independent], [one.cpu_seconds for one in independent]),
        KINDS[1]: (cyclic.states, [independent[0].cpu_seconds + per_step * step for step in steps]),
    }


def run_one(study: Study, bench: Bench, folder: Path, seed: int) -> Unit:
    """Train the networks of a seed, evolve on val, evaluate on test."""
    rows: list[Row] = []
    found: dict[str, Any] = {}
    for kind, (states, seconds) in networks(study, bench, folder, seed).items():
        of_kind, found[kind] = evolve_kind(study, bench, folder, kind, states, seconds)
        rows += of_kind
    return finished(bench, seed, rows, kinds=found)


def evolve_kind(
    study: Study,
    bench: Bench,
    folder: Path,
    kind: str,
    states: Sequence[Any],
    seconds: Sequence[float],
) -> tuple[list[Row], dict[str, Any]]:
    """Evolve the line and the simplex of one kind of networks; return its rows, and curves for the record."""
    from dnas_ens.ensembles.evolution import EvolutionSettings, evolve_interpolation, evolve_simplex
    from dnas_ens.ensembles.selection import greedy_selection

    data = bench.data
    judged = data.val.subset(alternating_halves(data.val.labels.cpu().numpy())[0])
    settings = EvolutionSettings(
        criterion=study.criterion,
        population_size=study.population,
        generations=study.generations,
        batch_norm_batches=study.batch_norm_batches,
    )
    # Snapshots that follow each other differ least.
    first, second = (0, 1) if kind == KINDS[0] else (0, len(states) - 1)
    model = bench.model()
    # Of the networks alone as well, so that nothing but the way of combining differs between rows.
    states = [with_own_statistics(study, bench, state) for state in states]
    batches = bench.statistics_batches, bench.batches(judged)
    with all_starts(folder / f"line-{kind}-cost.json") as line_cost:
        line = evolve_interpolation(
            model,
            states[first],
            states[second],
            *batches,
            curve_points=study.curve_points,
            settings=settings,
            file=folder / f"line-{kind}.json",
        )
    with all_starts(folder / f"simplex-{kind}-cost.json") as simplex_cost:
        file = folder / f"simplex-{kind}.json"
        simplex = evolve_simplex(model, states, *batches, settings=settings, file=file)
    choice = bench.predict(states, judged)
    best = greedy_selection(choice, judged.labels.cpu().numpy(), num_members=1)[0]
    # Everything is chosen; only now is test read.
    everything = [*states, line.state, simplex.state]
    val, test = (bench.predict(everything, split) for split in (data.val, data.test))
    # The cost of all independent networks, or of the one training of all snapshots.
    both = seconds[first] + seconds[second] if kind == KINDS[0] else seconds[second]
    whole = sum(seconds) if kind == KINDS[0] else seconds[-1]
    two, count = [first, second], len(states)
    members: dict[str, tuple[list[int], float, dict[str, Any]]] = {
        "network 1": ([first], seconds[first], {}),
        "network 2": ([second], seconds[second], {}),
        "best single network": ([best], whole, {"chosen": best}),
        "evolved, two networks": ([count], both + line_cost(), described(line)),
        "mean of predictions, two": (two, both, {}),
        f"evolved, simplex of {count}": ([count + 1], whole + simplex_cost(), described(simplex)),
        f"mean of predictions, {count}": (list(range(count)), whole, {}),
    }
    rows = [
        Row(
            name=f"{kind}: {name}",
            val_probs=val[chosen].mean(axis=0),
            test_probs=test[chosen].mean(axis=0),
            details={"cpu_seconds": cpu_seconds, **details},
        )
        for name, (chosen, cpu_seconds, details) in members.items()
    ]
    return rows, curves(line)


def with_own_statistics(study: Study, bench: Bench, state: Any) -> dict[str, Any]:
    """Return a state with BatchNorm statistics recomputed as those of a candidate are."""
    from dnas_ens.ensembles.averaging import averaged_model, copied_to_cpu
    from dnas_ens.training.prediction import one_pass

    def batches() -> Any:
        return islice(one_pass(bench.statistics_batches), study.batch_norm_batches)

    return copied_to_cpu(averaged_model(bench.model(), [state], None, batches).state_dict())


def described(evolution: Evolution) -> dict[str, Any]:
    """Return what an evolution found, for its row."""
    return {
        "coefficients": evolution.best.coefficients[0].tolist(),
        "evaluations": evolution.evaluations,
        "judged_nll": evolution.best.val_nll,
        "judged_accuracy": evolution.best.val_accuracy,
    }


def curves(line: Evolution) -> dict[str, Any]:
    """Return the curve over e on the judging half of val, its barrier, and the mean of predictions beside it."""
    shares = np.array([float(candidate.coefficients[0, 0]) for candidate in line.curve])
    nlls = np.array([candidate.val_nll for candidate in line.curve])
    chord = nlls[0] + shares * (nlls[-1] - nlls[0])
    return {
        "e": shares.tolist(),
        "nll": nlls.tolist(),
        "accuracy": [candidate.val_accuracy for candidate in line.curve],
        "barrier": float(max(0.0, (nlls - chord).max())),
        "evolved": [line.coefficient, line.best.val_nll, line.best.val_accuracy],
        "mean_of_predictions": [line.ensemble_val_nll, line.ensemble_val_accuracy],
    }


def published_table(records: Sequence[Record]) -> str:
    """Return the published accuracies beside ours as Markdown."""
    means = {
        row["name"]: 100 * float(np.mean([record["rows"][index]["accuracy"] for record in records]))
        for index, row in enumerate(records[0]["rows"])
    }
    rows = [
        [name, PUBLISHED.get(name, ""), *(f"{means[f'{kind}: {name}']:.2f}" for kind in KINDS)]
        for name in (name.split(": ")[1] for name in means if name.startswith(KINDS[0]))
    ]
    return markdown_table(["accuracy %", "published", *(f"ours, {kind}" for kind in KINDS)], rows)


def found_sentences(study: Study, records: Sequence[Record]) -> str:
    """Say what the evolutions found: e, the coefficients' spread, the barrier."""
    lines = []
    for kind in KINDS:
        rows = {
            name: [next(row for row in record["rows"] if row["name"] == f"{kind}: {name}") for record in records]
            for name in ("evolved, two networks", f"evolved, simplex of {study.networks}")
        }
        line, simplex = rows.values()
        barrier = Column("").cell(record["kinds"][kind]["barrier"] for record in records)
        shares = ", ".join(f"{row['coefficients'][0]:.2f}" for row in line)
        largest = ", ".join(f"{max(row['coefficients']):.2f}" for row in simplex)
        line_count, simplex_count = (
            ", ".join(str(row["evaluations"]) for row in of_kind) for of_kind in (line, simplex)
        )
        lines.append(
            f"- {kind}: the barrier of NLL on the line is {barrier} nats; e was found at {shares} in {line_count} "
            f"evaluations; the largest coefficient on the simplex is {largest} in {simplex_count} evaluations.\n"
        )
    return "".join(lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw accuracy and NLL on val over e, a column a kind of networks, a colour a seed."""
    from studies.plotting import handle, panel

    from dnas_ens.figures.style import CYCLE, font, new_figure, style_axis

    figure = new_figure(720, 470)
    axes = figure.subplots(2, len(KINDS), sharex=True, squeeze=False)
    for column, kind in enumerate(KINDS):
        for position, record in enumerate(records):
            found, colour = record["kinds"][kind], CYCLE[position % len(CYCLE)]
            share, nll, accuracy = found["evolved"]
            for axis, values, point, mean in (
                (axes[0, column], 100 * np.array(found["accuracy"]), 100 * accuracy, 1),
                (axes[1, column], np.array(found["nll"]), nll, 0),
            ):
                level = found["mean_of_predictions"][mean] * (100 if mean else 1)
                axis.plot(found["e"], values, color=colour, linewidth=1.5)
                axis.axhline(level, color=colour, linestyle=":", linewidth=1.2)
                axis.plot(share, point, "*", color=colour, markersize=11, markeredgecolor="white", zorder=3)
        every = [value for record in records for value in record["kinds"][kind]["nll"]]
        # NLLs of a barrier differ by factors.
        if max(every) > 10 * min(every):
            axes[1, column].set_yscale("log")
            axes[1, column].yaxis.set_major_formatter("{x:g}")
        barrier = np.mean([record["kinds"][kind]["barrier"] for record in records])
        name = "independent networks" if column == 0 else "two snapshots of one training"
        first = column == 0
        panel(
            axes[0, column],
            f"{name}\nbarrier {barrier:.3f} nats",
            y_label="val accuracy, %" if first else "",
        )
        y_label = "val NLL, nats" if first else ""
        style_axis(axes[1, column], x_label="e, share of the first network", y_label=y_label)
    handles = [
        handle("one network, weights averaged", linewidth=1.5),
        handle("evolved e", linestyle="", marker="*", markersize=10),
        handle("mean of the two networks' predictions", linestyle=":"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, prop=font(9))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    with SeedStudy.open(STUDY, study, [*PROG.split(), *argv]) as seeds:
        records = seeds.records(lambda folder, seed: run_one(study, seeds.bench, folder, seed))
        count = study.networks
        pairs = [
            (f"{kind}: {first}", f"{kind}: {second}")
            for kind in KINDS
            for first, second in (
                ("evolved, two networks", "best single network"),
                ("evolved, two networks", "mean of predictions, two"),
                (f"evolved, simplex of {count}", "best single network"),
                (f"evolved, simplex of {count}", f"mean of predictions, {count}"),
            )
        ]
        body = (
            f"*Independent*: {count} networks of {study.epochs} epochs, one cosine each. *Snapshots*: the first of "
            f"them trained on for {count} triangular cycles of {study.cycle_epochs} epochs (learning rate "
            f"{study.cycle_learning_rate:g} to {study.cycle_learning_rate / 100:g}), a snapshot in the middle of "
            "each. Two networks: the first two independent, the first and the last snapshot. Differential evolution "
            f"by {study.criterion}: {study.population} candidates, up to {study.generations} generations more; every "
            "candidate, and every network alone, gets BatchNorm statistics of its own from training images as they "
            "are. Half of val judged the candidates and chose the best single network (by NLL); temperatures were "
            "fitted on the whole of val, so that the judging half is used twice, for at most "
            f"{count - 1} coefficients of a network. (On digits they were first fitted on the other half alone, which "
            "holds no error of some networks, so that temperatures went to their bound; that was changed after test "
            "had been seen.) Mean ± standard deviation over seeds on test; NLL "
            "in nats. CPU "
            "seconds: trainings that a row needs, and the evolution.\n\n"
            f"{table(records)}\n## Beside the published table\n\nPublished without data, "
            f"network and recipe: compare the order of the rows, not the figures.\n\n{published_table(records)}\n"
            f"## What was found on val\n\n{found_sentences(study, records)}\n"
            f"## Comparisons\n\n{seeds.comparisons(records, pairs)}"
        )
        seeds.write(
            records,
            title="Evolution between the weights of networks",
            body=body,
            waiting="The published figures come without data, network and recipe, so that only the order of rows "
            "can be compared. The full scale, WRN-16-4 on CIFAR-10 for 200 epochs, waits for a GPU: "
            f"`{PROG} --device cuda`",
            figure=lambda path: plot(records, path),
        )


if __name__ == "__main__":
    run_script(main)
