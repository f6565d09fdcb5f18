"""Configurations: typed dataclasses, presets, and one way to set a field from flags, files or keywords."""

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
    "BilevelConfig",
    "CandidateConfig",
    "DataConfig",
    "HypernetworkConfig",
    "ObjectiveConfig",
    "RetrainConfig",
    "SearchConfig",
    "SupernetConfig",
    "require",
]
