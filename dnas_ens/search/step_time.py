"""The time of a training step: every operation measured at every place, and what an architecture is expected to take.

A search that knows it can look for networks that earn their seconds: the expected time is differentiable in the
mixture, as latency is in ProxylessNAS (arXiv 1812.00332) and FBNet (arXiv 1812.03443).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnas_ens.nn.execution import Execution, step_seconds
from dnas_ens.nn.network import Network
from dnas_ens.nn.supernet import MixedOperation, Supernet
from dnas_ens.search.relaxation import discretise, genotype_mixture, mixture_distribution
from dnas_ens.space.genotype import Genotype
from dnas_ens.space.search_space import SearchSpace, stack_cell_types
from dnas_ens.space.stack import StackSpec

#: Random networks whose whole steps are timed for what is not an operation's.
NETWORKS = 3


@dataclass(frozen=True)
class Place:
    """Where an operation is computed: (C, H, W) of its input and of its result."""

    operation: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Times of a step of a network in milliseconds, forward and backward.

    Args:
        edges_per_node: Edges that a node of a discrete cell keeps, at most.
        operations: (T, E, O), of an operation on an edge, summed over the cells of a type; 0 for ``none``.
        rest: Of all that no choice changes: stem, preprocessing, sums, classifier, loss.
        places: What was measured, by place.
    """

    space: SearchSpace
    edges_per_node: int
    operations: Tensor
    rest: float
    places: Mapping[Place, float]

    def expected(self, mixtures: Tensor) -> Tensor:
        """Return the expected time of a step, differentiable in the mixture.

        Equation: rest + sum over cells, nodes n, edges e, operations o of k_n p_n(e, o) t(e, o), where k_n is the
        number of edges that node n keeps. Where it may keep fewer than it is allowed, k_n = 1 / sum_e p_n(e)^2, but
        not more than allowed. For the distribution of a discrete architecture this is the sum of its operations' times.

        Args:
            mixtures: (..., T, E, O) natural distributions, summing to 1 over the pairs of each node.

        Returns:
            (...), in milliseconds.
        """
        edges, taken = mixtures.sum(-1), (mixtures * self.operations).sum(-1)
        total = mixtures.new_full(mixtures.shape[:-3], self.rest)
        for node in self.space.node_slices:
            counts = self.space.rules.edge_counts(self.edges_per_node, node.stop - node.start)
            kept: Tensor | int = counts[-1]
            if len(counts) > 1:
                kept = (1 / edges[..., node].square().sum(-1)).clamp_max(counts[-1])
            total = total + (kept * taken[..., node].sum(-1)).sum(-1)
        return total

    def of(self, genotype: Genotype) -> float:
        """Return the time of a step of a discrete architecture, in milliseconds."""
        chosen = genotype_mixture(genotype, self.space).to(self.operations)
        return self.rest + float((chosen * self.operations).sum())

    def uniform(self) -> float:
        """Return the expected time of the mixture that prefers nothing, in milliseconds."""
        zeros = torch.zeros_like(self.operations)
        return float(self.expected(mixture_distribution(zeros, zeros[..., 0], self.space)))

    def to(self, device: torch.device | str) -> StepTimes:
        """Return the same on another device."""
        return replace(self, operations=self.operations.to(device))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of step_time.json."""
        return {
            "rest_ms": self.rest,
            "operations_ms": self.operations.tolist(),
            "places": [{**vars(place), "ms": taken} for place, taken in self.places.items()],
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any], *, space: SearchSpace, edges_per_node: int) -> StepTimes:
        """Rebuild the times from step_time.json."""
        shapes = ("input_shape", "output_shape")
        places = {
            Place(one["operation"], *(tuple(one[shape]) for shape in shapes)): one["ms"] for one in entry["places"]
        }
        return cls(
            space=space,
            edges_per_node=edges_per_node,
            operations=torch.tensor(entry["operations_ms"]),
            rest=entry["rest_ms"],
            places=places,
        )


def measured_step_times(
    space: SearchSpace,
    stack: StackSpec,
    *,
    image_size: int,
    batch_size: int,
    edges_per_node: int,
    execution: Execution,
    device: torch.device | str = "cpu",
) -> StepTimes:
    """Measure a step of the networks of a stack: each operation at each place alone, then whole steps for the rest.

    Args:
        stack: Of the members, its types of cells all searched.
        image_size: Side of the images in pixels.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        trial: dict[str, Any] = {"device": device} | ({} if device.type == "cuda" else {"warm_up": 1})
        supernet = Supernet(space, stack)
        found = _places(supernet, image_size)
        modules = {place: module for place, module, _ in found}

        def operation_step(place: Place) -> Callable[[], object]:
            module = execution.place_module(copy.deepcopy(modules[place]), device).train()
            features = execution.place(torch.randn(batch_size, *place.input_shape, device=device)).requires_grad_()
            gradient = execution.place(torch.randn(batch_size, *place.output_shape, device=device))

            def step() -> None:
                with execution.autocast(device):
                    result = module(features)
                torch.autograd.grad(result, [features, *module.parameters()], gradient.to(result.dtype))

            return execution.graphed(step, device)

        places = {place: 1000 * seconds for place, seconds in step_seconds(modules, operation_step, **trial).items()}
        operations = torch.zeros(space.shape)
        for place, _, where in found:
            operations[where] += places[place]
        times = StepTimes(space=space, edges_per_node=edges_per_node, operations=operations, rest=0.0, places=places)
        genotypes = [discretise(torch.rand(space.shape), space, edges_per_node=edges_per_node) for _ in range(NETWORKS)]
        shape = (batch_size, stack.in_channels, image_size, image_size)

        def network_step(index: int) -> Callable[[], object]:
            return whole_step(genotypes[index], stack, shape, execution, device)

        measured = step_seconds(range(NETWORKS), network_step, rounds=3, **trial)
        rest = [1000 * seconds - times.of(genotypes[index]) for index, seconds in measured.items()]
        return replace(times, rest=max(0.0, statistics.median(rest)))


def whole_step(
    genotype: Genotype, stack: StackSpec, shape: tuple[int, ...], execution: Execution, device: torch.device
) -> Callable[[], object]:
    """Return a step of a genotype's network on random images (B, C_in, H, W): forward, loss and backward."""
    network = execution.place_module(Network(genotype, stack), device).train()
    images = execution.place(torch.randn(shape, device=device))
    labels = torch.randint(stack.num_classes, shape[:1], device=device)
    parameters = list(network.parameters())

    def step() -> None:
        with execution.autocast(device):
            logits = network(images)
        torch.autograd.grad(F.cross_entropy(logits.float(), labels), parameters, allow_unused=True)

    return execution.graphed(step, device)


def _places(supernet: Supernet, image_size: int) -> list[tuple[Place, nn.Module, tuple[int, int, int]]]:
    """Return every operation of a supernet but ``none``: its place, itself, and its type of cell, edge and number."""
    space, found = supernet.space, []

    def note(where: tuple[int, int, int]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
            name = space.operations[where[2]]
            found.append((Place(name, tuple(inputs[0].shape[1:]), tuple(result.shape[1:])), module, where))

        return hook

    hooks = []
    for cell, cell_type in zip(supernet.cells, stack_cell_types(supernet.stack.num_cells), strict=True):
        for edge, mixed in enumerate(cell.edges):  # type: ignore[arg-type]
            assert isinstance(mixed, MixedOperation)
            for number, operation in enumerate(mixed.operations):
                where = (space.cell_types.index(cell_type), edge, number)
                hooks.append(operation.register_forward_hook(note(where)))
    with torch.no_grad():
        images = torch.zeros(2, supernet.stack.in_channels, image_size, image_size)
        supernet.eval()(images, torch.ones(space.shape))
    for hook in hooks:
        hook.remove()
    return found
