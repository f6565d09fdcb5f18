"""A pretrained network trained on one's own pictures, all of it, before its first stages become a trunk.

On the CPU, like the maps of a trunk.
"""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dnas_ens.data.batches import Augmentation, count_batches, iterate_batches
from dnas_ens.data.dataset import ImageData
from dnas_ens.data.trunk import Trunk, build_classifier, digest_of, take_over
from dnas_ens.errors import UserError
from dnas_ens.run.files import load_tensors, save_tensors

#: As fine-tuning usually is: small steps, since the network is good already.
BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 32, 0.01, 0.9, 5e-4


def fine_tuned(given: str, data: ImageData, *, epochs: int, stride: int, image_size: int, cache: Path) -> Trunk:
    """Return a trunk of a network that was first trained on the training pictures, with a new head for their classes.

    Args:
        given: See `Trunk.pretrained`.
        data: Pictures of the trunk's size.
        epochs: At least 1, with one cosine.
        cache: Folder for the trained network, which is read from there the next time.

    Raises:
        UserError: See `Trunk.pretrained`; or the training diverges.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = build_classifier(given.partition(":")[0], num_classes=data.num_classes)
    trunk = Trunk.pretrained(given, stride=stride, image_size=image_size, whole=whole)
    # Flips are no part of the fingerprint.
    said = f"{data.fingerprint} {data.flip} {digest_of(whole)} {epochs}"
    name = hashlib.sha256(said.encode()).hexdigest()
    file = cache / f"{name[:32]}.tuned.safetensors"
    if not _taken_over(whole, file):
        _train(whole, trunk, data, epochs=epochs)
        save_tensors(file, whole.state_dict())
    trunk.requires_grad_(False).eval()
    return trunk


def _taken_over(whole: nn.Module, file: Path) -> bool:
    """Give a network what was trained before; False where there is nothing, or it is damaged."""
    if not file.exists():
        return False
    try:
        tensors = load_tensors(file)
    except UserError:
        return False
    own = whole.state_dict()
    if {key: value.shape for key, value in tensors.items()} != {key: value.shape for key, value in own.items()}:
        return False
    take_over(whole, tensors)
    return True


def _train(whole: nn.Module, trunk: Trunk, data: ImageData, *, epochs: int) -> None:
    whole.requires_grad_(True).train()
    # To 0 .. 1; the network's own mean and deviation are of three channels, and pictures may have one.
    augmentation = Augmentation(
        pad=data.image_size // 8,
        flip=data.flip,
        cutout=0,
        mean=(0.0,) * data.num_channels,
        std=(1.0,) * data.num_channels,
    )
    order, draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(
        whole.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps = epochs * count_batches(data.train, BATCH, drop_last=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    said = f"training {trunk.name} on the pictures"
    with (
        tqdm(total=steps, desc=said, unit="step", file=sys.stderr, disable=None, leave=False) as bar,
        # Dropout draws from the global stream.
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(0)
        for epoch in range(epochs):
            batches = iterate_batches(
                data.train,
                BATCH,
                generator=order,
                augmentation=augmentation,
                augmentation_generator=draws,
                drop_last=True,
            )
            for images, labels in batches:
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(whole((images - trunk.mean) / trunk.std), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"{trunk.name} diverged in epoch {epoch + 1} of its training on the pictures.",
                    "Leave --fine-tune-trunk out, or give it other epochs.",
                )
