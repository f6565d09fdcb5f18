"""BatchNorm over the images of several processes, with gradients through the statistics of all of them.

torch's SyncBatchNorm runs on GPUs alone and does not know the norms of the fast supernet, which hold convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnas_ens.nn.moments import PointwiseNorm, track
from dnas_ens.run.ranks import current


class _Mean(torch.autograd.Function):
    """The mean over ranks. Each rank's loss counts equally, so the gradient is the mean of the ranks' as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return current().mean(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return current().mean(gradient)


def _mean(values: Tensor) -> Tensor:
    result: Tensor = _Mean.apply(values)
    return result


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm that takes a training batch's statistics over the equal shares of all ranks.

    Equation: mean = E[x], var = E[(x - mean)^2] over images, pixels and ranks. Where the batch's statistics are not
    tracked, ranks do not work together, and each takes its own.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        if not (self.training and self.track_running_stats):
            return super().forward(input)
        features = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _mean(features.mean(dim=(0, 2, 3)))
        centred = features - mean.view(1, -1, 1, 1)
        variance = _mean(centred.square().mean(dim=(0, 2, 3)))
        count = current().size * features.numel() // features.shape[1]
        track(self, mean.detach(), variance.detach(), count)
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centred * scale.view(1, -1, 1, 1)).to(input.dtype)
        shift = self.bias.view(1, -1, 1, 1)
        return torch.addcmul(shift, centred, (scale * self.weight).view(1, -1, 1, 1)).to(input.dtype)


class SynchronisedPointwiseNorm(PointwiseNorm):
    """The same for ``PointwiseNorm``: cov = E[(z - mean)(z - mean)^T] over ranks too."""

    def _folds_in_triton(self, features: Tensor, channels: int) -> bool:
        # The kernels take the statistics of one rank.
        return not self._shares() and super()._folds_in_triton(features, channels)

    def _moments(self, features: Tensor, num_groups: int) -> tuple[int, Tensor, Tensor]:
        count, own_mean, own_covariance = super()._moments(features, num_groups)
        if not self._shares():
            return count, own_mean, own_covariance
        mean = _mean(own_mean)
        apart = own_mean - mean
        covariance = _mean(own_covariance + apart.unsqueeze(2) * apart.unsqueeze(1))
        return current().size * count, mean, covariance

    def _shares(self) -> bool:
        return self.training and self.track_running_stats


_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: SynchronisedBatchNorm,
    PointwiseNorm: SynchronisedPointwiseNorm,
}


def synchronise(module: nn.Module) -> None:
    """Let all BatchNorm of a module take its statistics over the images of all ranks, in training."""
    _change(module, _SYNCHRONISED)


def separate(module: nn.Module) -> None:
    """Undo ``synchronise``: the module is the one it was."""
    _change(module, {after: before for before, after in _SYNCHRONISED.items()})


def _change(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for part in module.modules():
        if type(part) in classes:
            # Parameters, buffers and their names stay as they are.
            part.__class__ = classes[type(part)]
