"""Command: ``python -m dnas_ens.search``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import OmitArgPrefixes

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
from dnas_ens.config import SearchConfig
from dnas_ens.config.presets import retrain_preset
from dnas_ens.run.ranks import Ranks, as_typed

PROG = "python -m dnas_ens.search"
DESCRIPTION = (
    "Train a supernet together with a hypernetwork that maps a diversity parameter lambda and a direction to an "
    "architecture, draw candidates from it and choose the members of an ensemble. "
)


@dataclass(frozen=True, kw_only=True)
class SearchCommand(RunOptions):
    """Options of the command."""

    search: OmitArgPrefixes[SearchConfig]


def main(argv: list[str]) -> None:
    """Run the command."""
    default = SearchCommand(search=configured(argv, prog=PROG, section="search")[0])
    command = parse(SearchCommand, argv, prog=PROG, description=DESCRIPTION + preset_help(), default=default)
    on_every_rank(_search, command, as_typed(PROG, argv))


def _search(command: SearchCommand, ranks: Ranks, typed: list[str]) -> None:
    from dnas_ens.nn.operations import require_operations
    from dnas_ens.search.cost import search_facts
    from dnas_ens.search.run import run_search

    config, device = command.search, ranks.device
    require_operations(config.supernet.search_space.operations)
    data = ranks.after_first(lambda: load_configured_data(config.data, dry_run=command.dry_run))
    if command.dry_run:
        recipe = retrain_preset(config.preset, config.supernet.space).with_stem_of(config)
        facts, taken = search_facts(config, recipe, data, device=device)
        print_resolved(config, {**facts, **taken.facts(command.price_per_hour)})
        return
    require_same_on_all(ranks, data, search=config)
    with begin_run(command, config, data, ranks=ranks, command=typed) as run, resumable(run, typed):
        result = run_search(config, data, device=device, run=run, resume=command.resume)
        if run is None:
            return
        for member, index in enumerate(result.selected):
            print(f"member {member}: candidate {index}, {result.candidates[index]}")
        # The recipe's defaults come from the preset that config.json holds.
        print_next(run.path, "dnas_ens.retrain")
