"""Retraining: every chosen genotype from scratch, with seeds of its own, into an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from torch.utils.data import Dataset

    from dnas_ens.config import RetrainConfig
    from dnas_ens.data.dataset import ImageData
    from dnas_ens.ensembles import Ensemble
    from dnas_ens.search.result import SearchResult
    from dnas_ens.space.genotype import Genotype
    from dnas_ens.space.spaces import SpaceName


def retrain(
    found: SearchResult | Sequence[Genotype],
    data: str | os.PathLike[str] | Dataset | ImageData = "digits",
    *,
    members: int | None = None,
    config: RetrainConfig | None = None,
    device: str = "auto",
    workers: int = 1,
    folder: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Ensemble:
    """Train the members from scratch and return their ensemble.

    Args:
        found: The result of a search, or genotypes; name one several times for a deep ensemble of it.
        data: What ``load_data`` takes; give the ``ImageData`` of the search for the same splits. The ``flip`` of a
            search holds here too.
        members: How many to train, in the order of the search's ranking or of the genotypes; default: those the search
            selected, or all the genotypes.
        config: The recipe; default: that of the search's preset, else of the preset "smoke".
        device: auto, cpu, cuda or cuda:N.
        workers: Members trained side by side: on a CPU in processes that share the threads, 0 for one a thread; on a
            GPU on streams. A script then needs ``if __name__ == "__main__":`` before what it does.
        folder: Keeps the members and their states, so that the same call goes on after an interruption.
        **overrides: Any field of the recipe by its own name, such as ``epochs=10``.

    Returns:
        The ensemble, its temperature fitted on ``val``.

    Raises:
        UserError: If a value, a genotype or the number of members does not fit, or another process has the folder.
    """
    import tempfile
    from functools import partial
    from pathlib import Path

    from dnas_ens.config import require
    from dnas_ens.config.fields import with_fields
    from dnas_ens.config.presets import retrain_preset
    from dnas_ens.data import load_data
    from dnas_ens.run.folder import held
    from dnas_ens.run.machine import resolve_device
    from dnas_ens.training.members import train_members

    if isinstance(found, Sequence):
        require(
            members is None or 1 <= members <= len(found),
            f"{members} members were asked for, but {len(found)} genotypes were given.",
            "Give as many genotypes, one several times for copies of it.",
        )
        genotypes = list(found)[:members]
    else:
        genotypes = found.ranked(members)
    preset = "smoke" if isinstance(found, Sequence) else found.config.preset
    space: SpaceName = "darts" if any(genotype.space == "darts" for genotype in genotypes) else "efficient"
    recipe = with_fields(config or retrain_preset(preset, space), **overrides)
    if not isinstance(found, Sequence):
        recipe = recipe.with_stem_of(found.config)
    flip = None if isinstance(found, Sequence) else found.config.data.flip
    images, chosen = load_data(data, flip=flip), resolve_device(device)
    train = partial(train_members, genotypes, images, recipe, device=chosen, workers=workers)
    if folder is not None:
        with held(Path(folder)):
            return train(folder=Path(folder))
    if workers == 1:
        return train()
    with tempfile.TemporaryDirectory() as temporary:
        # Processes hand their members over by files.
        return train(folder=Path(temporary))
