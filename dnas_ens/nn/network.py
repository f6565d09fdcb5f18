"""The discrete network of a genotype: what is retrained from scratch and joins the ensemble."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.errors import UserError
from dnas_ens.nn.operations import build_operation, require_operations
from dnas_ens.nn.stack import (
    build_preprocessing,
    build_stem,
    pass_by,
    preprocessed,
    shuffle_channels,
    split_channels,
)
from dnas_ens.nn.supernet import Supernet
from dnas_ens.run.ranks import current
from dnas_ens.space.cells import loose_ends
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import stack_cell_types
from dnas_ens.space.stack import CellPlan, StackSpec


def drop_path(features: Tensor, probability: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Zero a whole path for each image with the given probability, scaled so that the mean is kept.

    Source: FractalNet (arXiv 1605.07648), as used by DARTS.

    Args:
        features: (B, C, H, W).
        probability: In [0, 1); a tensor () on a GPU, whose recorded step reads it again at each replay.
        generator: On the features' device; None for the global one.
    """
    # Drawn for the images of all ranks.
    size = len(features) * current().size
    keep, own = features.new_empty(size, 1, 1, 1), current().own(size)
    if isinstance(probability, Tensor):
        kept = (1.0 - probability).to(features.dtype)
        return features * keep.bernoulli_(kept.expand_as(keep), generator=generator)[own] / kept
    return features * keep.bernoulli_(1.0 - probability, generator=generator)[own] / (1.0 - probability)


def num_parameters(module: nn.Module) -> int:
    """Return how many numbers the parameters of a module are; an auxiliary head counts where it is built."""
    return sum(parameter.numel() for parameter in module.parameters())


class NetworkCell(nn.Module):
    """One cell of a genotype, as DARTS has it: every node sums its kept edges, the output concatenates the nodes."""

    def __init__(self, genotype: Genotype, plan: CellPlan, *, affine: bool, partial_channels: int = 1) -> None:
        super().__init__()
        self.partial_channels = partial_channels
        cell = genotype.cell(plan.cell_type)
        self.strides = [plan.stride(source) for source in range(plan.rules.num_inputs + len(cell))]
        self.sources = [[source for _, source in node] for node in cell]
        self.outputs = loose_ends(cell, plan.rules)
        self.preprocessing = build_preprocessing(plan, affine=affine)
        self.nodes = nn.ModuleList(
            nn.ModuleList(
                build_operation(
                    operation,
                    plan.in_channels(source) // partial_channels,
                    plan.channels // partial_channels,
                    self.strides[source],
                    affine=affine,
                )
                for operation, source in node
            )
            for node in cell
        )

    def forward(
        self,
        before_last: Tensor,
        last: Tensor,
        drop_path_probability: float | Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Compute the cell's output (B, N * C, H, W), or (B, C, H, W), from the outputs of the last two cells."""
        states = preprocessed(self.preprocessing, before_last, last)
        # Reading a tensor's value would wait for the device; where there is one, paths are dropped in some epoch.
        drops = isinstance(drop_path_probability, Tensor) or drop_path_probability > 0.0
        for operations, sources in zip(self.nodes, self.sources, strict=True):
            terms = []
            assert isinstance(operations, nn.ModuleList)
            for operation, source in zip(operations, sources, strict=True):
                active, rest = split_channels(states[source], self.partial_channels)
                features = operation(active)
                if drops and self.may_drop(operation, operations):
                    features = drop_path(features, drop_path_probability, generator)
                if rest is not None:
                    features = torch.cat([features, pass_by(rest, self.strides[source])], dim=1)
                terms.append(features)
            states.append(self.node(terms, operations))
        return self.output([states[source] for source in self.outputs])

    def may_drop(self, operation: nn.Module, operations: nn.ModuleList) -> bool:
        """Say whether drop-path may zero an operation, one of its node's.

        A skip connection is never dropped, so that some path always carries the signal.
        """
        return not isinstance(operation, nn.Identity)

    def node(self, terms: list[Tensor], operations: nn.ModuleList) -> Tensor:
        """Return a node (B, C, H, W) from what its operations return."""
        return shuffle_channels(functools.reduce(operator.add, terms), self.partial_channels)

    def output(self, nodes: list[Tensor]) -> Tensor:
        """Return the output from the nodes that reach it."""
        return torch.cat(nodes, dim=1)


class LooseEndsNetworkCell(NetworkCell):
    """One cell of a genotype of the efficient space: ReLU in every node, the output sums the loose ends."""

    def may_drop(self, operation: nn.Module, operations: nn.ModuleList) -> bool:
        """Say whether drop-path may zero an operation: only beside another one, for a chain has no other path."""
        return len(operations) > 1 and super().may_drop(operation, operations)

    def node(self, terms: list[Tensor], operations: nn.ModuleList) -> Tensor:
        """Return a node (B, C, H, W) from what its operations return."""
        # No feature is negative, so ReLU would copy a node that only passes one on.
        if len(terms) == 1 and isinstance(operations[0], nn.Identity):
            return terms[0]
        return F.relu(functools.reduce(operator.add, terms))

    def output(self, nodes: list[Tensor]) -> Tensor:
        """Return the sum of the loose ends."""
        return functools.reduce(operator.add, nodes)


CELL_CLASSES = {"darts": NetworkCell, "efficient": LooseEndsNetworkCell}


class AuxiliaryHead(nn.Module):
    """A second classifier on the features behind the last reduction cell; it is used in training only.

    DARTS's head crops 8x8 features; this one pools to at most 2x2 first, so that any image size fits.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 256, 2, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(256, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.classifier(self.features(features).flatten(1))
        return logits


class Network(nn.Module):
    """A stack of the genotype's cells between a stem and a linear classifier.

    Args:
        genotype: The cells; it must hold every cell type that occurs in the stack.
        stack: Size of the stack and of the images; partial channels inherit from a supernet that has them.
        affine: Whether BatchNorm in the cells has a learnt scale and shift.

    Raises:
        UserError: If the genotype lacks a cell type of the stack or names an unknown operation.
    """

    def __init__(self, genotype: Genotype, stack: StackSpec, *, auxiliary: bool = False, affine: bool = True) -> None:
        super().__init__()
        plans = stack.plan(genotype.space, genotype.num_nodes)
        missing = {plan.cell_type for plan in plans} - set(genotype.cell_types)
        if missing:
            raise UserError(
                f"A stack of {stack.num_cells} cells has {missing.pop()} cells, but the genotype has none.",
                "Search with as many cells, or choose --num-cells so that both kinds are used.",
            )
        require_operations(genotype.operations)
        self.genotype, self.stack, self.affine = genotype, stack, affine
        #: Probability that a path is dropped, in [0, 1), as in ``drop_path``; the training raises it linearly.
        self.drop_path_probability: float | Tensor = 0.0
        #: What decides which paths are dropped; None for the global stream.
        self.drop_path_generator: torch.Generator | None = None
        self.stem = build_stem(stack, genotype.space)
        cell_class = CELL_CLASSES[genotype.space]
        self.cells = nn.ModuleList(
            cell_class(genotype, plan, affine=affine, partial_channels=stack.partial_channels) for plan in plans
        )
        self.classifier = nn.Linear(plans[-1].out_channels, stack.num_classes)
        reductions = [index for index, plan in enumerate(plans) if plan.cell_type == "reduction"]
        self.auxiliary_position = reductions[-1]
        self.auxiliary = AuxiliaryHead(plans[reductions[-1]].out_channels, stack.num_classes) if auxiliary else None

    def __repr__(self) -> str:
        # Not nn.Module's, which lists every module over pages.
        return f"{self._heading()}\n{self.genotype}"

    def _repr_svg_(self) -> str:
        """A drawing of the cells, for notebooks."""
        from dnas_ens.figures.cells import draw_genotype
        from dnas_ens.figures.style import to_svg

        return to_svg(draw_genotype(self.genotype, title=self._heading()), title=self._heading())

    def _heading(self) -> str:
        stack, count = self.stack, num_parameters(self)
        return (
            f"Network({stack.num_cells} cells, C={stack.channels}, {stack.num_classes} classes, {count:,} parameters)"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C_in, H, W) to logits (B, K)."""
        return self.forward_with_auxiliary(images)[0]

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits (B, K) and, in training mode with the head built, the auxiliary logits (B, K)."""
        probability = self.drop_path_probability if self.training else 0.0
        auxiliary_logits = None
        before_last = last = self.stem(images)
        for position, cell in enumerate(self.cells):
            before_last, last = last, cell(before_last, last, probability, self.drop_path_generator)
            if position == self.auxiliary_position and self.auxiliary is not None and self.training:
                auxiliary_logits = self.auxiliary(last)
        return self.classifier(last.mean(dim=(2, 3))), auxiliary_logits

    def spec(self) -> dict[str, Any]:
        """Return what rebuilds this network through ``from_spec``, ready for JSON."""
        return {
            "kind": "network",
            "genotype": self.genotype.to_dict(),
            **vars(self.stack),
            "auxiliary": self.auxiliary is not None,
            "affine": self.affine,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Network:
        """Build the network a ``spec()`` describes, with fresh weights.

        Raises:
            UserError: If a field is missing or unknown, or the genotype is malformed.
        """
        if spec.get("kind") != "network" or "genotype" not in spec:
            raise UserError(
                f"The description of a member is of kind {spec.get('kind')!r}, not 'network'.",
                "Load the folder with members=[...] that holds the fresh modules to fill.",
            )
        fields = {key: value for key, value in spec.items() if key not in ("kind", "genotype")}
        own = {key: fields.pop(key) for key in ("auxiliary", "affine") if key in fields}
        try:
            return cls(Genotype.from_dict(spec["genotype"]), StackSpec(**fields), **own)
        except TypeError as error:
            raise UserError(
                f"The description of a member does not fit: {error}.", "Use a folder this version wrote."
            ) from error


def inherit(supernet: Supernet, genotype: Genotype) -> Network:
    """Return the discrete network of a genotype with weights and BatchNorm statistics copied from the supernet.

    Its forward equals the supernet's with mixture weight 1 on every (edge, operation) of the genotype and 0
    elsewhere.
    """
    network = Network(genotype, supernet.stack, affine=False).to(supernet.classifier.weight)
    space = supernet.space
    weights = supernet.state_dict()

    def copy(module: nn.Module, name: str) -> None:
        prefix = f"{name}."
        module.load_state_dict(
            {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        )

    copy(network.stem, "stem")
    copy(network.classifier, "classifier")
    for position, (cell_type, cell) in enumerate(
        zip(stack_cell_types(supernet.stack.num_cells), network.cells, strict=True)
    ):
        assert isinstance(cell, NetworkCell)
        copy(cell.preprocessing, f"cells.{position}.preprocessing")
        for node, edges in enumerate(genotype.cell(cell_type)):
            for index, (operation, source) in enumerate(edges):
                edge, number = space.edges.index((node, source)), space.operations.index(operation)
                there = f"cells.{position}.edges.{edge}.operations.{number}"
                copy(cell.nodes[node][index], there)  # type: ignore[index]
    return network
