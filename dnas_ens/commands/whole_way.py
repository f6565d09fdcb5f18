"""Command: ``python -m dnas_ens``, the whole way: search, retrain, evaluate, in one run folder."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from dnas_ens.budget.amount import Amount, parse_time
from dnas_ens.commands.options import (
    RunOptions,
    begin_run,
    configured,
    load_configured_data,
    on_every_rank,
    preset_help,
    print_next,
    print_resolved,
    require_same_on_all,
    resumable,
)
from dnas_ens.commands.parse import parse
from dnas_ens.config import RetrainConfig, SearchConfig, require
from dnas_ens.config.fields import to_dict, with_fields
from dnas_ens.config.settings import Engine
from dnas_ens.run.ranks import Ranks, as_typed, launched
from dnas_ens.space.genotype import Genotype, load_genotypes
from dnas_ens.space.search_space import stack_cell_types

PROG = "python -m dnas_ens"
DESCRIPTION = "Search an ensemble of different networks, retrain its members from scratch, evaluate it. "


@dataclass(frozen=True, kw_only=True)
class WholeWayCommand(RunOptions):
    """Options of the command."""

    search: OmitArgPrefixes[SearchConfig]
    retrain: RetrainConfig
    workers: int = 0
    """Members trained side by side, or networks of a budget of time: on a CPU each on its share of the cores, 0 for one
    a core; on a GPU each on a stream of its own, 0 for one, and of a budget always one."""
    engine: Engine = "local"
    """local, or ray (pip install 'dnas_ens[cluster]'): tasks of the Ray cluster that RAY_ADDRESS names, else of a Ray
    of this machine; --workers then share a machine's threads, or a GPU."""
    genotypes: Path | None = None
    """Train these architectures instead of searching: the genotypes.json of a search, whose members they are, an
    ensemble.json, or a JSON list of genotypes."""
    budget: str | None = None
    """Spend a time such as 90s, 30m or 2h where val says that it pays: on a longer training, a further cycle, another
    network, another cell. An ensemble is there after each of them. Width and lengths of trainings are chosen too."""
    budget_epochs: int | None = None
    """The same, a number of epochs instead of a time; then the same command gives the same ensemble."""

    def __post_init__(self) -> None:
        require(
            self.budget is None or self.budget_epochs is None,
            "A budget of time and one of epochs were given.",
            "Give --budget or --budget-epochs.",
        )
        require(
            self.genotypes is None or self.amount is None,
            "Genotypes and a budget were given, which finds its own.",
            "Give --genotypes or a budget.",
        )
        require(
            self.amount is None or self.engine == "local",
            f"A budget is spent by one machine, and --engine is {self.engine}.",
            "Leave --engine out; --workers trains networks side by side.",
        )
        require(
            self.budget_epochs is None or self.budget_epochs > 0,
            f"--budget-epochs is {self.budget_epochs}.",
            "Give --budget-epochs 1 or more.",
        )
        if self.budget is not None:
            parse_time(self.budget)
        searched, trained = self.search.supernet.num_cells, self.retrain.num_cells
        missing = set(stack_cell_types(trained)) - set(stack_cell_types(searched))
        # Otherwise it would only show after the search.
        require(
            not missing,
            f"A supernet of {searched} cell{'s' if searched > 1 else ''} finds no {'/'.join(sorted(missing))} cell, "
            f"which a network of {trained} cells has.",
            "Give --num-cells 3 or more, or --retrain.num-cells as --num-cells.",
        )

    @property
    def amount(self) -> Amount | None:
        """The budget, if there is one."""
        if self.budget is not None:
            return Amount(total=parse_time(self.budget))
        return None if self.budget_epochs is None else Amount(total=float(self.budget_epochs), unit="epochs")


def main(argv: list[str]) -> None:
    """Run the command."""
    search, recipe = configured(argv, prog=PROG)
    default = WholeWayCommand(search=search, retrain=recipe)
    command = parse(WholeWayCommand, argv, prog=PROG, description=DESCRIPTION + preset_help(), default=default)
    require(
        command.genotypes is None or not any(word.split("=")[0] == "--members" for word in argv),
        "--members was given, but the genotypes of a file are trained all.",
        "Leave --members out, or write the genotypes that are wanted to a JSON list.",
    )
    require(
        command.amount is None or launched() < 2,
        f"torchrun has started {launched()} processes, but a budget is spent by one.",
        "Start it with python instead of torchrun.",
    )
    on_every_rank(_whole_way, command, as_typed(PROG, argv))


def _whole_way(command: WholeWayCommand, ranks: Ranks, typed: list[str]) -> None:
    from dnas_ens.budget.run import spend_budget
    from dnas_ens.evaluate.run import evaluate_folder
    from dnas_ens.nn.operations import require_operations
    from dnas_ens.report import write_report
    from dnas_ens.search.cost import random_members, search_facts
    from dnas_ens.search.result import SearchResult
    from dnas_ens.search.run import run_search
    from dnas_ens.training.cost import Estimate, Fanout, estimate_members
    from dnas_ens.training.members import train_members

    config, recipe, device = command.search, command.retrain.with_stem_of(command.search), ranks.device
    given = None if command.genotypes is None else SearchResult.given(*_given(command.genotypes, config))
    config = config if given is None else given.config
    require_operations(config.supernet.search_space.operations)
    data = ranks.after_first(lambda: load_configured_data(config.data, dry_run=command.dry_run))
    if command.dry_run and command.amount is not None:
        budget = {"budget": command.amount.shown(0.0)}
        if command.price_per_hour is not None and command.amount.unit == "seconds":
            budget["price"] = f"{command.amount.total / 3600 * command.price_per_hour:.2f}"
        print_resolved(recipe, budget)
        return
    if command.dry_run:
        facts: dict[str, float | str] = {}
        searching = Estimate()
        if not given:
            facts, searching = search_facts(config, recipe, data, device=device)
            facts = {**facts, **searching.facts()}
        print_resolved(config, facts)
        genotypes = given.genotypes if given else random_members(config, config.candidates.members)
        fanout = Fanout(workers=command.workers, engine=command.engine, device=device)
        training = estimate_members(genotypes, data, recipe, fanout)
        print_resolved(recipe, {"members": config.candidates.members, **training.facts()})
        print("in all: " + ", ".join(map(": ".join, (searching + training).facts(command.price_per_hour).items())))
        return
    require_same_on_all(ranks, data, search=config, retrain=recipe)
    with begin_run(command, config, data, ranks=ranks, command=typed) as run, resumable(run, typed):
        if run is not None:
            run.record_recipe(to_dict(recipe), resume=command.resume)
        if command.amount is not None:
            assert run is not None
            spend_budget(config, data, recipe, amount=command.amount, device=device, run=run, workers=command.workers)
        else:
            result = given or run_search(config, data, device=device, run=run, resume=command.resume, recipe=recipe)
            if given and run is not None:
                run.write_json("genotypes.json", result.to_dict())
            train_members(
                result.genotypes,
                data,
                recipe,
                device=device,
                folder=None if run is None else run.path,
                workers=command.workers,
                engine=command.engine,
            )
        # The others need not wait, for longer than they may, while one evaluates.
        ranks.leave()
        if run is None:
            return
        evaluate_folder(run.path, data, device=device)
        print(f"{data.name}, {len(data.test)} test images; temperatures fitted on {len(data.val)} of val")
        print(run.file("results.md").read_text(), end="")
        print(f"report: {write_report(run.path)}")
        drawn = f"cells: {run.path}/cells/*.svg; " if (run.path / "cells").exists() else ""
        print(f"{drawn}curves: tensorboard --logdir {shlex.quote(str(run.path))}")
        if run.has_a_network_a_genotype:
            print_next(run.path, "dnas_ens.compare")
        else:
            print(f"run folder: {run.path}")
        if command.amount is not None:
            print(f"next, to spend more: {shlex.join(_with_twice_the_budget(run.path, command))}")


def _given(file: Path, config: SearchConfig) -> tuple[SearchConfig, list[Genotype]]:
    """Return the genotypes of a file, and the configuration with as many members."""
    found = load_genotypes(file)
    for genotype in found:
        require(
            genotype.space == config.supernet.space,
            f"{file} holds cells of the space {genotype.space}, and --space is {config.supernet.space}.",
            f"Give --space {genotype.space}.",
        )
    pool_size = max(config.candidates.pool_size, len(found))
    return with_fields(config, members=len(found), pool_size=pool_size), found


def _with_twice_the_budget(folder: Path, command: WholeWayCommand) -> list[str]:
    """Return the command that goes on in the folder with a budget twice as large, from any folder."""
    amount, path = command.amount, os.path.abspath(folder)
    assert amount is not None
    budget = ["--budget", f"{2 * amount.total:.0f}s"]
    if amount.unit == "epochs":
        budget = ["--budget-epochs", str(round(2 * amount.total))]
    device = [] if command.device == "auto" else ["--device", command.device]
    workers = ["--workers", str(command.workers)] if command.workers else []
    config = ["--config", os.path.join(path, "config.json")]
    return [*PROG.split(), *config, *device, *workers, *budget, "--run-dir", path, "--resume"]
