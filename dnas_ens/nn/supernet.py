"""The reference supernet: every candidate operation of every edge, computed one at a time.

The mixture weights are an argument of ``forward`` and never an attribute, so one supernet serves any number
of architectures, also several within one batch. Every faster form is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dnas_ens.nn.operations import Zero, build_operation, require_operations
from dnas_ens.nn.stack import build_preprocessing, build_stem, pass_by, shuffle_channels, split_channels
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.stack import CellPlan, StackSpec


class MixedOperation(nn.Module):
    """All O candidate operations of one edge, summed with mixture weights."""

    def __init__(self, space: SearchSpace, channels: int, stride: int, *, partial_channels: int = 1) -> None:
        super().__init__()
        self.stride, self.partial_channels = stride, partial_channels
        share = channels // partial_channels
        self.operations = nn.ModuleList(build_operation(name, share, stride, affine=False) for name in space.operations)

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
    """One cell of the supernet: two inputs, N nodes, an output that concatenates the nodes."""

    def __init__(self, space: SearchSpace, plan: CellPlan, *, partial_channels: int = 1) -> None:
        super().__init__()
        self.space, self.partial_channels = space, partial_channels
        self.type_index = space.cell_types.index(plan.cell_type)
        self.preprocess_before_last, self.preprocess_last = build_preprocessing(plan, affine=False)
        self.edges = nn.ModuleList(
            MixedOperation(space, plan.channels, plan.stride(source), partial_channels=partial_channels)
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
            (B, N * C, H, W).
        """
        weights = mixture[:, self.type_index]
        own = None if drawn is None else drawn[self.type_index]
        # PyTorch broadcasts a single mixture over the batch.
        if len(weights) > 1:
            weights = weights.repeat_interleave(len(last) // len(weights), dim=0)
        states = [self.preprocess_before_last(before_last), self.preprocess_last(last)]
        for node_slice in self.space.node_slices:
            node = sum(
                self.edges[edge](states[source], weights[..., edge, :], None if own is None else own[edge])
                for source, edge in enumerate(range(node_slice.start, node_slice.stop))
                if own is None or any(own[edge])
            )
            states.append(shuffle_channels(node, self.partial_channels))
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """A stack of cells in which every edge holds every candidate operation (DARTS, arXiv 1806.09055).

    BatchNorm is affine-free inside the cells: a learnt scale would undo the mixture weights.

    Raises:
        UserError: If an operation is unknown.
    """

    #: What computes a cell: called with space, plan and partial_channels.
    cell_class: type[nn.Module] = SupernetCell

    def __init__(self, space: SearchSpace, stack: StackSpec) -> None:
        super().__init__()
        require_operations(space.operations)
        self.space, self.stack = space, stack
        plans, out_channels = stack.plan(space.num_nodes)
        self.stem = build_stem(stack)
        self.cells = nn.ModuleList(
            self.cell_class(space, plan, partial_channels=stack.partial_channels) for plan in plans
        )
        self.classifier = nn.Linear(out_channels, stack.num_classes)

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
