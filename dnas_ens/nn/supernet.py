"""The reference supernet: every candidate operation of every edge, computed one at a time.

The mixture weights are an argument of ``forward`` and never an attribute, so one supernet serves any number
of architectures, also several within one batch. Every faster form is tested against it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.nn.operations import Zero, build_operation, require_operations
from dnas_ens.nn.stack import (
    build_preprocessing,
    build_stem,
    pass_by,
    preprocessed,
    shuffle_channels,
    split_channels,
)
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.spaces import NONE
from dnas_ens.space.stack import CellPlan, StackSpec


class MixedOperation(nn.Module):
    """All O candidate operations of one edge, summed with mixture weights."""

    def __init__(
        self, space: SearchSpace, in_channels: int, out_channels: int, stride: int, *, partial_channels: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.partial_channels = stride, partial_channels
        shares = in_channels // partial_channels, out_channels // partial_channels
        self.operations = nn.ModuleList(
            build_operation(name, *shares, stride, affine=False) for name in space.operations
        )

    def forward(self, features: Tensor, weights: Tensor, drawn: Sequence[bool] | None = None) -> Tensor:
        """Return sum over o of weights_o * op_o(features); channels that pass by get the sum of the weights.

        Args:
            features: (B, C, H, W).
            weights: (O,) for the whole batch, or (B, O) for each image its own.
            drawn: For each operation whether it is computed; the others' weights must be 0.
        """
        active, rest = split_channels(features, self.partial_channels)
        columns = weights.reshape(-1, weights.shape[-1], 1, 1, 1).unbind(1)
        total: Tensor | None = None
        for index, (operation, column) in enumerate(zip(self.operations, columns, strict=True)):
            # ``none`` adds nothing, but its weight lowers the share of the others.
            if isinstance(operation, Zero) or (drawn is not None and not drawn[index]):
                continue
            term = operation(active)
            total = column * term if total is None else torch.addcmul(total, column, term)
        assert total is not None, "the space allows no cell without an operation"
        if rest is None:
            return total
        share = weights.reshape(-1, weights.shape[-1], 1, 1, 1).sum(1)
        return torch.cat([total, share * pass_by(rest, self.stride)], dim=1)


class SupernetCell(nn.Module):
    """One cell of the supernet, as DARTS has it: every node is a sum, the output concatenates the nodes."""

    def __init__(self, space: SearchSpace, plan: CellPlan, *, partial_channels: int = 1) -> None:
        super().__init__()
        self.space, self.partial_channels = space, partial_channels
        self.type_index = space.cell_types.index(plan.cell_type)
        self.preprocessing = build_preprocessing(plan, affine=False)
        self.edges = nn.ModuleList(
            MixedOperation(
                space,
                plan.in_channels(source),
                plan.channels,
                plan.stride(source),
                partial_channels=partial_channels,
            )
            for _, source in space.edges
        )

    def forward(
        self,
        before_last: Tensor,
        last: Tensor,
        mixture: Tensor,
        drawn: Sequence[Sequence[Sequence[bool]]] | None = None,
    ) -> Tensor:
        """Compute the cell's output.

        Args:
            before_last: Output of the cell before the last one, (B, C', H', W').
            last: Output of the last cell, (B, C'', H'', W'').
            mixture: (S, T, E, O) for S slices of the batch.
            drawn: (T, E, O), which operations are computed, at least one for each node; None for all.

        Returns:
            (B, N * C, H, W), or (B, C, H, W) for the sum of loose ends.
        """
        weights = mixture[:, self.type_index]
        own = None if drawn is None else drawn[self.type_index]
        # PyTorch broadcasts a single mixture over the batch.
        if len(weights) > 1:
            weights = weights.repeat_interleave(len(last) // len(weights), dim=0)
        states = preprocessed(self.preprocessing, before_last, last)
        for node_slice in self.space.node_slices:
            terms = (
                self.edges[edge](states[source], weights[..., edge, :], None if own is None else own[edge])
                for source, edge in enumerate(range(node_slice.start, node_slice.stop))
                if own is None or any(own[edge])
            )
            states.append(self.node(functools.reduce(operator.add, terms)))
        return self.output(states[self.space.rules.num_inputs :], weights)

    def node(self, total: Tensor) -> Tensor:
        """Return a node (B, C, H, W) from the sum of its edges."""
        return shuffle_channels(total, self.partial_channels)

    def output(self, nodes: list[Tensor], weights: Tensor) -> Tensor:
        """Return the output from the nodes, N of (B, C, H, W), and the mixture weights (1 or B, E, O)."""
        return torch.cat(nodes, dim=1)


class LooseEndsCell(SupernetCell):
    """One cell of the supernet of the efficient space: ReLU in every node, the output sums the loose ends."""

    def node(self, total: Tensor) -> Tensor:
        """Return a node (B, C, H, W) from the sum of its edges."""
        return F.relu(total)

    def output(self, nodes: list[Tensor], weights: Tensor) -> Tensor:
        """Return sum over n of looseness_n * node_n, (B, C, H, W)."""
        return sum_of_loose_ends(nodes, looseness(weights, self.space))


def looseness(weights: Tensor, space: SearchSpace) -> Tensor:
    """Return how far each node is a loose end, one that no other node reads.

    Equation: looseness_n = product over the later nodes m of (1 - sum_o w[edge n -> m, o]), each factor clamped to
    [0, 1]. With the weights of a genotype it is 1 on loose ends and 0 on other nodes; between, it is differentiable.

    Args:
        weights: (..., E, O) mixture weights of a cell; ``none`` reads nothing.

    Returns:
        (..., N), in [0, 1].
    """
    columns = weights.unbind(-1)
    reads = functools.reduce(
        operator.add, [column for column, name in zip(columns, space.operations, strict=True) if name != NONE]
    )
    unread = (1.0 - reads).clamp(0.0, 1.0).unbind(-1)
    first = space.rules.num_inputs
    loose = []
    for node in range(space.num_nodes):
        leaving = [unread[edge] for edge, (_, source) in enumerate(space.edges) if source == first + node]
        loose.append(functools.reduce(operator.mul, leaving, torch.ones_like(unread[0])))
    return torch.stack(loose, dim=-1)


def sum_of_loose_ends(nodes: list[Tensor], loose: Tensor) -> Tensor:
    """Return the sum of nodes (B, C, H, W) weighted by their looseness (1 or B, N).

    The last node is read by none, so its looseness is 1.
    """
    total = nodes[-1]
    for node, share in zip(nodes[:-1], loose.unbind(-1), strict=False):
        total = torch.addcmul(total, node, share.reshape(-1, 1, 1, 1))
    return total


class Supernet(nn.Module):
    """A stack of cells in which every edge holds every candidate operation (DARTS, arXiv 1806.09055).

    BatchNorm is affine-free inside the cells: a learnt scale would undo the mixture weights.

    Raises:
        UserError: If an operation is unknown.
    """

    #: What computes a cell of each space: called with space, plan and partial_channels.
    cell_classes: Mapping[str, type[nn.Module]] = MappingProxyType({"darts": SupernetCell, "efficient": LooseEndsCell})

    def __init__(self, space: SearchSpace, stack: StackSpec) -> None:
        super().__init__()
        require_operations(space.operations)
        self.space, self.stack = space, stack
        plans = stack.plan(space.name, space.num_nodes)
        self.stem = build_stem(stack, space.name)
        cell_class = self.cell_classes[space.name]
        self.cells = nn.ModuleList(cell_class(space, plan, partial_channels=stack.partial_channels) for plan in plans)
        self.classifier = nn.Linear(plans[-1].out_channels, stack.num_classes)

    def forward(self, images: Tensor, mixture: Tensor, *, hard: bool = False) -> Tensor:
        """Classify images under given mixture weights.

        Args:
            images: (B, C_in, H, W), normalised.
            mixture: (T, E, O) non-negative weights of every (edge, operation), the same for all images; or
                (S, T, E, O) for S slices: images [i * B/S, (i + 1) * B/S) use mixture i. BatchNorm statistics
                are shared between the slices in training mode.
            hard: Whether operations of weight 0 are not computed; then the weights are read from their device. For the
                reference form.

        Returns:
            Logits (B, K).

        Raises:
            ValueError: If the mixture has another shape, or the slices do not divide the batch.
        """
        slices = per_slice(self.space, images, mixture)
        before_last = last = self.stem(images)
        drawn = (slices != 0).any(0).tolist() if hard else None
        for cell in self.cells:
            before_last, last = last, cell(before_last, last, slices, *([drawn] if hard else []))
        logits: Tensor = self.classifier(last.mean(dim=(2, 3)))
        return logits


def per_slice(space: SearchSpace, images: Tensor, mixture: Tensor) -> Tensor:
    """Return the mixture with its axis of slices, (S, T, E, O); one mixture for all images is a single slice.

    Raises:
        ValueError: If it has another shape, or the slices do not divide the batch.
    """
    if mixture.shape[-3:] != space.shape or mixture.dim() not in (3, 4):
        raise ValueError(
            f"mixture has shape {tuple(mixture.shape)}; it must be {space.shape}, "
            "or the same with a leading axis of slices."
        )
    slices = mixture if mixture.dim() == 4 else mixture.unsqueeze(0)
    if len(images) % len(slices):
        raise ValueError(
            f"{len(slices)} slices do not divide a batch of {len(images)} images; use a multiple of {len(slices)}."
        )
    return slices
