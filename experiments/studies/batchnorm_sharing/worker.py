"""What a worker does: one search with the scores of its pool, or one training from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dnas_ens.config.fields import to_dict
from dnas_ens.space.genotype import Genotype
from studies.batchnorm_sharing.options import SETTINGS, Study
from studies.from_scratch import load, train_from_scratch
from studies.steering import rank_correlation

if TYPE_CHECKING:
    from dnas_ens.search.candidates import Candidate
    from dnas_ens.search.loop import SearchLoop

#: |D - lambda| is judged up to here.
JUDGED_LAMBDA = 0.7


def run_search(study: Study, setting: str, seed: int) -> dict[str, Any]:
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
    drawn = study.random_pool(seed)
    searched = spread_candidates(loop, study.pool - study.num_random, excluded=drawn)
    pool, _ = score(
        loop, [*searched, *(Candidate(genotype=genotype) for genotype in drawn)], recipe=study.recipe(seed)
    )
    relaxed = loop.measure(num_images=2000)["val_accuracy"]
    base_accuracy = pool[0].supernet_val_accuracy
    assert base_accuracy is not None
    return {
        "kind": "search",
        "setting": setting,
        "seed": seed,
        "config": to_dict(config),
        "pool": study.pool,
        "random_genotypes": study.num_random,
        **steering(loop),
        "relaxed_accuracy": relaxed,
        "discretisation_gap": relaxed - base_accuracy,
        **seconds,
        "candidates": [
            {"cells": candidate.genotype.canonical_hash(), **candidate.to_dict()} for candidate in pool
        ],
    }


def spread_candidates(loop: SearchLoop, count: int, *, excluded: Sequence[Genotype]) -> list[Candidate]:
    """Choose candidates of a search spread over lambda and directions, the base first.

    The i-th is the one of the search's own pool that lies nearest to lambda = i / (count - 1) of the range, and
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
            # Rounded, for equally near lambdas are to be decided by the direction.
            return round(abs(candidate.lam - wanted), 6), (candidate.direction - index) % hyper.directions

        nearest = min(left, key=distance)
        left.remove(nearest)
        chosen.append(nearest)
    return chosen


def steering(loop: SearchLoop) -> dict[str, Any]:
    """Return how lambda steers distance and shared edges, and the curves, (R, L) values each."""
    from dnas_ens.search.family import diversity_curve

    curve = diversity_curve(loop.family)
    lam, distance, shared = (
        np.array(values, dtype=float).reshape(loop.config.hypernetwork.directions, -1)
        for values in (curve.lam, curve.distance_to_base, curve.shared_edges)
    )

    return {
        "spearman_distance": rank_correlation(lam[0], distance),
        "spearman_shared": rank_correlation(lam[0], shared),
        "tracking_error": float(np.abs(distance - lam)[lam <= JUDGED_LAMBDA].mean()),
        "lam": lam[0].tolist(),
        "distance": distance.tolist(),
        "shared": shared.tolist(),
    }


def run_training(study: Study, cells: str, genotype: Genotype, seed: int) -> dict[str, Any]:
    """Train one genotype from scratch; what comes out depends on its isomorphism class and the seed alone."""
    import torch

    from dnas_ens.metrics.scores import accuracy, nll

    torch.set_num_threads(1)
    recipe = study.recipe(seed)
    data = load(study.configuration(SETTINGS[0], seed).data)
    training, seconds = train_from_scratch(genotype, data, recipe)
    probs, labels = training.val_probs(), training.val.labels.numpy()
    return {
        "kind": "training",
        "cells": cells,
        "seed": seed,
        "genotype": genotype.to_dict(),
        "recipe": to_dict(recipe),
        "data": to_dict(study.configuration(SETTINGS[0], seed).data),
        "parameters": sum(parameter.numel() for parameter in training.network.parameters()),
        "val_nll": nll(probs, labels),
        "val_accuracy": accuracy(probs, labels),
        **seconds,
    }
