"""Blobs or images as batches, and the models that are trained on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dnas_ens.config import DataConfig
from studies.batches import plain_passes, training_passes
from studies.weight_averaging.options import BLOBS, CELL, Study

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dnas_ens.training.prediction import Batches
    from studies.batches import TrainingPass


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """Data as batches; inputs are (B, C, H, W), points as images of one pixel with two channels.

    Args:
        training_pass: Starts an epoch, given the generators of order and augmentation.
        training: The training inputs as they are, for BatchNorm.
        val: What everything is chosen on.
        test: What every finished row is evaluated on, once.
        in_channels: C.
        num_classes: K.
        image_size: H = W.
        fingerprint: Of data and splits.
        sizes: Training, val and test inputs.
    """

    training_pass: TrainingPass
    training: Batches
    val: Batches
    test: Batches
    in_channels: int
    num_classes: int
    image_size: int
    fingerprint: str
    sizes: tuple[int, int, int]


def load_problem(study: Study) -> Problem:
    """Load images, or draw blobs."""
    return draw_problem(study) if study.data == BLOBS else load_images(study)


def draw_problem(study: Study) -> Problem:
    """Draw the blobs; points are standardised by the training points."""
    import torch

    from studies.weight_averaging.blobs import draw_blobs

    blobs = draw_blobs(study.split_seed)
    splits = (blobs.train, blobs.val, blobs.test)
    mean, std = blobs.train[0].mean(axis=0), blobs.train[0].std(axis=0)
    digest = hashlib.sha256()
    tensors = []
    for points, labels in splits:
        digest.update(points.tobytes() + labels.tobytes())
        tensors.append((torch.from_numpy((points - mean) / std)[:, :, None, None], torch.from_numpy(labels)))
    (inputs, classes), val, test = tensors
    size = study.recipe.batch_size

    def training_pass(order: torch.Generator, _: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        shuffled = torch.randperm(len(inputs), generator=order)
        yield from ((inputs[chosen], classes[chosen]) for chosen in shuffled.split(size))

    return Problem(
        training_pass=training_pass,
        training=lambda: [(inputs, classes)],
        val=lambda: [val],
        test=lambda: [test],
        in_channels=2,
        num_classes=int(classes.max()) + 1,
        image_size=1,
        fingerprint=digest.hexdigest(),
        sizes=(len(inputs), len(val[0]), len(test[0])),
    )


def load_images(study: Study) -> Problem:
    """Load images as the commands of the package do."""
    from dnas_ens.commands.options import load_configured_data

    data = load_configured_data(
        DataConfig(
            data=study.data,
            data_root=study.data_root,
            limit_train=study.limit_train,
            split_seed=study.split_seed,
        )
    )
    return Problem(
        training_pass=training_passes(data, study.recipe),
        training=plain_passes(data, data.train.drawn()),
        val=plain_passes(data, data.val),
        test=plain_passes(data, data.test),
        in_channels=data.num_channels,
        num_classes=data.num_classes,
        image_size=data.image_size,
        fingerprint=data.fingerprint,
        sizes=(len(data.train), len(data.val), len(data.test)),
    )


def build_model(study: Study, problem: Problem, name: str) -> nn.Module:
    """Build a model with fresh weights, drawn from torch's global generator."""
    import torch

    from dnas_ens.nn.network import Network
    from dnas_ens.nn.reference_models import reference_model
    from dnas_ens.nn.reference_models.small_networks import MLP
    from dnas_ens.space.stack import SMALL_IMAGE, StackSpec

    model: nn.Module
    if study.data == BLOBS:
        model = MLP(in_features=problem.in_channels, num_classes=problem.num_classes)
    elif name == CELL:
        stack = StackSpec(
            num_cells=study.recipe.num_cells,
            channels=study.recipe.channels,
            in_channels=problem.in_channels,
            num_classes=problem.num_classes,
            large_images=problem.image_size > SMALL_IMAGE,
        )
        model = Network(study.genotype(), stack)
    else:
        model = reference_model(name, problem.in_channels, problem.num_classes, problem.image_size)
    return cast("nn.Module", model.to(memory_format=torch.channels_last))
