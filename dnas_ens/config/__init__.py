"""Configurations: typed dataclasses, presets, and one way to set a field from flags, files or keywords."""

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

__all__ = [
    "CUDA_GRAPH",
    "LAYOUT",
    "PENALTIES",
    "PRECISION",
    "PRESET_COSTS",
    "BilevelConfig",
    "CandidateConfig",
    "DataConfig",
    "HypernetworkConfig",
    "ObjectiveConfig",
    "RetrainConfig",
    "SearchConfig",
    "SupernetConfig",
    "override",
    "require",
    "retrain_preset",
    "search_preset",
    "to_dict",
    "with_fields",
]
