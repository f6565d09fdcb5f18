"""Studies of reference models: options, data and model on a device, trainings that go on, and one unit a seed.

The run folder of such a study holds, for every seed, one folder a training (its states and its cost, ``training.json``
written last) and the rows' predictions (``predictions.npz``), and a line a finished seed in ``records.jsonl``. What is
finished is not run again, and a training that was interrupted goes on from its newest checkpoint.

Legend: M networks, N images, K classes, S seeds.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnas_ens.compare.methods.long_training import Cycles, train_on
from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.report import (
    Column,
    Row,
    losses_over_seeds,
    measured_rows,
    pair_sentences,
    provenance,
    table_over_seeds,
)
from dnas_ens.compare.study import RESULTS, Unit, require_positive, run_missing, write_study
from dnas_ens.config import RetrainConfig
from dnas_ens.data import load_data
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.ensembles.snapshot import Schedule
from dnas_ens.nn.execution import PLAIN
from dnas_ens.nn.reference_models import ReferenceModel, reference_model
from dnas_ens.run.files import load_tensors, read_json, save_tensors, write_json
from dnas_ens.run.folder import RunFolder
from dnas_ens.run.machine import resolve_device
from dnas_ens.run.progress import CostMeter
from dnas_ens.training.prediction import Batches, plain_passes, predict_members, training_passes
from dnas_ens.training.trainer import NetworkTraining

#: Options that do not change what a training or a row of a seed is.
FREE = ("seeds", "device", "run_dir", "output")
COLUMNS = {
    "accuracy": Column("accuracy %", 100.0, 2),
    "nll": Column("NLL"),
    "calibrated_nll": Column("calibrated NLL"),
    "temperature": Column("T", digits=2),
    "cpu_seconds": Column("CPU seconds", digits=1),
}


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of every study; the defaults are the scale of arXiv 1704.00109 for wide ResNets."""

    model: str = "wrn-16-4"
    """Reference model: wrn-N-K, densenet-L-K, resnetN, small-cnn, medium-cnn, shallow-cnn, mlp."""
    data: str = "cifar10"
    """digits, fashion-mnist, mnist, cifar10, cifar100, svhn, or a path to a folder of images."""
    data_root: Path | None = None
    """Where named data sets are kept; default: $DNAS_ENS_DATA, else ~/.cache/dnas_ens/data."""
    limit_train: int | None = None
    """Training images, a stratified subset; default: all."""
    epochs: int = 200
    """Epochs of every training from fresh weights."""
    batch_size: int = 64
    """Images a step."""
    learning_rate: float = 0.1
    """Initial learning rate alpha_0 of SGD with momentum."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    augment: bool = True
    """Random crops, and flips where they keep the meaning."""
    seeds: int = 3
    """Seeds; initialisation, order and augmentation of every training have their own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    run_dir: Path | None = None
    """Where trainings are kept; default: runs/STUDY-DATA-MODEL."""
    output: Path | None = None
    """Where table, plot and figures go: OUTPUT.md, .png, .jsonl; default: runs/results/STUDY-DATA."""

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "batch_size", "seeds")

    @property
    def recipe(self) -> RetrainConfig:
        """How every model is trained, apart from its schedule; as in the papers no gradient is clipped."""
        names = ("epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "augment")
        return RetrainConfig(**{name: getattr(self, name) for name in names}, average_last=0.0, gradient_clip=math.inf)

    @property
    def is_published(self) -> bool:
        """Whether everything that decides the outcome is at its default."""
        default = type(self)()
        return replace(self, **{name: getattr(default, name) for name in (*FREE, "data_root")}) == default


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """Data on a device, and what trains reference models on them; ``test`` is predicted when everything is chosen."""

    options: StudyOptions
    data: ImageData
    device: torch.device

    @classmethod
    def of(cls, options: StudyOptions) -> Bench:
        """Load the data of a study onto its device."""
        device = resolve_device(options.device)
        data = load_data(options.data, data_root=options.data_root, limit_train=options.limit_train)
        return cls(options=options, data=data.to(device), device=device)

    def model(self) -> ReferenceModel:
        """Return the model with fresh weights from torch's global generator."""
        data = self.data
        model = reference_model(self.options.model, data.num_channels, data.num_classes, data.image_size)
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def batches(self, split: Split) -> Batches:
        """Return passes over a split in its order, without augmentation."""
        return plain_passes(self.data, split)

    @functools.cached_property
    def statistics_batches(self) -> Batches:
        """Passes over the training images as in training, for BatchNorm statistics."""
        return training_passes(self.data, self.data.train.drawn(), augment=self.options.augment)

    def predict(self, states: Sequence[Mapping[str, torch.Tensor]], split: Split) -> np.ndarray:
        """Return the probabilities (M, N, K) of states of the model."""
        model = self.model()

        def members() -> Iterator[ReferenceModel]:
            for state in states:
                model.load_state_dict(state)
                yield model

        return predict_members(members(), self.batches(split))[0]

    def training(self, *, root: int, member: int) -> NetworkTraining[ReferenceModel]:
        """Return a training of the model; `root` and `member` decide its seeds."""
        return NetworkTraining(
            self.model,
            self.data,
            replace(self.options.recipe, seed=root),
            index=member,
            device=self.device,
            execution=PLAIN,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A finished training: its snapshots, the oldest first, and training.json (seeds, schedule, steps, seconds)."""

    states: list[dict[str, torch.Tensor]]
    record: dict[str, Any]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the training, over all its starts."""
        return float(self.record["cpu_seconds"])


def train(
    bench: Bench,
    folder: Path,
    schedule: Schedule,
    *,
    root: int,
    member: int,
    epochs: int | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> Trained:
    """Train the model under a schedule of snapshots, or load what was trained.

    Args:
        bench: Data, device and recipe.
        folder: Where the training is kept.
        schedule: Learning rates, and when to take a snapshot.
        root: The study's seed.
        member: Which training of that seed; decides its seeds together with `root`.
        epochs: How many; None for the option's.
        start: A state to begin with instead of fresh weights.
    """
    if not (folder / "training.json").exists():
        training = bench.training(root=root, member=member)
        if start is not None:
            training.network.load_state_dict(start)
        cycles = Cycles(training, schedule)
        epochs = bench.options.epochs if epochs is None else epochs
        found = train_on(
            training,
            cycles,
            folder,
            epochs=epochs,
            save_every=max(1, epochs // 10),
            description=str(folder),
        )
        seconds = {name: value for name, value in found.items() if name.endswith("_seconds")}
        recorder = cycles.recorder
        for index, snapshot in enumerate(recorder.snapshots):
            save_tensors(folder / f"snapshot-{index}.safetensors", snapshot)
        write_json(
            folder / "training.json",
            {
                "seeds": asdict(training.seeds),
                "schedule": recorder.state_dict()["schedule"],
                "snapshot_steps": recorder.snapshot_steps,
                "parameters": training.num_parameters,
                "train_loss": found["train_loss"],
                **seconds,
            },
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(f"trained {folder}: {seconds['cpu_seconds']:.1f} CPU s", flush=True)
    record = read_json(folder / "training.json")
    count = len(record["snapshot_steps"])
    return Trained(
        states=[load_tensors(folder / f"snapshot-{index}.safetensors") for index in range(count)],
        record=record,
    )


@contextmanager
def all_starts(file: Path) -> Iterator[Callable[[], float]]:
    """Count the CPU seconds of a computation that may be interrupted and resumed.

    Args:
        file: Keeps the seconds of earlier starts.

    Yields:
        What returns the seconds of all starts, to be called after the block.
    """
    cost = CostMeter(read_json(file) if file.exists() else None)
    try:
        yield lambda: float(read_json(file)["cpu_seconds"])
    finally:
        write_json(file, cost.seconds())


@dataclass(frozen=True, eq=False, kw_only=True)
class SeedStudy:
    """A study with one unit a seed: its run folder, which holds trainings of these options alone, and its store."""

    name: str
    bench: Bench
    run: RunFolder
    store: Records

    @classmethod
    @contextmanager
    def open(cls, name: str, options: StudyOptions, command: Sequence[str]) -> Iterator[SeedStudy]:
        """Load the data, and make the run folder or continue with it.

        Raises:
            UserError: The folder is of other options; the first that differs is named.
        """
        bench = Bench.of(options)
        settings = {key: value for key, value in asdict(options).items() if key not in FREE}
        settings["data"] = bench.data.fingerprint
        del settings["data_root"]
        folder = options.run_dir or Path("runs") / f"{name}-{Path(options.data).name}-{options.model}"
        with RunFolder.create(folder, config=settings, section=name, command=list(command), resume=True) as run:
            run.write_env({"device": str(bench.device), "data": bench.data.describe()})
            store = Records(
                run.file("records.jsonl"),
                key=("seed",),
                arrays=lambda record: run.file(f"seed-{record['seed']}") / "predictions.npz",
            )
            yield cls(name=name, bench=bench, run=run, store=store)

    def records(self, run_one: Callable[[Path, int], Unit]) -> list[Record]:
        """Return the record of every seed, running those that are not finished.

        Args:
            run_one: Given the folder of a seed and the seed, returns what `finished` does.
        """
        seeds = range(self.bench.options.seeds)
        run_missing(
            self.store,
            {seed: functools.partial(run_one, self.run.file(f"seed-{seed}"), seed) for seed in seeds},
            said=lambda record: f"seed {record['seed']} is finished",
        )
        return [self.store[seed] for seed in seeds]

    def comparisons(self, records: Sequence[Record], pairs: Iterable[tuple[str, str]]) -> str:
        """Say in one sentence for each pair of rows how their calibrated NLL on test differs."""
        return pair_sentences(losses_over_seeds(self.store, [record["seed"] for record in records]), pairs)

    def write(
        self,
        records: Sequence[Record],
        *,
        title: str,
        body: str,
        waiting: str,
        figure: Callable[[Path], None],
    ) -> None:
        """Write OUTPUT.md with all that is needed to repeat it, OUTPUT.png, and OUTPUT.jsonl, a line a seed.

        Args:
            records: A record a seed.
            title: The heading.
            body: Tables and sentences.
            waiting: What is said where options are not at their defaults: the run that waits for a GPU.
            figure: Draws to a path.
        """
        options, data = self.bench.options, self.bench.data
        env = self.run.read_json("env.json")[-1]
        on_gpu = self.bench.device.type == "cuda"
        hardware = env["cuda_device"] or "no GPU" if on_gpu else "no GPU used"
        parameters = read_json(next(self.run.path.glob("seed-0/*/training.json")))["parameters"]
        header = (
            f"# {title}: {data.name}, {options.model}\n\n"
            f"{provenance(env, hardware=hardware)} "
            f"Seeds {', '.join(str(record['seed']) for record in records)}, from each of which initialisation, order "
            "and augmentation of every training have seeds of their own; split seed 0.\n\n"
            f"**Scale that was run: {options.model} ({parameters:,} parameters), {data.name}, {len(data.train)} "
            f"training, {len(data.val)} val and {len(data.test)} test images of {data.image_size} x {data.image_size}, "
            f"{options.epochs} epochs.** SGD in batches of {options.batch_size}, learning rate from "
            f"{options.learning_rate:g}, momentum {options.momentum:g}, weight decay {options.weight_decay:g}, "
            f"{'with' if options.augment else 'without'} augmentation.\n\n"
        )
        if not options.is_published:
            header += f"This is **not** the published scale. {waiting}\n\n"
        output = options.output or RESULTS / f"{self.name}-{Path(options.data).name}"
        write_study(output, header + body, figure=figure, records=records)


def finished(bench: Bench, seed: int, rows: Sequence[Row], **more: Any) -> Unit:
    """Evaluate the rows of a seed on test, once; ``more`` is what else its record holds, such as curves on val."""
    found, arrays = measured_rows(
        rows,
        val_labels=bench.data.val.labels.cpu().numpy(),
        test_labels=bench.data.test.labels.cpu().numpy(),
    )
    return {"seed": seed, "rows": found, **more}, arrays


def table(records: Sequence[Record]) -> str:
    """Return mean ± standard deviation over seeds of every row on test as Markdown."""
    rows = {row["name"]: [record["rows"][index] for record in records] for index, row in enumerate(records[0]["rows"])}
    return table_over_seeds(rows, COLUMNS)
