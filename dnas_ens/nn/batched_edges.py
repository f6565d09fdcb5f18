"""All edges that leave one node of a supernet cell, computed together.

What depends on the source alone (ReLU, pooling and its BatchNorm, skip) is computed once instead of once an edge;
convolutions of the k edges are side by side as k * C channels; the last pointwise convolution of every
operation, its BatchNorm and the mixture weights are one matrix product (see ``moments``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.nn import moments
from dnas_ens.nn.depthwise import depthwise_conv
from dnas_ens.nn.execution import without_autocast
from dnas_ens.nn.moments import PointwiseNorm, grouped_pointwise
from dnas_ens.nn.operations import average_pool, build_operation, halving_pointwise
from dnas_ens.space.spaces import NONE

#: Kernel size and dilation of the operations that are batched; others run edge by edge.
SEPARABLE = {"sep_conv_3x3": 3, "sep_conv_5x5": 5}
DILATED = {"dil_conv_3x3": 3, "dil_conv_5x5": 5}
POOLS = ("max_pool_3x3", "avg_pool_3x3")
SKIP = "skip_connect"
#: Channels and activations (B * C * H * W) below which the edges' depthwise convolutions run as one.
NARROW, SMALL = 16, 2**18
BATCHED = (*SEPARABLE, *DILATED, *POOLS, SKIP, NONE)


@dataclass(frozen=True)
class Piece:
    """Where a tensor of one operation of one edge is in a batched tensor.

    Args:
        own: Name of the batched tensor in ``EdgesOfSource``.
        index: Which of its ``count`` equal parts along the first axis.
        count: How many parts it has.
        edge: Number of the edge among the k.
        operation: Number of the operation among the O.
        name: Name of the tensor within the reference's operation.
    """

    own: str
    index: int
    count: int
    edge: int
    operation: int
    name: str


def interleave(parts: list[Tensor], num_edges: int) -> Tensor:
    """Join n tensors (B, k * c, H, W) to one, edge by edge and within an edge part by part, channels_last."""
    batch, _, height, width = parts[0].shape
    split = [part.permute(0, 2, 3, 1).reshape(batch, height, width, num_edges, -1) for part in parts]
    return torch.cat(split, dim=4).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def _product(equation: str, weights: Tensor, matrices: Tensor) -> Tensor:
    """Multiply by mixture weights in their own precision: autocast would round them, and the folded BatchNorm."""
    with without_autocast(weights.device):
        return torch.einsum(equation, weights, matrices)


def separate(features: Tensor, num_edges: int, num_parts: int) -> list[Tensor]:
    """Undo ``interleave`` for parts of equal size."""
    batch, _, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(batch, height, width, num_edges, num_parts, -1)
    return [part.reshape(batch, height, width, -1).permute(0, 3, 1, 2) for part in rows.unbind(4)]


class EdgesOfSource(nn.Module):
    """The k edges that leave one source, with all their candidate operations.

    Args:
        stride: 1 or 2, of all these edges.
    """

    def __init__(self, operations: tuple[str, ...], num_edges: int, channels: int, stride: int) -> None:
        super().__init__()
        self.operations, self.num_edges, self.channels, self.stride = operations, num_edges, channels, stride
        self.separable = [name for name in operations if name in SEPARABLE]
        self.convolutions = self.separable + [name for name in operations if name in DILATED]
        self.pools = [name for name in operations if name in POOLS]
        self.reduces = SKIP in operations and stride == 2
        self.shared = self.pools + ([SKIP] if SKIP in operations and stride == 1 else [])

        kernels = SEPARABLE | DILATED
        self.depthwise = nn.ParameterDict(
            {name: torch.empty(num_edges * channels, 1, kernels[name], kernels[name]) for name in self.convolutions}
        )
        self.second_depthwise = nn.ParameterDict(
            {name: torch.empty_like(self.depthwise[name]) for name in self.separable}
        )
        if self.separable:
            self.first_norm = PointwiseNorm(num_edges * len(self.separable), channels)
        if self.convolutions:
            self.last_norm = PointwiseNorm(num_edges * len(self.convolutions), channels)
        if self.pools:
            self.pool_norm = PointwiseNorm(len(self.pools), channels, convolve=False)
        if self.reduces:
            half = channels // 2
            self.even = nn.Parameter(torch.empty(num_edges * half, channels, 1, 1))
            self.odd = nn.Parameter(torch.empty(num_edges * (channels - half), channels, 1, 1))
            self.reduce_norm = nn.BatchNorm2d(num_edges * channels, affine=False)
        #: Operations a user registered, edge by edge as the reference has them.
        self.others = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    build_operation(name, channels, channels, stride, affine=False) for _ in range(num_edges)
                )
                for name in operations
                if name not in BATCHED
            }
        )

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """Return what every edge adds to its node.

        Args:
            features: (B, C, H, W) of the source.
            weights: (S, k, O) mixture weights of S slices of the batch.

        Returns:
            (B, k * C, H', W'), edge by edge.
        """
        terms = []
        if self.convolutions or self.reduces:
            active = F.relu(features)
        if self.convolutions:
            terms.append(self._mix_convolutions(active, self._of(self.convolutions, weights)))
        if self.shared:
            terms.append(self._mix_shared(features, self._of(self.shared, weights)))
        if self.reduces:
            terms.append(self._scale(self._reduce(active), self._of([SKIP], weights)[..., 0]))
        for name, modules in self.others.items():
            assert isinstance(modules, nn.ModuleList)
            joined = torch.cat([module(features) for module in modules], dim=1)
            terms.append(self._scale(joined, self._of([name], weights)[..., 0]))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def _of(self, names: list[str], weights: Tensor) -> Tensor:
        # Not by a list of indices, which would be copied from the host at every step.
        columns = [self.operations.index(name) for name in names]
        if columns == list(range(columns[0], columns[0] + len(columns))):
            return weights[..., columns[0] : columns[0] + len(columns)]
        return torch.stack([weights[..., column] for column in columns], dim=-1)

    def _mix_convolutions(self, active: Tensor, weights: Tensor) -> Tensor:
        edges, count, channels = self.num_edges, len(self.convolutions), self.channels
        on_cpu = not moments.suits_large_products(active)
        # On a CPU, below either bound a call costs more than copying the input for every edge. On a GPU it always does,
        # and there the input need not be copied.
        together = not on_cpu or channels < NARROW or active.numel() < SMALL
        copies = [active] * (1 if together else edges)
        if together and on_cpu:
            copies = [torch.cat([active] * edges, dim=1)]
        inner = {
            name: self._depthwise(copies, self.depthwise[name], self.stride, 2 if name in DILATED else 1)
            for name in self.convolutions
        }
        if self.separable:
            first = self._join([inner[name] for name in self.separable])
            hidden = F.relu_(grouped_pointwise(first, *self.first_norm.matrices(first)))
            for name, parts in zip(self.separable, self._split(hidden, together), strict=True):
                inner[name] = self._depthwise(parts, self.second_depthwise[name], 1, 1)
        last = self._join([inner[name] for name in self.convolutions])
        matrices, shifts = self.last_norm.matrices(last)
        matrices = matrices.view(edges, count, channels, channels)
        # Slice s, edge k: sum over operations n of w_skn (A_kn z_n + b_kn), one matrix of n * C columns.
        mixed = _product("skn,knoi->skoni", weights, matrices).flatten(3)
        shift = _product("skn,kno->sko", weights, shifts.view(edges, count, channels))
        return self._by_slice(last, mixed, shift)

    def _depthwise(self, parts: list[Tensor], weight: Tensor, stride: int, dilation: int) -> list[Tensor]:
        kernels = weight.chunk(len(parts))
        return [
            depthwise_conv(part, kernel, stride=stride, dilation=dilation)
            for part, kernel in zip(parts, kernels, strict=True)
        ]

    def _join(self, operations: list[list[Tensor]]) -> Tensor:
        """Join the outputs of n operations, each in one part or one an edge, to (B, k * n * C, H, W)."""
        if len(operations[0]) == 1:
            return interleave([parts[0] for parts in operations], self.num_edges)
        return torch.cat([part for edge in zip(*operations, strict=True) for part in edge], dim=1)

    def _split(self, features: Tensor, together: bool) -> list[list[Tensor]]:
        """Undo ``_join`` for the separable convolutions."""
        count = len(self.separable)
        if together:
            return [[part] for part in separate(features, self.num_edges, count)]
        parts = features.split(self.channels, dim=1)
        return [list(parts[number::count]) for number in range(count)]

    def _mix_shared(self, features: Tensor, weights: Tensor) -> Tensor:
        """Mix pools and skip: all k edges read the same n * C channels."""
        stacked = torch.cat([self._pool(name, features) for name in self.shared], dim=1)
        skip = torch.eye(self.channels, dtype=weights.dtype, device=features.device).unsqueeze(0)
        matrices, shift = skip, None
        if self.pools:
            matrices, shifts = self.pool_norm.matrices(stacked)
            shift = _product("skn,nc->skc", weights[..., : len(self.pools)], shifts)
            matrices = torch.cat([matrices, skip])[: len(self.shared)]
            shift = shift.flatten(1).unsqueeze(1)
        mixed = _product("skn,noi->skoni", weights, matrices).flatten(3).flatten(1, 2)
        return self._by_slice(stacked, mixed.unsqueeze(1), shift)

    def _by_slice(self, features: Tensor, matrices: Tensor, shift: Tensor | None) -> Tensor:
        """Apply the matrices (S, G, d, c) and shifts (S, G, d) of each slice to its share of the batch."""
        if moments.suits_large_products(features):
            return moments.sliced_pointwise(features, matrices, shift)
        parts = features.chunk(len(matrices))
        shifts = [None] * len(parts) if shift is None else shift.unbind()
        results = [
            grouped_pointwise(part, own, own_shift)
            for part, own, own_shift in zip(parts, matrices.unbind(), shifts, strict=True)
        ]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _pool(self, name: str, features: Tensor) -> Tensor:
        if name == "max_pool_3x3":
            return F.max_pool2d(features, 3, self.stride, padding=1)
        if name == SKIP:
            return features
        return average_pool(features, self.stride)

    def _reduce(self, active: Tensor) -> Tensor:
        """Return ``FactorizedReduce`` of every edge, (B, k * C, H / 2, W / 2)."""
        shifted = F.pad(active[:, :, 1:, 1:], (0, 1, 0, 1))
        even = halving_pointwise(active, self.even)
        odd = halving_pointwise(shifted, self.odd)
        normalised: Tensor = self.reduce_norm(interleave([even, odd], self.num_edges))
        return normalised

    def _scale(self, features: Tensor, weights: Tensor) -> Tensor:
        """Multiply the C channels of each edge by its weight (S, k) in each slice."""
        slices = len(weights)
        rows = features.unflatten(0, (slices, -1)).unflatten(2, (self.num_edges, -1))
        scaled: Tensor = (rows * weights[:, None, :, None, None, None]).to(features.dtype)
        return scaled.flatten(2, 3).flatten(0, 1).contiguous(memory_format=torch.channels_last)

    def pieces(self) -> Iterator[Piece]:
        """Yield where every tensor of the reference's k edges is; shared tensors come once for each edge."""
        edges = self.num_edges
        for edge in range(edges):
            for number, name in enumerate(self.operations):
                if name in self.convolutions:
                    yield Piece(f"depthwise.{name}", edge, edges, edge, number, "1.weight")
                    yield from self._norm_pieces("last_norm", self.convolutions, edge, number)
                if name in self.separable:
                    yield Piece(f"second_depthwise.{name}", edge, edges, edge, number, "5.weight")
                    yield from self._norm_pieces("first_norm", self.separable, edge, number)
                if name in self.pools:
                    part = self.pools.index(name), len(self.pools)
                    yield from _statistics("pool_norm", *part, edge, number, "1")
                if name == SKIP and self.reduces:
                    yield Piece("even", edge, edges, edge, number, "even.weight")
                    yield Piece("odd", edge, edges, edge, number, "odd.weight")
                    yield from _statistics("reduce_norm", edge, edges, edge, number, "norm")
                if name in self.others:
                    module = self.others[name][edge]  # type: ignore[index]
                    for own in module.state_dict():
                        yield Piece(f"others.{name}.{edge}.{own}", 0, 1, edge, number, own)

    def _norm_pieces(self, norm: str, names: list[str], edge: int, number: int) -> Iterator[Piece]:
        name = self.operations[number]
        part = edge * len(names) + names.index(name), self.num_edges * len(names)
        # In the reference a pointwise convolution is the third of four, or the seventh of eight, layers.
        position = 6 if name in self.separable and norm == "last_norm" else 2
        yield Piece(f"{norm}.pointwise", *part, edge, number, f"{position}.weight")
        yield from _statistics(norm, *part, edge, number, str(position + 1))


def _statistics(norm: str, index: int, count: int, edge: int, number: int, name: str) -> Iterator[Piece]:
    for buffer in ("running_mean", "running_var"):
        yield Piece(f"{norm}.{buffer}", index, count, edge, number, f"{name}.{buffer}")
    yield Piece(f"{norm}.num_batches_tracked", 0, 1, edge, number, f"{name}.num_batches_tracked")
