"""Does lambda steer diversity? Distances, shared edges and predictions along the paths of a search.

    python experiments/diversity_control.py --workers 2

For every penalty and for R = 1 and R = 4 directions, over several seeds, on digits: Spearman's correlation of lambda
with D to the base and with the edges shared with the base, the mean |D - lambda|, the mean D between members
of equal lambda over lambda, and, of the discretised members with inherited weights, predictive disagreement,
predictive JS and shared errors on val. It stands beside EdgeNES, where lambda counts shared edges or weighs the
divergence to a base (published: Fashion-MNIST, one cell, 92.10 % at lambda = 0 and 86.4 to 90.6 % for lambda >= 5).
About 45 searches of one to two minutes of a CPU core each; finished ones are kept in OUTPUT.jsonl and not run again,
so that an interrupted study continues and more seeds add to it.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from studies.search_studies import inherited, steering

from dnas_ens.commands.parse import parse
from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.report import Column, markdown_table, provenance
from dnas_ens.compare.study import (
    RESULTS,
    require_positive,
    run_missing,
    run_script,
    tasks_of,
    write_study,
)
from dnas_ens.config import SearchConfig, require
from dnas_ens.config.fields import to_dict, with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.config.settings import Engine
from dnas_ens.data import ImageData, load_data
from dnas_ens.figures.style import BLUE, MUTED_COLOUR, VERMILION, font, new_figure, style_axis
from dnas_ens.metrics.diversity import evaluate_members
from dnas_ens.run.files import with_ending, write_json
from dnas_ens.run.machine import environment
from dnas_ens.search.family import Points
from dnas_ens.search.loop import SearchLoop
from dnas_ens.space.genotype import Genotype, load_genotype
from dnas_ens.training.workers import worker_pool

PROG = "python experiments/diversity_control.py"
#: As the objective was before operations were balanced.
UNBALANCED = {"operation_balance": (0.0, 0.0)}
#: Directions of the star in this study, as the fields each setting changes.
SETTINGS: dict[str, dict[str, Any]] = {
    "js-pairwise, balanced operations, R=4": {"directions": 4},
    "js-pairwise, R=4": {"directions": 4, **UNBALANCED},
    "js-pairwise, R=1": {"directions": 1, **UNBALANCED},
    "js-pairwise without commitment, R=4": {"directions": 4, "commitment": (0.0, 0.0), **UNBALANCED},
    "js-predictive, R=4": {"directions": 4, "penalty": "js-predictive", **UNBALANCED},
    "js-pairwise+js-predictive, R=4": {"directions": 4, "penalty": "js-pairwise+js-predictive", **UNBALANCED},
    "none, R=4": {"directions": 4, "penalty": "none", **UNBALANCED},
    "js-base (EdgeNES v1), R=1": {"regime": "js"},
    "edge-overlap (EdgeNES v2), R=1": {"regime": "hypernet"},
    "hard paths in the efficient space, R=5": {"space": "efficient"},
}
NUM_MEMBERS = 4
#: Seeds below this one were looked at while the objective was chosen (docs/log.md); those from it on were not.
FIRST_FRESH_SEED = 5
COLUMNS = {
    field: Column(heading, digits=3)
    for field, heading in {
        "spearman_distance": "Spearman(λ, D to base)",
        "spearman_shared": "Spearman(λ, shared edges)",
        "tracking_error": "mean abs(D−λ), λ ≤ 0.7",
        "between_over_lambda": "D between / λ",
        "between_over_lambda_min": "its minimum",
        "disagreement": "disagreement",
        "predictive_js": "predictive JS",
        "shared_error_fraction": "shared errors",
        "average_member_nll": "member NLL",
        "ensemble_nll": "ensemble NLL",
        "val_accuracy": "relaxed accuracy",
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    seeds: int = 5
    """Seeds a setting."""
    epochs: int | None = None
    """Epochs a search; default: the preset's."""
    workers: int = 1
    """Searches side by side, each on one CPU core."""
    engine: Engine = "local"
    """local, or ray: tasks of the Ray cluster that RAY_ADDRESS names, else of a Ray of this machine."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Which settings to run."""
    output: Path = RESULTS / "diversity-control-digits"
    """Where table, plot and figures go: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl."""

    def __post_init__(self) -> None:
        for name in self.settings:
            require(name in SETTINGS, f"There is no setting {name!r}.", f"Choose from {', '.join(SETTINGS)}.")
        require_positive(self, "seeds", "workers")
        require(bool(self.settings), "No setting was given.", f"Choose from {', '.join(SETTINGS)}.")

    @property
    def bases(self) -> Path:
        """Where the given bases of EdgeNES's two stages are."""
        return self.output.parent / f"{self.output.name}-bases"

    def base_file(self, setting: str, seed: int) -> Path | None:
        """Return where the given base of a setting is, that of an ordinary search; None where it is learnt."""
        two_stages = SETTINGS[setting].get("regime") == "hypernet"
        length = "" if self.epochs is None else f"-{self.epochs}-epochs"
        return self.bases / f"optimal-{seed}{length}.json" if two_stages else None

    def configuration(self, setting: str, seed: int) -> SearchConfig:
        """Return the search of a setting and a seed."""
        fields = dict(SETTINGS[setting])
        regime, space = fields.pop("regime", "star"), fields.pop("space", "darts")
        config = search_preset("smoke", regime, base=self.base_file(setting, seed), space=space)
        if self.epochs is not None:
            fields["epochs"] = self.epochs
        return with_fields(config, seed=seed, **fields)

    def settings_of(self, record: Record) -> Record:
        """Return the configuration that a record must have."""
        if record["setting"] not in SETTINGS:
            return {"config": None}
        return {"config": stored(self.configuration(record["setting"], record["seed"]))}


def stored(config: SearchConfig) -> Record:
    """Return a configuration as it is kept: without the folder of the given base, which is not a setting."""
    fields = to_dict(config)
    if config.hypernetwork.base is not None:
        fields["hypernetwork"]["base"] = config.hypernetwork.base.name
    return fields


def searched(
    config: SearchConfig, data: ImageData, base: Genotype | None = None
) -> tuple[SearchLoop, dict[str, float]]:
    """Run a search; return it with the scalars of its last epoch."""
    loop = SearchLoop(config, data, base=base)
    for _ in range(config.bilevel.epochs):
        scalars = loop.run_epoch()
    return loop, scalars


def run_one(study: Study, setting: str, seed: int) -> Record:
    """Run one search and measure it."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = load_data("digits")
    given = study.base_file(setting, seed)
    if given is not None and not given.exists():
        optimal = search_preset("smoke", "optimal")
        first, _ = searched(with_fields(optimal, seed=seed, epochs=study.epochs or optimal.bilevel.epochs), data)
        write_json(given, first.family.base_genotype().to_dict())
    config = study.configuration(setting, seed)
    loop, scalars = searched(config, data, base=None if given is None else load_genotype(given))
    hyper = config.hypernetwork
    steered = steering(loop)

    # Members: one a direction at half the range, or spread along the only path.
    if hyper.directions > 1:
        points = Points(torch.full((NUM_MEMBERS,), hyper.max_lambda / 2), torch.arange(NUM_MEMBERS))
    else:
        spread = torch.linspace(0, hyper.max_lambda, NUM_MEMBERS)
        points = Points(spread, torch.zeros(NUM_MEMBERS, dtype=torch.int64))
    with torch.no_grad():
        mixtures = loop.family.distributions(points)
    genotypes = loop.family.discretised(mixtures)
    (probs,) = inherited(loop, genotypes, [loop.val])
    predictive = evaluate_members(probs, loop.val.labels.numpy())
    ratios = np.array(steered["between"][1:]) / np.array(steered["lam"][1:]) if steered["between"] else None
    return {
        "setting": setting,
        "seed": seed,
        "epochs": config.bilevel.epochs,
        "config": stored(config),
        **steered,
        "between_over_lambda": None if ratios is None else float(ratios.mean()),
        "between_over_lambda_min": None if ratios is None else float(ratios.min()),
        "different_genotypes": len({genotype.canonical() for genotype in genotypes}),
        "disagreement": predictive["disagreement"],
        "predictive_js": predictive["predictive_js"],
        "shared_error_fraction": predictive["shared_error_fraction"],
        "average_member_nll": predictive["average_member_nll"],
        "ensemble_nll": predictive["nll"],
        "val_accuracy": scalars["val_accuracy"],
        "entropy": scalars["entropy"],
        "seconds": time.perf_counter() - start,
        "revision": environment([])["git_revision"],
    }


def table(runs: list[Record]) -> str:
    """Return mean ± standard deviation over seeds of every setting as Markdown, fresh seeds in rows of their own."""
    lines = []
    for setting in SETTINGS:
        of_setting = [run for run in runs if run["setting"] == setting]
        fresh = [run for run in of_setting if run["seed"] >= FIRST_FRESH_SEED]
        seen = [run for run in of_setting if run not in fresh]
        for name, chosen in ((setting, seen), (f"{setting}, fresh seeds", fresh)):
            if chosen:
                cells = [column.cell(run[field] for run in chosen) for field, column in COLUMNS.items()]
                lines.append([name, str(len(chosen)), *cells])
    header = ["setting", "seeds", *(column.heading for column in COLUMNS.values())]
    return markdown_table(header, lines, text_columns=(0, 1))


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw D to the base and shared edges against lambda, a column a setting, a line a seed and direction."""
    settings = [name for name in SETTINGS if any(run["setting"] == name for run in runs)]
    figure = new_figure(max(175 * len(settings), 350), 400)
    axes = figure.subplots(2, len(settings), squeeze=False, sharey="row")
    for column, setting in enumerate(settings):
        top, bottom = axes[0, column], axes[1, column]
        chosen = [run for run in runs if run["setting"] == setting]
        for run in chosen:
            for distance, shared in zip(run["distance"], run["shared"], strict=True):
                top.plot(run["lam"], distance, color=BLUE, alpha=0.4, linewidth=1)
                bottom.plot(run["lam"], shared, color=VERMILION, alpha=0.4, linewidth=1)
        counts_edges = "edge-overlap" in setting
        end = chosen[0]["lam"][-1]
        target = top if not counts_edges else bottom
        target.plot([0, end], [0, end], color=MUTED_COLOUR, linestyle="--", linewidth=1)
        style_axis(top, y_label="distance D to the base" if column == 0 else "")
        x_label = "λ (edges to share)" if counts_edges else "λ"
        style_axis(bottom, x_label=x_label, y_label="edges shared with the base" if column == 0 else "")
        name = setting.replace("+", "\n+ ").replace(" without", "\nwithout").replace(" (", "\n(").replace(", ", "\n")
        top.set_title(name, fontproperties=font(9, bold=True), loc="left")
        top.set_ylim(0, 1)
        bottom.set_ylim(0, 17)
        bottom.set_yticks(range(0, 17, 4))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    log = with_ending(study.output, ".jsonl")
    records = Records(log, key=("setting", "seed"), settings=study.settings_of)
    with worker_pool(study.workers, engine=study.engine) as pool:
        run_missing(
            records,
            tasks_of(functools.partial(run_one, study), study.settings, range(study.seeds)),
            pool=pool,
            said=lambda run: (
                f"{run['setting']}, seed {run['seed']}: Spearman {run['spearman_distance']:.3f} / "
                f"{run['spearman_shared']:.3f}, error {run['tracking_error']:.3f}, {run['seconds']:.0f} s"
            ),
        )
    done = list(records)
    revisions = sorted({str(run.get("revision", "not noted")) for run in done})
    text = (
        "# Does lambda steer diversity? (digits, preset smoke)\n\n"
        + provenance(environment([*PROG.split(), *argv]), hardware="no GPU, one thread a search")
        + " Runs that were finished before are kept; the command is the last one's. Revisions of all runs: "
        f"{', '.join(revisions)}.\n\n"
        "Mean ± standard deviation over seeds, 21 values of lambda on every direction. From "
        "*disagreement* on: the discretised networks at half the "
        f"range on each direction (R=1: {NUM_MEMBERS} points along the path), with inherited weights, on val. "
        "For edge-overlap lambda counts shared edges, so its correlations have the other sign; for js-base it weighs "
        "the divergence. For neither it is a distance, and abs(D−λ) means nothing.\n\n" + table(done)
    )
    write_study(study.output, text, figure=lambda path: plot(done, path), shown=table(done))


if __name__ == "__main__":
    run_script(main)
