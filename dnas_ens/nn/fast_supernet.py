"""The supernet a search trains by default: the reference's function, computed by source instead of by edge.

Forward, gradients and BatchNorm statistics equal the reference's to rounding. Its checkpoint is the reference's too:
``state_dict`` names and shapes every tensor as the reference does, so either loads what the other saved.

In the efficient space the reference is the fast form: its operations have little in common that could be computed once.
With their kernels side by side a step of the weights took 0.87, one of the architecture 1.0 times as long (64 images
of 14x14, C = 16, 3 cells, one CPU thread), which is not worth a second way to compute them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dnas_ens.nn.batched_edges import EdgesOfSource
from dnas_ens.nn.stack import build_preprocessing, pass_by, preprocessed, shuffle_channels, split_channels
from dnas_ens.nn.supernet import LooseEndsCell, Supernet
from dnas_ens.space.search_space import SearchSpace
from dnas_ens.space.stack import CellPlan, StackSpec


class FastSupernetCell(nn.Module):
    """One cell of the supernet, computed source by source; arguments as in ``SupernetCell``."""

    def __init__(self, space: SearchSpace, plan: CellPlan, *, partial_channels: int = 1) -> None:
        super().__init__()
        self.space, self.partial_channels = space, partial_channels
        self.type_index = space.cell_types.index(plan.cell_type)
        self.preprocessing = build_preprocessing(plan, affine=False)
        #: For every source the numbers of the edges that leave it, in the order of their nodes.
        self.leaving = [
            [edge for edge, (_, origin) in enumerate(space.edges) if origin == source]
            for source in range(space.num_nodes + 1)
        ]
        self.sources = nn.ModuleList(
            EdgesOfSource(
                space.operations,
                len(edges),
                plan.channels // partial_channels,
                plan.stride(source),
            )
            for source, edges in enumerate(self.leaving)
        )

    def forward(self, before_last: Tensor, last: Tensor, mixture: Tensor) -> Tensor:
        """Compute the cell's output (B, N * C, H, W); mixture is (S, T, E, O) for S slices of the batch."""
        # Split once: the gradient of every separate slice would be added into its own tensor of zeros.
        weights = mixture[:, self.type_index].unbind(1)
        inputs = [
            state.contiguous(memory_format=torch.channels_last)
            for state in preprocessed(self.preprocessing, before_last, last)
        ]
        nodes: list[Tensor | None] = [None] * self.space.num_nodes
        for source, (module, edges) in enumerate(zip(self.sources, self.leaving, strict=True)):
            # Nodes are complete when their turn as a source comes: all edges lead forward.
            features = inputs[source] if source < len(inputs) else self._complete(nodes[source - len(inputs)])
            assert isinstance(module, EdgesOfSource)
            active, rest = split_channels(features, self.partial_channels)
            own = torch.stack([weights[edge] for edge in edges], dim=1)
            terms = module(active.contiguous(memory_format=torch.channels_last), own).chunk(len(edges), dim=1)
            if rest is not None:
                passing = pass_by(rest, module.stride)
                shares = own.sum(2).repeat_interleave(len(features) // len(own), dim=0)
                terms = [
                    torch.cat([term, shares[:, position, None, None, None] * passing], dim=1)
                    for position, term in enumerate(terms)
                ]
            for edge, term in zip(edges, terms, strict=True):
                node = self.space.edges[edge][0]
                earlier = nodes[node]
                nodes[node] = term if earlier is None else earlier + term
        return torch.cat([self._complete(node) for node in nodes], dim=1)

    def _complete(self, node: Tensor | None) -> Tensor:
        assert node is not None, "every node has edges from both inputs"
        return shuffle_channels(node, self.partial_channels)


class FastSupernet(Supernet):
    """A supernet whose cells are computed source by source; arguments, result and errors as in ``Supernet``."""

    cell_classes = MappingProxyType({"darts": FastSupernetCell, "efficient": LooseEndsCell})

    def __init__(self, space: SearchSpace, stack: StackSpec) -> None:
        super().__init__(space, stack)
        self.register_state_dict_post_hook(_to_reference)
        self.register_load_state_dict_pre_hook(_from_reference)

    @classmethod
    def from_reference(cls, reference: Supernet) -> FastSupernet:
        """Return the fast form of a reference supernet, with a copy of its weights and statistics."""
        fast = cls(reference.space, reference.stack).to(reference.classifier.weight)
        fast.load_state_dict(reference.state_dict())
        return fast.train(reference.training)

    def named_pieces(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield (name of the reference's tensor, own batched tensor, which part of it, of how many)."""
        for position, cell in enumerate(self.cells):
            if not isinstance(cell, FastSupernetCell):
                continue  # its tensors are the reference's
            for source, (module, edges) in enumerate(zip(cell.sources, cell.leaving, strict=True)):
                assert isinstance(module, EdgesOfSource)
                for piece in module.pieces():
                    there = f"cells.{position}.edges.{edges[piece.edge]}.operations.{piece.operation}.{piece.name}"
                    own = f"cells.{position}.sources.{source}.{piece.own}"
                    yield there, own, piece.index, piece.count


def _part(tensor: Tensor, index: int, count: int) -> Tensor:
    return tensor if count == 1 else tensor.chunk(count)[index]


def _to_reference(module: FastSupernet, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Replace the batched tensors of a state by the reference's."""
    batched = set()
    for there, own, index, count in module.named_pieces():
        part = _part(state[prefix + own], index, count)
        if own.endswith("pointwise"):
            part = part.view(part.shape[1], part.shape[2], 1, 1)
        state[prefix + there] = part
        batched.add(prefix + own)
    for own in batched:
        del state[own]


def _from_reference(
    module: FastSupernet,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    *_: object,
) -> None:
    """Replace the reference's tensors of a state by batched ones; parts it lacks are reported and stay as they are."""
    batched: dict[str, Tensor] = {}
    own_tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for there, own, index, count in module.named_pieces():
        if own not in batched:
            batched[own] = own_tensors[own].detach().clone()
        if prefix + there in state:
            target = _part(batched[own], index, count)
            target.copy_(state.pop(prefix + there).detach().reshape(target.shape))
        else:
            missing_keys.append(prefix + there)
    state.update({prefix + own: tensor for own, tensor in batched.items()})
