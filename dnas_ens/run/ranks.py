"""Several processes that share one search or one training, as torchrun starts them.

Every process takes its share of each batch, and the gradients are averaged before each step of an optimiser, so W
processes take the steps that one takes on the same batches. All random numbers are drawn for the whole batch from the
same seeds, so a saved state is the same for any W.

torch's DistributedDataParallel averages what one `backward` of one wrapped `forward` leaves. Here most gradients come
from `torch.autograd.grad`, of the weights and of the hypernetwork in turn, and for the second order by finite
differences. So they are averaged by an all-reduce of our own, one a step.

torch is imported where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from dnas_ens.errors import UserError
from dnas_ens.run.checkpoint import state_from_bytes, state_to_bytes
from dnas_ens.run.files import as_json, first_difference
from dnas_ens.run.machine import resolve_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

#: Seconds that a process waits for the others, and where another number is set.
TIMEOUT, TIMEOUT_VARIABLE = 600.0, "DNAS_ENS_TIMEOUT"
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> int:
    """Return how many processes torchrun has started for the command; 0 if it was started without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 0


def is_first() -> bool:
    """Return whether this is rank 0, or a command that was started without torchrun."""
    return not launched() or os.environ["RANK"] == "0"


def restarted() -> bool:
    """Return whether torchrun has started the processes again, after one of them had failed."""
    return launched() > 0 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def may_restart() -> bool:
    """Return whether torchrun would start the processes again (--max-restarts)."""
    return launched() > 0 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def end(code: int) -> NoReturn:
    """End the process; of torchrun's at once, for what torch takes down then may abort it after all is done."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def as_typed(prog: str, argv: Sequence[str]) -> list[str]:
    """Return the command line of a program `python -m ...` as it was started, with or without torchrun."""
    words = shlex.split(prog)
    if size := launched():
        each = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        nodes = ["--nnodes", str(size // each)] if size > each else []
        words = ["torchrun", *nodes, "--nproc-per-node", str(each), *words[1:]]
    return [*words, *argv]


class Ranks:
    """This process among W, the ranks 0 to W - 1; rank 0 writes the files and talks. By default it is alone.

    Where several are needed, every rank must call the same methods in the same order.

    Args:
        device: Where this rank computes.
        sync_batch_norm: Whether BatchNorm takes its statistics over the images of all ranks.
        store: What short messages go through; of several ranks.
        timeout: Seconds that a rank waits for the others.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        device: torch.device | None = None,
        sync_batch_norm: bool = False,
        store: Any = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.rank, self.size, self.sync_batch_norm = rank, size, sync_batch_norm and size > 1
        self._device, self._store, self._timeout, self._messages = device, store, timeout, 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        assert self._device is not None, "only a command that has joined has chosen a device"
        return self._device

    def own(self, num_images: int) -> slice:
        """Return this rank's share of so many images, which W divides."""
        share = num_images // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    # Means

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks, without a gradient."""
        return self.means([values.detach()])[0]

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over all ranks of several tensors, by one all-reduce."""
        if self.size == 1:
            return list(tensors)
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._answered():
            dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def average_gradients(self, parameters: Iterable[Tensor], *more: Tensor) -> list[Tensor]:
        """Average the gradients that parameters hold, which are those of the same ones on all ranks.

        Returns:
            The means of further tensors.
        """
        if self.size == 1:
            return list(more)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means = self.means([*gradients, *more])
        for gradient, mean in zip(gradients, means, strict=False):
            gradient.copy_(mean)
        return means[len(gradients) :]

    # What all ranks have in common

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have on rank 0."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            with self._answered():
                dist.broadcast(flat, 0)
            with torch.no_grad():
                for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def require_agreement(self, module: nn.Module, what: str) -> None:
        """Compare the SHA-256 of a module's parameters between ranks, and take over the buffers of rank 0.

        Running statistics of BatchNorm are buffers: each rank has its own during an epoch.

        Raises:
            UserError: A rank has other parameters than rank 0.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for parameter in module.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(-1).numpy().data)
        found = self.gathered(digest.hexdigest())
        others = [str(rank) for rank, other in enumerate(found) if other != found[0]]
        if others:
            raise UserError(
                f"{what} differs between ranks: rank {', '.join(others)} has other parameters than rank 0.",
                "Give all ranks the same software and machines of one kind, and go on from the last state by --resume.",
            )
        self.take_over(module.buffers())

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Compare what the ranks were given.

        Raises:
            UserError: Naming the first field that differs.
        """
        found = self.gathered(settings) if self.size > 1 else []
        for rank, other in enumerate(found):
            difference = first_difference(found[0], other, "")
            if difference is not None:
                field, there, here = difference
                raise UserError(
                    f"The ranks were given different settings: {field.lstrip('.')} is {there} on rank 0 and {here} on "
                    f"rank {rank}.",
                    "Start all of them with the same command, configuration and data.",
                )

    def shared(self, value: T) -> T:
        """Return what rank 0 gives, which JSON must hold."""
        if self.size == 1:
            return value
        self._messages += 1
        key = str(self._messages)
        if self.first:
            self._send(key, value)
            return value
        received: T = self._receive(key)
        return received

    def after_first(self, work: Callable[[], T]) -> T:
        """Do on rank 0, and then on the others, a work that leaves files for them, such as a download."""
        if not self.first:
            self.shared(None)
        result = work()
        if self.first:
            self.shared(None)
        return result

    def gathered(self, value: T) -> list[T]:
        """Return what every rank gives, in their order; JSON must hold it."""
        self._messages += 1
        self._send(f"{self._messages}/{self.rank}", value)
        return [self._receive(f"{self._messages}/{rank}") for rank in range(self.size)]

    def shared_state(self, state: Any) -> Any:
        """Return the nested state that rank 0 gives; see `CheckpointStore` for what it may hold."""
        if self.size == 1:
            return state
        import torch
        import torch.distributed as dist

        content = state_to_bytes(state) if self.first else b""
        length = self.shared(len(content))
        sent = torch.frombuffer(bytearray(content or length), dtype=torch.uint8).to(self.device)
        with self._answered():
            dist.broadcast(sent, 0)
        return state if self.first else state_from_bytes(sent.cpu().numpy().tobytes())

    def leave(self) -> None:
        """Part from the other ranks at a good end, once; after a failure this would wait for them."""
        global _current
        if _current is not self or self._store is None:
            return
        import torch.distributed as dist

        # None leaves while another still receives.
        with self._answered():
            dist.barrier()
        dist.destroy_process_group()
        _current = Ranks()

    def tells(self, message: str) -> bool:
        """Return whether no other rank has told a message before."""
        if self._store is None:
            return True
        key = f"told/{hashlib.sha256(message.encode()).hexdigest()}"
        try:
            if (told := self._store.add(key, 1)) == 1:
                # The first one may hold the store, so it does not end before the others had time to ask.
                deadline = time.monotonic() + 1.0
                while self._store.add(key, 0) < self.size and time.monotonic() < deadline:
                    time.sleep(0.01)
        except RuntimeError:
            # Whoever held the store has ended.
            return True
        return bool(told == 1)

    def _send(self, key: str, value: Any) -> None:
        with self._answered():
            self._store.set(key, json.dumps(as_json(value)))

    def _receive(self, key: str) -> Any:
        # Asked for again and again instead of waited for: a signal is then handled at once.
        deadline = time.monotonic() + self._timeout
        with self._answered():
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no message {key}")
                time.sleep(0.01)
            return json.loads(self._store.get(key))

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """Turn the loss of another rank into an error of one line."""
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"A process of the {self.size} has ended, or has not answered for {self._timeout:g} seconds.",
                "What it printed is above. Go on from the last state with --resume; torchrun does so by itself with "
                f"--max-restarts. {TIMEOUT_VARIABLE} sets how many seconds a process waits.",
            ) from error


_current = Ranks()


def current() -> Ranks:
    """Return this process among those that share its work; alone, unless its command has joined others."""
    return _current


@contextlib.contextmanager
def joined(device: str, *, sync_batch_norm: bool = False, alone: bool = False) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, for the block; without torchrun this process stays alone.

    All ranks but 0 print nothing in the block. Of an error that several ranks have, one tells it.

    Args:
        device: auto, cpu or cuda: of several GPUs each rank takes that of its local rank; of a rank alone, cuda:N too.
        sync_batch_norm: See `Ranks`.
        alone: Stay alone in any case, as for a dry run.

    Raises:
        UserError: The others cannot be reached, or the device is not there.
    """
    global _current
    size = 0 if alone else launched()
    if not size:
        yield Ranks(device=resolve_device(device))
        return
    ranks = Ranks()
    try:
        with _silent() if not is_first() else contextlib.nullcontext():
            ranks = _current = _join(size, sync_batch_norm=sync_batch_norm)
            ranks._device = _begin(ranks, device)
            yield ranks
            ranks.leave()
    except UserError as error:
        error.told = not ranks.tells(str(error))
        raise
    finally:
        _current = Ranks()


def _join(size: int, *, sync_batch_norm: bool) -> Ranks:
    """Meet the other processes where torchrun's environment says."""
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    rank, timeout = int(os.environ["RANK"]), _timeout()
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        store = PrefixStore(f"dnas_ens/{attempt}", store)
        ranks = Ranks(rank, size, sync_batch_norm=sync_batch_norm, store=store, timeout=timeout)
        ranks.gathered(rank)
    except (RuntimeError, ValueError, UserError) as error:
        raise UserError(
            f"The {size} processes did not meet at {address} within {timeout:g} seconds.",
            f"Start all of them by torchrun, with an address that each can reach; {TIMEOUT_VARIABLE} sets how many "
            "seconds they wait.",
        ) from error
    return ranks


def _begin(ranks: Ranks, name: str) -> torch.device:
    """Choose the rank's device and make the group that averages gradients: NCCL on GPUs, gloo on CPUs."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name.startswith("cuda:") and ranks.size > 1:
        raise UserError(
            f"{ranks.size} processes were given one device, {name}.",
            "Give --device cuda: each process takes the GPU of its local rank.",
        )
    device = resolve_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with ranks._answered():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", ranks._store),
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=timedelta(seconds=ranks._timeout),
        )
    return device


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{TIMEOUT_VARIABLE} is {text!r}.", "Set it to a number of seconds above 0.")
    return seconds


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
