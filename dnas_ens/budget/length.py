"""How long a network is trained: as long as there is time, and until it knows its images."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np

from dnas_ens.budget.choice import cross_fitted_loss
from dnas_ens.training.prediction import predict_log_probs
from dnas_ens.training.trainer import MemberTraining

#: By how much the loss on val is above that in training where a training ends, nats. This gap is nearly proportional to
#: the epochs: 0.01 an epoch on 2,000 photographs of 16x16, 0.0015 on as many images of Fashion-MNIST, 0.029 there
#: without augmentation (docs/log.md).
END_GAP = 0.3
#: A network is looked at after these shares of the epochs that it has at most.
LOOKS = (1 / 6, 1 / 4, 1 / 3)
#: Its rate then falls to 0 within this share of those it has had, at least.
LANDING = 0.25


def saturated_after(epochs: float, gap: float) -> float:
    """Return after how many epochs a training should end, where the loss on val is that of training and `END_GAP`.

    Args:
        epochs: Those so far.
        gap: By how much the loss on val is above that in training after them, nats.
    """
    return epochs * END_GAP / gap if gap > 0 else math.inf


class Length:
    """Holds a training's epochs to those that are of use and end in time; called after every epoch.

    Three looks at val, in the first third of a training, say after how many epochs the network will be saturated; their
    median becomes its length, if it is less than planned. What they said is part of the training's state.

    Args:
        training: Its ``total_epochs`` are lowered.
        worth: Epochs that the network it goes on from is worth.
        at_most: Epochs that it is worth in the end, at most; None where its length needs no looks.
        ends: When on the clock there will be no more time; None for no such time.
    """

    def __init__(
        self,
        training: MemberTraining,
        *,
        worth: float = 0.0,
        at_most: float | None = None,
        ends: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._training, self._worth, self._at_most = training, worth, at_most
        self._ends, self._clock = ends, clock
        self._seen: list[tuple[float, int]] = []

    def __call__(self, scalars: Mapping[str, float]) -> None:
        """Take over what an epoch has brought."""
        total = self._training.recipe.epochs
        if self._at_most is not None:
            total = min(total, self._useful(scalars["train_loss"], self._at_most))
        if self._ends is not None:
            total = min(total, self._in_time(self._ends))
        self._training.total_epochs = max(total, self._training.epoch)

    def _useful(self, train_loss: float, at_most: float) -> int:
        """Return the epochs that are of use, once all looks have said so."""
        training, worth = self._training, self._worth
        looks = [max(1, math.ceil(share * at_most - worth)) for share in LOOKS]
        if worth < LOOKS[-1] * at_most and training.epoch in looks:
            training.looks.append(saturated_after(worth + training.epoch, self._val_loss() - train_loss))
        if training.epoch < looks[-1] or not training.looks:
            return training.recipe.epochs
        landed = (1 + LANDING) * (worth + looks[-1])
        return round(max(landed, min(at_most, statistics.median(training.looks))) - worth)

    def _val_loss(self) -> float:
        """Return the calibrated NLL on val, or on as many of its images as are trained on."""
        training = self._training
        count = min(len(training.val), len(training.train_split))
        some = training.val.subset(np.linspace(0, len(training.val) - 1, count).astype(int))
        log_probs = predict_log_probs(training.network, some, augmentation=training.augmentation)
        return cross_fitted_loss(log_probs.exp().cpu().numpy()[None], some.labels.cpu().numpy())

    def _in_time(self, ends: float) -> int:
        """Return the epochs that end in time, as they have been measured, with val predicted at the end."""
        training = self._training
        self._seen.append((self._clock(), training.epoch))
        (began, first), (now, latest) = self._seen[0], self._seen[-1]
        if latest == first:
            return training.epoch if now >= ends else training.recipe.epochs
        an_epoch = (now - began) / (latest - first)
        left = int((ends - now) / an_epoch - val_share(len(training.val), len(training.train_split)))
        return training.epoch + max(0, left)


def val_share(num_val: int, num_train: int) -> float:
    """Return what predicting val takes, in epochs: a third of a step is its forward pass."""
    return num_val / (3 * num_train)
