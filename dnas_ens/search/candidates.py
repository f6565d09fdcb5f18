"""The candidate pool: drawn from the hypernetwork, scored with inherited weights, chosen greedily."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dnas_ens.config import CandidateConfig, RetrainConfig
from dnas_ens.data.batches import Augmentation, iterate_batches
from dnas_ens.data.dataset import Split
from dnas_ens.ensembles.selection import exhaustive_selection, greedy_selection
from dnas_ens.errors import UserError
from dnas_ens.nn.network import Network, inherit
from dnas_ens.nn.supernet import Supernet
from dnas_ens.search.divergence import architecture_distance
from dnas_ens.search.loop import SearchLoop
from dnas_ens.search.star import FamilyLoop
from dnas_ens.space.genotype import Genotype, random_deviation
from dnas_ens.training.batch_norm import recalibrate
from dnas_ens.training.interleaving import exhaust
from dnas_ens.training.prediction import predict_log_probs
from dnas_ens.training.step import TrainingStep, training_steps

#: Factors by which lambda is drawn more densely before the pool is declared too small.
_DENSER = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One genotype of the pool.

    Args:
        lam: Diversity parameter it was drawn at; None for a random deviation.
        direction: Direction it was drawn on; None for a random deviation.
        distance_to_base: D to the base, in [0, 1]; None for a random deviation.
        shared_edges: (node, edge, operation) triples shared with the base.
        supernet_val_nll: Validation NLL with inherited weights, nats; None if it was not scored.
        supernet_val_accuracy: Validation accuracy with inherited weights, in [0, 1].
        expected_step_ms: What a training step is expected to take; None if operations were not measured.
    """

    genotype: Genotype
    lam: float | None = None
    direction: int | None = None
    distance_to_base: float | None = None
    shared_edges: int = 0
    supernet_val_nll: float | None = None
    supernet_val_accuracy: float | None = None
    expected_step_ms: float | None = None

    def cells(self) -> list[str]:
        """Return lambda, direction, D to the base, shared edges and validation NLL as text; - for what there is not."""
        return [
            _shown(self.lam),
            "-" if self.direction is None else str(self.direction),
            _shown(self.distance_to_base),
            str(self.shared_edges),
            _shown(self.supernet_val_nll),
        ]

    def __str__(self) -> str:
        lam, direction, distance, shared, val_nll = self.cells()
        return (
            f"lambda {lam}, direction {direction}, D to base {distance}, {shared} edges shared with the base, "
            f"val NLL with inherited weights {val_nll}"
            + ("" if self.expected_step_ms is None else f", expected step {self.expected_step_ms:.1f} ms")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {**vars(self), "genotype": self.genotype.to_dict()}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Candidate:
        """Rebuild a candidate from its dictionary."""
        return cls(**{**entry, "genotype": Genotype.from_dict(entry["genotype"])})


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def drop_doubles(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Keep the first of every set of isomorphic genotypes, so that no ensemble holds a network twice."""
    unique: dict[Genotype, Candidate] = {}
    for candidate in candidates:
        unique.setdefault(candidate.genotype.canonical(), candidate)
    return list(unique.values())


@torch.no_grad()
def draw_pool(loop: FamilyLoop) -> list[Candidate]:
    """Draw candidates at evenly spaced lambdas on every direction, the base first, isomorphic ones dropped.

    Where that leaves fewer different genotypes than members are wanted, lambda is drawn more densely.

    Raises:
        UserError: If the paths do not hold enough different genotypes.
    """
    config, hyper = loop.config.candidates, loop.config.hypernetwork
    fixed = loop.config.objective.fixed_lambda
    family = loop.family
    base = family.base_genotype()
    pool: list[Candidate] = []
    for density in _DENSER:
        num_lambdas = 1 if fixed is not None else max(1, density * config.pool_size // hyper.directions)
        steps = torch.arange(1, num_lambdas + 1) / num_lambdas * hyper.max_lambda
        # The start of the paths comes first; it differs from a given base that only the penalty compares with.
        points = family.start_point().joined(family.grid(steps if fixed is None else torch.tensor([fixed])))
        mixtures = family.distributions(points)
        distances = architecture_distance(mixtures, family.reference(), family.space)
        pool = drop_doubles(
            Candidate(
                genotype=genotype,
                lam=round(float(points.lam[index]), 6),
                direction=int(points.direction[index]),
                distance_to_base=float(distances[index]),
                shared_edges=genotype.shared_edges(base),
                expected_step_ms=None if loop.step_times is None else loop.step_times.of(genotype),
            )
            for index, genotype in enumerate(family.discretised(mixtures))
        )
        if len(pool) >= config.members:
            return pool[: max(config.pool_size + 1, config.members)]
    raise UserError(
        f"{config.members} members were asked for, but the hypernetwork holds {len(pool)} different genotypes.",
        "Lower --members, raise --directions or --max-lambda, or search for more --epochs.",
    )


def deviation_pool(
    base: Genotype, config: CandidateConfig, *, operations: tuple[str, ...], seed: int
) -> list[Candidate]:
    """Draw random deviations of a base, ``replaced_edges`` of its edges replaced in each.

    Raises:
        UserError: If they do not hold enough different genotypes.
    """
    generator = np.random.default_rng(seed)
    drawn = (
        random_deviation(base, num_edges=config.replaced_edges, operations=operations, generator=generator)
        for _ in range(max(_DENSER) * config.pool_size)
    )
    pool = drop_doubles(Candidate(genotype=genotype, shared_edges=genotype.shared_edges(base)) for genotype in drawn)
    if len(pool) < config.members:
        raise UserError(
            f"{config.members} members were asked for, but only {len(pool)} deviations are different.",
            "Lower --members or raise --replaced-edges.",
        )
    return pool[: config.pool_size]


def inherited_networks(
    supernet: Supernet,
    genotypes: Iterable[Genotype],
    calibration: Split,
    *,
    augmentation: Augmentation,
) -> Iterable[Network]:
    """Yield the discrete networks with inherited weights and BatchNorm statistics of their own."""
    for genotype in genotypes:
        network = inherit(supernet, genotype)
        recalibrate(network, calibration, augmentation=augmentation)
        yield network


def score(loop: SearchLoop, pool: list[Candidate], *, recipe: RetrainConfig) -> tuple[list[Candidate], np.ndarray]:
    """Score candidates on the validation images with the supernet's weights.

    Args:
        recipe: Learning rate and regularisation of the optional brief training (``candidate_epochs``).

    Returns:
        The candidates with their scores, and their probabilities (P, N, K) on ``loop.scoring_images()``.
    """
    images = loop.scoring_images()
    scored, probs = [], []
    genotypes = [candidate.genotype for candidate in pool]
    networks = inherited_networks(loop.supernet, genotypes, loop.weight_images, augmentation=loop.augmentation)
    print(f"scoring {len(pool)} candidates on {len(images):,} validation images", file=sys.stderr, flush=True)
    bar = tqdm(networks, total=len(pool), desc="candidates", unit="network", disable=None, leave=False)
    for candidate, network in zip(pool, bar, strict=True):
        if loop.config.candidates.candidate_epochs:
            _train_briefly(network, loop, recipe)
        log_probs = predict_log_probs(network, images, augmentation=loop.augmentation)
        picked = log_probs.gather(1, images.labels[:, None])
        hits = (log_probs.argmax(-1) == images.labels).float().mean()
        scored.append(replace(candidate, supernet_val_nll=-float(picked.mean()), supernet_val_accuracy=float(hits)))
        probs.append(log_probs.exp().cpu().numpy())
    return scored, np.stack(probs)


def _train_briefly(network: Network, loop: SearchLoop, recipe: RetrainConfig) -> None:
    """Train with inherited weights for a few epochs, the learning rate falling by a cosine."""
    epochs, recipe = loop.config.candidates.candidate_epochs, recipe.for_images(len(loop.weight_images))
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=0.5 * recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay or 0.0,
    )
    step = TrainingStep(network, optimizer, recipe)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        batches = iterate_batches(
            loop.weight_images,
            recipe.batch_size,
            generator=loop.generators["order"],
            augmentation=loop.augmentation,
            augmentation_generator=loop.generators["augmentation"],
            drop_last=True,
        )
        exhaust(training_steps(step, batches))
        schedule.step()


def select(probs: np.ndarray, labels: np.ndarray, config: CandidateConfig) -> list[int]:
    """Choose M candidates on the validation NLL of their ensemble; positions in the pool, best first.

    Raises:
        UserError: If more members are asked for than there are candidates.
    """
    if config.selection == "exhaustive":
        return exhaustive_selection(probs, labels, num_members=config.members)
    replacement = config.selection == "greedy-replacement"
    return greedy_selection(probs, labels, num_members=config.members, replacement=replacement)


def rank(probs: np.ndarray, labels: np.ndarray, selected: list[int]) -> list[int]:
    """Put the pool in the order that larger ensembles take it in.

    The chosen come first, then always the candidate that leaves the ensemble of all before it with the least
    validation NLL; where the choice was greedy, this is its continuation.

    Args:
        probs: Probabilities of the pool, shape (P, N, K).

    Returns:
        Positions in the pool, first ``selected``, then every other one once.
    """
    left = len(probs) - len(set(selected))
    return [*selected, *(greedy_selection(probs, labels, num_members=left, given=selected) if left else [])]


def spread_order(pool: list[Candidate]) -> list[int]:
    """Put candidates that are not scored in an order that is fair to all: the next is always the one farthest off.

    Always the candidate whose most similar one among those taken shares the fewest edges with it (farthest-first
    traversal, Gonzalez 1985); of several the one of the largest lambda, then the one drawn first. With R directions and
    large lambdas these are first the ends of the paths, one direction after the other.

    Returns:
        Positions in the pool, each once.
    """
    order: list[int] = []
    nearest = [0] * len(pool)
    left = set(range(len(pool)))
    while left:
        chosen = min(left, key=lambda index: (nearest[index], -(pool[index].lam or 0.0), index))
        left.remove(chosen)
        order.append(chosen)
        for index in left:
            nearest[index] = max(nearest[index], pool[index].genotype.shared_edges(pool[chosen].genotype))
    return order
