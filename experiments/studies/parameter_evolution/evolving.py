"""Networks of two kinds, one network found between the weights of several, and the rows of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dnas_ens.config import require
from dnas_ens.data.splits import alternating_halves
from studies.bench import Bench
from studies.options import StudyOptions
from studies.predictors import Row
from studies.records import finish_seed
from studies.snapshot_trainings import Trained, all_sittings, train

if TYPE_CHECKING:
    from dnas_ens.ensembles.evolution import Evolution

KINDS = ("independent", "snapshots")


@dataclass(frozen=True, kw_only=True)
class Study(StudyOptions):
    """Options of the study."""

    networks: int = 3
    """k, networks of each kind; the line lies between the first two independent, the first and last snapshot."""
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
    independent: list[Trained] = [
        train(bench, folder / f"network-{index}", cosine, root=seed, member=index)
        for index in range(study.networks)
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


def measure(study: Study, bench: Bench, folder: Path, seed: int) -> dict[str, Any]:
    """Train the networks of a seed, evolve on val, evaluate on test."""
    rows: list[Row] = []
    found: dict[str, Any] = {}
    for kind, (states, seconds) in networks(study, bench, folder, seed).items():
        of_kind, found[kind] = evolve_kind(study, bench, folder, kind, states, seconds)
        rows += of_kind
    return finish_seed(bench, folder, seed, rows, kinds=found)


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
    training_batches, val_batches = bench.statistics_batches, bench.batches(judged)
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
    with all_sittings(folder / f"line-{kind}-cost.json") as line_cost:
        line = evolve_interpolation(
            model,
            states[first],
            states[second],
            training_batches,
            val_batches,
            curve_points=study.curve_points,
            settings=settings,
            file=folder / f"line-{kind}.json",
        )
    with all_sittings(folder / f"simplex-{kind}-cost.json") as simplex_cost:
        simplex = evolve_simplex(
            model,
            states,
            training_batches,
            val_batches,
            settings=settings,
            file=folder / f"simplex-{kind}.json",
        )
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
