"""What an ensemble is built from and asked, checked and brought into one form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dnas_ens.data.dataset import Split
from dnas_ens.errors import UserError
from dnas_ens.metrics.diversity import normalise_weights
from dnas_ens.nn.network import Network
from dnas_ens.nn.reference_models import ReferenceModel
from dnas_ens.training.prediction import Outputs, check_outputs
from dnas_ens.types import IntArray


def as_members(members: Iterable[nn.Module] | nn.Module) -> list[nn.Module]:
    """Return members as a list.

    Raises:
        UserError: None, or one module, whose layers would be taken for members.
    """
    if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList):
        raise UserError(
            f"One {type(members).__name__} was given where a list of members is wanted.",
            "Put it into a list: Ensemble([network]).",
        )
    found = list(members)
    if not found:
        raise UserError("The ensemble has no members.", "Give at least one network.")
    strange = [member for member in found if not isinstance(member, nn.Module)]
    if strange:
        raise UserError(
            f"A member is a {type(strange[0]).__name__}.", "Give torch modules that map images to logits."
        )
    return found


def as_weights(
    weights: Sequence[float] | npt.NDArray[np.floating] | Tensor | None, num_members: int
) -> list[float]:
    """Return combining weights that sum to 1, equal ones for None.

    Raises:
        UserError: Not one non-negative number a member, or all are 0.
    """
    remedy = "Give one non-negative number a member, not all 0."
    values = None
    try:
        if weights is not None:
            given = weights.detach().cpu() if isinstance(weights, Tensor) else weights
            values = np.asarray(given, dtype=np.float64)
            if values.ndim != 1:
                raise UserError(f"The combining weights have shape {values.shape}.", remedy)
        shares = normalise_weights(values, num_members)
    except (TypeError, ValueError) as error:
        raise UserError(f"The combining weights do not fit: {error}.", remedy) from error
    # Weights that were rounded to single precision and saved must come back bit-equal.
    if values is not None and abs(values.sum() - 1.0) < 1e-6:
        return [float(value) for value in values]
    return [float(share) for share in shares]


def as_outputs(outputs: object, members: Sequence[nn.Module]) -> list[Outputs | None]:
    """Return what each member returns, None where that is not known; networks of ours return logits.

    Raises:
        UserError: Another word, or not one for each member.
    """
    given = [outputs] * len(members) if outputs is None or isinstance(outputs, str) else outputs
    if not isinstance(given, list | tuple) or len(given) != len(members):
        raise UserError(
            f"The outputs of {len(members)} members are {outputs!r}.",
            'Give "logits" or "probs" for all of them, or a list with one of these for each.',
        )
    for each in given:
        check_outputs(each)
    return [
        "logits" if each is None and isinstance(member, Network | ReferenceModel) else each
        for each, member in zip(given, members, strict=True)
    ]


def as_classes(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return class names, which must be text, as an ensemble's file holds them.

    Raises:
        UserError: They are not.
    """
    if classes is None:
        return None
    names = tuple(classes)
    if isinstance(classes, str) or not all(isinstance(name, str) for name in names):
        raise UserError(f"The classes are {classes!r}.", "Give a list of names as text, one a class.")
    return tuple(str(name) for name in names)


def check_temperature(temperature: float) -> float:
    """Return a temperature.

    Raises:
        UserError: It is not a finite number above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise UserError(f"The temperature is {temperature}.", "Give a finite number above 0; 1 for none.")
    return float(temperature)


def check_batch_size(batch_size: int) -> None:
    """Refuse batches of no image."""
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}.", "Give a number of images from 1 up.")


def as_pixels(images: object) -> Tensor:
    """Return the images of a split, an array or a tensor as a tensor; what is in them is checked elsewhere.

    Raises:
        UserError: It is none of these.
    """
    if isinstance(images, Split):
        return images.images
    if isinstance(images, Tensor):
        return images
    try:
        return torch.tensor(np.asarray(images))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"A {type(images).__name__} was given where images are wanted.",
            "Give a split, an array or a tensor (N, C, H, W); evaluate, calibrate and fit_weights take a DataLoader, "
            "and so does dnas_ens.training.prediction.predict_members.",
        ) from error


def check_labels(labels: IntArray, *, num_classes: int) -> None:
    """Refuse a label that is not among the classes."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"Labels reach from {labels.min()} to {labels.max()}, but the ensemble has {num_classes} classes.",
            "Evaluate on data with the classes that the members were trained on.",
        )


def home_of(members: Iterable[nn.Module]) -> tuple[torch.device, torch.dtype]:
    """Return where an ensemble's own numbers belong: the first member's device, and float64 if any member has that.

    Never less than float32: an average over members in half precision would be rounded as they are.
    """
    parameters = [
        parameter for member in members for parameter in member.parameters() if parameter.is_floating_point()
    ]
    wide = any(parameter.dtype == torch.float64 for parameter in parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    return device, torch.float64 if wide else torch.float32
