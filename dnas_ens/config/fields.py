"""Fields of a configuration: as JSON, read from JSON by the fields' own types, and set by name.

Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from dnas_ens.config.settings import RetrainConfig, SearchConfig
from dnas_ens.errors import UserError

T = TypeVar("T")
Config = TypeVar("Config", SearchConfig, RetrainConfig)

#: Plain types in words, and the types accepted for them.
_PLAIN: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a string", (str,)),
    Path: ("a path", (str, Path)),
    types.NoneType: ("null", (types.NoneType,)),
}


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
        UserError: No section has a field of that name (the nearest one is named), or a value has another type.
    """
    sections = [entry.name for entry in dataclasses.fields(config) if _is_section(getattr(config, entry.name))]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if _is_section(value) and type(value) is type(getattr(config, name, None)):
            section_as_given: dict[str, Any] = {name: value}
            config = dataclasses.replace(config, **section_as_given)
        elif section := next((part for part in sections if hasattr(getattr(config, part), name)), None):
            changes.setdefault(section, {})[name] = value
        elif hasattr(config, name):
            changes[name] = changes.get(name, {}) | value if isinstance(value, dict) else value
        else:
            known = [place.rpartition(".")[2] for place in _places(config) if place not in sections]
            raise UserError(f"The configuration has no field {name!r}.", _hint(name, known, known))
    return override(config, changes)


def override(default: T, values: Any) -> T:
    """Replace fields of a dataclass, nested ones included, by plain JSON values.

    Args:
        values: The fields to replace; a nested dataclass takes an object, which may leave fields out. Lists
            become tuples and strings paths where the field asks for them.

    Raises:
        UserError: A field is unknown (the nearest is named) or a value has another type.
    """
    places = _places(default)

    def replaced(current: Any, values: Any, prefix: str) -> Any:
        if not isinstance(values, dict):
            raise misfit(prefix.rstrip(".") or "the whole", values, "an object of fields")
        hints = typing.get_type_hints(type(current))
        changes: dict[str, Any] = {}
        for name, value in values.items():
            place = f"{prefix}{name}"
            if place not in places:
                # A field of this name in another section is a better hint than a similar name in this one.
                elsewhere = [other for other in places if other.rpartition(".")[2] == name]
                names = [field.name for field in dataclasses.fields(current)]
                hint = f"Did you mean {elsewhere[0]}?" if elsewhere else _hint(place, places, names)
                raise UserError(f"Unknown field {place} in the configuration.", hint)
            part = getattr(current, name)
            changes[name] = (
                replaced(part, value, f"{place}.") if _is_section(part) else converted(value, hints[name], place)
            )
        return dataclasses.replace(current, **changes)

    def converted(value: Any, hint: Any, place: str) -> Any:
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            # A number, a truth value or a string of NumPy's own.
            value = value.item()
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            for option in arguments:
                with contextlib.suppress(UserError):
                    return converted(value, option, place)
        elif origin is Literal:
            # 1 == True, so the type is compared as well.
            if any(value == choice and type(value) is type(choice) for choice in arguments):
                return value
        elif origin is tuple:
            if isinstance(value, list | tuple):
                kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
                if len(kinds) == len(value):
                    parts = enumerate(zip(value, kinds, strict=True))
                    return tuple(converted(part, kind, f"{place}[{index}]") for index, (part, kind) in parts)
        elif isinstance(value, _PLAIN[hint][1]) and (hint is bool or not isinstance(value, bool)):
            return hint(value) if hint in (float, Path) else value
        raise misfit(place, value, _described(hint))

    def misfit(place: str, value: Any, wanted: str) -> UserError:
        return UserError(f"{place} is {json.dumps(value, default=str)} in the configuration.", f"Make it {wanted}.")

    result: T = replaced(default, values, "")
    return result


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _places(config: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields, those of sections and of what is in them."""
    names = []
    for field in dataclasses.fields(config):
        names.append(f"{prefix}{field.name}")
        if _is_section(value := getattr(config, field.name)):
            names += _places(value, f"{prefix}{field.name}.")
    return names


def _hint(name: str, known: Sequence[str], all_names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {nearest[0]}?" if nearest else f"There are {', '.join(all_names)}."


def _described(hint: Any) -> str:
    """Return a type in plain words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(json.dumps, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each item {_described(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: " + ", ".join(map(_described, arguments))
    return _PLAIN[hint][0]
