"""The search loop: supernet weights and hypernetwork in turn, resumable after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dnas_ens.config import SearchConfig
from dnas_ens.data.batches import Augmentation, iterate_batches
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.genotype import Genotype
from dnas_ens.inference import accuracy_under_batch_statistics
from dnas_ens.nn.fast_supernet import FastSupernet
from dnas_ens.nn.stack import SMALL_IMAGE
from dnas_ens.nn.supernet import Supernet
from dnas_ens.search.bilevel import first_order_gradient, frozen, second_order_gradient
from dnas_ens.search.discretise import normalised_entropy
from dnas_ens.search.divergence import pairwise_architecture_distance
from dnas_ens.search.draws import Draw
from dnas_ens.search.objective import (
    discretisation_distance,
    diversity_penalty,
    likelihood_nll,
    needs_same_images,
    operation_imbalance,
    predictive_penalty,
)
from dnas_ens.search.relaxation import add_auxiliary_skip
from dnas_ens.search.star import Star
from dnas_ens.search_space import SearchSpace
from dnas_ens.training import require_finite

_STREAMS = ("order", "architecture_order", "augmentation", "draws")


class SearchLoop:
    """State and steps of one search.

    Args:
        config: The search's configuration.
        data: Images; only ``train`` (halved) and ``val`` are read.
        device: Where the supernet lives.
        base: A given base, if the configuration names one.
    """

    def __init__(
        self,
        config: SearchConfig,
        data: ImageData,
        *,
        device: torch.device | str = "cpu",
        base: Genotype | None = None,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        supernet = config.supernet
        self.space = SearchSpace.for_stack(
            supernet.num_cells, operations=supernet.operations, num_nodes=supernet.num_nodes
        )
        weight_half, architecture_half = data.search_halves(seed=config.seed)
        self.weight_half = weight_half.to(self.device)
        self.architecture_half = architecture_half.to(self.device)
        self.val = data.val.to(self.device)
        self.augmentation = Augmentation.for_data(data, augment=config.bilevel.augment)

        self.star = Star(config, self.space, base=base, device=device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            reference = Supernet(
                self.space,
                num_cells=supernet.num_cells,
                channels=supernet.channels,
                in_channels=data.num_channels,
                num_classes=data.num_classes,
                large_images=data.image_size > SMALL_IMAGE,
                partial_channels=supernet.partial_channels,
            )
        # Both forms start from the same weights, so that a seed means the same search.
        self.supernet = FastSupernet.from_reference(reference) if supernet.form == "fast" else reference
        self.supernet.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        bilevel = config.bilevel
        self.weights = list(self.supernet.parameters())
        self.architecture = [p for p in self.star.hypernetwork.parameters() if p.requires_grad]
        self.weight_optimizer = torch.optim.SGD(
            self.weights,
            lr=bilevel.learning_rate,
            momentum=bilevel.momentum,
            weight_decay=bilevel.weight_decay,
        )
        self.architecture_optimizer = torch.optim.Adam(
            self.architecture,
            lr=bilevel.architecture_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=bilevel.architecture_weight_decay,
        )
        # Separate streams, so that another batch size or number of members does not shift the others.
        self.generators = {
            name: torch.Generator(self.device if name == "augmentation" else "cpu").manual_seed(
                1000 * config.seed + index
            )
            for index, name in enumerate(_STREAMS)
        }
        self.epoch = 0
        self.steps_per_epoch = max(1, len(self.weight_half) // bilevel.batch_size)

    # Schedules

    @property
    def progress(self) -> float:
        """Where the schedules stand, in [0, 1]: 0 in the first architecture epoch, 1 in the last and after it."""
        warmup, epochs = self.config.bilevel.warmup_epochs, self.config.bilevel.epochs
        return min(1.0, max(0.0, (self.epoch - warmup) / max(1, epochs - warmup - 1)))

    def _between(self, ends: tuple[float, float], progress: float) -> float:
        return ends[0] + (ends[1] - ends[0]) * progress

    @property
    def temperature(self) -> float:
        """Temperature of the relaxation at the current epoch."""
        return self._between(self.config.objective.temperature, self.progress)

    def _learning_rate(self) -> float:
        bilevel = self.config.bilevel
        cosine = 0.5 * (1 + math.cos(math.pi * self.epoch / bilevel.epochs))
        return bilevel.min_learning_rate + (bilevel.learning_rate - bilevel.min_learning_rate) * cosine

    # One step

    def _draw(self, num_members: int | None = None) -> Draw:
        count = num_members or self.config.objective.drawn_members
        return self.star.draw(count, self.generators["draws"])

    def _member_logits(self, images: Tensor, mixtures: Tensor, *, same_images: bool) -> Tensor:
        """Return logits (m, b, K): of m slices of the batch, or of m passes over the first b = B/m images."""
        num_members = len(mixtures)
        weights = add_auxiliary_skip(
            mixtures, self.space, weight=self.config.bilevel.auxiliary_skip * (1 - self.progress)
        )
        images = images.contiguous(memory_format=torch.channels_last)
        if same_images:
            images = images[: len(images) // num_members]
            parts = [images] * num_members
        else:
            parts = list(images.chunk(num_members))
        if self.config.objective.passes == "separate":
            passes = zip(parts, weights, strict=True)
            return torch.stack([self.supernet(part, weight) for part, weight in passes])
        logits: Tensor = self.supernet(torch.cat(parts), weights)
        return logits.view(num_members, -1, logits.shape[-1])

    def _nll(self, images: Tensor, labels: Tensor, mixtures: Tensor) -> Tensor:
        logits = self._member_logits(images, mixtures, same_images=False)
        return likelihood_nll("member", logits, labels.unflatten(0, (len(mixtures), -1)))

    def _objective(
        self, images: Tensor, labels: Tensor, draw: Draw, penalty_draw: Draw, *, noise_seed: int
    ) -> Tensor:
        """Return L_val of the drawn members + c * the penalty on their similarity.

        Distances between architectures need no images, so they are penalised at many more points of the star.
        """
        objective = self.config.objective
        same = needs_same_images(objective.likelihood, objective.penalty)
        mixtures = self.star.relaxed(draw, noise_seed=noise_seed)
        logits = self._member_logits(images, mixtures, same_images=same)
        num_members = len(draw)
        if same:
            targets = labels[: len(labels) // num_members].expand(num_members, -1)
        else:
            targets = labels.unflatten(0, (num_members, -1))
        loss = likelihood_nll(objective.likelihood, logits, targets)
        distributions = self.star.distributions(penalty_draw, detach_base=False)
        undecided = discretisation_distance(
            distributions, self.space, edges_per_node=self.config.candidates.edges_per_node
        ).mean()
        self.totals["undecided"] += undecided.detach()
        loss = loss + self._between(objective.commitment, self.progress) * undecided
        imbalance = operation_imbalance(distributions, self.space).mean()
        self.totals["imbalance"] += imbalance.detach()
        loss = loss + self._between(objective.operation_balance, self.progress) * imbalance
        if objective.penalty == "none":
            return loss
        penalty = diversity_penalty(
            objective.penalty,
            distributions=self.star.distributions(penalty_draw, detach_base=True),
            samples=self.star.relaxed(penalty_draw, noise_seed=noise_seed + 1, detach_base=True),
            base=self.star.compared_with(),
            draw=penalty_draw,
            space=self.space,
        )
        if "js-predictive" in objective.penalty:
            penalty = penalty + predictive_penalty(logits, draw, scale=objective.predictive_scale)
        self.totals["penalty"] += penalty.detach()
        return loss + self._between(objective.penalty_weight, self.progress) * penalty

    def _whole_slices(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        whole = len(labels) // self.config.objective.drawn_members * self.config.objective.drawn_members
        return images[:whole], labels[:whole]

    def _architecture_step(self, batch: tuple[Tensor, Tensor], training_batch: tuple[Tensor, Tensor]) -> None:
        draw, seed = self._draw(), self._noise_seed()
        penalty_draw = self._draw(self.config.objective.penalty_draws)

        def validation_loss() -> Tensor:
            return self._objective(*batch, draw, penalty_draw, noise_seed=seed)

        if self.config.bilevel.second_order:
            training_draw, training_seed = self._draw(), self._noise_seed()
            state = self.weight_optimizer.state

            def training_loss() -> Tensor:
                return self._nll(*training_batch, self.star.relaxed(training_draw, noise_seed=training_seed))

            loss, gradients = second_order_gradient(
                training_loss,
                validation_loss,
                weights=self.weights,
                architecture=self.architecture,
                learning_rate=self._learning_rate(),
                momentum=self.config.bilevel.momentum,
                momentum_buffers=[state[weight].get("momentum_buffer") for weight in self.weights],
                weight_decay=self.config.bilevel.weight_decay,
            )
        else:
            # Else the backward pass would compute gradients of the weights and throw them away.
            with frozen(self.supernet):
                loss, gradients = first_order_gradient(validation_loss, self.architecture)
        for parameter, gradient in zip(self.architecture, gradients, strict=True):
            parameter.grad = gradient
        self.architecture_optimizer.step()
        self.totals["architecture_loss"] += loss

    def _weight_step(self, batch: tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            mixtures = self.star.relaxed(self._draw(), noise_seed=self._noise_seed())
        loss = self._nll(*batch, mixtures)
        self.weight_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.config.bilevel.gradient_clip)
        self.weight_optimizer.step()
        self.totals["train_loss"] += loss.detach()

    def _noise_seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generators["draws"]))

    # One epoch

    def _batches(self, split: Split, order: str) -> Iterator[tuple[Tensor, Tensor]]:
        return iterate_batches(
            split,
            self.config.bilevel.batch_size,
            generator=self.generators[order],
            augmentation=self.augmentation,
            augmentation_generator=self.generators["augmentation"],
            drop_last=True,
        )

    def run_epoch(self, on_step: Callable[[int], None] | None = None) -> dict[str, float]:
        """Train one epoch and return its scalars.

        Args:
            on_step: Called after every step with the number of images it used.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        names = ("train_loss", "architecture_loss", "penalty", "undecided", "imbalance")
        self.totals = {name: torch.zeros((), device=self.device) for name in names}
        search_architecture = self.epoch >= self.config.bilevel.warmup_epochs and bool(self.architecture)
        self.star.temperature = self.temperature
        for group in self.weight_optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.supernet.train()
        steps = 0
        pairs = zip(
            self._batches(self.weight_half, "order"),
            self._batches(self.architecture_half, "architecture_order"),
            strict=False,
        )
        for training_batch, validation_batch in pairs:
            training_batch = self._whole_slices(*training_batch)
            validation_batch = self._whole_slices(*validation_batch)
            if search_architecture:
                self._architecture_step(validation_batch, training_batch)
            self._weight_step(training_batch)
            steps += 1
            if on_step is not None:
                on_step(len(training_batch[1]) + (len(validation_batch[1]) if search_architecture else 0))
        scalars = {name: float(total) / max(1, steps) for name, total in self.totals.items()}
        require_finite(scalars, where=f"epoch {self.epoch + 1} of the search")
        self.epoch += 1
        self.star.temperature = self.temperature
        return scalars | self.measure()

    @torch.no_grad()
    def measure(self, *, num_images: int = 1000) -> dict[str, float]:
        """Return validation accuracy, diversity, skips and entropy at the current state.

        Args:
            num_images: How many validation images are looked at.
        """
        hyper = self.config.hypernetwork
        lam = torch.full((hyper.directions,), 0.5 * hyper.max_lambda, device=self.device)
        members = self.star.distributions(Draw(lam, torch.arange(hyper.directions, device=self.device)))
        distances = pairwise_architecture_distance(members, self.space)
        pairs = max(1, hyper.directions * (hyper.directions - 1))
        base = self.star.start()
        genotype = self.star.base_genotype()
        return {
            "val_accuracy": accuracy_under_batch_statistics(
                lambda images: self.supernet(images, base),
                self.supernet,
                # Evenly spaced, for the images of a folder may be sorted by class.
                self.val.subset(torch.arange(0, len(self.val), max(1, len(self.val) // num_images))),
                augmentation=self.augmentation,
            ),
            "member_distance": float(distances.sum()) / pairs,
            "skips": float(max(genotype.skip_counts().values())),
            "entropy": normalised_entropy(base.cpu(), self.space),
            "temperature": self.temperature,
        }

    def should_stop(self) -> bool:
        """Say whether a base cell holds more skip connections than allowed (DARTS+, arXiv 1909.06035)."""
        limit = self.config.bilevel.max_skips
        return limit is not None and max(self.star.base_genotype().skip_counts().values()) > limit

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides how the search goes on."""
        return {
            "epoch": self.epoch,
            "supernet": self.supernet.state_dict(),
            "hypernetwork": self.star.hypernetwork.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "architecture_optimizer": self.architecture_optimizer.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.epoch = state["epoch"]
        self.star.temperature = self.temperature
        self.supernet.load_state_dict(state["supernet"])
        self.star.hypernetwork.load_state_dict(state["hypernetwork"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.architecture_optimizer.load_state_dict(state["architecture_optimizer"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
