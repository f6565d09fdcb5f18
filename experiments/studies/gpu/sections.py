"""The sections of a session on a GPU: each measures one thing and gives away every figure as soon as it has it."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import floor
import kernels
import numpy as np
import retraining
import search_step
import side_by_side
from timing import in_turn, peak_memory, spread, synchronise, timed

from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.nn.execution import Execution

if TYPE_CHECKING:
    import torch

    from dnas_ens.config import RetrainConfig, SearchConfig
    from dnas_ens.data import ImageData
    from dnas_ens.training.trainer import MemberTraining

PROJECT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Session:
    """Where and how a section measures.

    Args:
        out: Folder of the session.
        device: What is measured.
        rehearse: Whether sizes are tiny, to try every line on a CPU.
        deadline: ``time.monotonic()`` at which the section is ended.
        keep: Takes a figure's name and record, and writes it down at once.
        earlier: Records of earlier sections, by name.
    """

    out: Path
    device: torch.device
    rehearse: bool
    deadline: float
    keep: Callable[[str, dict[str, Any]], None]
    earlier: dict[str, dict[str, Any]]

    @property
    def seconds_left(self) -> float:
        """Seconds until the section is ended."""
        return self.deadline - time.monotonic()

    def scaled(self, full: int, tiny: int) -> int:
        """Return the size of a session, or of its rehearsal."""
        return tiny if self.rehearse else full

    def data(self) -> ImageData:
        """Return all of Fashion-MNIST; digits in a rehearsal."""
        from dnas_ens.data import load_data

        return load_data("digits" if self.rehearse else "fashion-mnist", download=False)

    def executions(self, *precisions: str, layout: str = "channels_last") -> list[Execution]:
        """Return eager and, on a GPU, recorded computation in each precision."""
        graphs = (False, True) if self.device.type == "cuda" else (False,)
        return [
            Execution(layout=layout, precision=precision, cuda_graph=graph)
            for precision, graph in itertools.product(precisions or ("float32", "bfloat16"), graphs)
        ]

    def say(self, text: str) -> None:
        """Print what is being done, with the seconds left, so that a log tells what took long."""
        print(f"{self.seconds_left:.1f} s left: {text}", flush=True)

    def free(self) -> None:
        """Give memory back that nothing holds any more, so that peaks are a side's own."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def machine(session: Session) -> None:
    """Versions, and the two ceilings: bandwidth of a large copy, rate of a large bfloat16 product on random data."""
    import torch

    from dnas_ens.run.machine import environment

    # Without the folders of the machine.
    session.keep("environment", environment(["python", "experiments/gpu_session.py"]))
    device = session.device
    size = session.scaled(2**32, 2**24)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = in_turn({"copy": timed(lambda: target.copy_(source), device)}, rounds=10, warmup=3)["copy"]
    rates = [2 * size / taken for taken in seconds]
    session.keep("copy bandwidth", {"bytes": 2 * size, "bytes_per_second": spread(rates)})
    side = session.scaled(8192, 256)
    for precision in ("bfloat16", "float32"):
        left, right = (torch.randn(side, side, device=device).to(getattr(torch, precision)) for _ in range(2))
        product = timed(lambda left=left, right=right: left @ right, device)  # type: ignore[misc]
        seconds = in_turn({"product": product}, rounds=10, warmup=3)["product"]
        rates = [2 * side**3 / taken for taken in seconds]
        session.keep(f"product {precision}", {"side": side, "operations_per_second": spread(rates)})


def gpu_tests(session: Session) -> None:
    """Every test that is marked for a GPU; one of them in a rehearsal, where all of those would be skipped."""
    what = ["tests/test_cost.py"] if session.rehearse else ["-m", "gpu", "--durations=8"]
    report = session.out / "tests.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short",
         f"--junitxml={report}", *what],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout, flush=True)
    report.unlink(missing_ok=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    session.keep("tests", {"code": done.returncode, "summary": lines[-1] if lines else "", "failed": failed})


def search_config(session: Session, execution: Execution, *, batch_size: int) -> SearchConfig:
    """Return the preset ``fast``, every epoch of which searches the architecture."""
    return with_fields(
        search_preset("smoke" if session.rehearse else "fast"),
        warmup_epochs=0,
        batch_size=batch_size,
        **execution.settings(),
        **({"num_cells": 1, "channels": 2} if session.rehearse else {}),
    )


def recipe_of(session: Session, execution: Execution, *, batch_size: int, **fields: Any) -> RetrainConfig:
    """Return the preset ``fast`` for a member."""
    sizes = {"num_cells": 2, "channels": 4} if session.rehearse else {}
    preset = retrain_preset("smoke" if session.rehearse else "fast")
    return with_fields(preset, batch_size=batch_size, **execution.settings(), **sizes, **fields)


def member(session: Session, data: ImageData, recipe: RetrainConfig, *, index: int = 0) -> MemberTraining:
    """Return the training of a random genotype, the same for the same index."""
    from dnas_ens.space.genotype import random_genotype
    from dnas_ens.space.search_space import DARTS_OPERATIONS
    from dnas_ens.training.trainer import MemberTraining

    genotype = random_genotype(np.random.default_rng(index), operations=DARTS_OPERATIONS)
    return MemberTraining(genotype, data, recipe, index=index, device=session.device)


def recorded_losses(session: Session) -> None:
    """Twenty losses of the search and of a training: recorded beside eager, and eager beside eager once more.

    At small learning rates: at usual ones rounding grows tenfold a step, and two eager runs differ as much.
    """
    from dnas_ens.search.loop import SearchLoop

    data, count = session.data(), session.scaled(20, 4)

    def search_losses(execution: Execution) -> list[float]:
        config = search_config(session, execution, batch_size=64)
        config = with_fields(config, learning_rate=1e-3, architecture_learning_rate=1e-3)
        loop = SearchLoop(config, data, device=session.device)
        loop.supernet.train()
        loop.steps.begin_epoch(loop.schedules, num_pairs=count // 2)
        losses, before = [], [0.0, 0.0]
        batches = zip(
            loop._batches(loop.weight_half, "order"),
            loop._batches(loop.architecture_half, "architecture_order"),
            strict=False,
        )
        for training_batch, validation_batch in itertools.islice(batches, count // 2):
            loop.steps.architecture_step(validation_batch, training_batch)
            loop.steps.weight_step(training_batch)
            totals = [float(loop.steps.totals[name]) for name in ("architecture_loss", "train_loss")]
            losses += [total - past for total, past in zip(totals, before, strict=True)]
            before = totals
        return losses

    def training_losses(execution: Execution) -> list[float]:
        training = member(
            session, data, recipe_of(session, execution, batch_size=64, learning_rate=1e-3, drop_path=0.2)
        )
        losses, before = [], 0.0
        for _ in itertools.islice(training.epoch_steps(), count):
            total = float(training._step._total_loss)
            losses.append((total - before) / 64)
            before = total
        return losses

    for what, losses_of in (("search", search_losses), ("training", training_losses)):
        for precision in ("float32", "bfloat16"):
            eager, *recorded = session.executions(precision)
            session.say(f"losses of {what}, {precision}")
            found = {"eager": losses_of(eager)}
            session.say("again")
            found["eager again"] = losses_of(eager)
            if recorded:
                session.say("recorded")
                found["recorded"] = losses_of(recorded[0])
            largest = {
                name: float(np.abs(np.subtract(losses, found["eager"])).max())
                for name, losses in found.items()
            }
            session.keep(f"losses of {what}, {precision}", {"losses": found, "largest_difference": largest})
            session.free()


def kernel_variants(session: Session) -> None:
    """Depthwise convolutions, Gram matrices and grouped products in every variant."""
    options = kernels.Kernels(
        rounds=session.scaled(10, 1), warmup=1, batch_size=session.scaled(64, 4), parts=tuple(kernels.PARTS)
    )
    kernels.measure_kernels(
        options, session.device, lambda record: session.keep(f"kernels, {record['name']}", record)
    )


def search_pair(session: Session) -> None:
    """A pair of search steps: the textbook's, ours eager and recorded; its floor, the whole loop, and a profile."""
    for batch_size in (64, 256):
        _supernet_steps(session, batch_size)
        session.free()
    for batch_size in (64, 256):
        _loop_steps(session, batch_size)
        session.free()


def _step_options(session: Session, batch_size: int, execution: Execution) -> search_step.SearchStep:
    return search_step.SearchStep(
        image_size=session.scaled(28, 8),
        in_channels=1,
        channels=session.scaled(16, 2),
        batch_size=session.scaled(batch_size, 8),
        num_cells=session.scaled(5, 1),
        precision=execution.precision,  # type: ignore[arg-type]
        cuda_graph=execution.cuda_graph,
    )


def _supernet_steps(session: Session, batch_size: int) -> None:
    device = session.device
    sides, memory = {}, {}
    plain = Execution()
    ways = session.executions() if batch_size == 64 else session.executions()[1:]
    named = {search_step.SAME_IMAGES: plain} | {str(way): way for way in ways}
    for name, way in named.items():
        options = _step_options(session, batch_size, way)
        kind = name if name == search_step.SAME_IMAGES else search_step.OURS
        session.free()
        session.say(f"search pair, batch {batch_size}, {name}")
        sides[name] = search_step.build_step(kind, options, device)
        memory[name] = peak_memory(sides[name], 1 if kind == name else 5, device)
        session.say(f"{memory[name]}")
    seconds = in_turn(sides, rounds=session.scaled(4, 1), warmup=1)
    step = search_step.our_step_of(
        _step_options(session, batch_size, Execution(precision="bfloat16")), device
    )
    step()
    moved, by_operation = floor.moved_bytes(step)
    session.keep(
        f"search pair, batch {batch_size}",
        {
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "peak_memory": memory,
            "bytes_bfloat16": moved,
            "by_operation": by_operation,
        },
    )
    if batch_size != 64 and not session.rehearse:
        return
    session.keep("profile of a search pair", {"batch_size": batch_size, "table": _profile(step, device)})


def _profile(step: Callable[[], object], device: torch.device) -> str:
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    synchronise(device)
    with torch.profiler.profile(activities=activities) as found:
        step()
        synchronise(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table: str = found.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=100)
    return table


def _loop_steps(session: Session, batch_size: int) -> None:
    from dnas_ens.search.loop import SearchLoop

    data, device = session.data(), session.device
    sides, recording = {}, {}
    for way in session.executions("bfloat16"):
        session.say(f"search loop, batch {batch_size}, {way}")
        loop = SearchLoop(
            search_config(session, way, batch_size=session.scaled(batch_size, 8)), data, device=device
        )
        loop.supernet.train()
        loop.steps.begin_epoch(loop.schedules)
        images = loop.augmentation.normalise(loop.weight_half.images[: session.scaled(batch_size, 8)])
        batch = images, loop.weight_half.labels[: len(images)]

        def pair(loop: SearchLoop = loop, batch: Any = batch) -> None:
            loop.steps.architecture_step(batch, batch)
            loop.steps.weight_step(batch)

        for _ in range(5):
            pair()
        if way.cuda_graph:
            # As at the beginning of an epoch.
            side = timed(pair, device)
            usual = side()
            loop.steps.begin_epoch(loop.schedules)
            recording[str(way)] = side() - usual
        sides[str(way)] = timed(pair, device)
    seconds = in_turn(sides, rounds=session.scaled(5, 1), warmup=1)
    session.keep(
        f"search loop, batch {batch_size}",
        {
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "seconds_to_record": recording,
        },
    )


def training_step(session: Session) -> None:
    """A member's training step beside DataLoader + PIL, and whole epochs."""
    device = session.device
    for batch_size in (64, 256):
        if batch_size == 256 and session.seconds_left < 35:
            session.keep("left out, training, batch 256", {"seconds_left": session.seconds_left})
            break
        sides, memory = {}, {}

        def options_of(way: Execution, batch_size: int = batch_size) -> retraining.Retraining:
            return retraining.Retraining(
                data="digits" if session.rehearse else "fashion-mnist",
                batches=session.scaled(8, 1),
                workers=session.scaled(8, 0),
                channels=session.scaled(16, 2),
                num_cells=session.scaled(8, 2),
                batch_size=session.scaled(batch_size, 16),
                layout=way.layout,  # type: ignore[arg-type]
                precision=way.precision,  # type: ignore[arg-type]
                cuda_graph=way.cuda_graph,
            )

        # Eagerly both layouts wait for the host.
        ways = [*session.executions(), *session.executions(layout="contiguous")[1::2]]
        textbook = retraining.build_round(retraining.TEXTBOOK, options_of(Execution()), device)
        for way in ways:
            session.free()
            session.say(f"training, batch {batch_size}, {way}")
            side = retraining.build_round(retraining.OURS, options_of(way), device)
            memory[str(way)] = peak_memory(side, 1, device)
            sides[str(way)] = side
        seconds = in_turn({retraining.TEXTBOOK: textbook, **sides}, rounds=session.scaled(4, 1), warmup=1)
        session.keep(
            f"training, batch {batch_size}",
            {
                "batches": session.scaled(8, 1),
                "seconds": {name: spread(values) for name, values in seconds.items()},
                "peak_memory": memory,
            },
        )
        del sides, textbook
        session.free()
    data = session.data()
    for batch_size in (256, 64):
        way = session.executions("bfloat16")[-1]
        session.say(f"epoch, batch {batch_size}, {way}")
        training = member(session, data, recipe_of(session, way, batch_size=batch_size))
        taken = []
        # The first includes what happens once: compiling, cuDNN's plans, the recording.
        for _ in range(session.scaled(2 if batch_size == 256 else 1, 1)):
            synchronise(device)
            start = time.perf_counter()
            training.run_epoch()
            synchronise(device)
            taken.append(time.perf_counter() - start)
        session.keep(
            f"epoch, batch {batch_size}",
            {"execution": str(way), "images": len(data.train), "seconds": taken},
        )
        del training
        session.free()


def members_side_by_side(session: Session) -> None:
    """One, two, five and eight members in turns of a step, eager and recorded."""
    for way, batch_size in itertools.product(reversed(session.executions("bfloat16")), (256, 64)):
        # Without a recording the host is what members wait for, whatever the batch.
        few = session.rehearse or not way.cuda_graph
        if few and batch_size != 64:
            continue
        sides = {}
        for count in (1, 5) if few or batch_size == 64 else (1, 2, 5, 8):
            session.say(f"{count} side by side, batch {batch_size}, {way}")
            options = side_by_side.SideBySide(
                data="digits" if session.rehearse else "fashion-mnist",
                members=count,
                channels=session.scaled(16, 2),
                num_cells=session.scaled(8, 2),
                batch_size=session.scaled(batch_size, 16),
                batches=session.scaled(8, 1),
                precision=way.precision,  # type: ignore[arg-type]
                cuda_graph=way.cuda_graph,
            )
            sides[str(count)] = side_by_side.build_round("members", options, session.device)
        # Recorded before it is timed: the warm-up has more than the three steps that run eagerly.
        seconds = in_turn(sides, rounds=2 if few else 5, warmup=1)
        session.keep(
            f"side by side, batch {batch_size}, {way}",
            {
                "steps": session.scaled(8, 1),
                "seconds": {name: spread(values) for name, values in seconds.items()},
                "peak_bytes": _peak(session),
            },
        )
        del sides
        session.free()


def _peak(session: Session) -> int | None:
    import torch

    if session.device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(session.device)
    torch.cuda.reset_peak_memory_stats(session.device)
    return peak


def compiled_member(session: Session) -> None:
    """A member compiled by TorchInductor: seconds to compile, and a step beside ours."""
    import torch

    from dnas_ens.training.step import TrainingStep, build_sgd

    data, device = session.data(), session.device
    sides, first = {}, {}
    for compiled in (False, True):
        for way in session.executions("bfloat16"):
            recipe = recipe_of(session, way, batch_size=session.scaled(256, 16), drop_path=0.0)
            training = member(session, data, recipe)
            # Inductor takes minutes of a CPU; a rehearsal is of what calls it.
            backend = "eager" if session.rehearse else "inductor"
            network: Any = torch.compile(training.network, backend=backend) if compiled else training.network
            optimizer = build_sgd(
                training.network.parameters(),
                learning_rate=recipe.learning_rate,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
            )
            step = TrainingStep(network, optimizer, recipe, execution=way)
            network.train()
            images = training.augmentation.normalise(training.train_split.images[: recipe.batch_size])
            labels = training.train_split.labels[: recipe.batch_size]
            side = timed(lambda step=step, images=images, labels=labels: step(images, labels), device)  # type: ignore[misc]
            name = f"{'compiled ' * compiled}{way}"
            session.say(name)
            first[name] = side()
            for _ in range(4):
                side()
            sides[name] = side
    seconds = in_turn(sides, rounds=session.scaled(20, 1), warmup=1)
    session.keep(
        "compiled",
        {
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "first_step_seconds": first,
        },
    )
