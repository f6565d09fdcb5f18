"""Is the searched ensemble better than what else could be had, for as many members and for the same cost?

    python experiments/compare_ensembles.py runs/001-digits
    python experiments/compare_ensembles.py runs/001-digits --methods ours base-cell
    python experiments/compare_ensembles.py runs/001-digits runs/002-digits runs/003-digits --epochs-grid 10 30 60
    python experiments/compare_ensembles.py runs/001-digits --methods base-cell best-cell random-cells --members-grid 10

Trains the chosen methods of ``methods/`` with the recipe of the run and seeds of their own, predicts val and test, and
reports both budgets. Equal number of members: one table with the cost of each, and what the difference to ours is worth
(paired by seed and test image, Holm-corrected). Equal total cost: the frontier, calibrated NLL against total
training cost, where each method splits its budget between members and epochs as val finds best, as a figure and as
a table at our own cost. A deep ensemble of the best found cell cannot be had for that, for the cell is found among our
trained members: --members-grid compares at the cost of larger ensembles of ours. Several run folders are search seeds
of one configuration: figures are then mean ± standard deviation over them. The published comparison is EdgeNES's on
CIFAR-100, see ``neural_ensemble_search.py``. Cost: about 70 trainings of one member and M + 1 further searches for five
members, a quarter of an hour on digits; another epoch count about 25 trainings of that length, another size N of ours
four for each member more. What is finished is kept, predictions too: run it again after an interruption, or with more
methods.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from comparison_report import (
    COLUMNS,
    differences,
    over_seeds,
    provenance,
    rows_of,
    spread_sentence,
    write_results,
)
from comparison_runs import members_of, require_alike
from equal_cost import equal_cost, options_table
from frontier_plot import plot_frontiers
from methods import METHODS, Budget, Comparison, Result
from tyro.conf import Positional

from dnas_ens.commands.options import data_of_run
from dnas_ens.commands.parse import parse, run_main
from dnas_ens.config import RetrainConfig, SearchConfig, require
from dnas_ens.config.fields import override
from dnas_ens.run.files import with_ending

if TYPE_CHECKING:
    from dnas_ens.run.folder import RunFolder

PROG = "python experiments/compare_ensembles.py"


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Options of the comparison."""

    run_dirs: Positional[tuple[Path, ...]]
    """Run folders whose members are trained, one a search seed of the same configuration."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods to compare with."""
    epochs_grid: tuple[int, ...] = ()
    """Other epoch counts at which ours, the base cell's deep ensemble and the random cells are trained as well."""
    members_grid: tuple[int, ...] = ()
    """Larger sizes of ours. Members are added in the order of the search's ranking; deep ensembles of the base and of
    the best found cell and random cells grow to the same total cost; all are compared at each of these costs."""
    pool_size: int = 10
    """Networks that NES-RS and NES-RE train and choose M from; with M there is no NES-RS."""
    population: int = 5
    """Networks alive in NES-RE's evolution."""
    parents: int = 2
    """Candidates for the next parent in it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 0
    """Members trained side by side on a CPU, each on its share of the cores; 0 for one a core."""
    output: Path | None = None
    """Where the results go, OUTPUT.md, .csv, .json and .png; default: into the run folder of one, beside several."""

    def __post_init__(self) -> None:
        for name in self.methods:
            require(name in METHODS, f"There is no method {name}.", f"Choose from {', '.join(METHODS)}.")
        for epochs in self.epochs_grid:
            require(epochs > 0, f"--epochs-grid holds {epochs}.", "Give epoch counts of 1 or more.")
        require(
            list(self.members_grid) == sorted(set(self.members_grid)),
            f"--members-grid {' '.join(map(str, self.members_grid))} does not rise.",
            "Give each size once, the smallest first.",
        )

    @property
    def budget(self) -> Budget:
        """How much the methods may train."""
        return Budget(
            pool_size=self.pool_size,
            population=self.population,
            parents=self.parents,
            epochs=self.epochs_grid,
            members=self.members_grid,
        )

    @property
    def path(self) -> Path:
        """Where the results go, without suffix."""
        if self.output is not None:
            return self.output
        first, *others = self.run_dirs
        names = "-".join(path.name for path in self.run_dirs)
        return first.parent / f"comparison-{names}" if others else first / "comparison"


def main(argv: list[str]) -> None:
    """Run the comparison."""
    command = parse(
        CompareCommand,
        argv,
        prog=PROG,
        description=__doc__ or "",
        default=CompareCommand(run_dirs=tyro.MISSING),
    )
    from dnas_ens.run.folder import RunFolder
    from dnas_ens.run.machine import resolve_device
    from dnas_ens.space.genotype import ranked_genotypes

    require(bool(command.run_dirs), "No run folder was given.", "Name one or more whose members are trained.")
    device = resolve_device(command.device)
    typed = [*PROG.split(), *argv]
    with ExitStack() as stack:
        runs = [stack.enter_context(RunFolder.open(path, command=typed)) for path in command.run_dirs]
        require_alike(runs)
        comparisons = []
        for run in runs:
            data = data_of_run(run)
            run.write_env({"device": str(device), "data": data.describe()})
            comparison = Comparison(
                folder=run.path,
                search=override(SearchConfig(), run.config["search"]),
                found=run.read_json("genotypes.json"),
                data=data,
                recipe=override(RetrainConfig(), run.config["retrain"]),
                device=device,
                workers=command.workers,
                budget=command.budget,
                trained_members=members_of(run),
            )
            require(
                comparison.num_members <= command.pool_size,
                f"A pool of {command.pool_size} is too small for {comparison.num_members} members.",
                f"Give --pool-size {comparison.num_members} or more.",
            )
            if command.members_grid:
                require(
                    comparison.num_members < command.members_grid[0],
                    f"--members-grid begins with {command.members_grid[0]}, but ours has "
                    f"{comparison.num_members} members as it is.",
                    "Give larger sizes.",
                )
                # Too many are refused before anything is trained.
                ranked_genotypes(comparison.found, command.members_grid[-1])
            comparisons.append(comparison)
        # Seed by seed, so that an interrupted comparison has some whole ones.
        results = [results_of(comparison, command.methods) for comparison in comparisons]
        report(command, runs, comparisons, results)
        if command.path.parent == runs[0].path:
            from dnas_ens.report import write_report

            print(f"report: {write_report(runs[0].path)}")


def results_of(comparison: Comparison, methods: Sequence[str]) -> list[Result]:
    """Return the rows of the chosen methods, ours first."""
    return [
        result
        for name, method in METHODS.items()
        if name == "ours" or name in methods
        for result in method(comparison)
    ]


def report(
    command: CompareCommand,
    runs: Sequence[RunFolder],
    comparisons: Sequence[Comparison],
    results: Sequence[Sequence[Result]],
) -> None:
    """Print and write the tables of both budgets, and draw the frontier."""
    from dnas_ens.evaluate.tables import to_markdown

    seeds = [comparison.search.seed for comparison in comparisons]
    rows = [rows_of(of_seed, seed=seed) for of_seed, seed in zip(results, seeds, strict=True)]
    sizes = comparisons[0].sizes
    budgets = {size: [comparison.cost_of(size) for comparison in comparisons] for size in sizes}
    costs, cost_text = equal_cost(results, budgets)
    data = comparisons[0].data
    text = (
        "## Equal number of members\n\n"
        + to_markdown(over_seeds(rows), COLUMNS)
        + "\n"
        + differences(results)
        + spread_sentence(results)
        + ranking_sentence(comparisons)
        + "\n## Equal total cost\n\n"
        + epochs_sentence(comparisons[0])
        + "An option of k networks out of more that are exchangeable is the mean over subsets, each network in equally "
        "many; *k of n* are chosen greedily from n trained; *last k of c* are snapshots, c the cycles; *k "
        "averaged, e epochs* is the equal average of k models kept at the end of a training of so many. Choosing "
        f"between options is free here. Frontier: [figure]({command.path.name}.png).\n\n" + cost_text
    )
    print(f"{data.name}, {len(data.test)} test images")
    print(text, end="")
    environments = [entry for run in runs for entry in run.read_json("env.json")]
    environments.sort(key=lambda entry: str(entry["time"]))
    header = heading(comparisons) + provenance(environments, device=str(comparisons[0].device))
    flat = [row for of_seed in rows for row in of_seed]
    record = {"rows": flat, "equal_cost": costs, "options": options_table(results, seeds)}
    write_results(command.path, header + scale(comparisons) + text, flat, record)
    plot_frontiers(
        {
            result.label: [of_seed[index].options for of_seed in results]
            for index, result in enumerate(results[0])
            if result.options
        },
        budgets={
            f"ours with {size}" if len(budgets) > 1 else "our total cost": sum(seconds) / len(seconds)
            for size, seconds in budgets.items()
        },
        title=f"What a total training cost buys: {data.name}, {len(seeds)} search "
        f"seed{'s' if len(seeds) > 1 else ''}",
        path=with_ending(command.path, ".png"),
    )
    print(f"wrote {command.path}.md, .csv, .json and .png")


def epochs_sentence(comparison: Comparison) -> str:
    """Say what a method may split its budget between."""
    tried = sorted({comparison.recipe.epochs, *comparison.budget.epochs})
    grid = (
        f"Ours, the base cell and random cells were trained for {', '.join(map(str, tried[:-1]))} and {tried[-1]} "
        "epochs, the others as the recipe says; for other epochs than its no more networks were trained. "
        if len(tried) > 1
        else "Only the number of members varies: all were trained as long as the recipe says. "
    )
    return (
        "Every method spends at most our total cost (search and training), split as NLL on val finds best; "
        "*members × epochs* is what was chosen, a choice a seed where they differ. "
        + grid
        + (
            "Ours grows in the order of the search's ranking; deep ensembles of the base and of the best of the first "
            f"{comparison.num_members} members, which is one of its copies, and random cells are grown with it, other "
            "methods are not. "
            if comparison.budget.members
            else ""
        )
    )


def heading(comparisons: Sequence[Comparison]) -> str:
    """Return the first line of a results file."""
    return f"# Searched ensemble and other methods: {comparisons[0].data.name}\n\n"


def scale(comparisons: Sequence[Comparison]) -> str:
    """Say what was run, and what the columns hold."""
    first = comparisons[0]
    data, recipe = first.data, first.recipe
    seeds = ", ".join(str(comparison.search.seed) for comparison in comparisons)
    recipe_seeds = ", ".join(str(comparison.recipe.seed) for comparison in comparisons)
    many = len(comparisons) > 1
    return (
        f"Search seed{'s' if many else ''} {seeds}, recipe seed{'s' if many else ''} {recipe_seeds}, split seed "
        f"{first.search.data.split_seed}. {len(data.train)} training, {len(data.val)} val and {len(data.test)} test "
        f"images; {recipe.epochs} epochs, {recipe.num_cells} cells, C={recipe.channels}, {first.num_members} members. "
        "cpu seconds hold all the training a row needs: every search its cells come from, and networks that were "
        "trained and not chosen. Weights and temperature are fitted on val."
        + (" Mean ± standard deviation over seeds; counts are means.\n\n" if many else "\n\n")
    )


def ranking_sentence(comparisons: Sequence[Comparison]) -> str:
    """Say how the members' order with inherited weights agrees with that after retraining (Kendall's tau)."""
    from scipy.stats import kendalltau

    from dnas_ens.metrics.significance import mean_and_deviation
    from dnas_ens.run.files import read_json

    taus = []
    for comparison in comparisons:
        found, count = comparison.found, comparison.num_members
        places = found.get("ranking", found["selected"])[:count]
        inherited = [found["candidates"][index]["supernet_val_nll"] for index in places]
        if None in inherited or len(set(places)) < 2:
            return ""
        retrained = [
            read_json(comparison.folder / "members" / str(index) / "member.json")["val_nll"]
            for index in range(len(inherited))
        ]
        taus.append(float(kendalltau(inherited, retrained).statistic))
    return (
        "- Kendall's tau between the members' val NLL with inherited weights and retrained: "
        f"{mean_and_deviation(taus, digits=2)} ({comparisons[0].num_members} members).\n"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))
