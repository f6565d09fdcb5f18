"""Random architectures as ensembles: pools of random cells and random deviations, and NES-RS.

- Random-NES (EdgeNES's baseline): M genotypes of `random_pool`, trained and averaged.
- RandomD-NES: M random deviations of a base, as many edges or as far from it as the members they stand beside (for a
  fixed number of replaced edges there is the search's regime ``random``).
- NES-RS (Zaidi et al., arXiv 2006.08573): `nes_random_search` over a `random_pool` of P > M.

Legend: P genotypes in the pool, M members, T cell types, E edges, O operations, N nodes or validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

from dnas_ens.baselines.evaluations import Evaluations, FoundEnsemble, TrainFunction, forward_select
from dnas_ens.errors import UserError
from dnas_ens.search.divergence import architecture_distance
from dnas_ens.search.relaxation import genotype_mixture
from dnas_ens.space.genotype import Genotype, random_deviation, random_genotype
from dnas_ens.space.search_space import SearchSpace

#: Draws for one genotype before it is declared not to exist.
MAX_DRAWS = 2000


def random_pool(
    space: SearchSpace, num_genotypes: int, *, seed: int, edges_per_node: int = 2
) -> list[Genotype]:
    """Draw different random genotypes, no two of them isomorphic.

    Args:
        space: Where to draw from.
        num_genotypes: P, at least 1. A larger pool of the same seed begins with the smaller one.
        seed: Decides the draw.
        edges_per_node: Edges each node keeps.

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
        base: The genotype to deviate from.
        shared_edges: M numbers of shared edges, each from 0 to below ``base.num_edges``.
        operations: At least two names to draw from.
        seed: Decides the draw.

    Raises:
        UserError: No deviation found shares so many edges; the nearest number found is named.
    """
    return _matched(
        base,
        shared_edges,
        measure=base.shared_edges,
        what="shared edges",
        tolerance=0.0,
        operations=operations,
        seed=seed,
    )


def deviations_at_distance(
    base: Genotype, distances: Sequence[float], *, space: SearchSpace, seed: int, tolerance: float = 0.05
) -> list[Genotype]:
    """Draw one deviation for each given distance D to the base, all different.

    With two edges a node D takes the values (a / sqrt(2) + b) / (T N), a nodes with one edge replaced and b with
    both, so the tolerance cannot be arbitrarily small; 0.05 leaves no gap above D = 0.04 where T N is 8.

    Args:
        base: The genotype to deviate from.
        distances: M distances in (0, 1], such as the members' D to the base.
        space: The space all live in.
        seed: Decides the draw.
        tolerance: Largest difference from the distance asked for.

    Raises:
        UserError: No deviation found is that far (the nearest is named), or the base is not of the space.
    """
    return _matched(
        base,
        distances,
        measure=lambda genotype: discrete_distance(genotype, base, space),
        what="as distance D",
        tolerance=tolerance,
        operations=space.operations,
        seed=seed,
    )


def discrete_distance(first: Genotype, second: Genotype, space: SearchSpace) -> float:
    """Return D between two genotypes, each node's distribution uniform over its kept edges.

    D is the mean over nodes of sqrt(JSD / ln 2), `dnas_ens.search.divergence.architecture_distance`. A node that
    keeps two edges and shares c of them contributes sqrt(1 - c / 2). Nodes are compared as numbered.

    Args:
        first: A genotype of the space.
        second: Another one.
        space: The space.

    Returns:
        D in [0, 1]; 0 exactly for equal genotypes, 1 exactly if no (node, source, operation) is shared.

    Raises:
        UserError: If a genotype does not live in the space.
    """
    p, q = (_uniform_mixture(genotype, space) for genotype in (first, second))
    return float(architecture_distance(p, q, space))


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
        val_labels: Class indices of the validation images, (N,).
        pool: P genotypes: `random_pool` for NES-RS, deviations for its RandomD counterpart.
        num_members: M, from 1 to P.
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


def _uniform_mixture(genotype: Genotype, space: SearchSpace) -> Tensor:
    mixture = genotype_mixture(genotype, space)
    for node in space.node_slices:
        mixture[:, node] /= mixture[:, node].sum(dim=(1, 2), keepdim=True)
    return mixture


def _matched(
    base: Genotype,
    targets: Sequence[float],
    *,
    measure: Callable[[Genotype], float],
    what: str,
    tolerance: float,
    operations: Sequence[str],
    seed: int,
) -> list[Genotype]:
    """Draw for each target until a new deviation measures it, with any number of edges replaced."""
    generator = np.random.default_rng(seed)
    seen, found = {base.canonical()}, []
    for target in targets:
        nearest = None
        for _ in range(MAX_DRAWS):
            num_edges = int(generator.integers(1, base.num_edges + 1))
            genotype = random_deviation(base, num_edges=num_edges, operations=operations, generator=generator)
            if genotype.canonical() in seen:
                continue
            value = measure(genotype)
            if abs(value - target) <= tolerance:
                break
            if nearest is None or abs(value - target) < abs(nearest - target):
                nearest = value
        else:
            known = (
                "no other deviation was found" if nearest is None else f"the nearest found has {nearest:.3g}"
            )
            raise UserError(
                f"No new deviation with {target:.3g} {what} was found in {MAX_DRAWS} draws; {known}.",
                "Ask for another value or fewer genotypes, or allow a larger tolerance where there is one.",
            )
        seen.add(genotype.canonical())
        found.append(genotype)
    return found
