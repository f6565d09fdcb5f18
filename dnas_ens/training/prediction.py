"""Class probabilities of any classifier on any batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dnas_ens.data.batches import Augmentation, iterate_batches
from dnas_ens.data.dataset import ImageData, Split
from dnas_ens.errors import UserError
from dnas_ens.types import FloatArray, IntArray

#: Images of a pass without gradients.
EVALUATION_BATCH = 256
#: Batches of inputs (B, ...) and labels (B,) that can be iterated again: a DataLoader, a list or a function that starts
#: a new pass at every call. A batch is a pair, or a dict with one of `INPUT_KEYS` and one of `LABEL_KEYS`.
Batches = (
    Callable[[], Iterable[tuple[Tensor, Tensor] | Mapping[str, Any]]]
    | Iterable[tuple[Tensor, Tensor] | Mapping[str, Any]]
)
#: Keys under which a batch that is a dict holds its inputs and its labels.
INPUT_KEYS = ("image", "images", "img", "input", "inputs", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "target", "targets", "y")
#: What a classifier returns.
Outputs = Literal["logits", "probs"]
_BATCHES_REMEDY = "Give a DataLoader, a list, or a function that starts a new pass over the data at every call."
#: How far the sum of probabilities may be from 1 because of rounding.
_SUM_TOLERANCE = 1e-3
#: Words of torch's errors about shapes that do not fit a convolution or a product.
_SHAPE_WORDS = (
    "channels",
    "shapes cannot be multiplied",
    "size mismatch",
    "must match the size",
    "Kernel size",
)


def one_pass(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Start a pass over data; UserError if it could not be started again, as with a generator, or has no batches."""
    try:
        passing = iter(batches() if callable(batches) else batches)
    except TypeError as error:
        if callable(batches):
            raise
        raise UserError(
            f"A {type(batches).__name__} was given where batches are wanted.",
            _BATCHES_REMEDY,
        ) from error
    if passing is batches:
        raise UserError(
            "The batches can be passed over only once.",
            _BATCHES_REMEDY,
        )
    return map(as_pair, passing)


def as_pair(batch: object) -> tuple[Tensor, Tensor]:
    """Return the inputs and the labels of a batch.

    Args:
        batch: A pair, or a dict with exactly one of `INPUT_KEYS` and one of `LABEL_KEYS`; other keys are ignored.

    Raises:
        UserError: It is something else; which of three tensors holds the labels is not guessed.
    """
    parts: list[object] = list(batch) if isinstance(batch, tuple | list) else []
    if isinstance(batch, Mapping):
        found = [[batch[key] for key in keys if key in batch] for keys in (INPUT_KEYS, LABEL_KEYS)]
        parts = [values[0] for values in found if len(values) == 1]
    # The items of a Dataset are pairs too, with a single label.
    if len(parts) == 2 and isinstance(parts[0], Tensor) and isinstance(parts[1], Tensor) and parts[1].ndim:
        return parts[0], parts[1]
    raise UserError(
        f"A batch is {described(batch)} instead of a pair of inputs and labels.",
        "Give batches of two tensors, such as lambda: ((images, labels) for images, labels, index in loader), or dicts "
        f"with one of the keys {', '.join(INPUT_KEYS)} and one of {', '.join(LABEL_KEYS)}; a Dataset goes into a "
        "DataLoader.",
    )


def described(value: object) -> str:
    """Say what a value is by its type, its keys or parts, and their shapes."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {kind} with the keys {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        parts = [
            f"{type(part).__name__} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            for part in value[:4]
        ]
        more = ", ..." if len(value) > 4 else ""
        return f"a {kind} of {len(value)} ({', '.join(parts)}{more})"
    return f"a {kind}"


def class_indices(labels: Tensor, num_images: int) -> Tensor:
    """Return the labels of a batch.

    Raises:
        UserError: They are not one whole number an image.
    """
    if labels.ndim != 1 or len(labels) != num_images or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"The labels of {num_images} images are {labels.dtype} of shape {tuple(labels.shape)}.",
            "Give one class index an image, shape (B,); of one-hot rows that is labels.argmax(dim=1).",
        )
    return labels


def like_parameters(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return inputs on the device of a model, floating ones in the dtype of its parameters; as they are without any."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            floating = inputs.is_floating_point()
            return inputs.to(parameter.device, parameter.dtype if floating else inputs.dtype)
    return inputs


def check_outputs(outputs: object) -> None:
    """Raise UserError unless this is one of `Outputs`, or None for unknown."""
    if outputs not in ("logits", "probs", None):
        raise UserError(f"outputs is {outputs!r}.", 'Give "logits", "probs", or None to find out on the first images.')


def class_probs(
    model: nn.Module,
    inputs: Tensor,
    *,
    name: str = "The model",
    dtype: torch.dtype = torch.float32,
    outputs: Outputs | None = None,
) -> tuple[Tensor, Outputs | None]:
    """Return the class probabilities (B, K) of a classifier, and what it returns.

    Probabilities must not be soft-maxed again, which would flatten them: rows that are non-negative and sum to 1, to
    the precision of their dtype, are taken as they are. Log-probabilities are logits like any others, for
    softmax(ln p) = p.

    Args:
        model: Inputs (B, ...) -> logits or probabilities (B, K) or (B, K, 1, 1), on any device; or an `Ensemble`, which
            says that it returns probabilities.
        inputs: (B, ...), moved to the model's device and dtype.
        dtype: What the softmax is computed in at least, where the device has it.
        outputs: What it returns, "logits" or "probs"; None to tell by these outputs.

    Returns:
        The probabilities; and what the model returns, for the next batch, None where that can not be told yet:
        without values, as while a graph is traced, or where they are not finite.

    Raises:
        UserError: It does not return (B, K), takes inputs of another form, or does not return probabilities where it
            should.

    Warns:
        UserWarning: Its outputs are taken as probabilities.
    """
    try:
        returned = model(like_parameters(model, inputs))
    except RuntimeError as error:
        # Only errors about shapes; running out of memory, for instance, is a subclass of RuntimeError.
        if type(error) is not RuntimeError or not any(word in str(error) for word in _SHAPE_WORDS):
            raise
        raise UserError(
            f"{name} does not take inputs of shape {tuple(inputs.shape)} ({error}).",
            "Combine networks that were trained on images of one size and number of channels, and give it those.",
        ) from error
    found = _class_outputs(returned, num_images=inputs.shape[0], name=name)
    # Apple's GPUs have no double precision.
    dtype = torch.float32 if found.device.type == "mps" else dtype
    # In half precision the sum over classes is too far from 1 for the metrics.
    wide = found.to(torch.promote_types(found.dtype, dtype))
    # True of an `Ensemble`.
    if getattr(model, "returns_probabilities", False):
        return wide, outputs
    if not _has_values(found):
        if outputs is None:
            told = _are_distributions(found)
            # The branch that is not chosen must not divide by 0 either, or its gradient is NaN.
            return torch.where(told, _scaled(torch.where(told, wide, 1.0)), wide.softmax(dim=1)), None
    elif outputs is None and len(found):
        if bool(_are_distributions(found)):
            outputs = "probs"
            warnings.warn(
                f"{name} returns class probabilities, non-negative with sum 1: they are taken as they are, without a "
                'softmax. outputs="probs" says that this is right, outputs="logits" that it is not.',
                UserWarning,
                stacklevel=3,
            )
        elif bool(found.isfinite().all()):
            outputs = "logits"
    elif outputs == "probs" and not bool(_are_distributions(found[found.isfinite().all(dim=1)])):
        raise UserError(
            f"{name} should return probabilities, but its outputs are not non-negative with sum 1 over the classes.",
            'Give outputs="logits" for a network that does not end in a softmax over the classes; sigmoids of several '
            "labels are no distribution.",
        )
    return _scaled(wide) if outputs == "probs" else wide.softmax(dim=1), outputs


def _class_outputs(returned: object, *, num_images: int, name: str) -> Tensor:
    """Return what a model returned as (B, K); UserError says what else it is."""
    if isinstance(returned, Tensor):
        # A convolution as the classifier behind a global pooling.
        found = returned.flatten(1) if returned.ndim == 4 and returned.shape[2:] == (1, 1) else returned
        if tuple(found.shape) in ((num_images,), (num_images, 1)):
            raise UserError(
                f"{name} returns one number an image, shape {tuple(returned.shape)}, not one a class.",
                "Wrap a classifier of two classes in a module that returns a logit of each: for one logit z of "
                "shape (B, 1) that is torch.cat([torch.zeros_like(z), z], dim=1).",
            )
        # Not len, which would fix the batch size of an exported graph.
        if found.ndim == 2 and found.shape[0] == num_images:
            return found
        images = "" if len(returned.shape) and len(returned) == num_images else f" for {num_images} images"
        form = f"{tuple(returned.shape)}{images}"
    else:
        form = described(returned)
    part = " (its .logits)" if hasattr(returned, "logits") else ""
    raise UserError(
        f"{name} returns {form} instead of logits of shape (B, K).",
        f"Wrap it in a module that returns the logits{part} alone.",
    )


def _has_values(found: Tensor) -> bool:
    """Tell whether a tensor's values can be read: not while a graph is recorded, and not if it has only a shape."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return not (recorded or found.is_meta or (found.is_cuda and torch.cuda.is_current_stream_capturing()))


def _are_distributions(found: Tensor) -> Tensor:
    """Tell, as a tensor, whether all rows (B, K) are non-negative and sum to 1 to the precision of their dtype."""
    precision = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    wide = found.detach().to(torch.promote_types(found.dtype, torch.float32))
    off = (wide.sum(dim=1) - 1.0).abs()
    return (wide >= 0.0).all() & (off <= max(_SUM_TOLERANCE, precision)).all()


def _scaled(probs: Tensor) -> Tensor:
    """Return distributions (B, K) whose sum was rounded in another precision, with sum 1 in their own."""
    return probs / probs.sum(dim=1, keepdim=True)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluation_batches(split: Split, *, augmentation: Augmentation) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a split's images, normalised only and channels_last, and labels in its order."""
    for images, labels in iterate_batches(split, EVALUATION_BATCH, augmentation=augmentation):
        yield images.contiguous(memory_format=torch.channels_last), labels


@torch.inference_mode()
def predict_log_probs(model: nn.Module, split: Split, *, augmentation: Augmentation) -> Tensor:
    """Return log-probabilities (N, K) of a network in evaluation mode, in the order of the split."""
    with evaluation_mode(model):
        batches = evaluation_batches(split, augmentation=augmentation)
        return torch.cat([model(images).float().log_softmax(-1) for images, _ in batches])


def predict_batches(
    model: nn.Module, val_batches: Batches, *, outputs: Outputs | None = None, name: str = "The model"
) -> tuple[FloatArray, IntArray]:
    """Compute a classifier's probabilities in evaluation mode; its modes are restored afterwards.

    Args:
        model: Inputs (B, ...) -> logits or probabilities (B, K); or an `Ensemble`.
        outputs: Which of the two, "logits" or "probs"; None to tell by the first batch, see `class_probs`.

    Returns:
        Class probabilities, shape (N, K), range [0, 1], NaN where logits are not finite; labels, shape (N,).

    Raises:
        UserError: There are no batches, another word for the outputs, or see `class_probs` and `class_indices`.
    """
    check_outputs(outputs)
    probs, labels = [], []
    with evaluation_mode(model), torch.inference_mode():
        for inputs, classes in one_pass(val_batches):
            labels.append(class_indices(classes, len(inputs)))
            part, outputs = class_probs(model, inputs, name=name, dtype=torch.float64, outputs=outputs)
            probs.append(part)
    if not labels:
        raise no_batches("validation")
    # Copied once at the end, so that a GPU need not wait at every batch.
    return torch.cat(probs).cpu().numpy(), torch.cat(labels).cpu().numpy()


def predict_members(
    members: Iterable[nn.Module], val_batches: Batches, *, outputs: Outputs | None = None
) -> tuple[FloatArray, IntArray]:
    """Compute the probabilities of members, one after another.

    Args:
        members: Modules (B, ...) -> logits or probabilities (B, K), or ensembles; one at a time is taken.
        val_batches: Validation batches, in the same order at every call.
        outputs: What all members return, "logits" or "probs"; None to tell it of each, see `class_probs`.

    Returns:
        Class probabilities, shape (M, N, K), range [0, 1]; labels, shape (N,).

    Raises:
        UserError: No members or no batches, a member whose probabilities are not finite or that has another
            number of classes, or labels that change from call to call; see `predict_batches`.
    """
    parts: list[FloatArray] = []
    first_labels: IntArray | None = None
    for index, member in enumerate(members):
        probs, labels = predict_batches(member, val_batches, outputs=outputs, name=f"Member {index}")
        if not np.isfinite(probs).all():
            raise not_finite(index)
        if first_labels is not None and not np.array_equal(labels, first_labels):
            raise UserError(
                f"Member {index} saw other labels than member 0.",
                "Give validation batches that come in the same order at every call.",
            )
        if parts and probs.shape[1] != parts[0].shape[1]:
            raise UserError(
                f"Member {index} has {probs.shape[1]} classes, but member 0 has {parts[0].shape[1]}.",
                "Combine members that were trained on the same classes.",
            )
        parts.append(probs)
        first_labels = labels
    if first_labels is None:
        raise UserError("There are no members to predict with.", "Give at least one network.")
    return np.stack(parts), first_labels


def plain_passes(data: ImageData, split: Split) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Return passes over a split in its order, normalised as the data are and without augmentation."""
    augmentation = Augmentation.for_data(data, augment=False)
    return lambda: evaluation_batches(split, augmentation=augmentation)


def training_passes(
    data: ImageData, split: Split, *, augment: bool, cutout: int = 0
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Return passes over a split in random order, augmented as in training, each pass alike.

    BatchNorm's statistics of plain images do not fit a network that was trained on augmented ones (docs/log.md).
    """
    augmentation = Augmentation.for_data(data, augment=augment, cutout=cutout)

    def one() -> Iterator[tuple[Tensor, Tensor]]:
        return iterate_batches(
            split,
            EVALUATION_BATCH,
            generator=torch.Generator().manual_seed(0),
            augmentation=augmentation,
            augmentation_generator=torch.Generator(split.labels.device).manual_seed(0),
            drop_last=True,
        )

    return one


def no_batches(purpose: str) -> UserError:
    """Return the error for a pass over the data that was empty."""
    return UserError(f"There are no batches for {purpose}.", _BATCHES_REMEDY)


def not_finite(member: int) -> UserError:
    """Return the error for a member whose probabilities are not finite."""
    return UserError(
        f"Member {member} predicts probabilities that are not finite.",
        "Train it again, with a lower learning rate if it diverged, or leave it out.",
    )
