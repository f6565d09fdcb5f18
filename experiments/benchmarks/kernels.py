"""Which kernels are fastest for what the supernet consists of: depthwise convolutions, Gram and grouped products?

    python experiments/benchmarks/kernels.py

Forward and backward pass of each part at sizes of the preset ``fast`` (batch 64), in every variant: memory layout,
cuDNN's, PyTorch's or our kernels, batched or one dense product. On a GPU calls are
replayed from a CUDA graph, so that launches do not count. Every variant is compared with float64 first.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from timing import (
    TrainingOptions,
    conditions,
    parse_benchmark,
    prepare,
    report,
    spread,
    synchronise,
    tell,
    timed,
)

from dnas_ens.commands.parse import run_main

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Largest relative error against float64, forward and gradients, that a variant of a precision may have.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
#: Calls in one recording.
REPEATS = 10
#: Channels of a group and side of the images, in the first to the last cells.
SIZES = ((16, 28), (32, 14), (64, 7))


@dataclass(frozen=True, kw_only=True)
class Kernels(TrainingOptions):
    """Options of the benchmark."""

    rounds: int = 5
    """Rounds timed; every variant runs once in each."""
    warmup: int = 1
    """Rounds before them, not counted."""
    batch_size: int = 64
    """B."""
    parts: tuple[Literal["depthwise", "gram", "pointwise"], ...] = ("depthwise", "gram", "pointwise")
    """Which parts to measure."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a part.

    Args:
        name: What distinguishes it from the others.
        compute: Inputs -> output, differentiable.
        exact: The plain form that it is compared with, in float64.
        inputs: Float64 values on the CPU.
        precision: What it is computed in.
        channels_last: Whether four-dimensional inputs are in this layout.
        context: Where it is computed.
        gradients: Whether the backward pass is measured too.
    """

    name: str
    compute: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    precision: str
    channels_last: bool = True
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    gradients: bool = True

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the inputs on a device, in precision and layout, with gradients."""
        import torch

        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        placed = [tensor.to(device, getattr(torch, self.precision)) for tensor in self.inputs]
        return tuple(
            # Weights of matrices (S, G, d, c) have four dimensions, too, and no layout.
            (tensor.contiguous(memory_format=layout) if index == 0 and tensor.dim() == 4 else tensor).requires_grad_(
                self.gradients
            )
            for index, tensor in enumerate(placed)
        )


def outcome(compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the output and, where inputs want them, their gradients of a weighted sum of it."""
    import torch

    result = compute(*inputs)
    if not result.requires_grad:
        return [result]
    # Another weight for every element; otherwise gradients at wrong places would go unnoticed.
    weights = torch.linspace(-1, 1, result.numel(), device=result.device).view(result.shape).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, inputs, weights)]


def cudnn(*, enabled: bool = True) -> AbstractContextManager[object]:
    """Return the context of convolutions by cuDNN, in float32 where that is asked for, or by PyTorch's own kernels."""
    import torch

    flags: Any = torch.backends.cudnn.flags
    context: AbstractContextManager[object] = flags(enabled=enabled, allow_tf32=False)
    return context


def depthwise(batch_size: int) -> Iterator[tuple[str, list[Variant]]]:
    """Yield the depthwise convolutions of the first and the last cells."""
    import torch
    import torch.nn.functional as F

    from dnas_ens.nn.depthwise import depthwise_conv

    generator = torch.Generator().manual_seed(0)
    shapes = ((80, 28), (320, 7))
    for (channels, side), (kernel, dilation), precision in itertools.product(
        shapes, ((3, 1), (5, 1), (3, 2), (5, 2)), TOLERANCE
    ):
        images = torch.randn(batch_size, channels, side, side, generator=generator, dtype=torch.float64)
        weight = torch.randn(channels, 1, kernel, kernel, generator=generator, dtype=torch.float64)
        plain: Any = partial(F.conv2d, padding=dilation * (kernel // 2), dilation=dilation, groups=channels)
        ours = partial(depthwise_conv, stride=1, dilation=dilation)

        def of_five_edges(features: Tensor, kernels: Tensor, plain: Any = plain) -> Any:
            return plain(torch.cat([features] * 5, dim=1), kernels)

        made = partial(Variant, precision=precision, exact=plain)
        variants = [
            made(
                name=f"{layout}, {kind}",
                compute=plain,
                inputs=(images, weight),
                channels_last=layout == "channels_last",
                context=partial(cudnn, enabled=kind == "cuDNN"),
            )
            for layout, kind in itertools.product(("channels_last", "contiguous"), ("cuDNN", "PyTorch"))
        ]
        variants.append(made(name="ours", compute=ours, inputs=(images, weight)))
        few = images[:, : channels // 5]
        variants.append(made(name="ours, 5 edges at once", compute=ours, inputs=(few, weight), exact=of_five_edges))
        size = f"{channels} channels of {side}x{side}, {precision}"
        yield f"{kernel}x{kernel}{' dilated' * (dilation > 1)}, {size}", variants


def gram(batch_size: int) -> Iterator[tuple[str, list[Variant]]]:
    """Yield the second moments of 20 groups of channels, forward alone: rows (P, G * c) -> (G, c, c)."""
    import torch

    from dnas_ens.nn.moments import batched_gram, dense_gram

    generator = torch.Generator().manual_seed(0)
    ways = {"batched": partial(batched_gram, groups=20), "dense": partial(dense_gram, groups=20)}
    for (channels, side), precision in itertools.product(SIZES, TOLERANCE):
        rows = torch.randn(batch_size * side * side, 20 * channels, generator=generator, dtype=torch.float64)
        made = partial(Variant, exact=ways["batched"], inputs=(rows,), precision=precision, gradients=False)
        name = f"Gram of 20 groups of {channels} channels, {side}x{side}, {precision}"
        yield name, [made(name=name, compute=way) for name, way in ways.items()]


def pointwise(batch_size: int) -> Iterator[tuple[str, list[Variant]]]:
    """Yield the first pointwise convolutions of 10 groups, and the last ones of 5 edges for 4 slices."""
    import torch
    import torch.nn.functional as F

    from dnas_ens.nn.moments import batched_pointwise, sliced_pointwise

    generator = torch.Generator().manual_seed(0)

    def dense(features: Tensor, matrices: Tensor) -> Tensor:
        return sliced_pointwise(features, matrices[None])

    def grouped(features: Tensor, matrices: Tensor) -> Tensor:
        return F.conv2d(features, matrices.flatten(0, 1)[..., None, None], groups=len(matrices))

    def by_slice(way: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def sliced(features: Tensor, matrices: Tensor) -> Tensor:
            parts = zip(features.chunk(len(matrices)), matrices.unbind(), strict=True)
            return torch.cat([way(part, own) for part, own in parts])

        return sliced

    of_groups = {"batched": batched_pointwise, "dense": dense, "grouped convolution": grouped}
    of_slices = {"batched": by_slice(batched_pointwise), "dense": sliced_pointwise}
    every: tuple[tuple[str, tuple[int, ...], int, dict[str, Any], Callable[..., Tensor]], ...] = (
        ("10 groups", (10,), 1, of_groups, grouped),
        ("4 slices, 5 edges", (4, 5), 4, of_slices, by_slice(grouped)),
    )
    for (what, groups, operations, ways, exact), (channels, side), precision in itertools.product(
        every, SIZES, TOLERANCE
    ):
        inputs = operations * channels
        features = torch.randn(batch_size, groups[-1] * inputs, side, side, generator=generator, dtype=torch.float64)
        matrices = torch.randn(*groups, channels, inputs, generator=generator, dtype=torch.float64)
        made = partial(Variant, exact=exact, inputs=(features, matrices), precision=precision, context=cudnn)
        name = f"{what} of {channels} channels, {side}x{side}, {precision}"
        yield name, [made(name=name, compute=way) for name, way in ways.items()]


PARTS = {"depthwise": depthwise, "gram": gram, "pointwise": pointwise}


def relative_error(variant: Variant, device: torch.device) -> float:
    """Return the largest relative error of output and gradients against float64 of the same rounded inputs."""
    import torch

    inputs = variant.on(device)
    doubles = tuple(tensor.detach().double().requires_grad_(variant.gradients) for tensor in inputs)
    exact = outcome(variant.exact, doubles)
    with variant.context():
        found = outcome(variant.compute, inputs)
    return max(
        float(torch.linalg.vector_norm(own.double() - other) / torch.linalg.vector_norm(other))
        for own, other in zip(found, exact, strict=True)
    )


def call_seconds(variant: Variant, device: torch.device, *, rounds: int, warmup: int) -> list[float]:
    """Return the seconds of a forward and backward pass in every round; of a replayed recording on a GPU."""
    import torch

    inputs = variant.on(device)

    def call() -> None:
        outcome(variant.compute, inputs)

    with variant.context():
        if device.type != "cuda":
            side, calls = timed(call, device), 1
        else:
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            synchronise(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(REPEATS):
                    call()
            side, calls = timed(graph.replay, device), REPEATS
        return [side() / calls for _ in range(warmup + rounds)][warmup:]


def measure_kernels(options: Kernels, device: torch.device, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure every variant of every part, and hand over each part's record as soon as it is there."""
    for part in options.parts:
        for name, variants in PARTS[part](options.batch_size):
            found: dict[str, Any] = {}
            for variant in variants:
                try:
                    error = relative_error(variant, device)
                    limit = TOLERANCE[variant.precision]
                    if not error <= limit:
                        found[variant.name] = {"failed": f"relative error {error:.1e}, at most {limit:.0e}"}
                        continue
                    seconds = call_seconds(variant, device, rounds=options.rounds, warmup=options.warmup)
                    found[variant.name] = {"relative_error": error, "seconds": spread(seconds)}
                except RuntimeError as error_of_kernel:
                    # A device may lack kernels for a layout or precision; the others are measured all the same.
                    found[variant.name] = {"failed": str(error_of_kernel).splitlines()[0]}
            keep({"part": part, "name": name, "variants": found})


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("kernels", __doc__, Kernels(), argv)
    device = prepare(options)
    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        times = {
            name: f"{1e6 * found['seconds']['median']:.0f}" if "seconds" in found else found["failed"]
            for name, found in record["variants"].items()
        }
        tell(f"{record['name']}, in microseconds: " + ", ".join(f"{k} {v}" for k, v in times.items()))

    measure_kernels(options, device, keep)
    report("kernels", argv, options, {"records": records, **conditions(device)})


if __name__ == "__main__":
    sys.exit(run_main(main))
