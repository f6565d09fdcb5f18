"""OUTPUT.md with all that is needed to repeat it: where it comes from, the scale, and the five parts."""

from __future__ import annotations

from collections.abc import Sequence

from dnas_ens.run.files import with_ending
from studies.comparisons import how_to_read
from studies.diversity_sweep.figure import plot
from studies.diversity_sweep.measured import Figures
from studies.diversity_sweep.options import STEERED
from studies.diversity_sweep.path_parts import along_lambda, up_to_limit
from studies.diversity_sweep.records import Records
from studies.diversity_sweep.results import Results
from studies.diversity_sweep.search_parts import against_deviations, over_epochs, schedules
from studies.report import provenance, write_results


def report(records: Records, command: Sequence[str]) -> str:
    """Write tables and plot of a finished study and return the tables."""
    from dnas_ens.run.machine import environment

    study = records.study
    seeds = range(study.seeds)
    results = Results(records, seeds)
    figures = Figures.of(results)
    config, recipe = study.configuration(STEERED[0], seeds[0]), study.recipe(seeds[0])
    data = results.data
    cells, edges = (
        f"{number} {noun}{'s' if number > 1 else ''}"
        for number, noun in ((study.cells, "cell"), (study.edges_per_node, "edge"))
    )
    largest = [study.configuration(way, seeds[0]).hypernetwork.max_lambda for way in STEERED]
    header = (
        f"# The studies of EdgeNES ({study.data}, preset {config.preset}, {cells})\n\n"
        f"{provenance(environment(command), hardware='no GPU, one thread a search')} Seeds "
        f"{', '.join(map(str, seeds))}.\n\n"
        f"**Scale that was run: {study.data}, {len(data.train)} training, {len(data.val)} val and {len(data.test)} "
        f"test images; searches of {cells}, C = {config.supernet.channels}, {edges} a node, "
        f"{config.bilevel.epochs} epochs; {recipe.epochs} epochs from scratch with C = {recipe.channels}; ensembles of "
        f"{study.members}.** The published figures are of other data, networks and recipes, so that only orders and "
        "directions compare; they stand here because the question is the same. "
        f"*star*: js-pairwise, R = {config.hypernetwork.directions}, learnt base, lambda a distance up to "
        f"{largest[0]:g}. *hypernet*: edge-overlap, R = 1, base from the search *optimal* of the same seed, lambda a "
        f"number of shared edges up to {largest[1]:g}. {study.lambdas} values of lambda a direction. *Inherited*: the "
        "supernet's weights, BatchNorm statistics measured anew for each network; *retrained*: from scratch, once. "
        "Mean ± standard deviation over seeds. Everything is chosen on val; test is only predicted.\n\n"
        f"![Accuracy, shared edges, ensembles, deviations and search curves]({study.path.name}.png)\n\n"
        f"Sentences on a to d: {how_to_read(len(figures.compared))} Calibrated NLL of single networks is averaged "
        "over those of a seed.\n\n"
    )
    parts = (along_lambda, up_to_limit, schedules, against_deviations, over_epochs)
    text = "\n".join(part(figures) for part in parts) + "\n" + cost(results)
    write_results(study.path, header + text)
    plot(figures, with_ending(study.path, ".png"))
    return text


def cost(results: Results) -> str:
    """Say what searches and trainings took."""
    from dnas_ens.metrics.significance import mean_and_deviation

    units = [unit for unit in results.records.units.values() if unit["seed"] in results.seeds]
    trainings = [unit["cpu_seconds"] for unit in units if unit["kind"] == "training"]
    searches = [unit["cpu_seconds"] for unit in units if unit["kind"] == "search"]
    return (
        f"## Cost\n\n{len(searches)} searches of {mean_and_deviation(searches, digits=1)} and {len(trainings)} "
        f"trainings of {mean_and_deviation(trainings, digits=1)} CPU seconds, "
        f"{(sum(searches) + sum(trainings)) / 60:.1f} CPU minutes in all. Other work ran on the same machine.\n"
    )
