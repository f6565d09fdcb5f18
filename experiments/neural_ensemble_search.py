"""Neural ensemble search with a hypernetwork: is an ensemble of searched cells better than one cell or random ones?

    python experiments/neural_ensemble_search.py
    python experiments/neural_ensemble_search.py --data fashion-mnist --limit-train 10000 --seeds 1

The comparison that EdgeNES published: one cell is searched, two are stacked and trained. DARTS (one search, its cell
trained once), Random (one random cell), DartsEns (M independent DARTS searches), Random-NES (M random cells),
RandomD-NES (M random deviations of the DARTS cell, as far from it as the hypernetwork's members), EdgeNES (the regime
"hypernet" on the DARTS cell) and ours (the regime "star", base and directions learnt together), with what searching
cost each. The published table beside it is EdgeNES's on CIFAR-100. Per seed M + 2 searches and 5 M trainings; the
defaults take about fifteen minutes on one core for three seeds. What is finished is kept: run it again after an
interruption. The published scale needs a GPU:

    python experiments/neural_ensemble_search.py --data cifar100 --search-channels 16 --search-epochs 50 --epochs 100
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dnas_ens.commands.options import load_configured_data
from dnas_ens.commands.parse import parse
from dnas_ens.compare import tables
from dnas_ens.compare.budgets import options_table
from dnas_ens.compare.figure import plot_frontiers
from dnas_ens.compare.methods.comparison import Comparison, Result
from dnas_ens.compare.methods.random_cells import random_nes, random_pool_of
from dnas_ens.compare.methods.searched import darts, darts_deviations, hypernet, ours
from dnas_ens.compare.report import write_results
from dnas_ens.compare.study import RESULTS, require_positive, run_script
from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.config.fields import to_dict, with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.config.settings import Engine
from dnas_ens.evaluate.tables import to_markdown
from dnas_ens.run.files import with_ending
from dnas_ens.run.folder import RunFolder
from dnas_ens.run.machine import resolve_device
from dnas_ens.search.run import run_search
from dnas_ens.training.members import train_members

PROG = "python experiments/neural_ensemble_search.py"
STUDY = "neural-ensemble-search"
WAITING = f"{PROG} --data cifar100 --search-channels 16 --search-epochs 50 --epochs 100"
#: EdgeNES on CIFAR-100, accuracy % and GPU-hours of searching, by our rows in their order.
PUBLISHED: tuple[tuple[str, str], ...] = (
    ("46.8 ± 1.7", "1.2"),
    ("", ""),
    ("48.2 ± 1.5", "3.6"),
    ("46.9 ± 5.2", "0"),
    ("47.7 ± 3.4", "1.2"),
    ("48.1 ± 1.7", "2.1"),
    ("", ""),
)
COLUMNS = (
    "name",
    "accuracy",
    "calibrated_nll",
    "disagreement",
    "parameters",
    "search_cpu_seconds",
    "cpu_seconds",
    "published accuracy %",
    "published search GPU-hours",
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    data: str = "digits"
    """digits, fashion-mnist, mnist, cifar10, cifar100, svhn, or a path to a folder of images."""
    data_root: Path | None = None
    """Where named data sets are kept; default: $DNAS_ENS_DATA, else ~/.cache/dnas_ens/data."""
    limit_train: int | None = None
    """Training images, a stratified subset; default: all."""
    seeds: int = 3
    """Seeds, each with its own searches and trainings."""
    members: int = 3
    """M, members of an ensemble. The published DartsEns costs three DARTS searches."""
    search_cells: int = 1
    """Cells of the supernet, as published."""
    cells: int = 2
    """Cells of the trained networks, as published."""
    edges_per_node: int = 1
    """Incoming edges a node keeps, as published."""
    search_channels: int = 8
    """C of the supernet."""
    channels: int = 16
    """C of the trained networks."""
    search_epochs: int = 20
    """Epochs of a search."""
    epochs: int = 30
    """Epochs of a training."""
    batch_size: int = 64
    """Images a step, of searches and trainings."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 1
    """Members trained side by side on a CPU; 0 for one a core."""
    engine: Engine = "local"
    """local, or ray: tasks of the Ray cluster that RAY_ADDRESS names, else of a Ray of this machine."""
    run_dir: Path | None = None
    """Holds a run folder a seed; default: runs/neural-ensemble-search-DATA."""
    output: Path | None = None
    """Where the results go, OUTPUT.md, .csv, .json, .png; default: runs/results/neural-ensemble-search-DATA."""

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "members", "epochs", "search_epochs")

    @property
    def path(self) -> Path:
        """Where the results go, without ending."""
        return self.output or RESULTS / f"{STUDY}-{Path(self.data).name}"

    def search(self, seed: int) -> SearchConfig:
        """Return our search with a seed."""
        return with_fields(
            search_preset("smoke", "star", space="darts"),
            seed=seed,
            data=self.data,
            data_root=self.data_root,
            limit_train=self.limit_train,
            num_cells=self.search_cells,
            channels=self.search_channels,
            directions=self.members,
            epochs=self.search_epochs,
            warmup_epochs=min(SearchConfig().bilevel.warmup_epochs, self.search_epochs - 1),
            batch_size=self.batch_size,
            members=self.members,
            edges_per_node=self.edges_per_node,
        )

    def recipe(self, seed: int) -> RetrainConfig:
        """Return how everything is trained with a seed."""
        return replace(
            retrain_preset("smoke", "darts"),
            num_cells=self.cells,
            channels=self.channels,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
        )


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    device = resolve_device(study.device)
    command = [*PROG.split(), *argv]
    comparisons, results, environments = [], [], []
    for seed in range(study.seeds):
        comparison, started = searched(study, seed, device=device, command=command)
        comparisons.append(comparison)
        results.append(results_of(comparison))
        environments += started
        print(f"seed {seed} is finished", flush=True)
    report(study, comparisons, results, environments)


def searched(
    study: Study, seed: int, *, device: torch.device, command: list[str]
) -> tuple[Comparison, list[dict[str, Any]]]:
    """Search and train our ensemble of a seed in its run folder, or take what is finished.

    Returns:
        The run, ready to be compared, and its env.json.
    """
    config, recipe = study.search(seed), study.recipe(seed)
    data = load_configured_data(config.data)
    root = study.run_dir or Path("runs") / f"{STUDY}-{Path(study.data).name}"
    with RunFolder.create(root / f"seed-{seed}", config=to_dict(config), command=command, resume=True) as run:
        run.record_recipe(to_dict(recipe), resume=True)
        run.write_env({"device": str(device), "data": data.describe()})
        run.write_json("splits.json", {**data.describe(), "indices": data.splits})
        if not run.file("genotypes.json").exists():
            run_search(config, data, device=device, run=run, resume=True)
        comparison = Comparison(
            folder=run.path,
            search=config,
            found=run.read_json("genotypes.json"),
            data=data,
            recipe=recipe,
            device=device,
            workers=study.workers,
            engine=study.engine,
        )
        train_members(
            comparison.genotypes,
            data,
            recipe,
            device=device,
            folder=run.path,
            workers=study.workers,
            engine=study.engine,
        )
        return comparison, run.read_json("env.json")


def results_of(comparison: Comparison) -> list[Result]:
    """Return the rows of the study, in the order of the published table, ours last."""
    single, ensemble = darts(comparison)
    pool = random_pool_of(comparison, comparison.num_members)
    trained = comparison.train("random-cells", pool)
    random = Result(
        name="one random cell (Random)",
        predictions=trained.predictions.of_members([0]),
        networks=1,
        cpu_seconds=trained.seconds[0],
    )
    return [
        single,
        random,
        ensemble,
        random_nes(comparison, trained),
        darts_deviations(comparison),
        next(hypernet(comparison)),
        replace(next(ours(comparison)), name="star hypernetwork (ours)"),
    ]


def report(
    study: Study,
    comparisons: Sequence[Comparison],
    results: Sequence[Sequence[Result]],
    environments: Sequence[dict[str, Any]],
) -> None:
    """Print and write the table with the published one beside it, and draw the frontier."""
    rows = [tables.rows_of(of_seed, seed=seed) for seed, of_seed in enumerate(results)]
    shown = [
        {**row, "published accuracy %": accuracy, "published search GPU-hours": hours}
        for row, (accuracy, hours) in zip(tables.over_seeds(rows), PUBLISHED, strict=True)
    ]
    ours_first = [[of_seed[-1], *of_seed[:-1]] for of_seed in results]
    data = comparisons[0].data
    text = (
        f"# Neural ensemble search: {data.name}\n\n"
        + tables.provenance(environments, device=str(comparisons[0].device))
        + scale(study, comparisons)
        + to_markdown(shown, COLUMNS)
        + "\n"
        + tables.differences(ours_first)
    )
    print(text, end="")
    flat = [row for of_seed in rows for row in of_seed]
    write_results(
        study.path,
        text,
        rows=flat,
        columns=tables.FILE_COLUMNS,
        document={"rows": flat, "options": options_table(results, range(len(results)))},
    )
    plot_frontiers(
        ours_first,
        budgets={"our total cost": sum(of_seed[-1].cpu_seconds for of_seed in results) / len(results)},
        title=f"What a total training cost buys: {data.name}, {study.search_cells} cell searched, "
        f"{study.cells} stacked",
        path=with_ending(study.path, ".png"),
    )
    print(f"wrote {study.path}.md, .csv, .json and .png")


def scale(study: Study, comparisons: Sequence[Comparison]) -> str:
    """Say what was run, what the columns hold, and what is still to be run."""
    data = comparisons[0].data
    parameters = [count for comparison in comparisons for count in comparison.members.predictions.parameters]
    published = study.data == "cifar100" and study.limit_train is None
    text = (
        f"**Scale that was run: {data.name}, {len(data.train)} training, {len(data.val)} val and {len(data.test)} test "
        f"images of {data.image_size} x {data.image_size}; {study.search_cells} cell searched with "
        f"C={study.search_channels} for {study.search_epochs} epochs, {study.cells} stacked with C={study.channels} "
        f"(our members have {min(parameters):,} to {max(parameters):,} parameters) and trained for {study.epochs} "
        f"epochs, M={study.members} members, {study.edges_per_node} edge a node.** Seeds "
        f"{', '.join(str(seed) for seed in range(study.seeds))}, each with its own searches, initialisations, orders "
        "and augmentations; split seed 0. Mean ± standard deviation over seeds. *search cpu seconds* hold every search "
        "a row needs, *cpu seconds* all its training as well; temperatures are fitted on val.\n\n"
        "Beside it EdgeNES's published table on CIFAR-100: one cell searched, two stacked. Its numbers of epochs, "
        "channels and members are not in the table; M=3 is read off from DartsEns costing three DARTS searches.\n\n"
    )
    if not published:
        text += (
            f"This is **not** the published scale, and figures of other images cannot be compared with it. Waiting for "
            f"a GPU: `{WAITING}` (epochs and channels of ours, for want of published ones).\n\n"
        )
    return text


if __name__ == "__main__":
    run_script(main)
