"""Image data sets by name, folder or torch Dataset: splits, fingerprints, batches and augmentation.

The data's way through this folder: a source (`sources`, `folder`, `torch_dataset`) gives all its images
in one order, `splits` says which are for training, validation and test, `loading` puts both together as an
`ImageData`, and `batches` hands out normalised, augmented batches on whichever device holds the images. Sets larger
than memory are held in files (`large`).

Names are imported on first use, so that importing this package alone does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnas_ens.lazy import lazy_names

if TYPE_CHECKING:
    from dnas_ens.data.batches import Augmentation, AugmentationDraws, count_batches, iterate_batches
    from dnas_ens.data.dataset import ImageData, Split
    from dnas_ens.data.images import read_image
    from dnas_ens.data.large import default_data_root
    from dnas_ens.data.loading import load_data
    from dnas_ens.data.names import SOURCE_NAMES

__getattr__, __dir__, __all__ = lazy_names(__name__)
