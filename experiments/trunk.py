"""What is a pretrained network worth with 300 pictures? Budgets with and without a trunk, and what people do instead.

    python experiments/trunk.py --workers 2

A ResNet-18 of torchvision is trained on seven classes of a folder of pictures (train/CLASS/*, test/CLASS/*; default
cifar10-jpeg below the data root). The task is the other three, bird, dog and truck, with 100 pictures of each for
training and val, which a seed draws, and all their test pictures. Every row may spend the same CPU seconds on one
thread; training the ResNet is free for all who use it.

- *budget*: `--budget` on the pictures.
- *budget on the trunk*: `--budget --trunk`, the maps included.
- *budget on the trunk, trained before*: the same with `--fine-tune-trunk`, which gets about half of the seconds.
- *fine-tuned*: the whole ResNet with a new head, one for all the seconds, or two or four for a share each; the split
  that val prefers over seeds, in hindsight.
- *logistic regression*: scikit-learn's on the features before the head, its strength chosen on val.

The first run trains the ResNet: ten minutes on two cores. Afterwards 3 to 4 minutes a seed on one core.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torchvision.models import resnet18

from dnas_ens.budget.amount import Amount
from dnas_ens.budget.cells import StarCells
from dnas_ens.budget.choice import cross_fitted_loss
from dnas_ens.budget.run import Spending
from dnas_ens.commands.parse import parse
from dnas_ens.compare.records import Record, Records
from dnas_ens.compare.report import markdown_table, provenance
from dnas_ens.compare.study import RESULTS, Task, require_positive, run_missing, run_script, write_study
from dnas_ens.compare.tables import sentences
from dnas_ens.config import RetrainConfig, require
from dnas_ens.config.fields import with_fields
from dnas_ens.config.presets import search_preset
from dnas_ens.data import Augmentation, ImageData, fine_tuning, iterate_batches, load_data
from dnas_ens.data.large import default_data_root
from dnas_ens.data.trunk import Trunk, stand_on
from dnas_ens.figures.style import new_figure, style_axis
from dnas_ens.metrics.calibration import per_image_calibrated_nll
from dnas_ens.metrics.significance import mean_and_deviation
from dnas_ens.run.files import load_tensors, sha256, with_ending
from dnas_ens.run.machine import environment
from dnas_ens.training.workers import worker_pool

PROG = "python experiments/trunk.py"
TASK = ("bird", "dog", "truck")
#: Pictures of a class, of which a fifth is val; side in pixels; what the trunk divides it by.
PICTURES, SIDE, STRIDE = 100, 32, 8
PRETRAINING_EPOCHS, BATCH = 8, 64
#: Of ImageNet, as a trunk normalises.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = "budget on the trunk"
#: What training the network before gets of the seconds.
TUNING_SHARE = 0.5
Probs = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    pictures: Path | None = None
    """Folder of pictures; default: cifar10-jpeg below the data root."""
    weights: Path = Path("runs/resnet18-seven-classes.safetensors")
    """The ResNet; trained where it is absent."""
    seconds: float = 40.0
    """CPU seconds of every row."""
    first_seed: int = 0
    """The first seed."""
    seeds: int = 5
    """How many seeds."""
    workers: int = 1
    """Units side by side, each on one CPU core."""
    output: Path = RESULTS / "trunk"
    """Where table and plot go: OUTPUT.md, .png and .jsonl."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds", "seeds", "workers")

    @property
    def folder(self) -> Path:
        """Where the pictures are."""
        return self.pictures or default_data_root() / "cifar10-jpeg"

    def arrays(self, record: Record) -> Path:
        """Return where the losses of a unit are."""
        return self.output.parent / f"{self.output.name}-losses" / f"{record['method']}-{record['seed']}.npz"


def linked(folder: Path, classes: list[str], target: Path, *, seed: int | None = None) -> ImageData:
    """Load some classes of a folder through links; with a seed, that many pictures of each that it draws."""
    for part in ("train", "test"):
        for name in classes:
            files = sorted((folder / part / name).iterdir())
            if part == "train" and seed is not None:
                chosen = np.random.default_rng([seed, TASK.index(name)]).choice(len(files), PICTURES, replace=False)
                files = [files[index] for index in chosen]
            place = target / part / name
            place.mkdir(parents=True)
            for file in files:
                (place / file.name).symlink_to(file.resolve())
    return load_data(target, data_root=target / "cache", image_size=SIDE, seed=seed or 0)


def train(network: nn.Module, data: ImageData, *, epochs: int, learning_rate: float, seed: int) -> Iterator[int]:
    """Train a classifier of torchvision by SGD with one cosine; yields after every epoch."""
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    augmentation = Augmentation(pad=4, flip=True, cutout=0, mean=MEAN, std=STD)
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * math.ceil(len(data.train) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        network.train()
        batches = iterate_batches(
            data.train,
            BATCH,
            generator=generators[0],
            augmentation=augmentation,
            augmentation_generator=generators[1],
        )
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
        yield epoch


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> Tensor:
    """Return what a network makes of uint8 images, in evaluation mode."""
    network.eval()
    augmentation = Augmentation(pad=0, flip=False, cutout=0, mean=MEAN, std=STD)
    return torch.cat([network(augmentation.normalise(batch)) for batch in images.split(256)])


def pretrain(study: Study) -> None:
    """Train the ResNet on the other classes and keep it."""
    others = sorted(path.name for path in (study.folder / "train").iterdir() if path.name not in TASK)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        data = linked(study.folder, others, Path(temporary))
        network = resnet18(num_classes=len(others))
        for epoch in train(network, data, epochs=PRETRAINING_EPOCHS, learning_rate=0.1, seed=0):
            right = outputs(network, data.val.images).argmax(1) == data.val.labels
            print(f"ResNet, epoch {epoch + 1} of {PRETRAINING_EPOCHS}: {100 * right.float().mean():.1f} % on val")
        study.weights.parent.mkdir(parents=True, exist_ok=True)
        save_model(network, str(study.weights))


def spend(data: ImageData, seconds: float, seed: int) -> Probs:
    """Spend CPU seconds as ``--budget`` does."""
    config = with_fields(search_preset("smoke"), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        ensemble = Spending(
            data,
            RetrainConfig(seed=1000 + seed),
            amount=Amount(total=seconds),
            cells=StarCells(config, data),
            folder=Path(folder),
            clock=time.process_time,
        ).run()
        val, test = (ensemble.predict_probs(split).mean(axis=0) for split in (data.val, data.test))
    return val, test


def budget(study: Study, data: ImageData, seed: int) -> dict[str, Probs]:
    """A budget on the pictures."""
    return {"": spend(data, study.seconds, seed)}


def budget_on_trunk(study: Study, data: ImageData, seed: int) -> dict[str, Probs]:
    """A budget on the maps of the trunk, which are computed in it."""
    start = time.process_time()
    trunk = Trunk.pretrained(f"resnet18:{study.weights}", stride=STRIDE, image_size=SIDE)
    with tempfile.TemporaryDirectory() as cache:
        maps = stand_on(data, trunk, cache=Path(cache))
        return {"": spend(maps, study.seconds - (time.process_time() - start), seed)}


def budget_on_tuned_trunk(study: Study, data: ImageData, seed: int) -> dict[str, Probs]:
    """A budget on the maps of a trunk that was trained on the pictures before."""
    start = time.process_time()
    epochs = max(1, int(TUNING_SHARE * study.seconds / _seconds_of_an_epoch(study, data)))
    with tempfile.TemporaryDirectory() as cache:
        trunk = fine_tuning.fine_tuned(
            f"resnet18:{study.weights}", data, epochs=epochs, stride=STRIDE, image_size=SIDE, cache=Path(cache)
        )
        maps = stand_on(data, trunk, cache=Path(cache))
        return {f"{epochs} epochs before": spend(maps, study.seconds - (time.process_time() - start), seed)}


def fine_tuned(study: Study, data: ImageData, seed: int) -> dict[str, Probs]:
    """One, two or four whole networks, each with a share of the seconds."""
    found: dict[str, Probs] = {}
    an_epoch = _seconds_of_an_epoch(study, data)
    for count in (1, 2, 4):
        epochs = max(1, int(study.seconds / count / an_epoch))
        probs = []
        for number in range(count):
            network = _with_new_head(study, seed=1000 * seed + 10 * count + number)
            for _ in train(network, data, epochs=epochs, learning_rate=0.01, seed=1000 * seed + number):
                pass
            probs.append([outputs(network, split.images).softmax(1).numpy() for split in (data.val, data.test)])
        val, test = (np.mean(each, axis=0) for each in zip(*probs, strict=True))
        found[f"{count} × {epochs} epochs"] = val, test
    return found


def _seconds_of_an_epoch(study: Study, data: ImageData) -> float:
    epochs = train(_with_new_head(study, seed=0), data, epochs=3, learning_rate=0.01, seed=0)
    next(epochs)
    start = time.process_time()
    next(epochs)
    return time.process_time() - start


def _with_new_head(study: Study, *, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = resnet18(num_classes=len(TASK))
    kept = {name: value for name, value in load_tensors(study.weights).items() if not name.startswith("fc.")}
    network.load_state_dict(kept, strict=False)
    return network


def logistic_regression(study: Study, data: ImageData, seed: int) -> dict[str, Probs]:
    """Logistic regression on frozen features."""
    network = _with_new_head(study, seed=seed)
    network.fc = nn.Identity()
    features = {name: outputs(network, split.images).numpy() for name, split in data.named_splits().items()}
    labels = data.val.labels.numpy()
    tried = [
        LogisticRegression(C=strength, max_iter=2000).fit(features["train"], data.train.labels.numpy())
        for strength in (1e-3, 1e-2, 1e-1, 1.0)
    ]
    probs = [tuple(each.predict_proba(features[name]) for name in ("val", "test")) for each in tried]
    val, test = min(probs, key=lambda each: cross_fitted_loss(each[0][None], labels))
    return {"": (val, test)}


METHODS = {
    OURS: budget_on_trunk,
    "budget on the trunk, trained before": budget_on_tuned_trunk,
    "fine-tuned": fine_tuned,
    "logistic regression": logistic_regression,
    "budget": budget,
}


def run_one(study: Study, method: str, seed: int) -> tuple[Record, dict[str, np.ndarray]]:
    """Run one method with one seed; return its splits and their losses on every test picture."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        data = linked(study.folder, list(TASK), Path(temporary), seed=seed)
    val_labels, test_labels = data.val.labels.numpy(), data.test.labels.numpy()
    start = time.process_time()
    found = METHODS[method](study, data, seed)
    seconds = time.process_time() - start
    losses = [per_image_calibrated_nll(val, val_labels, test, test_labels) for val, test in found.values()]
    splits = [
        {
            "spent": name,
            "val_nll": cross_fitted_loss(val[None], val_labels),
            "accuracy": float((test.argmax(axis=1) == test_labels).mean()),
            "calibrated_nll": float(of_split.mean()),
        }
        for (name, (val, test)), of_split in zip(found.items(), losses, strict=True)
    ]
    record = {
        "method": method,
        "seed": seed,
        "budget": study.seconds,
        "pictures": study.folder.name,
        "weights": sha256(study.weights),
        "splits": splits,
        "seconds": seconds / len(found),
        "revision": environment([])["git_revision"],
    }
    return record, {"losses": np.stack(losses).astype(np.float32)}


def chosen(records: list[Record]) -> int:
    """Return the split that has the least mean loss on val over the seeds."""
    return int(np.argmin(np.mean([[each["val_nll"] for each in record["splits"]] for record in records], axis=0)))


def table(study: Study, records: Records, seeds: range) -> tuple[str, dict[str, list[float]]]:
    """Return the table and the differences from ours as Markdown, and the losses of every seed by method."""
    lines, losses, of_seeds = [], {}, {}
    for method in METHODS:
        own = [records[method, seed] for seed in seeds]
        index = chosen(own)
        rows = [record["splits"][index] for record in own]
        of_seeds[method] = [row["calibrated_nll"] for row in rows]
        losses[method] = np.stack([records.arrays((method, seed))["losses"][index] for seed in seeds])
        lines.append(
            [
                method,
                mean_and_deviation(of_seeds[method], digits=4),
                mean_and_deviation([100 * row["accuracy"] for row in rows], digits=2),
                mean_and_deviation([record["seconds"] for record in own], digits=0),
                rows[0]["spent"],
            ]
        )
    header = ["method", "calibrated NLL", "accuracy, %", "CPU s", "split"]
    return markdown_table(header, lines, text_columns=(0, 4)) + "\n" + sentences(losses), of_seeds


def plot(of_seeds: dict[str, list[float]], path: Path) -> None:
    """Draw every seed's loss by method."""
    figure = new_figure(560, 240)
    axis = figure.subplots()
    for place, values in enumerate(of_seeds.values()):
        axis.plot(values, [place] * len(values), "o", alpha=0.7)
    axis.set_yticks(range(len(of_seeds)), list(of_seeds))
    axis.invert_yaxis()
    style_axis(axis, x_label="calibrated NLL on test, nats, a point a seed", y_label="")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Run the study."""
    study = parse(Study, argv, prog=PROG, description=__doc__ or "", default=Study())
    for name in TASK:
        place = study.folder / "train" / name
        require(place.is_dir(), f"{place} is not there.", "Give --pictures a folder with train/ and test/.")
    if not study.weights.exists():
        pretrain(study)
    records = Records(
        with_ending(study.output, ".jsonl"),
        key=("method", "seed"),
        settings=lambda _: {"budget": study.seconds, "pictures": study.folder.name, "weights": sha256(study.weights)},
        arrays=study.arrays,
    )
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    tasks: dict[Hashable, Task] = {
        (method, seed): functools.partial(run_one, study, method, seed) for seed in seeds for method in METHODS
    }
    with worker_pool(study.workers) as pool:
        run_missing(
            records,
            tasks,
            pool=pool,
            said=lambda record: f"{record['method']}, seed {record['seed']} ({record['seconds']:.0f} s)",
        )
    found, of_seeds = table(study, records, seeds)
    text = (
        "# What is a pretrained network worth with 300 pictures?\n\n"
        + provenance(environment([*PROG.split(), *argv]), hardware="no GPU, one thread a unit")
        + f"\n\nPictures of {', '.join(TASK)}, {PICTURES} of each for training and val, {SIDE}×{SIDE} pixels; the "
        f"network was trained on the other classes of {study.folder.name}. Mean ± standard deviation over "
        f"{len(seeds)} seeds of pictures, search and training; {study.seconds:g} CPU seconds for every row.\n\n" + found
    )
    write_study(study.output, text, figure=functools.partial(plot, of_seeds))


if __name__ == "__main__":
    run_script(main)
