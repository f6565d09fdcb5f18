"""Fields of a configuration by their own name, whichever section they are in.

Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar

from dnas_ens.config import RetrainConfig, SearchConfig
from dnas_ens.errors import UserError

Config = TypeVar("Config", SearchConfig, RetrainConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested JSON-ready dictionaries."""

    def ready(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ready(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [ready(entry) for entry in value]
        return str(value) if isinstance(value, Path) else value

    result: dict[str, Any] = ready(dataclasses.asdict(config))
    return result


def with_fields(config: Config, **values: Any) -> Config:
    """Return a configuration with fields replaced by their own name, whichever section they are in.

    Raises:
        UserError: If no section has a field of that name; the nearest one is named.
    """
    sections: dict[str, Any] = {
        entry.name: getattr(config, entry.name)
        for entry in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, entry.name))
    }
    changes: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in values.items():
        owners = [section for section, part in sections.items() if hasattr(part, name)]
        if owners:
            changes.setdefault(owners[0], {})[name] = value
        elif hasattr(config, name):
            own[name] = value
        else:
            known = [
                entry.name for part in (config, *sections.values()) for entry in dataclasses.fields(part)
            ]
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {nearest[0]}?" if nearest else f"There are {', '.join(known)}."
            raise UserError(f"The configuration has no field {name!r}.", hint)
    replaced = {name: dataclasses.replace(sections[name], **fields) for name, fields in changes.items()}
    return dataclasses.replace(config, **own, **replaced)
