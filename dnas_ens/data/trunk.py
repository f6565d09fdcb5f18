"""The first stages of a pretrained network, under all members: frozen, computed once, and held in 8 bits.

What they make of a picture is a map of many channels. Its values are put into 8 bits, channel by channel, so whatever
takes images takes maps: batches, crops and mirrors, the search, every training, the ensemble.

Legend: N pictures, S pixels a side; maps of C channels, H x W.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.data.large import read_mapped, room_for
from dnas_ens.errors import UserError
from dnas_ens.run.files import load_tensors, load_tensors_and_text, save_tensors, sha256, write_atomic

#: Side of the pictures that torchvision's networks were trained on, the largest one, and their mean and deviation.
PICTURE_SIZE, _LARGEST = 224, 2048
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Pictures that go through the stages at once, and those that the range of a channel is measured on.
_BATCH, _MEASURED = 32, 256
#: Share of a channel's values that may lie above its range, and below.
_BEYOND = 5e-4
_DIGEST = "maps_sha256"


class Trunk(nn.Module):
    """Frozen stages: uint8 pictures (N, 1 or 3, S, S) -> uint8 maps (N, C, H, W).

    A value f of channel c becomes round(255 (f - low_c) / (high_c - low_c)), clipped to 0..255. The ranges are those of
    some training pictures, see `measure`.

    Args:
        name: A convolutional classifier of torchvision, such as resnet18.
        stride: S / H at most: the deepest stage is the last one with it.
        image_size: S.
        whole: The classifier, if it is there already.

    Raises:
        UserError: torchvision has no such classifier, or it is not a chain of stages with square maps.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, name: str, *, stride: int = 16, image_size: int = PICTURE_SIZE, whole: nn.Module | None = None
    ) -> None:
        super().__init__()
        # The size may come from a file, and memory is taken for it below.
        if not 1 <= stride <= image_size <= _LARGEST:
            raise UserError(
                f"A trunk of stride {stride} has no map of pictures of {image_size} pixels.",
                f"Give --trunk-stride from 1 up, no more than --image-size, and that up to {_LARGEST}.",
            )
        self.name, self.stride, self.image_size = name, stride, image_size
        self.stages, self.num_channels, self.map_size = _first_stages(
            build_classifier(name) if whole is None else whole, name, stride, image_size
        )
        for statistic, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(statistic, torch.tensor(values).view(1, 3, 1, 1))
        self.register_buffer("low", torch.zeros(1, self.num_channels, 1, 1))
        self.register_buffer("high", torch.ones(1, self.num_channels, 1, 1))
        self.requires_grad_(False).eval()

    @classmethod
    def pretrained(
        cls, given: str, *, stride: int = 16, image_size: int = PICTURE_SIZE, whole: nn.Module | None = None
    ) -> Trunk:
        """Build a trunk with weights.

        Args:
            given: A name, for torchvision's own weights, which it downloads; or NAME:FILE with the weights of such a
                network, a .safetensors file.
            whole: The classifier that is to be trained further; it gets all of the weights but for the last layer's.

        Raises:
            UserError: See `Trunk`; or the weights cannot be had.
        """
        name, _, file = given.partition(":")
        tuned, whole = whole is not None, build_classifier(name) if whole is None else whole
        trunk = cls(name, stride=stride, image_size=image_size, whole=whole)
        state = load_tensors(Path(file)) if file else _downloaded(name)
        own = whole.state_dict(keep_vars=True)
        # The classifier on top may be of other classes, and one that is trained further gets a new one.
        head = _head_of(own)
        fitting = {
            key: value
            for key, value in state.items()
            if key in own and own[key].shape == value.shape and not (tuned and key.startswith(head))
        }
        needed = {id(value) for value in trunk.stages.state_dict(keep_vars=True).values()}
        # What is trained further needs everything below its top.
        if missing := [
            key
            for key, value in own.items()
            if key not in fitting and (id(value) in needed or (tuned and not key.startswith(head)))
        ]:
            raise UserError(
                f"{file} holds no weights of {name}: {missing[0]} is missing or of another size.",
                f"Save them by safetensors.torch.save_file(network.state_dict(), ...) of torchvision's {name}.",
            )
        take_over(whole, fitting)
        return trunk

    def train(self, mode: bool = True) -> Trunk:
        """Stay in evaluation mode: BatchNorm statistics are frozen too."""
        return super().train(False)

    def features(self, pictures: Tensor) -> Tensor:
        """Return what the stages make of uint8 pictures, float (N, C, H, W)."""
        values = (pictures.float() / 255 - self.mean) / self.std
        found: Tensor = self.stages(values)
        return found

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the maps of pictures."""
        levels = 255 * (self.features(pictures) - self.low) / (self.high - self.low)
        return levels.round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def measure(self, pictures: Tensor) -> None:
        """Take the ranges of the channels from training pictures (N, 1 or 3, S, S), at most 256 of them."""
        batches = pictures[:_MEASURED].to(self.low.device).split(_BATCH)
        # Of large maps every so many-th value, which is plenty.
        every = max(1, self.map_size**2 * _MEASURED // 50_000)
        features = [self.features(batch).transpose(0, 1).flatten(1)[:, ::every] for batch in batches]
        values = torch.cat(features, 1).sort(dim=1).values
        beyond = int(_BEYOND * values.shape[1])
        low, high = values[:, beyond], values[:, -1 - beyond]
        self.low.copy_(low.view_as(self.low))
        # A channel that says nothing stays 0.
        self.high.copy_(torch.where(high > low, high, low + 1).view_as(self.high))

    @torch.no_grad()
    def maps(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield the maps of pictures, batch by batch, on the CPU."""
        device = self.low.device
        for batch in pictures.split(_BATCH):
            yield self(batch.to(device)).cpu()

    def digest(self) -> str:
        """Return the SHA-256 of the stages' weights and of what they are."""
        return digest_of(self.stages, said=f"{self.name} {self.stride} {self.image_size}")

    def describe(self) -> dict[str, str | int]:
        """Return what it is built from, but for the weights."""
        return {"name": self.name, "stride": self.stride, "image_size": self.image_size}


def stand_on(data: ImageData, trunk: Trunk, *, cache: Path | None) -> ImageData:
    """Put the maps of a trunk in the place of the pictures.

    Args:
        data: Pictures of the trunk's size.
        trunk: Its ranges are measured on training pictures here.
        cache: Folder for the maps, which are read from there and never changed; the next command computes none.
            None computes none at all: noise stands for them, in a trial of what training takes.

    Returns:
        The same splits; mean and deviation are those of the maps, and the fingerprint that of pictures and weights.
    """
    name = hashlib.sha256(f"{data.fingerprint} {trunk.digest()}".encode()).hexdigest()
    parts = data.named_splits()
    counts = [len(split) for split in parts.values()]
    shape = (sum(counts), trunk.num_channels, trunk.map_size, trunk.map_size)
    if cache is None:
        maps = room_for(*shape).random_(0, 256, generator=torch.Generator().manual_seed(0))
    else:
        file = cache / f"{name[:32]}.maps"
        if not _ranges_of(file, trunk):
            trunk.measure(data.train.drawn(_MEASURED).images)
            write_atomic(file, _computed(trunk, list(parts.values())))
            ranges = {"low": trunk.low, "high": trunk.high}
            save_tensors(file.with_suffix(".safetensors"), ranges, metadata={_DIGEST: sha256(file)})
        maps = read_mapped(file, *shape)
    splits = {key: Split(part, parts[key].labels) for key, part in zip(parts, maps.split(counts), strict=True)}
    found = ImageData.from_splits(
        data.name,
        data.classes,
        **splits,
        flip=data.flip,
        splits=data.splits,
        skipped=data.skipped,
        deep_bits=data.deep_bits,
        deep_colour=data.deep_colour,
        trunk=trunk,
        pictures=data.val.images[:_BATCH].clone(),
    )
    # Not of the maps, in which rounding may differ from machine to machine.
    return replace(found, fingerprint=name)


def _ranges_of(maps: Path, trunk: Trunk) -> bool:
    """Give a trunk the ranges of maps that were computed before; False where there are none, or they are damaged."""
    try:
        kept, text = load_tensors_and_text(maps.with_suffix(".safetensors"))
        if not maps.is_file() or text.get(_DIGEST) != sha256(maps):
            return False
    except UserError:
        return False
    trunk.low.copy_(kept["low"])
    trunk.high.copy_(kept["high"])
    return True


def _computed(trunk: Trunk, splits: Sequence[Split]) -> Iterator[bytes]:
    """Yield the maps of splits, batch by batch."""
    total = sum(map(len, splits))
    with tqdm(total=total, desc=trunk.name, unit="image", file=sys.stderr, disable=None, leave=False) as bar:
        for split in splits:
            for maps in trunk.maps(split.images):
                yield maps.numpy().tobytes()
                bar.update(len(maps))


def take_over(whole: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network some of its tensors, by name."""
    # Some classifiers of torchvision read the versions of their modules, which files do not hold.
    complete = whole.state_dict()
    complete.update(tensors)
    whole.load_state_dict(complete)


def _head_of(state: dict[str, Tensor]) -> str:
    """Return the name of a classifier's last layer, with a dot, of its state."""
    return list(state)[-1].rpartition(".")[0] + "."


def digest_of(module: nn.Module, *, said: str = "") -> str:
    """Return the SHA-256 of a module's weights and of a text."""
    found = hashlib.sha256(said.encode())
    for key, value in sorted(module.state_dict().items()):
        found.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def build_classifier(name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return torchvision's classifier of a name, without weights; None for its own number of classes."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(
            f"torchvision has no classifier {name!r}.",
            f"Give one of its {len(known)} names, such as resnet18, resnet50, efficientnet_b0 or convnext_tiny.",
        )
    classes = {} if num_classes is None else {"num_classes": num_classes}
    built: nn.Module = models.get_model(name, weights=None, **classes)
    return built


def _downloaded(name: str) -> dict[str, Tensor]:
    """Return torchvision's own weights of a network, which it downloads once."""
    from torchvision import models

    weights = models.get_model_weights(name)
    try:
        # By the network's own builder, which renames what old files call otherwise.
        state: dict[str, Tensor] = models.get_model(name, weights=weights["DEFAULT"]).state_dict()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"The weights of {name} cannot be downloaded ({error}).",
            f"Download them where there is a network, save them as a .safetensors file, and give --trunk {name}:FILE.",
        ) from error
    return state


def _first_stages(whole: nn.Module, name: str, stride: int, image_size: int) -> tuple[nn.Sequential, int, int]:
    """Return a network's first stages down to a stride, and channels and side of their maps."""
    stages = list(_chain(whole))
    values = torch.zeros(1, 3, image_size, image_size)
    sides: list[tuple[int, int]] = []
    was_training = whole.training
    whole.eval()
    try:
        with torch.no_grad():
            for stage in stages:
                values = stage(values)
                if values.ndim != 4 or values.shape[2] != values.shape[3]:
                    raise RuntimeError(f"maps of shape {tuple(values.shape[1:])}")
                sides.append((values.shape[1], values.shape[2]))
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{name} is no chain of stages with square maps, as a trunk must be.",
            "Give a convolutional network, such as resnet18, efficientnet_b0 or convnext_tiny.",
        ) from error
    finally:
        whole.train(was_training)
    kept = [index for index, (_, side) in enumerate(sides) if side * stride >= image_size]
    if not kept:
        raise UserError(f"{name} has no stage of stride {stride} or less.", "Give a larger --trunk-stride, such as 16.")
    channels, side = sides[kept[-1]]
    return nn.Sequential(*stages[: kept[-1] + 1]), channels, side


def _chain(whole: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a network's pictures go through one after the other, up to the pooling of whole maps."""
    features = getattr(whole, "features", None)
    for child in (features if isinstance(features, nn.Sequential) else whole).children():
        if isinstance(child, nn.AdaptiveAvgPool2d | nn.Linear | nn.Dropout | nn.Flatten):
            return
        if type(child).forward is nn.Sequential.forward:
            yield from _chain(child)
        else:
            yield child
