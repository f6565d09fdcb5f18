"""Drawing points of the star: which (lambda, direction) pairs a step trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """m points of the star: lam (m,) float and direction (m,) int64."""

    lam: Tensor
    direction: Tensor

    def __len__(self) -> int:
        return len(self.lam)


def draw_members(
    num_members: int,
    *,
    num_directions: int,
    max_lambda: float,
    margin: float,
    generator: torch.Generator,
    fixed_lambda: float | None = None,
) -> Draw:
    """Draw m pairs: lambda stratified on [-margin, max_lambda + margin] and clipped, directions shuffled.

    The margin gives the ends of the range their share of training (EdgeNES found them untrained otherwise).
    Directions come without replacement; when m exceeds R every direction comes equally often, up to one.

    Args:
        num_members: m.
        num_directions: R.
        max_lambda: End of the range.
        margin: Overhang on both sides.
        generator: A CPU generator.
        fixed_lambda: If given, every lambda is this one.

    Returns:
        On the CPU; ``moved`` takes many at once to another device.
    """
    strata = torch.arange(num_members) + torch.rand(num_members, generator=generator)
    lam = strata / num_members * (max_lambda + 2 * margin) - margin
    # Shuffled, for otherwise the first slice of every batch would hold the small lambdas.
    lam = lam[torch.randperm(num_members, generator=generator)].clamp(0.0, max_lambda)
    if fixed_lambda is not None:
        lam = torch.full_like(lam, fixed_lambda)
    rounds = -(-num_members // num_directions)
    direction = torch.cat([torch.randperm(num_directions, generator=generator) for _ in range(rounds)])
    return Draw(lam, direction[:num_members])


def moved(draws: Sequence[Draw], device: torch.device | str) -> list[Draw]:
    """Return the draws on a device, by one copy of all lambdas and one of all directions."""
    if not draws:
        return []
    sizes = [len(draw) for draw in draws]
    lam = torch.cat([draw.lam for draw in draws]).to(device).split(sizes)
    direction = torch.cat([draw.direction for draw in draws]).to(device).split(sizes)
    return [Draw(*parts) for parts in zip(lam, direction, strict=True)]


def grid(
    num_lambdas: int, *, num_directions: int, max_lambda: float, device: torch.device | str = "cpu"
) -> Draw:
    """Return evenly spaced lambdas from 0 to max_lambda on every direction, direction by direction."""
    lam = torch.linspace(0.0, max_lambda, num_lambdas)
    direction = torch.arange(num_directions).repeat_interleave(num_lambdas)
    return Draw(lam.repeat(num_directions).to(device), direction.to(device))
