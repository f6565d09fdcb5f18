"""Command: ``python -m dnas_ens.retrain R``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from dnas_ens.commands.options import (
    EarlyOptions,
    data_of_run,
    file_sections,
    noted,
    on_every_rank,
    print_next,
    print_resolved,
    require_same_on_all,
    resumable,
)
from dnas_ens.commands.parse import parse, peek
from dnas_ens.config import RetrainConfig
from dnas_ens.config.fields import override, to_dict, with_fields
from dnas_ens.config.presets import retrain_preset
from dnas_ens.config.settings import Engine, Preset
from dnas_ens.run.ranks import Ranks, as_typed
from dnas_ens.space.spaces import SpaceName

PROG = "python -m dnas_ens.retrain"


@dataclass(frozen=True, kw_only=True)
class RetrainCommand:
    """Options of the command."""

    run_dir: Positional[Path]
    """Run folder of a search."""
    recipe: OmitArgPrefixes[RetrainConfig]
    preset: Preset | None = None
    """Scale; sets the defaults of the recipe. Default: the search's own."""
    config: Path | None = None
    """JSON file of the recipe, or a run's config.json; flags beat it."""
    data: str | None = None
    """Where the images of the run are now, if they have moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    sync_batch_norm: bool = False
    """Of several processes under torchrun: take BatchNorm's statistics over the images of all of them."""
    workers: int = 0
    """Members trained side by side: on a CPU each on its share of the cores, 0 for one a core; on a GPU each on a
    stream of its own, 0 for one."""
    engine: Engine = "local"
    """local, or ray (pip install 'dnas_ens[cluster]'): tasks of the Ray cluster that RAY_ADDRESS names, else of a Ray
    of this machine; --workers then share a machine's threads, or a GPU."""
    resume: bool = False
    """Go on with an interrupted training."""
    members: int = 0
    """Members to train, in the order of the search's ranking; 0 for those it selected. An ensemble grows without
    another search where more are asked for with --resume."""
    dry_run: bool = False
    """Print the resolved recipe and what it will take, then stop."""
    price_per_hour: float | None = None
    """What an hour of all machines costs, for the price that --dry-run prints."""


def main(argv: list[str]) -> None:
    """Run the command."""
    early = peek(EarlyOptions, argv, prog=PROG)
    preset, space, stem_stride = _searched_with(argv)
    recipe = with_fields(retrain_preset(early.preset or preset, space), stem_stride=stem_stride)
    recipe = override(recipe, file_sections(early.config, only="retrain").get("retrain", {}))
    command = parse(
        RetrainCommand,
        argv,
        prog=PROG,
        description="Train the members a search has chosen from scratch, each with seeds of its own.",
        default=RetrainCommand(run_dir=tyro.MISSING, recipe=recipe),
    )
    on_every_rank(_retrain, command, as_typed(PROG, argv))


def _retrain(command: RetrainCommand, ranks: Ranks, typed: list[str]) -> None:
    from dnas_ens.run.folder import RunFolder
    from dnas_ens.space.genotype import Genotype, ranked_genotypes, read_genotypes
    from dnas_ens.training.cost import Fanout, estimate_members
    from dnas_ens.training.members import train_members
    from dnas_ens.training.trainer import MemberTraining

    device, recipe = ranks.device, command.recipe
    opened: AbstractContextManager[RunFolder | None] = nullcontext()
    if ranks.first:
        opened = RunFolder.open(command.run_dir, command=typed)
    with opened as run, resumable(run, typed):
        chosen = []
        if run is not None:
            chosen = ranked_genotypes(read_genotypes(run.file("genotypes.json")), command.members or None)
        genotypes = [Genotype.from_dict(one) for one in ranks.shared([one.to_dict() for one in chosen])]
        data = data_of_run(run, moved_to=command.data, ranks=ranks)
        if command.dry_run:
            training = MemberTraining(genotypes[0], data, recipe, index=0)
            steps = training.steps_per_epoch * recipe.epochs_in_all
            facts = {"members": len(genotypes), "parameters_a_member": training.num_parameters, "steps_a_member": steps}
            fanout = Fanout(workers=command.workers, engine=command.engine, device=device)
            taken = estimate_members(genotypes, data, recipe, fanout)
            print_resolved(recipe, {**facts, **taken.facts(command.price_per_hour)})
            return
        require_same_on_all(ranks, data, retrain=recipe)
        if run is not None:
            run.record_recipe(to_dict(recipe), resume=command.resume)
            run.write_env(noted(ranks, data))
        ensemble = train_members(
            genotypes,
            data,
            recipe,
            device=device,
            folder=None if run is None else run.path,
            workers=command.workers,
            engine=command.engine,
        )
        if run is None:
            return
        networks_each = recipe.cycles + 1
        for number in range(len(genotypes) * networks_each):
            member = run.read_json(f"members/{number}/member.json")
            index, cycle = divmod(number, networks_each)
            print(
                f"member {index}{f', cycle {cycle}' if cycle else ''}: val accuracy "
                f"{100 * member['val_accuracy']:.2f} %, val NLL {member['val_nll']:.4f}, "
                f"{member['parameters']:,} parameters, {member['wall_seconds']:.0f} s"
            )
        if networks_each > 1:
            last = len(ensemble.members) // len(genotypes)
            print(f"chosen on val: of each member the last {last} of {networks_each} networks")
        print_next(run.path, "dnas_ens.evaluate")


def _searched_with(argv: list[str]) -> tuple[str, SpaceName, int | None]:
    """Return preset, space and stride of the stem of the search in the run folder that the command line names."""
    from dnas_ens.run.files import read_json

    for argument in argv:
        path = Path(argument) / "config.json"
        if not argument.startswith("-") and path.is_file():
            config = read_json(path)
            search = config.get("search") if isinstance(config, dict) else None
            # Opening the folder reports what is wrong with it.
            if isinstance(search, dict):
                supernet = search.get("supernet")
                supernet = supernet if isinstance(supernet, dict) else {}
                space: SpaceName = "darts" if supernet.get("space") == "darts" else "efficient"
                return str(search.get("preset", "smoke")), space, supernet.get("stem_stride")
    return "smoke", "efficient", None
