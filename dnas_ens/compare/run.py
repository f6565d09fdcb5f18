"""Comparing one or several runs: which are seeds of one configuration, the methods' rows, both budgets, the files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnas_ens.commands.options import data_of_run
from dnas_ens.compare import tables
from dnas_ens.compare.budgets import equal_cost, options_table
from dnas_ens.compare.figure import plot_frontiers
from dnas_ens.compare.methods import METHODS
from dnas_ens.compare.methods.comparison import Comparison, Result
from dnas_ens.compare.plan import plan_text
from dnas_ens.compare.report import write_results
from dnas_ens.config import RetrainConfig, SearchConfig, require
from dnas_ens.config.fields import override
from dnas_ens.errors import UserError
from dnas_ens.evaluate.predictions import source_of
from dnas_ens.evaluate.tables import to_markdown
from dnas_ens.run.files import first_difference, with_ending
from dnas_ens.run.folder import RunFolder, without_places
from dnas_ens.run.machine import resolve_device
from dnas_ens.space.genotype import ranked_genotypes

if TYPE_CHECKING:
    import torch

    from dnas_ens.commands.compare import CompareCommand


def compare_runs(command: CompareCommand, *, typed: Sequence[str]) -> None:
    """Train the methods beside runs, then print and write the comparison; what is finished is not done again.

    Ours is always among the methods. With ``plan`` it prints what that will take instead, from a short trial.

    Raises:
        UserError: The runs are not trained or not alike, or the budget does not fit their members.
    """
    device = resolve_device(command.device)
    with ExitStack() as stack:
        runs = [stack.enter_context(RunFolder.open(path, command=typed)) for path in command.run_dirs]
        require_alike(runs)
        comparisons = [_beside(run, command, device) for run in runs]
        if command.plan:
            print(plan_text(comparisons, command.methods, price=command.price_per_hour)[0], end="")
            return
        # Seed by seed, so that an interrupted comparison has some whole ones.
        results = [
            [
                row
                for name, family in METHODS.items()
                if name == "ours" or name in command.methods
                for row in getattr(import_module(f"dnas_ens.compare.methods.{family}"), name.replace("-", "_"))(
                    comparison
                )
            ]
            for comparison in comparisons
        ]
        environments = [entry for run in runs for entry in run.read_json("env.json")]
        write_comparison(command.path, comparisons, results, environments)


def _beside(run: RunFolder, command: CompareCommand, device: torch.device) -> Comparison:
    """Load a run's data, and refuse a budget that does not fit its members before anything is trained."""
    data = data_of_run(run, moved_to=command.data)
    run.write_env({"device": str(device), "data": data.describe()})
    comparison = Comparison(
        folder=run.path,
        search=override(SearchConfig(), run.config["search"]),
        found=run.read_json("genotypes.json"),
        data=data,
        recipe=override(RetrainConfig(), run.config["retrain"]),
        device=device,
        workers=command.workers,
        engine=command.engine,
        budget=command.budget,
        trained_members=members_of(run),
    )
    command.budget.require_room_for(comparison.num_members, command.methods)
    ranked_genotypes(comparison.found, comparison.sizes[-1])
    return comparison


def require_alike(runs: Sequence[RunFolder]) -> None:
    """Check that runs are trained, and differ in their seeds alone.

    Raises:
        UserError: Members are missing, seeds are the same, or something else differs; its field is named.
    """
    first = runs[0]
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        if not run.file("ensemble.json").exists():
            raise UserError(
                f"The members of {run.path} are not trained.",
                f"Run python -m dnas_ens.retrain {shlex.quote(str(run.path))}.",
            )
        require(
            run.has_a_network_a_genotype,
            f"The networks of {run.path} are those of a budget, or ends of cycles; methods are compared with one "
            "training of each genotype.",
            "Name a run of python -m dnas_ens.retrain without --cycles.",
        )
        difference = first_difference(_without_seeds(first), _without_seeds(run), "config")
        if difference is not None:
            field, there, here = difference
            raise UserError(
                f"{first.path} and {run.path} are not seeds of one configuration: {field} is {there} in the first and "
                f"{here} in the second.",
                "Compare them one by one, or name runs that differ in their seeds alone.",
            )
        sizes = [members_of(each) for each in (first, run)]
        require(
            sizes[0] == sizes[1],
            f"{first.path} has {sizes[0]} members and {run.path} has {sizes[1]}.",
            "Train as many of each: python -m dnas_ens.retrain RUN --members N --resume.",
        )
        prints = [each.read_json("splits.json")["fingerprint"] for each in (first, run)]
        require(
            prints[0] == prints[1],
            f"{first.path} and {run.path} have other images or splits.",
            "Name runs on the same data.",
        )
        # Of the recipe's seed are the random cells and their training: with the same one they would be one sample.
        for section, name in (("search", "search"), ("retrain", "recipe's")):
            other = seen.setdefault((section, run.config[section]["seed"]), run.path)
            require(
                other == run.path,
                f"{other} and {run.path} have the same {name} seed.",
                "Name runs with seeds of their own, such as python -m dnas_ens --seed 1 --retrain.seed 1.",
            )


def members_of(run: RunFolder) -> int:
    """Return the number of members of a run's ensemble."""
    return len(run.read_json("ensemble.json")["members"])


def _without_seeds(run: RunFolder) -> dict[str, Any]:
    """Return a configuration without seeds, and without a given base, which a seed may have of its own."""
    search, recipe = without_places(run.config["search"]), dict(run.config["retrain"])
    del search["seed"], recipe["seed"]
    return {"search": search, "retrain": recipe}


def write_comparison(
    output: Path,
    comparisons: Sequence[Comparison],
    results: Sequence[Sequence[Result]],
    environments: Sequence[Mapping[str, Any]],
) -> None:
    """Print the tables of both budgets and write them to OUTPUT.md, .csv and .json, with the frontier as OUTPUT.png.

    Args:
        comparisons: One a seed.
        results: The results of every seed, the same rows in the same order, ours first.
        environments: Entries of env.json of all runs.
    """
    first, data = comparisons[0], comparisons[0].data
    seeds = [comparison.search.seed for comparison in comparisons]
    rows = [tables.rows_of(of_seed, seed=seed) for of_seed, seed in zip(results, seeds, strict=True)]
    budgets = {size: [comparison.cost_of(size) for comparison in comparisons] for size in first.sizes}
    costs, cost_text = equal_cost(results, budgets)
    text = (
        "## Equal number of members\n\n"
        + to_markdown(tables.over_seeds(rows), tables.COLUMNS)
        + "\n"
        + tables.differences(results)
        + tables.spread_sentence(results)
        + tables.ranking_sentence(comparisons)
        + "\n## Equal total cost\n\n"
        + _options_sentences(first)
        + f"Frontier: [figure]({output.name}.png).\n\n"
        + cost_text
    )
    print(f"{data.name}, {len(data.test)} test images")
    print(text, end="")
    head = (
        f"# Searched ensemble and other methods: {data.name}\n\n"
        + tables.provenance(sorted(environments, key=lambda entry: str(entry["time"])), device=str(first.device))
        + _scale(comparisons)
    )
    flat = [row for of_seed in rows for row in of_seed]
    source = source_of(first.folder, data.fingerprint)
    record = {"rows": flat, "source": source, "equal_cost": costs, "options": options_table(results, seeds)}
    write_results(output, head + text, rows=flat, columns=tables.FILE_COLUMNS, document=record)
    plot_frontiers(
        results,
        budgets={
            f"ours with {size}" if len(budgets) > 1 else "our total cost": sum(seconds) / len(seconds)
            for size, seconds in budgets.items()
        },
        title=f"What a total training cost buys: {data.name}, {len(seeds)} search seed{'s' if len(seeds) > 1 else ''}",
        path=with_ending(output, ".png"),
    )
    print(f"wrote {output}.md, .csv, .json and .png")


def _options_sentences(comparison: Comparison) -> str:
    """Say what a method may split its budget between, and what the words for it mean."""
    tried = sorted({comparison.recipe.epochs, *comparison.budget.epochs_grid})
    grid = (
        f"Ours, the base cell and random cells were trained for {', '.join(map(str, tried[:-1]))} and {tried[-1]} "
        "epochs, the others as the recipe says; for other epochs than its no more networks were trained. "
        if len(tried) > 1
        else "Only the number of members varies: all were trained as long as the recipe says. "
    )
    grown = (
        "Ours grows in the order of the search's ranking; deep ensembles of the base and of the best of the first "
        f"{comparison.num_members} members, which is one of its copies, and random cells are grown with it, other "
        "methods are not. "
    )
    return (
        "Every method spends at most our total cost (search and training), split as NLL on val finds best; "
        "*members × epochs* is what was chosen, a choice a seed where they differ. "
        + grid
        + (grown if comparison.budget.members_grid else "")
        + "An option of k networks out of more that are exchangeable is the mean over subsets, each network in equally "
        "many; *k of n* are chosen greedily from n trained; *last k of c* are snapshots, c the cycles; *k "
        "averaged, e epochs* is the equal average of k models kept at the end of a training of so many. Choosing "
        "between options is free here. "
    )


def _scale(comparisons: Sequence[Comparison]) -> str:
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
        "trained and not chosen. "
        + (
            "The search behind the given base or cells is not among them. "
            if first.search.hypernetwork.base is not None or "cpu_seconds" not in first.found["report"]
            else ""
        )
        + "Weights and temperature are fitted on val."
        + (" Mean ± standard deviation over seeds; counts are means.\n\n" if many else "\n\n")
    )
