"""The public CIFAR-10-C files: CIFAR-10's test images under corruption (Hendrycks and Dietterich, arXiv 1903.12261).

One file a corruption holds five blocks of the test images in their published order, severity 1 first;
``labels.npy`` holds their labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dnas_ens.data.dataset import ImageData
from dnas_ens.data.names import SEVERITIES, check_severity
from dnas_ens.errors import UserError
from dnas_ens.run.files import unreadable

#: What the benchmark's mean is over, in the paper's order; the four further files are its validation.
PUBLISHED_NAMES = (
    *(
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
    ),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)


class Cifar10C:
    """A folder of CIFAR-10-C whose images are those of a run's test split.

    Args:
        folder: Holds ``labels.npy`` (5 N,) and ``<corruption>.npy`` uint8 (5 N, H, W, 3), N = 10,000 in the
            published ones; a path, or a name below `data_root`.
        data: The run's data: its test split must be CIFAR-10's, whole and in the published order.
        data_root: Where else `folder` is looked for.

    Attributes:
        names: The corruptions of `PUBLISHED_NAMES` whose files are there.

    Raises:
        UserError: A file is missing, damaged or of another form, or the test split is another one.
    """

    def __init__(self, folder: Path, data: ImageData, *, data_root: Path | None = None) -> None:
        self.folder = _find(folder, data_root)
        self.names = tuple(name for name in PUBLISHED_NAMES if (self.folder / f"{name}.npy").is_file())
        if not self.names:
            raise UserError(
                f"{self.folder} holds no corruption of CIFAR-10-C.",
                "Name the folder that has gaussian_noise.npy and labels.npy in it.",
            )
        self._require_labels_of(data)
        self._num_images = len(data.test)
        self._shape = (data.image_size, data.image_size, data.num_channels)

    def images(self, name: str, severity: int) -> torch.Tensor:
        """Read the test images under one of `names` at one severity from 1 to 5, in the order of the run's test split.

        Returns:
            uint8 (N, 3, H, W).

        Raises:
            UserError: The severity is another, or the file is missing, damaged or of another form.
        """
        check_severity(severity)
        wanted = (len(SEVERITIES) * self._num_images, *self._shape)
        stored = _read(self.folder / f"{name}.npy")
        if stored.dtype != np.uint8 or stored.shape != wanted:
            raise unreadable(
                self.folder / f"{name}.npy",
                f"it holds {stored.dtype} of shape {stored.shape}, not uint8 of shape {wanted}",
            )
        block = stored[(severity - 1) * self._num_images : severity * self._num_images]
        return torch.from_numpy(np.ascontiguousarray(block.transpose(0, 3, 1, 2)))

    def _require_labels_of(self, data: ImageData) -> None:
        """Check that the labels are those of the run's test split in every block of a severity."""
        labels = _read(self.folder / "labels.npy")
        expected = data.test.labels.cpu().numpy()
        same = (
            data.num_channels == 3
            and labels.shape == (len(SEVERITIES) * len(expected),)
            and np.issubdtype(labels.dtype, np.integer)
            and (labels.reshape(len(SEVERITIES), -1) == expected).all()
        )
        if not same:
            raise UserError(
                f"The labels in {self.folder} are not those of the {len(expected):,} test images of {data.name}.",
                "CIFAR-10-C corrupts CIFAR-10's own test images: use it with a run on --data cifar10.",
            )


def _find(folder: Path, data_root: Path | None) -> Path:
    places = [folder.expanduser()] + ([] if data_root is None else [data_root / folder])
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"There is no folder {' nor '.join(map(str, places))}.",
        "Unpack CIFAR-10-C.tar there, or name the folder that holds its .npy files.",
    )


def _read(path: Path) -> np.ndarray:
    """One array, memory-mapped, so that a severity reads only its own fifth of the file."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, error) from error
    return array
