"""Options of the studies of reference models, and the recipe that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from dnas_ens.config import RetrainConfig, require

#: Where studies write unless told otherwise. What is published, experiments/results, is written by ``--output`` alone.
RESULTS = Path("runs/results")
#: Preset of searches and trainings from scratch on each data set.
PRESETS = {"digits": "smoke", "fashion-mnist": "micro"}
#: Options that do not change what a training or a row of a seed is.
FREE = ("seeds", "device", "run_dir", "output")


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
        for name in ("epochs", "batch_size", "seeds"):
            flag = name.replace("_", "-")
            require(
                getattr(self, name) > 0, f"--{flag} is {getattr(self, name)}.", f"Give --{flag} 1 or more."
            )

    @property
    def recipe(self) -> RetrainConfig:
        """How every model is trained, but for its schedule; as in the papers no gradient is clipped."""
        names = ("epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "augment")
        return RetrainConfig(**{name: getattr(self, name) for name in names}, gradient_clip=math.inf)

    @property
    def is_published(self) -> bool:
        """Whether everything that decides the outcome is at its default."""
        default = type(self)()
        return replace(self, **{name: getattr(default, name) for name in (*FREE, "data_root")}) == default

    def path(self, study: str) -> Path:
        """Return the output without suffix."""
        return self.output or RESULTS / f"{study}-{Path(self.data).name}"
