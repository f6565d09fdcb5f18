"""A training step recorded once as a CUDA graph and replayed: one launch instead of thousands of kernels'."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class GraphedStep:
    """A step whose inputs are tensors and whose effect is on tensors it holds.

    The first calls run as they are, on a stream of their own as capturing asks for, and count like any other: they
    make what a step makes once (optimiser state, workspaces). The next call records; from then on inputs are copied to
    where the recorded one found them. Python values a step reads are those of the recording: where one changes,
    ``record_anew`` is called, or the step reads a tensor instead. Inputs of other shapes than the recorded ones run
    unrecorded.

    Args:
        step: Must not wait for the device, and must take all that changes from call to call as arguments.
        device: A CUDA device.
        generators: On the device, all but its default one that the step draws from.
        unrecorded: How many calls run before the recording.
    """

    def __init__(
        self,
        step: Callable[..., None],
        device: torch.device,
        *,
        generators: Iterable[torch.Generator] = (),
        unrecorded: int = 3,
    ) -> None:
        self._step, self._device, self._left = step, device, unrecorded
        self._generators = list(generators)
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> None:
        """Run the step on tensors of the device."""
        if self._left > 0:
            self._left -= 1
            self._run_aside(inputs)
            return
        if self._graph is None:
            self._inputs = tuple(tensor.clone() for tensor in inputs)
            self._graph = torch.cuda.CUDAGraph()
            for generator in self._generators:
                self._graph.register_generator_state(generator)
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._step(*self._inputs)
        shapes = [tensor.shape for tensor in inputs]
        if shapes != [tensor.shape for tensor in self._inputs]:
            self._run_aside(inputs)
            return
        for recorded, tensor in zip(self._inputs, inputs, strict=True):
            recorded.copy_(tensor)
        self._graph.replay()

    def record_anew(self) -> None:
        """Record the next call, for the step reads Python values that have changed."""
        self._graph = None

    def _run_aside(self, inputs: tuple[Tensor, ...]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(*inputs)
        current.wait_stream(self._stream)
