"""A configuration of sections and fields of every type, for the tests of flags and files that set them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from dnas_ens.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Bilevel:
    epochs: int = 5
    """Epochs over the weight half."""
    learning_rate: float = 0.1
    """Learning rate of the weights."""
    temperature: tuple[float, float] = (1.0, 0.4)
    """First and last temperature."""
    second_order: bool = False
    """Differentiate through a step."""

    def __post_init__(self):
        if self.epochs < 1:
            raise UserError(f"--epochs is {self.epochs}.", "Give --epochs 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Search:
    seed: int = 0
    """Seed of everything."""
    batch_size: int = 64
    """Images of a step."""
    data_root: Path | None = None
    """Where data sets are."""
    limit: int | None = None
    """--batch-size --batch-size --batch-size --batch-size --batch-size --batch-size --batch-size is it."""
    penalty: Literal["js", "none"] = "js"
    """Which penalty."""
    operations: tuple[str, ...] = ("skip",)
    """Candidate operations."""
    nodes: Literal[1, 4] = 4
    """Nodes of a cell."""
    pairs: tuple[tuple[str, int], ...] = ()
    """Operations with numbers."""
    bilevel: tyro.conf.OmitArgPrefixes[Bilevel] = field(default_factory=Bilevel)
