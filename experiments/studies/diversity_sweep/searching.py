"""One search: its ensemble while it runs, then its paths, ensembles and samples with inherited weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.config.fields import to_dict
from dnas_ens.space.genotype import Genotype
from studies.diversity_sweep.choosing import chosen_on_other_half, limited_ensemble, matched_samples
from studies.diversity_sweep.options import (
    BASE_SETTING,
    LIMITS,
    STEERED,
    Study,
)
from studies.from_scratch import load, train_from_scratch
from studies.steering import rank_correlation

if TYPE_CHECKING:
    from dnas_ens.data.dataset import Split
    from dnas_ens.search.candidates import Candidate
    from dnas_ens.search.loop import SearchLoop

Unit = tuple[dict[str, Any], dict[str, np.ndarray]]


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
        "kind": "search",
        "setting": setting,
        "seed": seed,
        "config": to_dict(config),
        "measured": study.measured,
        "base": {"cells": found.canonical_hash(), "genotype": found.to_dict()},
    }
    if setting == BASE_SETTING:
        return {**record, **cost.seconds()}, {}
    points = sweep(loop, study.lambdas)
    genotypes = {
        candidate.genotype.canonical_hash(): candidate.genotype for candidate in drop_doubles(points)
    }
    samples, deviations = (
        matched_samples(
            genotypes,
            found,
            num_samples=study.samples,
            operations=loop.family.space.operations,
            seed=seed,
        )
        if setting in STEERED
        else ([], [])
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


def inherited(loop: SearchLoop, genotypes: Iterable[Genotype], splits: Sequence[Split]) -> list[np.ndarray]:
    """Return the probabilities (P, N, K) of networks with inherited weights on each split."""
    from dnas_ens.search.candidates import inherited_networks
    from dnas_ens.training.prediction import predict_log_probs

    networks = inherited_networks(loop.supernet, genotypes, loop.weight_half, augmentation=loop.augmentation)
    by_network = [
        [predict_log_probs(network, split, augmentation=loop.augmentation).exp().numpy() for split in splits]
        for network in networks
    ]
    return [np.stack(of_split) for of_split in zip(*by_network, strict=True)]


def run_training(study: Study, genotype: Genotype, seed: int) -> Unit:
    """Train one genotype from scratch and predict val and test; nothing is chosen by them."""
    import torch

    from dnas_ens.training.prediction import predict_log_probs

    torch.set_num_threads(1)
    recipe, config = study.recipe(seed), study.configuration(STEERED[0], seed).data
    data = load(config)
    training, seconds = train_from_scratch(genotype, data, recipe)
    record = {
        "kind": "training",
        "cells": genotype.canonical_hash(),
        "seed": seed,
        "genotype": genotype.to_dict(),
        "recipe": to_dict(recipe),
        "data": to_dict(config),
        **seconds,
    }
    probs = {
        f"{name}_probs": predict_log_probs(training.network, split, augmentation=training.augmentation)
        .exp()
        .numpy()
        for name, split in (("val", data.val), ("test", data.test))
    }
    return record, probs
