"""Image data sets by name, folder or torch Dataset: splits, fingerprints, batches and augmentation.

The data's way through this folder: a source (`sources`, `folder`, `torch_dataset`) gives all its images
in one order, `splits` says which are for training, validation and test, `loading` puts both together as an
`ImageData`, and `batches` hands out normalised, augmented batches on whichever device holds the images.

Names are imported on first use, so that importing this package alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dnas_ens.data.batches import Augmentation, AugmentationDraws, count_batches, iterate_batches
    from dnas_ens.data.dataset import ImageData, Split
    from dnas_ens.data.images import read_image
    from dnas_ens.data.loading import default_data_root, load_data
    from dnas_ens.data.names import SOURCE_NAMES

__all__ = [
    "SOURCE_NAMES",
    "Augmentation",
    "AugmentationDraws",
    "ImageData",
    "Split",
    "count_batches",
    "default_data_root",
    "iterate_batches",
    "load_data",
    "read_image",
]

_HOME = {
    "SOURCE_NAMES": "names",
    "Augmentation": "batches",
    "AugmentationDraws": "batches",
    "ImageData": "dataset",
    "Split": "dataset",
    "count_batches": "batches",
    "default_data_root": "loading",
    "iterate_batches": "batches",
    "load_data": "loading",
    "read_image": "images",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
