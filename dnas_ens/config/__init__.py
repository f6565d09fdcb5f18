"""Configurations: typed dataclasses, presets, and one way to set a field from flags, files or keywords."""

from typing import TYPE_CHECKING

from dnas_ens.lazy import lazy_names

if TYPE_CHECKING:
    from dnas_ens.config.fields import override, to_dict, with_fields
    from dnas_ens.config.presets import PRESET_COSTS, retrain_preset, search_preset
    from dnas_ens.config.settings import (
        CUDA_GRAPH,
        LAYOUT,
        PENALTIES,
        PRECISION,
        BilevelConfig,
        CandidateConfig,
        DataConfig,
        HypernetworkConfig,
        ObjectiveConfig,
        RetrainConfig,
        SearchConfig,
        SupernetConfig,
        require,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
