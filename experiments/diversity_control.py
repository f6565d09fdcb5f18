"""Does lambda steer diversity? Distances, shared edges and predictions along the paths of a search.

    python experiments/diversity_control.py --workers 2

For every penalty and for R = 1 and R = 4 directions, over several seeds, on digits: Spearman's correlation of lambda
with D to the base and with the edges shared with the base, the mean |D - lambda|, the mean D between members
of equal lambda over lambda, and, of the discretised members with inherited weights, predictive disagreement,
predictive JS and shared errors on val. It stands beside EdgeNES, where lambda counts shared edges or weighs the
divergence to a base (published: Fashion-MNIST, one cell, 92.10 % at lambda = 0 and 86.4 to 90.6 % for lambda >= 5).
About 45 searches of one to two minutes of a CPU core each; finished ones are kept in OUTPUT.jsonl and not run again,
so that an interrupted study goes on and more seeds add to it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from studies.options import RESULTS
from studies.records import append_line, other_settings, read_lines
from studies.steering import rank_correlation

from dnas_ens.commands.parse import parse, run_main
from dnas_ens.config import SearchConfig, require
from dnas_ens.config.fields import to_dict, with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.run.files import with_ending
from dnas_ens.training.workers import worker_pool

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
}
NUM_MEMBERS = 4
#: Seeds below this one were looked at while the objective was chosen (experiments/LOG.md); those from it on were not.
FIRST_FRESH_SEED = 5
#: |D - lambda| is judged up to here.
JUDGED_LAMBDA = 0.7


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    seeds: int = 5
    """Seeds a setting."""
    epochs: int | None = None
    """Epochs a search; default: the preset's."""
    workers: int = 1
    """Searches side by side, each on one CPU core."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Which settings to run."""
    output: Path = RESULTS / "diversity-control-digits"
    """Where table, plot and figures go: OUTPUT.md, OUTPUT.png, OUTPUT.jsonl."""

    def __post_init__(self) -> None:
        for name in self.settings:
            require(name in SETTINGS, f"There is no setting {name!r}.", f"Choose from {', '.join(SETTINGS)}.")
        for name in ("seeds", "workers"):
            require(
                getattr(self, name) > 0, f"--{name} is {getattr(self, name)}.", f"Give --{name} 1 or more."
            )
        require(bool(self.settings), "No setting was given.", f"Choose from {', '.join(SETTINGS)}.")


def configuration(setting: str, seed: int, *, epochs: int | None, base: Path | None = None) -> SearchConfig:
    """Return the search of a setting and a seed."""
    fields = dict(SETTINGS[setting])
    config = search_preset("smoke", fields.pop("regime", "star"), base=base)
    if epochs is not None:
        fields["epochs"] = epochs
    return with_fields(config, seed=seed, **fields)


def run_one(setting: str, seed: int, epochs: int | None, bases: Path) -> dict[str, Any]:
    """Run one search and measure it."""
    import torch

    from dnas_ens.data import load_data
    from dnas_ens.metrics.diversity import evaluate_members
    from dnas_ens.run.files import write_json
    from dnas_ens.search.candidates import inherited_networks
    from dnas_ens.search.discretise import discretise
    from dnas_ens.search.draws import Draw
    from dnas_ens.search.loop import SearchLoop
    from dnas_ens.search.steering import diversity_curve, mixtures_at
    from dnas_ens.space.genotype import load_genotype
    from dnas_ens.training.prediction import predict_log_probs

    torch.set_num_threads(1)
    start = time.perf_counter()
    data = load_data("digits")
    given = base_file(setting, seed, bases)
    if given is not None and not given.exists():
        optimal = with_fields(search_preset("smoke", "optimal"), seed=seed)
        first = SearchLoop(optimal if epochs is None else with_fields(optimal, epochs=epochs), data)
        for _ in range(first.config.bilevel.epochs):
            first.run_epoch()
        write_json(given, first.star.base_genotype().to_dict())
    config = configuration(setting, seed, epochs=epochs, base=given)
    loop = SearchLoop(config, data, base=None if given is None else load_genotype(given))
    for _ in range(config.bilevel.epochs):
        scalars = loop.run_epoch()
    hyper, temperature = config.hypernetwork, loop.star.natural_temperature
    curve = diversity_curve(
        loop.star.hypernetwork,
        reference=loop.star.reference(),
        base=loop.star.base_genotype(),
        temperature=temperature,
        edges_per_node=config.candidates.edges_per_node,
    )
    shape = (hyper.directions, -1)
    lam, distance, shared = (
        np.array(values, dtype=float).reshape(shape)
        for values in (curve.lam, curve.distance_to_base, curve.shared_edges)
    )

    # Members: one a direction at half the range, or spread along the only path.
    if hyper.directions > 1:
        points = Draw(torch.full((NUM_MEMBERS,), hyper.max_lambda / 2), torch.arange(NUM_MEMBERS))
    else:
        spread = torch.linspace(0, hyper.max_lambda, NUM_MEMBERS)
        points = Draw(spread, torch.zeros(NUM_MEMBERS, dtype=torch.int64))
    mixtures = mixtures_at(loop.star.hypernetwork, points.lam, points.direction, temperature=temperature)
    genotypes = [
        discretise(mixture, loop.space, edges_per_node=config.candidates.edges_per_node)
        for mixture in mixtures
    ]
    probs = np.stack(
        [
            predict_log_probs(network, loop.val, augmentation=loop.augmentation).exp().numpy()
            for network in inherited_networks(
                loop.supernet, genotypes, loop.weight_half, augmentation=loop.augmentation
            )
        ]
    )
    predictive = evaluate_members(probs, loop.val.labels.numpy())
    between = np.array(curve.distance_between[1:])
    settings = to_dict(config)
    if given is not None:
        # Its folder belongs to this machine, not to the result.
        settings["hypernetwork"]["base"] = given.name
    return {
        "setting": setting,
        "seed": seed,
        "epochs": config.bilevel.epochs,
        "config": settings,
        "spearman_distance": rank_correlation(lam[0], distance),
        "spearman_shared": rank_correlation(lam[0], shared),
        "tracking_error": float(np.abs(distance - lam)[lam <= JUDGED_LAMBDA].mean()),
        "between_over_lambda": float((between / lam[0, 1:]).mean()) if len(between) else None,
        "between_over_lambda_min": float((between / lam[0, 1:]).min()) if len(between) else None,
        "different_genotypes": len({genotype.canonical() for genotype in genotypes}),
        "disagreement": predictive["disagreement"],
        "predictive_js": predictive["predictive_js"],
        "shared_error_fraction": predictive["shared_error_fraction"],
        "average_member_nll": predictive["average_member_nll"],
        "ensemble_nll": predictive["nll"],
        "val_accuracy": scalars["val_accuracy"],
        "entropy": scalars["entropy"],
        "seconds": time.perf_counter() - start,
        "lam": lam[0].tolist(),
        "distance": distance.tolist(),
        "shared": shared.tolist(),
        "between": curve.distance_between,
    }


COLUMNS = {
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
}


def is_done(runs: list[dict[str, Any]], setting: str, seed: int, study: Study, bases: Path) -> bool:
    """Say whether a search was run before, and refuse to mix it with one of another configuration.

    Raises:
        UserError: If it was run with other settings.
    """
    wanted = to_dict(configuration(setting, seed, epochs=study.epochs, base=base_file(setting, seed, bases)))
    for run in runs:
        if (run["setting"], run["seed"]) == (setting, seed):
            # Where the base's file lies is no setting.
            run["config"]["hypernetwork"]["base"] = wanted["hypernetwork"]["base"]
            if run["config"] != wanted:
                raise other_settings(
                    with_ending(study.output, ".jsonl"), f"{setting}, seed {seed},", "output"
                )
            return True
    return False


def run_task(task: tuple[str, int, int | None, Path]) -> dict[str, Any]:
    """Run one search, its arguments packed for a pool."""
    return run_one(*task)


def base_file(setting: str, seed: int, bases: Path) -> Path | None:
    """Return where the given base of a setting lies: for EdgeNES's two stages that of an ordinary search."""
    two_stages = SETTINGS[setting].get("regime") == "hypernet"
    return bases / f"optimal-{seed}.json" if two_stages else None


def table(runs: list[dict[str, Any]]) -> str:
    """Return mean ± standard deviation over seeds of every setting as Markdown."""
    from dnas_ens.metrics.significance import mean_and_deviation

    lines = [
        "| setting | seeds | " + " | ".join(COLUMNS.values()) + " |",
        "|:--" * 2 + "|--:" * len(COLUMNS) + "|",
    ]
    groups = []
    for setting in SETTINGS:
        of_setting = [run for run in runs if run["setting"] == setting]
        fresh = [run for run in of_setting if run["seed"] >= FIRST_FRESH_SEED]
        groups.append((setting, [run for run in of_setting if run not in fresh]))
        groups.append((f"{setting}, fresh seeds", fresh))
    for setting, chosen in groups:
        if not chosen:
            continue
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in chosen if run[column] is not None]
            cells.append(mean_and_deviation(values, digits=3) if values else "")
        lines.append(f"| {setting} | {len(chosen)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw D to the base and shared edges against lambda, a column a setting, a line a seed and direction."""
    from dnas_ens.figures.style import BLUE, MUTED_COLOUR, VERMILION, font, new_figure, style_axis

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
        name = (
            setting.replace("+", "\n+ ")
            .replace(" without", "\nwithout")
            .replace(" (", "\n(")
            .replace(", ", "\n")
        )
        top.set_title(name, fontproperties=font(9, bold=True), loc="left")
        top.set_ylim(0, 1)
        bottom.set_ylim(0, 17)
        bottom.set_yticks(range(0, 17, 4))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(
        Study,
        argv,
        prog="python experiments/diversity_control.py",
        description=__doc__ or "",
        default=Study(),
    )
    from studies.report import provenance

    from dnas_ens.run.machine import environment

    env = environment(["python", "experiments/diversity_control.py", *argv])
    log = with_ending(study.output, ".jsonl")
    done = read_lines(log)
    bases = study.output.parent / f"{study.output.name}-bases"
    missing = [
        (setting, seed)
        # Seed by seed, so that an interrupted study has all settings.
        for seed in range(study.seeds)
        for setting in study.settings
        if not is_done(done, setting, seed, study, bases)
    ]
    tasks = [(setting, seed, study.epochs, bases) for setting, seed in missing]
    with worker_pool(study.workers) as pool:
        for run in pool.map(run_task, tasks):
            run["revision"] = env["git_revision"]
            done.append(run)
            append_line(log, run)
            print(
                f"{run['setting']}, seed {run['seed']}: Spearman {run['spearman_distance']:.3f} / "
                f"{run['spearman_shared']:.3f}, error {run['tracking_error']:.3f}, {run['seconds']:.0f} s",
                flush=True,
            )
    revisions = sorted({str(run.get("revision", "not noted")) for run in done})
    text = (
        "# Does lambda steer diversity? (digits, preset smoke)\n\n"
        + provenance(env, hardware="no GPU, one thread a search")
        + " Runs that were finished before are kept; the command is the last one's. Revisions of all runs: "
        f"{', '.join(revisions)}.\n\n"
        "Mean ± standard deviation over seeds, 21 values of lambda on every direction. From "
        "*disagreement* on: the discretised networks at half the "
        f"range on each direction (R=1: {NUM_MEMBERS} points along the path), with inherited weights, on val. "
        "For edge-overlap lambda counts shared edges, so its correlations have the other sign; for js-base it weighs "
        "the divergence. For neither it is a distance, and abs(D−λ) means nothing.\n\n" + table(done)
    )
    with_ending(study.output, ".md").write_text(text)
    plot(done, with_ending(study.output, ".png"))
    print(table(done))
    print(f"wrote {study.output}.md, .png and .jsonl")


if __name__ == "__main__":
    sys.exit(run_main(main, go_on="run the same command again to go on"))
