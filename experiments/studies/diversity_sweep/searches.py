"""Options of the EdgeNES studies, what a search or a training measures, and which of them a seed needs."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.study import Task, Unit, require_positive
from dnas_ens.config import RetrainConfig, SearchConfig, require
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.space.genotype import Genotype
from studies.search_studies import (
    PRESETS,
    SearchStudy,
    inherited,
    key_of,
    load,
    rank_correlation,
    training_tasks,
)

if TYPE_CHECKING:
    from dnas_ens.search.candidates import Candidate
    from dnas_ens.search.loop import SearchLoop

#: Plain DARTS, which gives hypernet its base: the first of EdgeNES's two stages.
BASE_SETTING = "optimal"
#: The two ways of steering, of which everything is measured.
STEERED = ("star", "hypernet")
#: Coefficients and temperature at their last value throughout.
CONSTANT = "constant schedules"
#: The hypernetwork is trained from the first epoch on.
COLD = "no warm-up epochs"
SETTINGS = tuple(name for way in STEERED for name in (way, f"{way}, {CONSTANT}", f"{way}, {COLD}"))
#: What is compared in ensembles and in search curves.
PAIRS = (
    *((way, f"{way}, {change}") for way in STEERED for change in (CONSTANT, COLD)),
    STEERED,
)
SCHEDULES = ("penalty_weight", "commitment", "temperature")
#: Limits as shares of the largest lambda; of the last ones ensembles are retrained.
LIMITS = (0.25, 0.5, 0.75, 1.0)
RETRAINED_LIMITS = (0.5, 1.0)
#: Points of the path of direction 0 that are retrained, as shares of the largest lambda.
RETRAINED_POINTS = (0.0, 0.5, 1.0)
#: Edges shared or replaced, at which samples are compared with random deviations.
NUM_EDGES = range(4)


@dataclass(frozen=True, kw_only=True)
class Study(SearchStudy):
    """Options of the study."""

    name = "diversity-sweep"
    first_setting = STEERED[0]

    seeds: int = 5
    """Seeds, each with seven searches."""
    cells: int = 1
    """Cells of searches and trainings; EdgeNES's Fashion-MNIST figures are of one."""
    edges_per_node: int = 1
    """Edges a node keeps; 1 as in EdgeNES, so that its lambda of 0 to 4 counts all edges of one cell."""
    members: int = 3
    """M, members of an ensemble."""
    lambdas: int = 21
    """L, values of lambda on each direction; 4 must divide L - 1."""
    evaluations: int = 5
    """At how many epochs of a search its ensemble is measured."""
    samples: int = 2
    """Samples of a search, and random deviations, for each number of edges shared with the base."""
    run_dir: Path | None = None
    """Where predictions are kept; default: below runs/, in a folder for each output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "members", "samples", "evaluations")
        require(
            self.lambdas > 1 and (self.lambdas - 1) % 4 == 0,
            f"--lambdas is {self.lambdas}, which leaves out quarters of the range.",
            "Give --lambdas 5, 9, 13, 17, 21 or another multiple of 4 plus 1.",
        )

    def measured(self) -> Record:
        """Return what decides the figures of a search beside its configuration."""
        names = ("members", "lambdas", "evaluations", "samples")
        return {"measured": {name: getattr(self, name) for name in names}}

    def configuration(self, setting: str, seed: int) -> SearchConfig:
        """Return the search of a setting and a seed."""
        regime, _, change = setting.partition(", ")
        # The base comes from memory; its name says where it is from.
        base = Path(f"{BASE_SETTING}-{seed}") if regime == "hypernet" else None
        config = with_fields(
            search_preset(PRESETS[self.data], regime, base=base, space="darts"),
            seed=seed,
            num_cells=self.cells,
            edges_per_node=self.edges_per_node,
            **self.given(),
        )
        if change == CONSTANT:
            ends = {name: getattr(config.objective, name)[1] for name in SCHEDULES}
            return with_fields(config, **{name: (end, end) for name, end in ends.items()})
        return with_fields(config, warmup_epochs=0) if change == COLD else config

    def evaluated_epochs(self, config: SearchConfig) -> list[int]:
        """Return the epochs after which the ensemble of a search is measured, the last one included."""
        epochs = config.bilevel.epochs
        return sorted({max(1, round(epochs * (i + 1) / self.evaluations)) for i in range(self.evaluations)})

    def recipe(self, seed: int) -> RetrainConfig:
        """Return the recipe of a seed's trainings from scratch."""
        return replace(super().recipe(seed), num_cells=self.cells)

    def records(self, **more: Any) -> Records:
        """Open the store: a line a unit in OUTPUT.jsonl, its predictions in the run folder."""
        # Of the output's place, so that studies of other settings do not share predictions.
        place_of_output = zlib.crc32(str(self.path.resolve()).encode())
        folder = self.run_dir or Path("runs") / f"{self.path.name}-{place_of_output:08x}"

        def place(record: Record) -> Path:
            kind, name, seed = key_of(record)
            return folder / f"seed-{seed}" / f"{kind}-{name.replace(', ', '-').replace(' ', '-')}.npz"

        return super().records(arrays=place, **more)


# What is chosen on val, and drawn from a search


def chosen_on_other_half(probs: np.ndarray, labels: np.ndarray, num_members: int) -> np.ndarray:
    """Return ensemble probabilities (N, K), each half of the images predicted by members the other half chose.

    Args:
        probs: (P, N, K) of the candidates.
        labels: (N,).
        num_members: M; all candidates where there are fewer.
    """
    from dnas_ens.data.splits import alternating_halves
    from dnas_ens.ensembles.selection import greedy_selection

    averaged = np.empty(probs.shape[1:])
    halves = alternating_halves(labels)
    for choosing, judging in (halves, halves[::-1]):
        picked = greedy_selection(probs[:, choosing], labels[choosing], num_members=min(num_members, len(probs)))
        averaged[judging] = probs[picked][:, judging].mean(axis=0)
    return averaged


def limited_ensemble(
    limit: float, nearest: Mapping[str, float], probs: np.ndarray, labels: np.ndarray, num_members: int
) -> dict[str, Any]:
    """Choose an ensemble greedily on val from the genotypes with a lambda up to a limit.

    Args:
        limit: Lambda's limit.
        nearest: The smallest lambda of each genotype, by its cells.
        probs: (P or more, N, K), the first P those of the genotypes.
        labels: (N,).
        num_members: M; all there are where there are fewer.
    """
    from dnas_ens.ensembles.selection import greedy_selection

    within = [index for index, lam in enumerate(nearest.values()) if lam <= limit + 1e-6]
    picked = greedy_selection(probs[within], labels, num_members=min(num_members, len(within)))
    cells = list(nearest)
    return {
        "limit": limit,
        "candidates": len(within),
        "cells": [cells[within[index]] for index in picked],
    }


def matched_samples(
    genotypes: Mapping[str, Genotype],
    base: Genotype,
    *,
    num_samples: int,
    operations: Sequence[str],
    seed: int,
) -> tuple[list[str], list[Genotype]]:
    """Draw samples with 0 to 3 edges shared with the base, or 0 to 3 replaced, and a deviation that shares as many.

    Args:
        genotypes: Those of a search by their cells.
        base: Its base.
        num_samples: For each number of shared edges, or as many as there are.
        operations: What deviations are drawn from.
        seed: Decides samples and deviations.

    Returns:
        The samples' cells, and for each a random deviation of the base, all deviations different.
    """
    from dnas_ens.baselines import deviations_sharing

    generator = np.random.default_rng(seed)
    shared = {cells: base.shared_edges(genotype) for cells, genotype in genotypes.items()}
    samples: list[str] = []
    for count in sorted({*NUM_EDGES, *(base.num_edges - each for each in NUM_EDGES)} - {base.num_edges}):
        having = [cells for cells, number in shared.items() if number == count]
        samples += [str(cells) for cells in generator.permutation(having)[:num_samples]]
    deviations = deviations_sharing(base, [shared[cells] for cells in samples], operations=operations, seed=seed)
    return samples, deviations


def to_retrain(record: Mapping[str, Any]) -> dict[str, Genotype]:
    """Return the genotypes of a search that are trained from scratch, by their cells."""
    if record["setting"] == BASE_SETTING:
        return {}
    wanted = [
        cells
        for ensemble in record["ensembles"]
        if ensemble["share"] in (RETRAINED_LIMITS if record["setting"] in STEERED else (1.0,))
        for cells in ensemble["cells"]
    ]
    by_cells = dict(record["genotypes"])
    if record["setting"] in STEERED:
        wanted += [path_cells(record, share) for share in RETRAINED_POINTS]
        wanted += [sample["cells"] for sample in record["samples"]]
        for entry in (record["base"], *record["deviations"]):
            by_cells[entry["cells"]] = entry["genotype"]
            wanted.append(entry["cells"])
    return {cells: Genotype.from_dict(by_cells[cells]) for cells in dict.fromkeys(wanted)}


def path_cells(record: Mapping[str, Any], share: float, direction: int = 0) -> str:
    """Return the cells at a share of the largest lambda on a direction."""
    path = [point for point in record["points"] if point["direction"] == direction]
    return str(path[round(share * (len(path) - 1))]["cells"])


# Searches and trainings


def run_search(study: Study, setting: str, seed: int, base: Genotype | None) -> Unit:
    """Run one search and measure it.

    Returns:
        Its record, and the predictions of its networks with inherited weights by name: cells for those of its paths,
        "base", and "deviation 0" and so on.
    """
    import torch

    from dnas_ens.metrics.scores import accuracy, nll, per_image_nll
    from dnas_ens.run.progress import CostMeter
    from dnas_ens.search.candidates import drop_doubles
    from dnas_ens.search.loop import SearchLoop

    torch.set_num_threads(1)
    config = study.configuration(setting, seed)
    data = load(config.data)
    loop, cost = SearchLoop(config, data, base=base), CostMeter()
    labels = data.val.labels.numpy()
    evaluated, losses = [], []
    while loop.epoch < config.bilevel.epochs:
        loop.run_epoch()
        if setting == BASE_SETTING or loop.epoch not in study.evaluated_epochs(config):
            continue
        pool = drop_doubles(sweep(loop, study.lambdas))
        (probs,) = inherited(loop, [candidate.genotype for candidate in pool], [data.val])
        averaged = chosen_on_other_half(probs, labels, study.members)
        losses.append(per_image_nll(averaged, labels))
        evaluated.append(
            {
                "epoch": loop.epoch,
                "candidates": len(pool),
                "val_nll": nll(averaged, labels),
                "val_accuracy": accuracy(averaged, labels),
            }
        )
    found = loop.family.base_genotype()
    record = {
        **study.search_record(setting, seed),
        "base": {"cells": found.canonical_hash(), "genotype": found.to_dict()},
    }
    if setting == BASE_SETTING:
        return {**record, **cost.seconds()}, {}
    points = sweep(loop, study.lambdas)
    genotypes = {candidate.genotype.canonical_hash(): candidate.genotype for candidate in drop_doubles(points)}
    samples: list[str] = []
    deviations: list[Genotype] = []
    if setting in STEERED:
        operations = loop.family.space.operations
        samples, deviations = matched_samples(
            genotypes, found, num_samples=study.samples, operations=operations, seed=seed
        )
    names = [*genotypes, "base", *(f"deviation {index}" for index in range(len(deviations)))]
    networks = [*genotypes.values(), found, *deviations]
    val, test = inherited(loop, networks, [data.val, data.test])
    nearest = {
        cells: min(point.lam or 0.0 for point in points if point.genotype.canonical_hash() == cells)
        for cells in genotypes
    }
    shape = (config.hypernetwork.directions, study.lambdas)
    lam = np.array([point.lam for point in points]).reshape(shape)[0]
    shared = np.array([point.shared_edges for point in points]).reshape(shape)
    record |= {
        "points": [
            {
                "lam": point.lam,
                "direction": point.direction,
                "distance": point.distance_to_base,
                "shared": point.shared_edges,
                "cells": point.genotype.canonical_hash(),
            }
            for point in points
        ],
        "genotypes": {cells: genotype.to_dict() for cells, genotype in genotypes.items()},
        "epochs": evaluated,
        "ensembles": [
            limited_ensemble(share * config.hypernetwork.max_lambda, nearest, val, labels, study.members)
            | {"share": share}
            for share in LIMITS
        ],
        "samples": [{"cells": cells, "shared": found.shared_edges(genotypes[cells])} for cells in samples],
        "deviations": [
            {
                "cells": genotype.canonical_hash(),
                "shared": found.shared_edges(genotype),
                "genotype": genotype.to_dict(),
            }
            for genotype in deviations
        ],
        "spearman_shared": rank_correlation(lam, shared),
        **cost.seconds(),
    }
    return record, {
        "names": np.array(names),
        "val_probs": val.astype(np.float32),
        "test_probs": test.astype(np.float32),
        "epoch_losses": np.stack(losses),
    }


def sweep(loop: SearchLoop, num_lambdas: int) -> list[Candidate]:
    """Return the genotypes at evenly spaced lambdas on every direction, (R * L) of them, doubles included."""
    import torch

    from dnas_ens.search.candidates import Candidate
    from dnas_ens.search.family import Points, diversity_curve

    curve = diversity_curve(loop.family, num_lambdas=num_lambdas)
    points = Points(torch.tensor(curve.lam), torch.tensor(curve.direction))
    return [
        Candidate(
            genotype=genotype,
            lam=round(curve.lam[index], 6),
            direction=curve.direction[index],
            distance_to_base=curve.distance_to_base[index],
            shared_edges=curve.shared_edges[index],
        )
        for index, genotype in enumerate(loop.family.genotypes(points))
    ]


def run_training(study: Study, genotype: Genotype, seed: int) -> Unit:
    """Train one genotype from scratch and predict val and test; nothing is chosen by them."""
    from dnas_ens.training.prediction import predict_log_probs

    training, record = study.train(genotype, seed)
    data = load(study.configuration(STEERED[0], seed).data)
    probs = {
        f"{name}_probs": predict_log_probs(training.network, split, augmentation=training.augmentation).exp().numpy()
        for name, split in (("val", data.val), ("test", data.test))
    }
    return record, probs


def searches(study: Study, records: Records, seed: int) -> dict[Any, Task]:
    """Return the searches of a seed by key; that of the base must have been run."""
    given = Genotype.from_dict(records["search", BASE_SETTING, seed]["base"]["genotype"])
    return {
        ("search", setting, seed): functools.partial(
            run_search, study, setting, seed, given if setting.startswith("hypernet") else None
        )
        for setting in SETTINGS
    }


def trainings(study: Study, records: Records, seed: int) -> dict[Any, Task]:
    """Return the trainings of a seed by key; all searches must have been run."""
    wanted: dict[str, Genotype] = {}
    for setting in SETTINGS:
        wanted |= to_retrain(records["search", setting, seed])
    return training_tasks(functools.partial(run_training, study), wanted.values(), seed)
