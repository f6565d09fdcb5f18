"""What does sharing BatchNorm statistics between the slices of one pass do to a search?

    OMP_NUM_THREADS=1 python experiments/batchnorm_sharing.py --workers 2

The search evaluates its m drawn members on m slices of a batch in one pass (``--passes slices``), and BatchNorm
normalises all of them with statistics of the whole batch, a mixture over m architectures. ``--passes separate`` is the
exact way: m passes, each with statistics of its own member, taken over a slice alone (16 of 64 images in the presets).
For every seed one search of each from the same initial weights, images and draws, and then: how lambda steers (as in
diversity_control.py), whether val NLL with inherited weights ranks genotypes as val NLL after training from scratch
does (Kendall's tau, over random genotypes that both searches share and over those together with candidates of
the search), relaxed accuracy, discretisation gap and seconds. Test images are never read. Within the pool random
genotypes and candidates are two groups, which the supernet has trained unequally; so tau is given within each as well.

Cost with ``--data digits`` and a pool of 16: on one core about 45 s and 95 s for the two searches of a seed and 9 to
14 s for each of its 24 trainings, 20 minutes for three seeds. With ``--data fashion-mnist`` (preset micro) hours;
``--limit-train 5000 --candidate-recipe-epochs 4`` makes it two.
Finished searches with their scores, and finished trainings, are kept in OUTPUT.jsonl and not run again, so that an
interrupted study continues and more seeds add to it; an interrupted search restarts.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from studies.search_studies import (
    JUDGED_LAMBDA,
    PRESETS,
    SearchStudy,
    load,
    run_units,
    steering,
    training_tasks,
)

from dnas_ens.baselines import random_pool
from dnas_ens.commands.parse import parse
from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.report import Column, markdown_table, provenance
from dnas_ens.compare.study import Task, run_script, write_study
from dnas_ens.config import SearchConfig, require
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.space.genotype import Genotype

if TYPE_CHECKING:
    from dnas_ens.search.candidates import Candidate
    from dnas_ens.search.loop import SearchLoop

PROG = "python experiments/batchnorm_sharing.py"
SETTINGS = ("slices", "separate")
#: Seeds below which the verdict says that they are few.
MANY_SEEDS = 10
DECIMALS = 3
MEASURES = {
    "tau_pool": "Kendall's τ, pool",
    "tau_random": "Kendall's τ, random genotypes",
    "tau_searched": "Kendall's τ, candidates",
    "spearman_distance": "Spearman(λ, D to base)",
    "spearman_shared": "Spearman(λ, shared edges)",
    "tracking_error": f"mean abs(D−λ), λ ≤ {JUDGED_LAMBDA}",
    "relaxed_accuracy": "relaxed val accuracy",
    "discretisation_gap": "discretisation gap",
    "random_supernet_nll": "supernet val NLL, random genotypes",
    "searched_supernet_nll": "supernet val NLL, candidates",
    "searched_retrained_nll": "retrained val NLL, candidates",
    "cpu_seconds": "CPU seconds of the search",
}


@dataclass(frozen=True, kw_only=True)
class Study(SearchStudy):
    """Options of the study."""

    name = "batchnorm-sharing"
    first_setting = SETTINGS[0]

    pool: int = 16
    """P, genotypes that are ranked in each search: random ones and candidates of the search."""
    random_genotypes: int | None = None
    """How many of them are random, the same in both settings; default: half."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            2 <= self.num_random < self.pool,
            f"{self.num_random} random genotypes of a pool of {self.pool} leave nothing to rank or to compare with.",
            "Give --random-genotypes 2 or more and a larger --pool.",
        )

    @property
    def num_random(self) -> int:
        """Random genotypes of the pool."""
        return self.pool // 2 if self.random_genotypes is None else self.random_genotypes

    def configuration(self, setting: str, seed: int) -> SearchConfig:
        """Return the search of a setting and a seed."""
        return with_fields(search_preset(PRESETS[self.data], space="darts"), seed=seed, passes=setting, **self.given())

    def measured(self) -> Record:
        """Return what decides the figures of a search beside its configuration."""
        return {"pool": self.pool, "random_genotypes": self.num_random}

    def random_pool(self, seed: int) -> list[Genotype]:
        """Return the random genotypes of a seed, no two isomorphic; they do not depend on the setting."""
        config = self.configuration(SETTINGS[0], seed)
        edges = config.candidates.edges_per_node
        return random_pool(config.supernet.search_space, self.num_random, seed=seed, edges_per_node=edges)


# What is run


def run_search(study: Study, setting: str, seed: int) -> Record:
    """Run one search, measure it and score its pool."""
    import torch

    from dnas_ens.run.progress import CostMeter
    from dnas_ens.search.candidates import Candidate, score
    from dnas_ens.search.loop import SearchLoop

    torch.set_num_threads(1)
    config = study.configuration(setting, seed)
    loop = SearchLoop(config, load(config.data))
    cost = CostMeter()
    for _ in range(config.bilevel.epochs):
        loop.run_epoch()
    seconds = cost.seconds()
    steered = steering(loop)
    # Of this study's two settings alone paths are compared, not with each other.
    del steered["between"]
    drawn = study.random_pool(seed)
    searched = spread_candidates(loop, study.pool - study.num_random, excluded=drawn)
    pool, _ = score(loop, [*searched, *(Candidate(genotype=genotype) for genotype in drawn)], recipe=study.recipe(seed))
    relaxed = loop.measure(num_images=2000)["val_accuracy"]
    base_accuracy = pool[0].supernet_val_accuracy
    assert base_accuracy is not None
    return {
        **study.search_record(setting, seed),
        **steered,
        "relaxed_accuracy": relaxed,
        "discretisation_gap": relaxed - base_accuracy,
        **seconds,
        "candidates": [{"cells": candidate.genotype.canonical_hash(), **candidate.to_dict()} for candidate in pool],
    }


def spread_candidates(loop: SearchLoop, count: int, *, excluded: Sequence[Genotype]) -> list[Candidate]:
    """Choose candidates of a search spread over lambda and directions, the base first.

    The i-th is the one of the search's own pool nearest to lambda = i / (count - 1) of the range, and
    among those nearest to direction i modulo R, so that neighbours in lambda are on different directions.

    Args:
        loop: A finished search.
        count: How many; fewer where the search holds fewer different genotypes.
        excluded: Genotypes that are in the pool anyway.
    """
    from dnas_ens.search.candidates import draw_pool

    hyper = loop.config.hypernetwork
    base, *pool = draw_pool(loop)
    known = {genotype.canonical() for genotype in excluded}
    left = [candidate for candidate in pool if candidate.genotype.canonical() not in known]
    chosen = [base]
    for index in range(1, min(count, len(left) + 1)):
        wanted = index / (count - 1) * hyper.max_lambda

        def distance(candidate: Candidate, wanted: float = wanted, index: int = index) -> tuple[float, int]:
            assert candidate.lam is not None
            assert candidate.direction is not None
            # Rounded, so that the direction decides between equally near lambdas.
            return round(abs(candidate.lam - wanted), 6), (candidate.direction - index) % hyper.directions

        nearest = min(left, key=distance)
        left.remove(nearest)
        chosen.append(nearest)
    return chosen


def run_training(study: Study, genotype: Genotype, seed: int) -> Record:
    """Train one genotype from scratch and evaluate it on val."""
    from dnas_ens.metrics.scores import accuracy, nll

    training, record = study.train(genotype, seed)
    probs, labels = training.val_probs(), training.val.labels.numpy()
    return {
        **record,
        "parameters": training.num_parameters,
        "val_nll": nll(probs, labels),
        "val_accuracy": accuracy(probs, labels),
    }


def searches(study: Study, seed: int) -> dict[Any, Task]:
    """Return the searches of a seed by key, the longer one first."""
    return {
        ("search", setting, seed): functools.partial(run_search, study, setting, seed) for setting in reversed(SETTINGS)
    }


def trainings(study: Study, genotypes: Sequence[Genotype], seed: int) -> dict[Any, Task]:
    """Return the trainings of a seed by key."""
    return training_tasks(functools.partial(run_training, study), genotypes, seed)


def pools(records: Records, seed: int) -> list[Genotype]:
    """Return the genotypes of both searches' pools."""
    return [
        Genotype.from_dict(candidate["genotype"])
        for setting in SETTINGS
        for candidate in records["search", setting, seed]["candidates"]
    ]


def complete_seeds(study: Study, records: Records) -> list[int]:
    """Return the seeds of which everything was run."""
    return [
        seed
        for seed in sorted({record["seed"] for record in records})
        if all(key in records for key in searches(study, seed))
        and all(key in records for key in trainings(study, pools(records, seed), seed))
    ]


# Measures


@dataclass(frozen=True)
class Ranking:
    """Val NLL of a pool with inherited weights and retrained, and which of it is random; arrays (P,)."""

    supernet: np.ndarray
    retrained: np.ndarray
    random: np.ndarray


def ranking(records: Records, setting: str, seed: int) -> Ranking:
    """Return both scores of every genotype in the pool of a search."""
    pool = records["search", setting, seed]["candidates"]
    return Ranking(
        np.array([candidate["supernet_val_nll"] for candidate in pool]),
        np.array([records["training", candidate["cells"], seed]["val_nll"] for candidate in pool]),
        np.array([candidate["lam"] is None for candidate in pool]),
    )


def measures(records: Records, setting: str, seed: int) -> dict[str, float]:
    """Return everything measured on one search."""
    from scipy.stats import kendalltau

    ranks = ranking(records, setting, seed)
    drawn = ranks.random

    def tau(chosen: np.ndarray) -> float:
        # Without anything to order there is no correlation.
        enough = chosen.sum() > 1
        return float(kendalltau(ranks.supernet[chosen], ranks.retrained[chosen]).statistic) if enough else 0.0

    values = records["search", setting, seed] | {
        "tau_pool": tau(np.full_like(drawn, True)),
        "tau_random": tau(drawn),
        "tau_searched": tau(~drawn),
        "random_supernet_nll": ranks.supernet[drawn].mean(),
        "searched_supernet_nll": ranks.supernet[~drawn].mean(),
        "searched_retrained_nll": ranks.retrained[~drawn].mean(),
    }
    return {name: float(values[name]) for name in MEASURES}


def table(found: Mapping[str, Sequence[Mapping[str, float]]], seeds: Sequence[int]) -> str:
    """Return both settings and their difference at every seed as Markdown.

    Args:
        found: For each setting the measures of every seed.
        seeds: The seeds, in the same order.
    """
    from dnas_ens.metrics.significance import CONFIDENCE, t_interval

    header = [
        "measure",
        *SETTINGS,
        *(f"difference, seed {seed}" for seed in seeds),
        f"mean difference ({100 * CONFIDENCE:.0f} % paired t interval)",
    ]
    lines = []
    for name, label in MEASURES.items():
        differences = slices_minus_separate(found, name)
        low, high = t_interval(differences)
        ends = "" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})"
        lines.append(
            [
                label,
                *(Column("", digits=DECIMALS).cell(values[name] for values in found[key]) for key in SETTINGS),
                *(f"{value:+.3f}" for value in differences),
                f"{statistics.fmean(differences):+.3f}{ends}",
            ]
        )
    return markdown_table(header, lines)


def slices_minus_separate(found: Mapping[str, Sequence[Mapping[str, float]]], name: str) -> list[float]:
    """Return a measure's difference between the settings at every seed."""
    return [ours[name] - exact[name] for ours, exact in zip(*(found[key] for key in SETTINGS), strict=True)]


def verdict(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Say in plain words which differences between the settings are distinguishable from 0."""
    from dnas_ens.metrics.significance import CONFIDENCE, t_interval

    num_seeds = len(found[SETTINGS[0]])
    if num_seeds < 2:
        return "One seed says nothing about how far the two settings differ beyond the luck of a search.\n"
    apart, alike = [], []
    for name, label in MEASURES.items():
        low, high = t_interval(slices_minus_separate(found, name))
        if low > 0 or high < 0:
            apart.append(f"{label} ({'higher' if low > 0 else 'lower'} with shared statistics)")
        else:
            alike.append(label)
    few = (
        f"{num_seeds} seeds are few: only differences that are large against their spread can be seen, and "
        "not distinguishable does not mean equal. "
    )
    return (
        f"By the {100 * CONFIDENCE:.0f} % paired t interval over {num_seeds} seeds, slices minus separate is "
        f"distinguishable from 0 in {'; '.join(apart) or 'no measure'}. "
        f"It is not distinguishable from 0 in {'; '.join(alike) or 'no measure'}. "
        f"{few if num_seeds < MANY_SEEDS else ''}Each interval stands alone; of {len(MEASURES)} such intervals about "
        f"one in {round(1 / (1 - CONFIDENCE))} misses 0 by chance.\n"
    )


# Results


def report(study: Study, records: Records, seeds: Sequence[int], env: Mapping[str, Any]) -> tuple[str, str]:
    """Return what OUTPUT.md begins with, and the table with its verdict."""
    from dnas_ens.metrics.significance import mean_and_deviation

    found = {setting: [measures(records, setting, seed) for seed in seeds] for setting in SETTINGS}
    trained = [rank.retrained[rank.random].mean() for rank in (ranking(records, "slices", seed) for seed in seeds)]
    text = (
        f"{table(found, seeds)}\n{verdict(found)}\nRetrained val NLL of the random genotypes, which both settings "
        f"share: {mean_and_deviation(trained, digits=DECIMALS)}.\n"
    )
    config, recipe = study.configuration(SETTINGS[0], seeds[0]), study.recipe(seeds[0])
    limit = f", {config.data.limit_train} training images" if config.data.limit_train else ""
    header = (
        f"# What does sharing BatchNorm statistics do to a search? ({study.data}, preset {config.preset})\n\n"
        f"{provenance(env, hardware='no GPU, one thread a search')}\n\n"
        f"{config.bilevel.epochs} epochs a search{limit}, m = {config.objective.num_drawn} members a step, "
        f"R = {config.hypernetwork.directions} directions, batches of {config.bilevel.batch_size}: *slices* "
        f"normalises with statistics over {config.bilevel.batch_size} images of m architectures, *separate* over "
        f"{config.bilevel.batch_size // config.objective.num_drawn} images of one. Mean ± standard deviation "
        f"over {len(seeds)} seeds, then slices minus separate. Both searches of a seed begin with the same weights "
        f"and see the same images and draws. Pool: {study.num_random} random genotypes, the same in both settings, "
        f"and up to {study.pool - study.num_random} candidates of the search. Kendall's τ is between val NLL "
        "with inherited weights (BatchNorm statistics measured anew for each network) and val NLL after "
        f"{recipe.epochs} epochs from scratch, each trained once, so that it carries the noise of one training. "
        "NLL in nats. Relaxed accuracy: the base, on the statistics of each batch; the gap is from there to its "
        "discretisation with inherited weights. Test images were not read.\n\n"
    )
    return header, text


def plot(records: Records, seeds: Sequence[int], path: Path) -> None:
    """Draw supernet NLL against retrained NLL, a panel a setting."""
    from matplotlib.ticker import LogLocator, NullLocator
    from studies.plotting import handle, panel

    from dnas_ens.figures.style import CYCLE, MARKERS, font, new_figure

    figure = new_figure(620, 330)
    axes = figure.subplots(1, len(SETTINGS), sharex=True, sharey=True)
    looks = [(CYCLE[index % len(CYCLE)], MARKERS[index % len(MARKERS)]) for index, _ in enumerate(seeds)]
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for seed, (colour, marker) in zip(seeds, looks, strict=True):
            ranks = ranking(records, setting, seed)
            for chosen, face in ((ranks.random, "none"), (~ranks.random, colour)):
                axis.scatter(
                    ranks.supernet[chosen],
                    ranks.retrained[chosen],
                    s=24,
                    marker=marker,
                    facecolors=face,
                    edgecolors=colour,
                    linewidths=1,
                    alpha=0.8,
                )
        # NLLs differ by factors.
        axis.set_xscale("log")
        axis.set_yscale("log")
        for direction in (axis.xaxis, axis.yaxis):
            direction.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            direction.set_major_formatter("{x:g}")
            direction.set_minor_locator(NullLocator())
        found = [measures(records, setting, seed) for seed in seeds]
        pool, drawn = (
            Column("", digits=2).cell(values[name] for values in found) for name in ("tau_pool", "tau_random")
        )
        shares = "shared statistics" if setting == "slices" else "each member's own statistics"
        panel(
            axis,
            f"{setting}: {shares}\nτ {pool}; random alone {drawn}",
            x_label="val NLL, inherited weights",
            y_label="val NLL, trained from scratch" if axis is axes[0] else "",
            size=9,
        )
    point = {"linestyle": "", "marker": "o"}
    handles = [
        handle("random", **point, markerfacecolor="none"),
        handle("candidate of the search", **point),
        *(
            handle(f"seed {seed}", linestyle="", marker=marker, color=colour)
            for seed, (colour, marker) in zip(seeds, looks, strict=True)
        ),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, prop=font(9))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    from dnas_ens.run.machine import environment
    from dnas_ens.training.workers import worker_pool

    records = study.records()
    with worker_pool(study.workers, engine=study.engine) as pool:
        # Seed by seed, so that an interrupted study has both settings.
        for seed in range(study.seeds):
            drawn = study.random_pool(seed)
            run_units(records, searches(study, seed) | trainings(study, drawn, seed), pool=pool)
            run_units(records, trainings(study, pools(records, seed), seed), pool=pool)
    seeds = complete_seeds(study, records)
    header, text = report(study, records, seeds, environment([*PROG.split(), *argv]))
    write_study(study.path, header + text, figure=lambda path: plot(records, seeds, path), shown=text)


if __name__ == "__main__":
    run_script(main)
