"""Random architectures as ensembles: pools of random cells and random deviations, and NES-RS.

- Random-NES (EdgeNES's baseline): M genotypes of `random_pool`, trained and averaged.
- RandomD-NES: M random deviations of a base that share as many edges with it as the members they stand beside (for a
  fixed number of replaced edges there is the search's regime ``random``).
- NES-RS (Zaidi et al., arXiv 2006.08573): `nes_random_search` over a `random_pool` of P > M.

Legend: P genotypes in the pool, M members, N validation images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dnas_ens.baselines.evaluations import Evaluations, FoundEnsemble, TrainFunction, forward_select
from dnas_ens.errors import UserError
from dnas_ens.space.genotype import Genotype, random_deviation, random_genotype
from dnas_ens.space.search_space import SearchSpace

#: Draws for one genotype before giving up.
MAX_DRAWS = 2000


def random_pool(space: SearchSpace, num_genotypes: int, *, seed: int, edges_per_node: int = 2) -> list[Genotype]:
    """Draw different random genotypes, no two of them isomorphic.

    Args:
        num_genotypes: P, at least 1. A larger pool of the same seed starts with the smaller one.

    Raises:
        UserError: The space holds too few different genotypes, or P is below 1.
    """
    if num_genotypes < 1:
        raise UserError(f"A pool of {num_genotypes} genotypes was asked for.", "Ask for 1 or more.")
    generator = np.random.default_rng(seed)
    found: dict[Genotype, Genotype] = {}
    draws_in_vain = 0
    while len(found) < num_genotypes:
        genotype = random_genotype(
            generator,
            operations=space.operations,
            num_nodes=space.num_nodes,
            edges_per_node=edges_per_node,
            cell_types=space.cell_types,
            space=space.name,
        )
        known = genotype.canonical() in found
        found.setdefault(genotype.canonical(), genotype)
        draws_in_vain = draws_in_vain + 1 if known else 0
        if draws_in_vain == MAX_DRAWS:
            raise UserError(
                f"{num_genotypes} genotypes were asked for, but only {len(found)} are different.",
                "Ask for fewer, or give more operations or nodes.",
            )
    return list(found.values())


def deviations_sharing(
    base: Genotype, shared_edges: Sequence[int], *, operations: Sequence[str], seed: int
) -> list[Genotype]:
    """Draw one deviation for each given number of edges shared with the base, all different.

    Sharing is `Genotype.shared_edges`: given those of an ensemble's members, this makes their counterpart.

    Args:
        shared_edges: M numbers of shared edges, each from 0 to below ``base.num_edges``.
        operations: At least two names to draw from.

    Raises:
        UserError: No deviation found shares so many edges; the nearest number found is named.
    """
    generator = np.random.default_rng(seed)
    seen, found = {base.canonical()}, []
    for target in shared_edges:
        nearest = None
        for _ in range(MAX_DRAWS):
            num_edges = int(generator.integers(1, base.num_edges + 1))
            genotype = random_deviation(base, num_edges=num_edges, operations=operations, generator=generator)
            if genotype.canonical() in seen:
                continue
            shared = base.shared_edges(genotype)
            if shared == target:
                break
            if nearest is None or abs(shared - target) < abs(nearest - target):
                nearest = shared
        else:
            known = "no other deviation was found" if nearest is None else f"the nearest found has {nearest}"
            raise UserError(
                f"No new deviation with {target} shared edges was found in {MAX_DRAWS} draws; {known}.",
                "Ask for another value or fewer genotypes.",
            )
        seen.add(genotype.canonical())
        found.append(genotype)
    return found


def nes_random_search(
    train: TrainFunction,
    val_labels: npt.ArrayLike,
    *,
    pool: Sequence[Genotype],
    num_members: int,
    folder: Path | None = None,
) -> FoundEnsemble:
    """NES-RS (arXiv 2006.08573): train a pool, then choose M of it greedily on the ensemble's validation NLL.

    Args:
        train: Trains a genotype; called with it and its position in the pool, which should decide all seeds.
        pool: P genotypes: `random_pool` for NES-RS, deviations for its RandomD counterpart.
        folder: Where each evaluation is kept; run again with it, only what is missing is trained.

    Raises:
        UserError: M out of range, or the training returned no probabilities.
    """
    if not 1 <= num_members <= len(pool):
        raise UserError(
            f"{num_members} members were asked for of a pool of {len(pool)}.",
            "Ask for 1 or more, and draw a pool that is at least as large.",
        )
    evaluations = Evaluations(train, val_labels, folder=folder)
    bar = tqdm(pool, desc="random search", unit="network", disable=None, leave=False)
    label_probs = [evaluations.label_probs(genotype, index) for index, genotype in enumerate(bar)]
    return evaluations.found(pool, forward_select(label_probs, num_members))
