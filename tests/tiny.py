"""What tests build again and again: a genotype, a stack, a supernet and its fast form, predictions, all small."""

from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from dnas_ens.evaluate.predictions import Predictions
from dnas_ens.nn.fast_supernet import FastSupernet
from dnas_ens.nn.supernet import Supernet
from dnas_ens.search.relaxation import mixture_distribution
from dnas_ens.space.genotype import random_genotype
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import SPACES
from dnas_ens.space.stack import StackSpec

WITH_NONE = ("none", *SPACES["darts"].operations)


def genotype(seed=0, *, space="darts", num_nodes=2, edges_per_node=2, cell_types=("reduction",)):
    """A random genotype; by default of the cells of a stack of one."""
    return random_genotype(
        np.random.default_rng(seed),
        space=space,
        operations=SPACES[space].operations,
        num_nodes=num_nodes,
        edges_per_node=edges_per_node,
        cell_types=cell_types,
    )


def stack(num_cells=3, **fields):
    """A stack of C = 4."""
    return StackSpec(**{"channels": 4, "in_channels": 1, "num_classes": 3, **fields}, num_cells=num_cells)


def supernet(num_cells=3, *, space="darts", operations=None, num_nodes=3, **fields):
    """The reference supernet in double precision, of two-channel images and five classes, always the same weights."""
    torch.manual_seed(0)
    operations = operations or ("none", *SPACES[space].operations)
    space = SearchSpace.for_stack(num_cells, name=space, operations=operations, num_nodes=num_nodes)
    return Supernet(space, stack(num_cells, **{"in_channels": 2, "num_classes": 5, **fields})).double()


def supernet_pair(**fields):
    """The reference and its fast form."""
    reference = supernet(**fields)
    return reference, FastSupernet.from_reference(reference)


def same(first, second):
    """Whether two states of a module are equal bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def states_equal(first, second):
    """Whether the leaves of two nested states are equal, tensors bit by bit."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def mixture(space, *lead, seed=0):
    """Random mixture weights (*lead, T, E, O) in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*lead, *space.shape, generator=generator, dtype=torch.float64) / len(space.operations)


def logits(space, *lead, seed=0, scale=1.0):
    """Normal alpha (*lead, T, E, O) and beta (*lead, T, E) in double precision."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, *space.shape)
    alpha = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return alpha, scale * torch.randn(shape[:-1], generator=generator, dtype=torch.float64)


def distributions(space, *lead, seed=0, scale=1.0):
    """Natural distributions (*lead, T, E, O) of random logits."""
    return mixture_distribution(*logits(space, *lead, seed=seed, scale=scale), space)


def predictions(num_members=3, num_images=60, num_classes=4, *, sharpness=1.5, scale=1.0, seed=0, **fields):
    """Predictions (M, N, K) of val and as many of test, each member with noise of deviation 1 and factor `scale`.

    The label's logit exceeds the others by `sharpness`: a number, or one a member in shape (M, 1).
    """
    generator = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    given: dict[str, Any] = {}
    for split in ("val", "test"):
        drawn = generator.normal(size=(num_members, num_images, num_classes))
        drawn[:, np.arange(num_images), labels] += sharpness
        odds = np.exp(scale * (drawn - drawn.max(axis=2, keepdims=True)))
        given |= {f"{split}_probs": odds / odds.sum(axis=2, keepdims=True), f"{split}_labels": labels}
    given |= {"classes": [f"class {index}" for index in range(num_classes)], "weights": [1 / num_members] * num_members}
    return Predictions(**{**given, **fields})
