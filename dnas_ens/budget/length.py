"""How long a network is trained: as long as there is time, and until it knows its images."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

from dnas_ens.budget.choice import cross_fitted_loss
from dnas_ens.budget.forecast import LOOKS, saturated_after
from dnas_ens.data.dataset import Split
from dnas_ens.training.prediction import predict_log_probs
from dnas_ens.training.trainer import MemberTraining

#: After the last look the rate falls to 0 within this share of the epochs so far, at least.
LANDING = 0.25


class Length:
    """Holds a training's epochs to those that are of use and end in time; called after every epoch.

    Three looks at val, in the first third of the epochs that are enough, say after how many the network will know its
    images; their median becomes its length, if it is less than those. What they said is part of the training's state.

    Args:
        training: Its ``total_epochs`` are lowered.
        worth: Epochs that the network it goes on from is worth.
        at_most: Epochs that are enough; None where its length needs no looks. A network that is worth more than a sixth
            of them is not looked at, since it has just gone back to the full rate.
        looks: Whether it is looked at; what earlier looks have said holds in any case.
        ends: When on the clock there will be no more time; None for no such time.
    """

    def __init__(
        self,
        training: MemberTraining,
        *,
        worth: float = 0.0,
        at_most: float | None = None,
        looks: bool = True,
        ends: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._training, self._worth, self._at_most, self._looks = training, worth, at_most, looks
        self._ends, self._clock = ends, clock
        self._seen: list[tuple[float, int]] = []

    def __call__(self, scalars: Mapping[str, float]) -> None:
        """Take over what an epoch has brought."""
        total = self._training.recipe.epochs
        if self._ends is not None:
            total = min(total, self._in_time(self._ends))
        if self._at_most is not None:
            total = min(total, self._useful(self._at_most, total))
        self._training.total_epochs = max(total, self._training.epoch)

    def _useful(self, at_most: float, total: int) -> int:
        """Return the epochs that are of use, once all looks have said so; those that end before need none."""
        training, worth = self._training, self._worth
        looks = [max(1, math.ceil(share * at_most - worth)) for share in LOOKS]
        if self._looks and worth < LOOKS[0] * at_most and training.epoch in looks and total > looks[-1]:
            training.looks.append(saturated_after(worth + training.epoch, self._gap()))
        if training.epoch < looks[-1] or not training.looks:
            return training.recipe.epochs
        useful = statistics.median(training.looks)
        if useful >= at_most:
            return training.recipe.epochs
        return round(max((1 + LANDING) * (worth + looks[-1]), useful) - worth)

    def _gap(self) -> float:
        """Return by how much the calibrated NLL on val images is above that on as many training images, nats.

        Both of the same weights, in evaluation mode: at a high rate the loss of one step's weights varies more than it
        differs from that of the training.
        """
        training = self._training
        count = min(len(training.val), len(training.train_split))

        def loss(split: Split) -> float:
            some = split.drawn(count)
            log_probs = predict_log_probs(training.network, some, augmentation=training.augmentation)
            return cross_fitted_loss(log_probs.exp().cpu().numpy()[None], some.labels.cpu().numpy())

        return loss(training.val) - loss(training.train_split)

    def _in_time(self, ends: float) -> int:
        """Return the epochs that end in time, as they have been measured, with val predicted at the end."""
        training = self._training
        self._seen.append((self._clock(), training.epoch))
        (began, first), (now, latest) = self._seen[0], self._seen[-1]
        if latest == first:
            return training.epoch if now >= ends else training.total_epochs
        an_epoch = (now - began) / (latest - first)
        left = int((ends - now) / an_epoch - val_share(len(training.val), len(training.train_split)))
        return training.epoch + max(0, left)


def val_share(num_val: int, num_train: int) -> float:
    """Return what predicting val takes, in epochs: a third of a step is its forward pass."""
    return num_val / (3 * num_train)
