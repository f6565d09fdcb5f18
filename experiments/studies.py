"""What the seed studies of reference models share: options, resumable trainings with snapshots, rows, report.

A study's run folder holds, for every seed, one folder a training (its states and its cost, ``training.json`` written
last), the rows' predictions (``predictions.npz``) and the rows themselves (``rows.json``, written last).
What is finished is not run again, and a training that was interrupted goes on from its newest checkpoint.

Legend: M networks, R rows, N images, K classes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from weight_averaging import Difference, mean_and_deviation

from dnas_ens.config import require

if TYPE_CHECKING:
    import torch

    from dnas_ens.data.dataset import ImageData, Split
    from dnas_ens.ensembles.snapshot import Schedule
    from dnas_ens.inference import Batches
    from dnas_ens.nn.reference_models import ReferenceModel
    from dnas_ens.runs import RunFolder

RESULTS = Path(__file__).parent / "results"
#: Options that do not change what a training or a row of a seed is.
FREE = ("seeds", "device", "run_dir", "output")
SHOWN = {"accuracy": "accuracy %", "nll": "NLL", "calibrated_nll": "calibrated NLL"}


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
    """Where table, plot and figures go: OUTPUT.md, .png, .jsonl; default: experiments/results/STUDY-DATA."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "seeds"):
            flag = name.replace("_", "-")
            require(
                getattr(self, name) > 0, f"--{flag} is {getattr(self, name)}.", f"Give --{flag} 1 or more."
            )

    def path(self, study: str) -> Path:
        """Return the output without suffix."""
        return self.output or RESULTS / f"{study}-{Path(self.data).name}"


# Trainings


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench:
    """Data on a device, and what trains reference models on them.

    Args:
        options: How to train.
        data: Images; ``test`` is read by `predict_test` alone.
        device: Where to train.
    """

    options: StudyOptions
    data: ImageData
    device: torch.device

    @classmethod
    def of(cls, options: StudyOptions) -> Bench:
        """Load the data of a study onto its device."""
        from dnas_ens.data import load_data
        from dnas_ens.device import resolve_device

        device = resolve_device(options.device)
        data = load_data(options.data, data_root=options.data_root, limit_train=options.limit_train)
        return cls(options=options, data=data.to(device), device=device)

    def model(self) -> ReferenceModel:
        """Return the model with fresh weights from torch's global generator."""
        import torch

        from dnas_ens.nn.reference_models import reference_model

        data = self.data
        model = reference_model(self.options.model, data.num_channels, data.num_classes, data.image_size)
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def batches(self, split: Split, batch_size: int | None = None) -> Batches:
        """Return passes over a split in its order, without augmentation."""
        import torch

        from dnas_ens.data.batches import Augmentation, iterate_batches
        from dnas_ens.inference import EVALUATION_BATCH

        augmentation = Augmentation.for_data(self.data, augment=False)
        size = batch_size or EVALUATION_BATCH

        def one_pass() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for images, labels in iterate_batches(split, size, augmentation=augmentation):
                yield images.contiguous(memory_format=torch.channels_last), labels

        return one_pass

    def predict(self, states: Sequence[Mapping[str, torch.Tensor]], split: Split) -> np.ndarray:
        """Return the probabilities (M, N, K) of states of the model."""
        from dnas_ens.inference import predict_members

        model = self.model()

        def members() -> Iterator[ReferenceModel]:
            for state in states:
                model.load_state_dict(state)
                yield model

        return predict_members(members(), self.batches(split))[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A finished training.

    Args:
        states: The snapshots, the oldest first.
        record: What training.json holds: seeds, schedule, snapshot steps, seconds.
    """

    states: list[dict[str, torch.Tensor]]
    record: dict[str, Any]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the training, of all its sittings."""
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
    from dnas_ens.checkpoint import CheckpointStore
    from dnas_ens.cost import CostMeter
    from dnas_ens.files import load_tensors, read_json, save_tensors, write_json

    if not (folder / "training.json").exists():
        training = _Training(bench, schedule, root=root, member=member, start=start)
        epochs = bench.options.epochs if epochs is None else epochs
        store = CheckpointStore(folder / "checkpoints", name="training")
        newest = store.load_newest()
        seconds: dict[str, float] = {}
        if newest is not None:
            training.load_state_dict(newest[1]["training"])
            seconds = newest[1]["seconds"]
        cost = CostMeter(seconds)
        while training.epoch < epochs:
            loss = training.run_epoch()
            if training.epoch % max(1, epochs // 10) == 0 and training.epoch < epochs:
                store.save(training.epoch, {"training": training.state_dict(), "seconds": cost.seconds()})
        for index, snapshot in enumerate(training.recorder.snapshots):
            save_tensors(folder / f"snapshot-{index}.safetensors", snapshot)
        write_json(
            folder / "training.json",
            {
                "seeds": asdict(training.seeds),
                "schedule": training.recorder.state_dict()["schedule"],
                "snapshot_steps": training.recorder.snapshot_steps,
                "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
                "train_loss": loss,
                **cost.seconds(),
            },
        )
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(f"trained {folder}: {cost.seconds()['cpu_seconds']:.1f} CPU s", flush=True)
    record = read_json(folder / "training.json")
    count = len(record["snapshot_steps"])
    return Trained(
        states=[load_tensors(folder / f"snapshot-{index}.safetensors") for index in range(count)],
        record=record,
    )


@contextmanager
def all_sittings(file: Path) -> Iterator[Callable[[], float]]:
    """Count the CPU seconds of a computation that may be interrupted and gone on with.

    Args:
        file: Keeps the seconds of the sittings so far.

    Yields:
        What returns the seconds of all sittings, to be called after the block.
    """
    from dnas_ens.cost import CostMeter
    from dnas_ens.files import read_json, write_json

    cost = CostMeter(read_json(file) if file.exists() else None)
    try:
        yield lambda: float(read_json(file)["cpu_seconds"])
    finally:
        write_json(file, cost.seconds())


class _Training:
    """State and epochs of one training."""

    def __init__(
        self,
        bench: Bench,
        schedule: Schedule,
        *,
        root: int,
        member: int,
        start: Mapping[str, torch.Tensor] | None,
    ) -> None:
        import torch

        from dnas_ens.data.batches import Augmentation, count_batches
        from dnas_ens.ensembles.snapshot import SnapshotRecorder
        from dnas_ens.training import MemberSeeds

        options = bench.options
        self.bench, self.epoch = bench, 0
        self.seeds = MemberSeeds.derive(root, member)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seeds.initialisation)
            self.model = bench.model()
        if start is not None:
            self.model.load_state_dict(start)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=options.learning_rate,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        self.augmentation = Augmentation.for_data(bench.data, augment=options.augment)
        self.order = torch.Generator().manual_seed(self.seeds.order)
        self.augmentation_generator = torch.Generator(bench.device).manual_seed(self.seeds.augmentation)
        steps = count_batches(bench.data.train, options.batch_size, drop_last=True)
        self.recorder = SnapshotRecorder(self.model, self.optimizer, schedule, steps_per_epoch=steps)

    def run_epoch(self) -> float:
        """Train one epoch and return its mean loss in nats."""
        import torch
        import torch.nn.functional as F

        from dnas_ens.data.batches import iterate_batches
        from dnas_ens.training import require_finite

        batches = iterate_batches(
            self.bench.data.train,
            self.bench.options.batch_size,
            generator=self.order,
            augmentation=self.augmentation,
            augmentation_generator=self.augmentation_generator,
            drop_last=True,
        )
        self.model.train()
        losses = []
        # Dropout draws from the global stream; seeding it by epoch keeps a resumed run on the same path.
        with torch.random.fork_rng(devices=[self.bench.device] if self.bench.device.type == "cuda" else []):
            torch.manual_seed(self.seeds.augmentation + 1 + self.epoch)
            for images, labels in batches:
                loss = F.cross_entropy(
                    self.model(images.contiguous(memory_format=torch.channels_last)), labels
                )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.recorder.step()
                losses.append(loss.detach())
        self.epoch += 1
        mean = float(torch.stack(losses).mean())
        require_finite({"train_loss": mean}, where=f"epoch {self.epoch}")
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the training goes on."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "augmentation": self.augmentation_generator.get_state(),
            "recorder": self.recorder.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"].cpu())
        self.augmentation_generator.set_state(state["augmentation"].cpu())
        self.recorder.load_state_dict(state["recorder"])


# Rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One predictor of one seed.

    Args:
        name: The row's name.
        val_probs: (N_val, K), on val, as far as may be on images that did not choose it, for the temperature.
        test_probs: (N_test, K).
        cpu_seconds: Everything it cost: trainings, and fitting.
        details: What was chosen, such as weights.
    """

    name: str
    val_probs: np.ndarray
    test_probs: np.ndarray
    cpu_seconds: float
    details: dict[str, Any]


def finish_rows(
    folder: Path,
    seed: int,
    rows: Sequence[Row],
    *,
    val_labels: np.ndarray,
    test_labels: np.ndarray,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate the rows of a seed on test, and keep predictions and metrics; called once a seed.

    Args:
        folder: The seed's folder.
        seed: The study's seed.
        rows: R rows.
        val_labels: (N_val,).
        test_labels: (N_test,).
        more: What else the seed's record holds, such as curves on val.
    """
    from dnas_ens.evaluate.tables import single_row
    from dnas_ens.files import as_json, write_json

    # The figures are of what is stored, so that they can be recomputed from it.
    arrays: dict[str, Any] = {
        "val_probs": np.stack([row.val_probs for row in rows]).astype(np.float32),
        "val_labels": val_labels,
        "test_probs": np.stack([row.test_probs for row in rows]).astype(np.float32),
        "test_labels": test_labels,
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "predictions.npz", **arrays)
    records = [
        {
            **single_row(
                row.name,
                val_probs=arrays["val_probs"][index],
                val_labels=val_labels,
                test_probs=arrays["test_probs"][index],
                test_labels=test_labels,
            ),
            "cpu_seconds": row.cpu_seconds,
            **row.details,
        }
        for index, row in enumerate(rows)
    ]
    record: dict[str, Any] = as_json({"seed": seed, "rows": records, **more})
    write_json(folder / "rows.json", record)
    return record


def run_seeds(
    run: RunFolder, options: StudyOptions, measure: Callable[[Path, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the record of every seed, measuring those that are not finished."""
    from dnas_ens.files import read_json

    records = []
    for seed in range(options.seeds):
        folder = run.file(f"seed-{seed}")
        finished = (folder / "rows.json").exists()
        records.append(read_json(folder / "rows.json") if finished else measure(folder, seed))
        if not finished:
            print(f"seed {seed} is finished", flush=True)
    return records


def open_run(study: str, options: StudyOptions, bench: Bench, command: Sequence[str]) -> RunFolder:
    """Make or go on with the run folder of a study, which holds trainings of these options alone."""
    from dnas_ens.runs import RunFolder

    name = f"{study}-{Path(options.data).name}-{options.model}"
    settings = {key: value for key, value in asdict(options).items() if key not in FREE}
    settings["data"] = bench.data.fingerprint
    del settings["data_root"]
    run = RunFolder.create(
        options.run_dir or Path("runs") / name,
        config=settings,
        section=study,
        command=list(command),
        resume=True,
    )
    run.write_env({"device": str(bench.device), "data": bench.data.describe()})
    return run


# Report


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return mean ± standard deviation over seeds of every row on test as Markdown."""
    lines = [
        "| | " + " | ".join(SHOWN.values()) + " | T | CPU seconds |",
        "|:--" + "|--:" * (len(SHOWN) + 2) + "|",
    ]
    for index, row in enumerate(records[0]["rows"]):
        of_seeds = [record["rows"][index] for record in records]

        def cell(column: str, digits: int, factor: float = 1.0, of: Any = of_seeds) -> str:
            return mean_and_deviation([factor * one[column] for one in of], digits=digits)

        cells = [
            row["name"],
            cell("accuracy", 2, 100.0),
            cell("nll", 4),
            cell("calibrated_nll", 4),
            cell("temperature", 2),
            cell("cpu_seconds", 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def losses(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the calibrated NLL of every row on each test image of a seed, (N,) in nats."""
    from dnas_ens.analysis.calibration import apply_temperature, fit_temperature
    from dnas_ens.analysis.metrics import PROB_FLOOR

    with np.load(folder / "predictions.npz") as stored:
        val, test = stored["val_probs"], stored["test_probs"]
        val_labels, test_labels = stored["val_labels"], stored["test_labels"]
    found = {}
    for name, val_probs, test_probs in zip(names, val, test, strict=True):
        calibrated = apply_temperature(test_probs, fit_temperature(val_probs, val_labels))
        of_labels = calibrated[np.arange(len(test_labels)), test_labels]
        found[name] = -np.log(np.clip(of_labels, PROB_FLOOR, 1.0))
    return found


def comparisons(run: RunFolder, records: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> str:
    """Say in one sentence for each pair of rows how their calibrated NLL on test differs."""
    names = [row["name"] for row in records[0]["rows"]]
    by_seed = [losses(run.file(f"seed-{record['seed']}"), names) for record in records]
    lines = [
        "- "
        + Difference.of(
            np.stack([seed[first] for seed in by_seed]), np.stack([seed[second] for seed in by_seed])
        ).sentence(f"*{first}*", f"*{second}*")
        + "\n"
        for first, second in pairs
    ]
    seeds = f"{len(records)} seed{'s' if len(records) > 1 else ''}"
    return (
        f"Calibrated NLL on test, first minus second, over {seeds}. *Better* and *worse* need both 95 % intervals to "
        "leave out 0: the paired t interval over seeds and the paired bootstrap over test images of the mean over "
        f"seeds. Each stands alone: of {len(pairs)} comparisons some may err by chance.\n\n" + "".join(lines)
    )


def write_report(
    study: str,
    run: RunFolder,
    bench: Bench,
    records: Sequence[dict[str, Any]],
    *,
    title: str,
    body: str,
    waiting: str,
) -> None:
    """Write OUTPUT.md with all that is needed to repeat it, and OUTPUT.jsonl, a line a seed.

    Args:
        study: The study's name.
        run: Its run folder.
        bench: Data and options.
        records: A record a seed.
        title: The heading.
        body: Tables and sentences.
        waiting: What is said where options are not at their defaults: the run that waits for a GPU.
    """
    from dnas_ens.files import read_json, write_atomic

    options, data = bench.options, bench.data
    sittings = run.read_json("env.json")
    env = sittings[-1]
    hardware = f"{env['cpu']}, {env['num_cpus']} cores, " + (
        env["cuda_device"] or "no GPU" if bench.device.type == "cuda" else "no GPU used"
    )
    versions = ", ".join(f"{name} {env['packages'][name]}" for name in ("torch", "numpy", "scipy"))
    trained = next(run.path.glob("seed-0/*/training.json"))
    parameters = read_json(trained)["parameters"]
    header = (
        f"# {title}: {data.name}, {options.model}\n\n"
        f"Command: `{' '.join(env['command'])}`\n\n"
        f"Hardware: {hardware}. Versions: {versions}. Revision: {env['git_revision']}. Date: {env['time']}. "
        f"Seeds {', '.join(str(record['seed']) for record in records)}, from each of which initialisation, order and "
        "augmentation of every training have seeds of their own; split seed 0.\n\n"
        f"**Scale that was run: {options.model} ({parameters:,} parameters), {data.name}, {len(data.train)} training, "
        f"{len(data.val)} val and {len(data.test)} test images of {data.image_size} x {data.image_size}, "
        f"{options.epochs} epochs.** SGD in batches of {options.batch_size}, learning rate from "
        f"{options.learning_rate:g}, momentum {options.momentum:g}, weight decay {options.weight_decay:g}, "
        f"{'with' if options.augment else 'without'} augmentation.\n\n"
    )
    if not is_published(options):
        header += f"This is **not** the published scale. {waiting}\n\n"
    path = options.path(study)
    write_atomic(path.with_suffix(".md"), (header + body).encode())
    write_atomic(
        path.with_suffix(".jsonl"), "".join(json.dumps(record) + "\n" for record in records).encode()
    )
    print(f"{header}{body}\nwrote {path}.md, .png and .jsonl")


def is_published(options: StudyOptions) -> bool:
    """Tell whether everything that decides the outcome is at its default."""
    asked = replace(options, **{name: getattr(type(options)(), name) for name in (*FREE, "data_root")})
    return asked == type(options)()


def choice_halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of two halves of the val images, stratified: every other image of each class."""
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        chosen = np.flatnonzero(labels == label)
        # Classes take turns in who gets the odd image.
        ranks[chosen] = np.arange(len(chosen)) + label
    return np.flatnonzero(ranks % 2 == 0), np.flatnonzero(ranks % 2 == 1)
