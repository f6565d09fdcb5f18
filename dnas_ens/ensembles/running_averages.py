"""Averages of the weights that run along with any training loop: Polyak, EMA and SWA."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dnas_ens.ensembles.averaging import check_same_architecture, clone, recompute_batch_norm
from dnas_ens.errors import UserError
from dnas_ens.training.prediction import Batches


class RunningAverage(AveragedModel):
    """An average of the weights that runs along with any training loop; the base of the three below.

    Call `after_step` after every step of the optimiser, `after_epoch` after every epoch, and take the
    `finished` model at the end. ``state_dict()`` and ``load_state_dict()`` make it resumable. The averaging is
    `torch.optim.swa_utils.AveragedModel`'s, in the precision of the weights.

    Args:
        model: The model that will be trained; it is copied.
        options: See `torch.optim.swa_utils.AveragedModel`.

    Raises:
        UserError: It can not be copied; see `dnas_ens.ensembles.averaging.clone`.
    """

    _checked = False

    def __init__(self, model: nn.Module, **options: Any) -> None:
        # A clone, which torch's own copying takes whatever the model holds.
        super().__init__(clone(model), **options)

    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of a model into the average; buffers are copied.

        Raises:
            UserError: See `check_same_architecture`.
        """
        # Once is enough to catch a mix-up, and at every step it would cost time.
        if not self._checked:
            check_same_architecture([self.module, model], ["The averaged model", "The trained model"])
            self._checked = True
        super().update_parameters(model)

    def after_step(self, model: nn.Module) -> None:
        """Count a step of the optimiser."""

    def after_epoch(self, model: nn.Module, epochs_done: int) -> None:
        """Count an epoch; epochs_done is 1 after the first one."""

    def finished(self, batches: Batches) -> nn.Module:
        """Return a copy of the average in evaluation mode, BatchNorm statistics recomputed.

        Args:
            batches: Training batches, for `recompute_batch_norm`.

        Raises:
            UserError: Nothing has been averaged yet; else see `recompute_batch_norm`.
        """
        if int(self.n_averaged) == 0:
            raise UserError(
                "The running average has seen no model.", "Train on, or let the averaging start earlier."
            )
        model = clone(self.module).eval()
        recompute_batch_norm(model, batches)
        return model


class PolyakAverage(RunningAverage):
    """The equal average of the weights after every step, w = 1/t sum_s w_s (Polyak and Juditsky, 1992).

    Args:
        model: The model that will be trained; it is copied.

    Raises:
        UserError: It can not be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def after_step(self, model: nn.Module) -> None:
        """Take the weights after a step into the average."""
        self.update_parameters(model)


class ExponentialMovingAverage(RunningAverage):
    """EMA of the weights after every step, w <- d w + (1 - d) w_t, which starts at the first w_t.

    Args:
        model: The model that will be trained; it is copied.
        decay: d in [0, 1).

    Raises:
        UserError: A decay that is not possible, or a model that can not be copied.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"The decay is {decay}.", "Give a number of at least 0 and below 1.")
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def after_step(self, model: nn.Module) -> None:
        """Take the weights after a step into the average."""
        self.update_parameters(model)


class StochasticWeightAverage(RunningAverage):
    """SWA: the equal average of the weights at the ends of cycles (Izmailov et al., arXiv 1803.05407).

    The learning rate, constant or cyclic from the start on, is the training loop's: see
    `torch.optim.swa_utils.SWALR`.

    Args:
        model: The model that will be trained; it is copied.
        start_epoch: Epochs that are done when the first weights are taken; with 0, untrained weights are not, and the
            first are those after one cycle.
        cycle: Epochs from one taking to the next, 1 or more.

    Raises:
        UserError: A start or a cycle that is not possible, or a model that can not be copied.
    """

    def __init__(self, model: nn.Module, *, start_epoch: int, cycle: int = 1) -> None:
        if start_epoch < 0 or cycle < 1:
            raise UserError(
                f"The averaging starts after epoch {start_epoch} with cycles of {cycle} epochs.",
                "Start after 0 or more epochs, with cycles of 1 or more.",
            )
        super().__init__(model)
        self.start_epoch, self.cycle = start_epoch, cycle

    def after_epoch(self, model: nn.Module, epochs_done: int) -> None:
        """Take the weights into the average where a cycle ends."""
        if epochs_done >= self.start_epoch and (epochs_done - self.start_epoch) % self.cycle == 0:
            self.update_parameters(model)
