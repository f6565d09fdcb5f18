"""How many training images a second does a discrete network see, ours beside the textbook's way?

    python experiments/benchmarks/retraining.py --data digits
    python experiments/benchmarks/retraining.py --data fashion-mnist

The same network (a random genotype, seed 0) from the same weights, with the same optimiser, batch size, loss and
augmentation. Two sides:

- textbook: torch's DataLoader with worker processes over PIL images, torchvision's RandomCrop, flip where the data
  allow it, ToTensor and Normalize, contiguous fp32, PyTorch's own depthwise gradients. Workers stay between rounds.
- ours: uint8 images on the device, augmented a batch at a time, channels_last, as ``dnas_ens.retrain`` does;
  --precision, --layout and --cuda-graph as a GPU wants it.

A round is a limited number of batches from freshly shuffled images. Rounds of both are timed in turn in one process;
peak memory is that of the training process alone, without the DataLoader's workers. Two minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steps import NetworkOptions, member_training, some_steps
from timing import ExecutedOptions, Side, measure, parse_benchmark, report, spread, tell, tell_sides, timed

from dnas_ens.commands.parse import run_main
from dnas_ens.config import require

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader

    from dnas_ens.config import RetrainConfig
    from dnas_ens.data import Augmentation, ImageData, Split
    from dnas_ens.nn.network import Network

OURS, TEXTBOOK = "ours", "textbook"


@dataclass(frozen=True, kw_only=True)
class Retraining(NetworkOptions, ExecutedOptions):
    """Options of the benchmark."""

    batches: int = 16
    """Batches of a round; the training images must suffice for them."""
    workers: int = 2
    """Worker processes of the textbook's DataLoader."""

    @property
    def images_per_round(self) -> int:
        """Training images a side sees in a round."""
        return self.batches * self.batch_size


class PilImages:
    """A map-style data set as tutorials write it: PIL images, transformed one at a time."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        from PIL import Image

        layouts = split.images.permute(0, 2, 3, 1).numpy()
        self.images = [Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels) for pixels in layouts]
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def textbook_loader(
    data: ImageData, augmentation: Augmentation, options: Retraining, device: torch.device
) -> DataLoader[Any]:
    """Return the DataLoader that gives a round's images, in a new order at each pass."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms

    steps: list[Any] = [transforms.RandomCrop(data.image_size, padding=augmentation.pad)]
    if augmentation.flip:
        steps.append(transforms.RandomHorizontalFlip())
    steps += [transforms.ToTensor(), transforms.Normalize(augmentation.mean, augmentation.std)]
    images: Any = PilImages(data.train, transforms.Compose(steps))
    return DataLoader(
        images,
        batch_size=options.batch_size,
        sampler=RandomSampler(images, num_samples=options.images_per_round),
        num_workers=options.workers,
        # Starting workers again would weigh more on these short rounds than on a whole epoch.
        persistent_workers=options.workers > 0,
        pin_memory=device.type == "cuda",
    )


def train_textbook(
    network: Network,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    recipe: RetrainConfig,
    device: torch.device,
) -> tuple[float, float]:
    """Train over a loader's batches with the loss and the bookkeeping of ours; return mean loss and accuracy."""
    import torch
    import torch.nn.functional as F

    from dnas_ens.nn.depthwise import native_depthwise

    network.train()
    total_loss, hits = torch.zeros(2, device=device)
    num_images = 0
    with native_depthwise():
        for cpu_images, cpu_labels in loader:
            images = cpu_images.to(device, non_blocking=True)
            labels = cpu_labels.to(device, non_blocking=True)
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.gradient_clip)
            optimizer.step()
            total_loss += loss.detach() * len(labels)
            hits += (logits.argmax(-1) == labels).sum()
            num_images += len(labels)
    return float(total_loss) / num_images, float(hits) / num_images


def build_round(side: str, options: Retraining, device: torch.device) -> Side:
    """Return the timed round of a side, with a network of its own."""
    import torch

    from dnas_ens.nn.execution import Execution

    data = options.images()
    require(
        len(data.train) >= options.images_per_round,
        f"A round of {options.batches} batches of {options.batch_size} images is more than the "
        f"{len(data.train)} training images of {options.data}.",
        "Lower --batches.",
    )
    recipe = options.recipe(options.execution if side == OURS else Execution(layout="contiguous"))
    training = member_training(data, recipe, device)
    if side == OURS:
        return timed(some_steps(training, options.batches), device)
    network = training.network
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=training.recipe.weight_decay or 0.0,
    )
    loader = textbook_loader(data, training.augmentation, options, device)
    return timed(lambda: train_textbook(network, loader, optimizer, recipe, device), device)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    options = parse_benchmark("retraining", __doc__, Retraining(), argv)
    tell(f"retraining on {options.data}: C={options.channels}, batch {options.batch_size}")
    results = measure(build_round, options, (TEXTBOOK, OURS), ours=OURS)
    tell_sides(results)
    for name, side in results["sides"].items():
        speeds = [options.images_per_round / taken for taken in side["seconds"]["values"]]
        side["images_per_second"] = spread(speeds)
        tell(f"{name}: {side['images_per_second']['median']:.0f} images a second")
    report("retraining", argv, options, {"images_per_round": options.images_per_round, **results})


if __name__ == "__main__":
    sys.exit(run_main(main))
