"""Hypernetworks that map a diversity parameter lambda and a direction to architecture logits.

Every direction is a path theta(lambda, r) through the space of architectures; all paths start from one *base*
at lambda = 0. The interface of both kinds is ``forward(lam, direction) -> (alpha, beta)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dnas_ens.space.search_space import SearchSpace

#: Standard deviation of the logits at the start of a search (DARTS).
INITIAL_SCALE = 1e-3


class Hypernetwork(nn.Module, ABC):
    """What both kinds share: the base, the range of lambda, and logits packed as one tensor (T, E, O + 1).

    The last column of the packed tensor is beta. Packing lets one line interpolate both.

    Args:
        num_directions: R.
        max_lambda: Largest lambda, > 0; larger and negative values are clipped.
        num_knots: K >= 2, of a piecewise-linear path.
        train_positions: Whether its inner knots' positions are learnt.
        generator: Source of the initial values.
        base_logits: (alpha, beta) of a given base, which then stays fixed; without it the base is learnt.
    """

    base: Tensor

    def __init__(
        self,
        space: SearchSpace,
        *,
        num_directions: int,
        max_lambda: float,
        num_knots: int = 5,
        train_positions: bool = False,
        generator: torch.Generator | None = None,
        base_logits: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.space, self.num_directions, self.max_lambda = space, num_directions, max_lambda
        self.num_knots, self.train_positions = num_knots, train_positions
        if base_logits is None:
            self.base = nn.Parameter(INITIAL_SCALE * torch.randn(self.packed_shape, generator=generator))
        else:
            alpha, beta = base_logits
            self.register_buffer("base", torch.cat([alpha, beta.unsqueeze(-1)], dim=-1))
        self.build(generator)

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """(T, E, O + 1)."""
        cell_types, edges, operations = self.space.shape
        return (cell_types, edges, operations + 1)

    def forward(self, lam: Tensor, direction: Tensor, *, detach_base: bool = False) -> tuple[Tensor, Tensor]:
        """Return the logits at m points.

        Args:
            lam: (m,) diversity parameters; clipped to [0, max_lambda].
            direction: (m,) int64 in [0, R).
            detach_base: Whether no gradient reaches the base. The diversity penalty asks for it: pushing the
                base away would not bring the members any further from it.

        Returns:
            alpha (m, T, E, O) and beta (m, T, E).
        """
        base = self.base.detach() if detach_base else self.base
        packed = self.path(lam.clamp(0.0, self.max_lambda), direction, base)
        return packed[..., :-1], packed[..., -1]

    @abstractmethod
    def build(self, generator: torch.Generator | None) -> None:
        """Make what the paths are computed from."""

    @abstractmethod
    def path(self, lam: Tensor, direction: Tensor, base: Tensor) -> Tensor:
        """Return packed logits (m, T, E, O + 1) at clipped lambda, given the base."""

    def base_logits(self) -> tuple[Tensor, Tensor]:
        """Return the base's alpha (T, E, O) and beta (T, E)."""
        return self.base[..., :-1], self.base[..., -1]


class PiecewiseLinearHypernetwork(Hypernetwork):
    """R continuous piecewise-linear paths through K knots each, which share the knot at lambda = 0.

    Equation: theta(lambda, r) = sum over k of hat_k(lambda) * knot_{k, r} with the hat functions of the knot
    positions 0 = s_0 < ... < s_{K-1} = max_lambda, and knot_{0, r} = base. R = 1 is the hypernetwork of EdgeNES
    with its two interpolation weights the right way round, so that the path is continuous and meets its knots.
    """

    def build(self, generator: torch.Generator | None) -> None:
        """Make the steps between knots and what their positions come from."""
        shape = (self.num_directions, self.num_knots - 1, *self.packed_shape)
        # A knot is the base plus the steps up to it. The paths follow while the base is learnt, and every
        # large lambda trains the first steps too, which keeps a path straight: with free knots the way from one
        # to the next often led back past the base.
        self.steps = nn.Parameter(INITIAL_SCALE * torch.randn(shape, generator=generator))
        # Softmax of these, summed up, gives the positions: ordered and inside the range by construction.
        self.gap_logits = nn.Parameter(torch.zeros(self.num_knots - 1), requires_grad=self.train_positions)

    def positions(self) -> Tensor:
        """Return the knots' positions (K,), ascending from 0 to max_lambda."""
        gaps = self.gap_logits.softmax(0).cumsum(0)
        ends = gaps.new_zeros(1), gaps[:-1], gaps.new_ones(1)
        return self.max_lambda * torch.cat(ends)

    def path(self, lam: Tensor, direction: Tensor, base: Tensor) -> Tensor:
        """Interpolate between the two knots around each lambda."""
        positions = self.positions()
        left = torch.searchsorted(positions[1:-1].detach().contiguous(), lam.detach().contiguous(), right=True)
        fraction = (lam - positions[left]) / (positions[left + 1] - positions[left])
        offsets = self.steps.cumsum(dim=1)
        knots = torch.cat([torch.zeros_like(offsets[:, :1]), offsets], dim=1)
        fraction = fraction.view(-1, 1, 1, 1)
        return base + (1 - fraction) * knots[direction, left] + fraction * knots[direction, left + 1]


class MlpHypernetwork(Hypernetwork):
    """Smooth paths: theta(lambda, r) = base + (lambda / max_lambda) * mlp(lambda, embedding of r)."""

    #: Hidden units of both layers and size of the embedding.
    width = 64

    def build(self, generator: torch.Generator | None) -> None:
        """Make the perceptron and the embeddings."""
        width = self.width
        self.embedding = nn.Parameter(torch.randn(self.num_directions, width, generator=generator))
        self.hidden = nn.Sequential(nn.Linear(width + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, self.base.numel())
        with torch.no_grad():
            for parameter in (*self.hidden.parameters(), *self.last.parameters()):
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            self.last.weight.mul_(INITIAL_SCALE)

    def path(self, lam: Tensor, direction: Tensor, base: Tensor) -> Tensor:
        """Evaluate the perceptron and scale it so that every path starts from the base."""
        relative = (lam / self.max_lambda).unsqueeze(-1)
        offsets: Tensor = self.last(self.hidden(torch.cat([relative, self.embedding[direction]], dim=-1)))
        return base + relative.view(-1, 1, 1, 1) * offsets.view(-1, *self.packed_shape)


#: By the name that a configuration gives them.
HYPERNETWORKS: dict[str, type[Hypernetwork]] = {
    "star": PiecewiseLinearHypernetwork,
    "mlp": MlpHypernetwork,
}
