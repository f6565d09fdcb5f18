"""The sections of a session on a GPU: each measures one thing and writes every figure down at once."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import floor
import kernels
import numpy as np
import retraining
import search_step
import side_by_side
from steps import joint_step, member_training, profile, search_pair
from timing import Side, in_turn, peak_memory, spread, timed

from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import retrain_preset, search_preset
from dnas_ens.nn.execution import Execution

if TYPE_CHECKING:
    import torch

    from dnas_ens.config import RetrainConfig, SearchConfig
    from dnas_ens.data import ImageData

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

    @property
    def dataset(self) -> str:
        """All of Fashion-MNIST; digits in a rehearsal."""
        return "digits" if self.rehearse else "fashion-mnist"

    def data(self) -> ImageData:
        """Load the images."""
        from dnas_ens.data import load_data

        return load_data(self.dataset, download=False, limit_train=320 if self.rehearse else None)

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
        """Free unused memory, so that peaks are a side's own."""
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep_times(self, name: str, sides: Mapping[str, Side], rounds: int, **more: Any) -> None:
        """Time sides in turn, after a round that does not count, and write the seconds down with what else is known."""
        import torch

        seconds = in_turn(sides, rounds=rounds, warmup=1)
        record = {"seconds": {side: spread(values) for side, values in seconds.items()}, **more}
        if self.device.type == "cuda":
            record["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.keep(name, record)


def machine(session: Session) -> None:
    """Versions, and the two ceilings: bandwidth of a large copy, rate of a large bfloat16 product on random data."""
    import torch

    from dnas_ens.run.machine import environment

    def rates(amount: int, step: Callable[[], object]) -> dict[str, Any]:
        seconds = in_turn({"it": timed(step, device)}, rounds=10, warmup=3)["it"]
        return spread([amount / taken for taken in seconds])

    # Without the folders of the machine.
    session.keep("environment", environment(["python", "experiments/gpu_session.py"]))
    device = session.device
    size = session.scaled(2**32, 2**24)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = rates(2 * size, lambda: target.copy_(source))
    session.keep("copy bandwidth", {"bytes": 2 * size, "bytes_per_second": copied})
    side = session.scaled(8192, 256)
    for precision in ("bfloat16", "float32"):
        pair = torch.randn(2, side, side, device=device).to(getattr(torch, precision))
        product = rates(2 * side**3, lambda pair=pair: pair[0] @ pair[1])  # type: ignore[misc]
        session.keep(f"product {precision}", {"side": side, "operations_per_second": product})


def gpu_tests(session: Session) -> None:
    """Every test that is marked for a GPU; one of them in a rehearsal, where all of those would be skipped."""
    what = ["tests/run/test_progress.py"] if session.rehearse else ["-m", "gpu", "--durations=8"]
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
        search_preset("smoke" if session.rehearse else "fast", space="darts"),
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


def network_options(session: Session, execution: Execution, batch_size: int) -> dict[str, Any]:
    """Return the options of a benchmark that trains members as large as those of the preset ``fast``."""
    return {
        "data": session.dataset,
        "channels": session.scaled(16, 2),
        "num_cells": session.scaled(8, 2),
        "batch_size": session.scaled(batch_size, 16),
        "layout": execution.layout,
        "precision": execution.precision,
        "cuda_graph": execution.cuda_graph,
    }


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
            loop._batches(loop.weight_images, "order"),
            loop._batches(loop.architecture_images, "architecture_order"),
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
        recipe = recipe_of(session, execution, batch_size=64, learning_rate=1e-3, drop_path=0.2)
        training = member_training(data, recipe, session.device)
        losses, before = [], 0.0
        for _ in itertools.islice(training.epoch_steps(), count):
            total = float(training._step._total_loss)
            losses.append((total - before) / 64)
            before = total
        return losses

    for what, losses_of in (("search", search_losses), ("training", training_losses)):
        for precision in ("float32", "bfloat16"):
            eager, *recorded = session.executions(precision)
            ways = {"eager": eager, "eager again": eager} | dict(zip(("recorded",), recorded, strict=False))
            found = {}
            for name, way in ways.items():
                session.say(f"losses of {what}, {precision}, {name}")
                found[name] = losses_of(way)
            largest = {name: float(np.abs(np.subtract(losses, found["eager"])).max()) for name, losses in found.items()}
            session.keep(f"losses of {what}, {precision}", {"losses": found, "largest_difference": largest})
            session.free()


def kernel_variants(session: Session) -> None:
    """Depthwise convolutions, Gram matrices and grouped products in every variant."""
    options = kernels.Kernels(rounds=session.scaled(10, 1), warmup=1, batch_size=session.scaled(64, 4))
    kernels.measure_kernels(options, session.device, lambda record: session.keep(f"kernels, {record['name']}", record))


def search_steps(session: Session) -> None:
    """A pair of search steps: the textbook's, ours eager and recorded; its floor, the whole loop, and a profile."""
    batch_sizes = (64,) if session.rehearse else (64, 256)
    for measure, batch_size in itertools.product((_loop_steps, _hard_steps, _supernet_steps), batch_sizes):
        measure(session, batch_size)
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
    step = search_step.our_step_of(_step_options(session, batch_size, Execution(precision="bfloat16")), device)
    step()
    moved, by_operation = floor.moved_bytes(step)
    session.keep_times(
        f"search pair, batch {batch_size}",
        sides,
        session.scaled(4, 1),
        peak_memory=memory,
        bytes_bfloat16=moved,
        by_operation=by_operation,
    )
    if batch_size == 64:
        table = profile(step, device, row_limit=60, max_name_column_width=100)
        session.keep("profile of a search pair", {"batch_size": batch_size, "table": table})


def _loop_steps(session: Session, batch_size: int) -> None:
    from dnas_ens.search.loop import SearchLoop

    data, device = session.data(), session.device
    sides, recording = {}, {}
    for way in session.executions("bfloat16"):
        session.say(f"search loop, batch {batch_size}, {way}")
        config = search_config(session, way, batch_size=session.scaled(batch_size, 8))
        loop = SearchLoop(config, data, device=device)
        side = timed(search_pair(loop), device)
        for _ in range(5):
            side()
        if way.cuda_graph:
            # As at the beginning of an epoch.
            usual = side()
            loop.steps.begin_epoch(loop.schedules)
            recording[str(way)] = side() - usual
        sides[str(way)] = side
    session.keep_times(f"search loop, batch {batch_size}", sides, session.scaled(5, 1), seconds_to_record=recording)


def _hard_steps(session: Session, batch_size: int) -> None:
    """The default's step by hard paths, which trains weights and architecture at once and is never recorded."""
    from dnas_ens.search.loop import SearchLoop

    data, device = session.data(), session.device
    sides = {}
    for precision in ("float32", "bfloat16"):
        session.say(f"hard paths, batch {batch_size}, {precision}")
        config = with_fields(
            search_preset("smoke" if session.rehearse else "fast"),
            batch_size=session.scaled(batch_size, 8),
            precision=precision,
        )
        loop = SearchLoop(config, data, device=device)
        sides[precision] = timed(joint_step(loop), device)
    session.keep_times(f"hard paths, batch {batch_size}", sides, session.scaled(10, 1))


def training_step(session: Session) -> None:
    """A member's training step beside DataLoader + PIL, and whole epochs."""
    device = session.device
    for batch_size in (64, 256):
        if batch_size == 256 and session.rehearse:
            break
        if batch_size == 256 and session.seconds_left < 35:
            session.keep("left out, training, batch 256", {"seconds_left": session.seconds_left})
            break
        memory = {}

        def side_of(name: str, way: Execution, batch_size: int = batch_size) -> Side:
            options = retraining.Retraining(
                batches=session.scaled(8, 1),
                workers=session.scaled(8, 0),
                **network_options(session, way, batch_size),
            )
            return retraining.build_round(name, options, device)

        # Eagerly both layouts wait for the host.
        ways = [*session.executions(), *session.executions(layout="contiguous")[1::2]]
        sides = {retraining.TEXTBOOK: side_of(retraining.TEXTBOOK, Execution())}
        for way in ways:
            session.free()
            session.say(f"training, batch {batch_size}, {way}")
            sides[str(way)] = side_of(retraining.OURS, way)
            memory[str(way)] = peak_memory(sides[str(way)], 1, device)
        session.keep_times(
            f"training, batch {batch_size}",
            sides,
            session.scaled(4, 1),
            batches=session.scaled(8, 1),
            peak_memory=memory,
        )
        del sides
        session.free()
    data = session.data()
    for batch_size in (256, 64):
        way = session.executions("bfloat16")[-1]
        session.say(f"epoch, batch {batch_size}, {way}")
        training = member_training(data, recipe_of(session, way, batch_size=batch_size), device)
        epoch = timed(training.run_epoch, device)
        # The first includes what happens once: compiling, cuDNN's plans, the recording.
        taken = [epoch() for _ in range(session.scaled(2 if batch_size == 256 else 1, 1))]
        session.keep(
            f"epoch, batch {batch_size}",
            {"execution": str(way), "images": len(data.train), "seconds": taken},
        )
        del training, epoch
        session.free()


def members_side_by_side(session: Session) -> None:
    """One, two, five and eight members in turns of a step, eager and recorded."""
    for way, batch_size in itertools.product(reversed(session.executions("bfloat16")), (256, 64)):
        # Without a recording members wait for the host at any batch size.
        few = session.rehearse or not way.cuda_graph
        if few and batch_size != 64:
            continue
        sides = {}
        for count in (1, 5) if few or batch_size == 64 else (1, 2, 5, 8):
            session.say(f"{count} side by side, batch {batch_size}, {way}")
            options = side_by_side.SideBySide(
                members=count, batches=session.scaled(8, 1), **network_options(session, way, batch_size)
            )
            sides[str(count)] = side_by_side.build_round("members", options, session.device)
        # Recorded before it is timed: the warm-up has more than the three steps that run eagerly.
        name = f"side by side, batch {batch_size}, {way}"
        session.keep_times(name, sides, 2 if few else 5, steps=session.scaled(8, 1))
        del sides
        session.free()


def compiled_member(session: Session) -> None:
    """A member compiled by TorchInductor: seconds to compile, and a step beside ours."""
    import torch

    from dnas_ens.training.step import TrainingStep, build_sgd

    data, device = session.data(), session.device
    sides, first = {}, {}
    for compiled in (False, True):
        for way in session.executions("bfloat16"):
            recipe = recipe_of(session, way, batch_size=session.scaled(256, 16), drop_path=0.0)
            training = member_training(data, recipe, device)
            # Inductor takes minutes of a CPU; a rehearsal is of what calls it.
            backend = "eager" if session.rehearse else "inductor"
            network: Any = torch.compile(training.network, backend=backend) if compiled else training.network
            optimizer = build_sgd(training.network.parameters(), training.recipe)
            step = TrainingStep(network, optimizer, recipe, execution=way)
            network.train()
            images = training.augmentation.normalise(training.train_split.images[: recipe.batch_size])
            labels = training.train_split.labels[: recipe.batch_size]
            name = f"{'compiled ' * compiled}{way}"
            session.say(name)
            sides[name] = timed(partial(step, images, labels), device)
            first[name], *_ = [sides[name]() for _ in range(5)]
    session.keep_times("compiled", sides, session.scaled(20, 1), first_step_seconds=first)
