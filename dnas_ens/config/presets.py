"""Presets (scale) and regimes (published method): bundles of defaults for the configuration.

Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dnas_ens.config.settings import RetrainConfig, SearchConfig, require
from dnas_ens.space.spaces import SpaceName

#: What each preset changes in the search, as (section, field): value.
_SEARCH_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "smoke": {},
    "micro": {
        "data": {"data": "fashion-mnist", "limit_train": 10_000},
        "bilevel": {"epochs": 6, "warmup_epochs": 1},
    },
    "fast": {
        "data": {"data": "fashion-mnist"},
        "supernet": {"num_cells": 5, "channels": 16},
        "bilevel": {"epochs": 25, "learning_rate": 0.025},
        "candidates": {"pool_size": 50},
    },
    "paper": {
        "data": {"data": "cifar10"},
        "supernet": {"num_cells": 8, "channels": 16},
        "bilevel": {"epochs": 50, "warmup_epochs": 15, "learning_rate": 0.025},
        "candidates": {"pool_size": 100},
    },
}
_RETRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"epochs": 100},
    "micro": {"epochs": 10},
    "fast": {"num_cells": 8, "channels": 16, "epochs": 50, "cutout": 8, "drop_path": 0.1},
    "paper": {
        "num_cells": 20,
        "channels": 36,
        "epochs": 600,
        "batch_size": 96,
        "learning_rate": 0.025,
        "drop_path": 0.2,
        "auxiliary_weight": 0.4,
        "cutout": 16,
    },
}
#: Members of DARTS cells take several times as long, so they are narrower, or trained for less.
_DARTS_RETRAIN: dict[str, dict[str, Any]] = {"smoke": {"epochs": 30}, "micro": {"channels": 8}}
#: As published, whatever the images.
_PUBLISHED_RECIPE: dict[str, Any] = {"weight_decay": 3e-4, "average_last": 0.0}
#: What each preset costs, as measured or, where it says so, estimated.
PRESET_COSTS: dict[str, str] = {
    "smoke": "digits, about a minute on two CPU cores (darts: two)",
    "micro": "10,000 Fashion-MNIST images, minutes on a CPU (darts: half an hour)",
    "fast": "Fashion-MNIST or CIFAR-sized images, one GPU, minutes a member (estimated)",
    "paper": "the published DARTS settings, one GPU, about a day a member (estimated)",
}
#: The published methods search the space of DARTS.
_DARTS: dict[str, Any] = {"space": "darts"}
#: Hard paths cost a fraction of soft ones where a step is cheap; and there is no need to hold operations in balance.
_EFFICIENT: dict[str, dict[str, Any]] = {
    "objective": {"relaxation": "gumbel-hard", "operation_balance": (0.0, 0.0)},
    # A search shall cost at most two trainings of a member.
    "candidates": {"score_images": 1000},
}
_EFFICIENT_EPOCHS = {"smoke": 12}
#: Both terms are this project's own.
_PUBLISHED: dict[str, Any] = {"commitment": (0.0, 0.0), "operation_balance": (0.0, 0.0)}
_ONE_MEMBER = {"members": 1, "pool_size": 1}
#: What each regime changes in the search (method of the cited paper in this project's terms).
_REGIMES: dict[str, dict[str, dict[str, Any]]] = {
    "star": {},
    "optimal": {
        "supernet": _DARTS,
        "hypernetwork": {"directions": 1},
        "objective": {"penalty": "none", "fixed_lambda": 0.0, **_PUBLISHED},
        "candidates": _ONE_MEMBER,
    },
    "edges": {
        "supernet": _DARTS,
        "hypernetwork": {"directions": 1, "max_lambda": 4.0},
        "objective": {
            "penalty": "edge-overlap",
            "relaxation": "gumbel-softmax",
            "fixed_lambda": 2.0,
            **_PUBLISHED,
        },
        "candidates": _ONE_MEMBER,
    },
    "random": {"supernet": _DARTS, "objective": {"penalty": "none"}},
    "hypernet": {
        "supernet": _DARTS,
        "hypernetwork": {"directions": 1, "num_knots": 5, "max_lambda": 4.0, "lambda_margin": 0.2},
        "objective": {"penalty": "edge-overlap", "relaxation": "gumbel-softmax", **_PUBLISHED},
    },
    "js": {
        "supernet": _DARTS,
        "hypernetwork": {"directions": 1},
        "objective": {"penalty": "js-base", **_PUBLISHED},
    },
}


def search_preset(
    preset: str = "smoke", regime: str = "star", *, base: Path | None = None, space: SpaceName | None = None
) -> SearchConfig:
    """Return the search configuration of a preset and a regime.

    Args:
        preset: smoke, micro, fast or paper.
        regime: star (several paths from a learnt base, this project's own), optimal (one architecture, as DARTS finds
            it), or one of EdgeNES: edges (shares a number of edges with a base), random (edges of a base replaced at
            random), hypernet (one path, lambda counts shared edges), js (one path, lambda weighs the Jensen-Shannon
            divergence from the base).
        base: File of a given base, needed by edges, random and hypernet.
        space: Where is searched; None for the regime's own: efficient for star, darts for the published ones.

    Raises:
        UserError: If a name is unknown or a needed base is missing.
    """
    for name, known, flag in ((preset, _SEARCH_PRESETS, "--preset"), (regime, _REGIMES, "--regime")):
        require(name in known, f"Unknown {flag[2:]} {name!r}.", f"Give {flag} one of {', '.join(known)}.")
    plain = SearchConfig()
    sections: dict[str, Any] = {}
    given: dict[str, dict[str, Any]] = {"hypernetwork": {"base": base}}
    if space is not None:
        given["supernet"] = {"space": space}
    by_space: dict[str, dict[str, Any]] = {}
    if regime == "star" and (space or plain.supernet.space) == "efficient":
        epochs = {"bilevel": {"epochs": _EFFICIENT_EPOCHS[preset]}} if preset in _EFFICIENT_EPOCHS else {}
        by_space = _EFFICIENT | epochs
    for changes in (_SEARCH_PRESETS[preset], _REGIMES[regime], by_space, given):
        for name, values in changes.items():
            sections[name] = dataclasses.replace(sections.get(name, getattr(plain, name)), **values)
    # The names were checked above; a literal type cannot tell.
    named: dict[str, Any] = {"preset": preset, "regime": regime}
    return dataclasses.replace(plain, **named, **sections)


def retrain_preset(preset: str = "smoke", space: SpaceName = "efficient") -> RetrainConfig:
    """Return the training recipe of a preset, for cells of a space.

    Raises:
        UserError: If the name is unknown.
    """
    require(
        preset in _RETRAIN_PRESETS,
        f"Unknown preset {preset!r}.",
        f"Give --preset one of {', '.join(_RETRAIN_PRESETS)}.",
    )
    in_darts = _PUBLISHED_RECIPE | _DARTS_RETRAIN.get(preset, {}) if space == "darts" else {}
    return RetrainConfig(**_RETRAIN_PRESETS[preset] | in_darts)
