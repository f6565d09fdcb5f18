"""Data of a configuration, loaded once a process, and genotypes trained from scratch on them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from dnas_ens.config import DataConfig, RetrainConfig
from dnas_ens.space.genotype import Genotype

if TYPE_CHECKING:
    from dnas_ens.data.dataset import ImageData
    from dnas_ens.training.trainer import MemberTraining


@functools.cache
def load(config: DataConfig) -> ImageData:
    """Load the data once a worker."""
    from dnas_ens.commands.options import load_configured_data

    return load_configured_data(config)


def train_from_scratch(
    genotype: Genotype, data: ImageData, recipe: RetrainConfig
) -> tuple[MemberTraining, dict[str, float]]:
    """Train one genotype; what comes out depends on its isomorphism class and the recipe's seed alone.

    Returns:
        The finished training, and its seconds.
    """
    from dnas_ens.run.progress import CostMeter
    from dnas_ens.training.trainer import MemberTraining

    cost = CostMeter()
    # Seeds from the cells' name instead of a position, so that neither setting nor order of the runs matters.
    training = MemberTraining(genotype.canonical(), data, recipe, index=int(genotype.canonical_hash(), 16))
    while training.epoch < recipe.epochs:
        training.run_epoch()
    return training, cost.seconds()
