"""How a network is computed: layout, precision, CUDA graph, as set or as a short measured trial finds best."""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from dnas_ens.errors import UserError
from dnas_ens.run.ranks import current

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: AUTO is what wins on a device (experiments/results/benchmarks.md and gpu.md); MEASURED leaves the choice to a trial.
AUTO, MEASURED = "auto", "measured"
#: Steps of a trial; the first ones are slow, and a CUDA graph is not recorded before the fourth.
_WARM_UP, _ROUNDS = 5, 5
#: Calls of a step before the one that is recorded.
_UNRECORDED = 3

Module = TypeVar("Module", bound=nn.Module)
#: What is timed, such as an execution.
Choice = TypeVar("Choice", bound=Hashable)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches kernels on a tensor's device; by itself it takes the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class GraphedStep:
    """A step on tensors, recorded once as a CUDA graph and replayed: one launch instead of thousands of kernels'.

    The first calls run as they are, on a stream of their own as capturing asks for, and count like any other: they
    make what a step makes once (optimiser state, workspaces). The next call records; from then on inputs are copied to
    where the recorded one found them. Python values a step reads are those of the recording: where one changes,
    ``record_anew`` is called, or the step reads a tensor instead. Inputs of other shapes than the recorded ones run
    unrecorded.

    Args:
        step: Must not wait for the device, and must take all that changes from call to call as arguments.
        generators: On the device, all but its default one that the step draws from.
    """

    def __init__(
        self,
        step: Callable[..., None],
        device: torch.device,
        *,
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        self._step, self._device, self._left = step, device, _UNRECORDED
        self._generators = list(generators)
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> None:
        """Run the step on tensors of the device."""
        if self._left > 0:
            if self._left == _UNRECORDED:
                # A finished training is held by its own functions, and with it the memory of its recording.
                gc.collect()
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
        """Record the next call, because the step reads Python values that have changed."""
        self._graph = None

    def _run_aside(self, inputs: tuple[Tensor, ...]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(*inputs)
        current.wait_stream(self._stream)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A memory layout, a precision, and whether steps are replayed as CUDA graphs.

    Args:
        layout: channels_last or contiguous, of images and of convolutions' weights.
        precision: float32, with all of its 24 bits also in a GPU's convolutions; or bfloat16 for autocast:
            parameters, BatchNorm's statistics, architecture weights and losses stay float32.
        cuda_graph: Whether a training step is recorded once and replayed; the result is the same.
    """

    layout: str = "channels_last"
    precision: str = "float32"
    cuda_graph: bool = False

    def __str__(self) -> str:
        return f"{self.layout} {self.precision}" + (" CUDA graph" if self.cuda_graph else "")

    def on(self, device: torch.device) -> Execution:
        """Return what goes on of it on another device: graphs are recorded on a GPU alone."""
        return self if device.type == "cuda" else replace(self, cuda_graph=False)

    def graphed(
        self, step: Callable[..., None], device: torch.device, *, generators: Iterable[torch.Generator] = ()
    ) -> Callable[..., None]:
        """Return the step to call: recorded and replayed, or unchanged, as always where ranks wait for one another.

        Args:
            step: Takes tensors alone, see `GraphedStep`.
            generators: What it draws from, besides the device's default generator.

        Raises:
            UserError: CUDA graphs are asked for on another device.
        """
        if not self.cuda_graph or current().size > 1:
            return step
        if device.type != "cuda":
            raise UserError(f"CUDA graphs do not run on the device {device}.", "Leave --cuda-graph out.")
        return GraphedStep(step, device, generators=generators)

    def to_dict(self) -> dict[str, str | bool]:
        """Return the fields, JSON-ready."""
        return asdict(self)

    def settings(self) -> dict[str, str]:
        """Return the settings of a search or a recipe that ask for this."""
        return {
            "layout": self.layout,
            "precision": self.precision,
            "cuda_graph": "on" if self.cuda_graph else "off",
        }

    def place(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) in the layout; inputs of another shape are left as they are."""
        return images.contiguous(memory_format=LAYOUTS[self.layout]) if images.dim() == 4 else images

    def place_module(self, module: Module, device: torch.device | str) -> Module:
        """Move a module to a device, its convolutions' weights in the layout; returns it.

        On a GPU this makes cuDNN compute float32 convolutions in float32 for the rest of the process: by default it
        rounds to TF32 with 11 bits.
        """
        if torch.device(device).type == "cuda":
            # The older of PyTorch's two switches: once the newer is set, PyTorch refuses to read the older one,
            # as its own torch.backends.cudnn.flags does.
            torch.backends.cudnn.allow_tf32 = False
        module.to(device=device, memory_format=LAYOUTS[self.layout])  # type: ignore[call-overload]
        return module

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context of a forward pass; the backward pass and the loss belong outside of it."""
        if self.precision == "float32":
            return without_autocast(device)
        return torch.autocast(
            device.type,
            dtype=PRECISIONS[self.precision],
            # A recorded step must not read weights that were cast before the recording.
            cache_enabled=not self.cuda_graph,
        )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which operations keep the precision of their inputs."""
    # The meta device, which counts without computing, has none.
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


#: The default for members: what wins on CPUs (experiments/results/benchmarks.md).
PLAIN = Execution()


def candidates(
    *,
    layout: str,
    precision: str,
    device: torch.device,
    layouts: Iterable[str] = tuple(LAYOUTS),
    cuda_graph: str = "off",
    recordable: bool = True,
) -> list[Execution]:
    """Return the ways to compute that the settings leave open, the one to take unmeasured first.

    Args:
        layout: auto, measured, channels_last or contiguous.
        precision: auto, measured, float32 or bfloat16.
        device: Decides what ``auto`` is, which leaves nothing open: a seed then means the same course in every run.
        layouts: Those the network can be computed in.
        cuda_graph: auto, on or off.
        recordable: Whether ``auto`` may record steps.
    """
    on_gpu = device.type == "cuda"
    has_bfloat16 = on_gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    fast = "bfloat16" if has_bfloat16 else "float32"

    def open_values(value: str, every: Iterable[str], plain: str) -> list[str]:
        if value == MEASURED:
            return list(every)
        return [plain if value == AUTO else value]

    return [
        Execution(
            layout=chosen_layout,
            precision=chosen_precision,
            cuda_graph=cuda_graph == "on" or (cuda_graph == AUTO and on_gpu and recordable),
        )
        for chosen_layout, chosen_precision in itertools.product(
            open_values(layout, layouts, PLAIN.layout), open_values(precision, PRECISIONS, fast)
        )
    ]


def fastest(
    choices: Sequence[Execution],
    build_step: Callable[[Execution], Callable[[], object]],
    *,
    device: torch.device,
    rounds: int = _ROUNDS,
) -> Execution:
    """Return the choice whose step takes the least time, all timed in turn; one choice is not timed.

    The trial draws no random numbers from the global stream and says on stderr what it measured. A choice that fails
    is left out, and said to be.

    Args:
        build_step: Gives one step of a network that is thrown away afterwards.
        rounds: Timed steps of every choice; the median counts.

    Raises:
        RuntimeError: All choices fail.
    """
    if len(choices) == 1:
        return choices[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seconds = step_seconds(choices, build_step, device=device, rounds=rounds)
    chosen = min(seconds, key=lambda choice: seconds[choice])
    measured = ", ".join(f"{choice} {1000 * taken:.1f} ms" for choice, taken in seconds.items())
    print(f"measured a step: {measured}; taking {chosen}", file=sys.stderr, flush=True)
    return chosen


def step_seconds(
    choices: Iterable[Choice],
    build_step: Callable[[Choice], Callable[[], object]],
    *,
    device: torch.device,
    rounds: int = _ROUNDS,
    warm_up: int = _WARM_UP,
) -> Mapping[Choice, float]:
    """Return the median seconds of each choice's step, all timed in turn; arguments and errors as for ``fastest``.

    Args:
        warm_up: Steps before them; too few for CUDA graphs below the default.
    """
    choices = list(choices)
    steps: dict[Choice, Callable[[], object]] = {}
    for choice in choices:
        try:
            steps[choice] = build_step(choice)
            for _ in range(warm_up):
                steps[choice]()
            _wait_for(device)
        except RuntimeError as error:
            # A device may lack kernels for a layout or precision, or the memory; another choice may have both.
            steps.pop(choice, None)
            if choice == choices[-1] and not steps:
                raise
            print(f"{choice} does not run here: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    taken: dict[Choice, list[float]] = {choice: [] for choice in steps}
    for _ in range(rounds):
        for choice, step in steps.items():
            _wait_for(device)
            start = time.perf_counter()
            step()
            _wait_for(device)
            taken[choice].append(time.perf_counter() - start)
    return {choice: statistics.median(values) for choice, values in taken.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
