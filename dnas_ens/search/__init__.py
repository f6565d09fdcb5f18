"""Searching: one supernet, one hypernetwork, a family of architectures steered by lambda."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from torch.utils.data import Dataset

    from dnas_ens.config import SearchConfig
    from dnas_ens.data.dataset import ImageData
    from dnas_ens.search.result import SearchResult
    from dnas_ens.space.genotype import Genotype


def search(
    data: str | os.PathLike[str] | Dataset | ImageData = "digits",
    *,
    members: int | None = None,
    config: SearchConfig | None = None,
    base: Genotype | str | os.PathLike[str] | None = None,
    device: str = "auto",
    **overrides: Any,
) -> SearchResult:
    """Search for an ensemble of architectures.

    Args:
        data: What ``load_data`` takes.
        members: M, members of the ensemble; default: the configuration's.
        config: The configuration; default: that of the preset "smoke", or of the preset, regime and space among the
            overrides. A preset limits the training images of its own data set alone.
        base: A given base, for the regimes that compare with one: its genotype, or a file or name as ``--base`` takes.
        device: auto, cpu, cuda or cuda:N.
        **overrides: Any field of the configuration by its own name, such as ``epochs=10``.

    Returns:
        The base, the candidates and the chosen members.

    Raises:
        UserError: If a name, a value or the data do not fit.
    """
    from pathlib import Path

    from dnas_ens.config.fields import with_fields
    from dnas_ens.config.presets import search_preset
    from dnas_ens.data import load_data
    from dnas_ens.run.machine import resolve_device
    from dnas_ens.search.run import run_search
    from dnas_ens.space.genotype import Genotype

    if members is not None:
        overrides["members"] = members
    given = base if isinstance(base, Genotype) else None
    if base is not None:
        # A genotype has no file, but the configuration has to know that a base is given.
        overrides["base"] = Path("given") if isinstance(base, Genotype) else Path(base)
    if config is None:
        names = {name: overrides.pop(name) for name in ("preset", "regime") if name in overrides}
        config = search_preset(**names, base=overrides.get("base"), space=overrides.get("space"))
        if data != config.data.data:
            overrides.setdefault("limit_train", None)
    chosen = with_fields(config, **overrides)
    loaded = load_data(data, **chosen.data.how_to_load())
    return run_search(chosen, loaded, device=resolve_device(device), base=given)
