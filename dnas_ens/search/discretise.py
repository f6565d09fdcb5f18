"""From mixture weights to a genotype and back."""

from __future__ import annotations

import torch
from torch import Tensor

from dnas_ens.errors import UserError
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import NONE, SearchSpace


def discretise(mixture: Tensor, space: SearchSpace, *, edges_per_node: int = 2) -> Genotype:
    """Keep the strongest edges of every node, each with its best operation other than ``none``.

    Strength of an edge: softmax(beta)_e * max over o of softmax(alpha_e)_o, that is the largest entry of the
    mixture on the edge (DARTS, arXiv 1806.09055, with PC-DARTS's edge weights).

    Args:
        mixture: (T, E, O) natural distribution.
        space: The space.
        edges_per_node: Edges kept; nodes with fewer incoming edges keep all.

    Returns:
        The genotype, with the space's cell types.
    """
    allowed = [index for index, name in enumerate(space.operations) if name != NONE]
    strength, best = mixture[..., allowed].detach().cpu().max(-1)
    cells = {}
    for type_index, cell_type in enumerate(space.cell_types):
        nodes = []
        for node in space.node_slices:
            scores = strength[type_index, node]
            kept = scores.argsort(descending=True, stable=True)[:edges_per_node].sort().values.tolist()
            nodes.append(
                tuple(
                    (space.operations[allowed[int(best[type_index, node.start + source])]], source)
                    for source in kept
                )
            )
        cells[cell_type] = tuple(nodes)
    return Genotype(**cells)


def genotype_mixture(genotype: Genotype, space: SearchSpace) -> Tensor:
    """Return (T, E, O), 1 on every (edge, operation) of the genotype and 0 elsewhere.

    Raises:
        UserError: If the genotype does not live in the space.
    """
    mixture = torch.zeros(space.shape)
    for type_index, cell_type in enumerate(space.cell_types):
        cell = genotype.cell(cell_type) if cell_type in genotype.cell_types else ()
        if len(cell) != space.num_nodes:
            raise UserError(
                f"The {cell_type} cell of the genotype has {len(cell)} nodes; the search has {space.num_nodes}.",
                "Search with the --num-nodes and --num-cells of the base's own search.",
            )
        for node, edges in enumerate(cell):
            for operation, source in edges:
                if operation not in space.operations:
                    raise UserError(
                        f"The genotype uses {operation!r}, which is not searched.",
                        f"Add {operation} to --operations.",
                    )
                mixture[type_index, space.edges.index((node, source)), space.operations.index(operation)] = 1
    return mixture


def normalised_entropy(mixture: Tensor, space: SearchSpace) -> float:
    """Return the mean entropy of the nodes' distributions over the largest possible, in [0, 1].

    Near 1 the search has not decided anything; near 0 it has collapsed onto single choices.

    Args:
        mixture: (T, E, O) or (m, T, E, O) natural distributions.
        space: The space.
    """
    terms = -torch.xlogy(mixture, mixture).sum(-1)
    shares = []
    for node in space.node_slices:
        num_outcomes = (node.stop - node.start) * len(space.operations)
        largest = torch.tensor(float(num_outcomes)).log()
        # A node with a single outcome has nothing to decide.
        shares.append(terms[..., node].sum(-1) / largest.clamp_min(torch.finfo(torch.float32).tiny))
    return float(torch.stack(shares).mean())
