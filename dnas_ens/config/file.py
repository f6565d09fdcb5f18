"""The fields of a configuration file, put into the dataclasses they belong to.

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

from dnas_ens.errors import UserError

T = TypeVar("T")


def override(default: T, values: Any, *, source: str = "the configuration") -> T:
    """Replace fields of a dataclass, nested ones included, by plain JSON values.

    Args:
        default: An instance of a frozen dataclass.
        values: The fields to replace; a nested dataclass takes an object, which may leave fields out. Lists
            become tuples and strings paths where the field asks for them.
        source: Where the values come from, for the message.

    Returns:
        A new instance, validated by its own `__post_init__`.

    Raises:
        UserError: A field is unknown (the nearest is named) or a value has another type.
    """
    overridden: T = _override(default, values, "", source=source, known=_dotted_names(default))
    return overridden


def _dotted_names(config: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        names.append(f"{prefix}{field.name}")
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            names += _dotted_names(value, f"{prefix}{field.name}.")
    return names


def _override(default: Any, values: Any, prefix: str, *, source: str, known: Sequence[str]) -> Any:
    if not isinstance(values, dict):
        raise _wrong_type(prefix.rstrip(".") or "the whole", values, "an object of fields", source)
    hints = typing.get_type_hints(type(default))
    names = [field.name for field in dataclasses.fields(default)]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        place = f"{prefix}{name}"
        if name not in names:
            # A name that stands in another section is nearer than any other spelling in this one.
            elsewhere = [other for other in known if other.rpartition(".")[2] == name]
            near = elsewhere or difflib.get_close_matches(place, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(names)}."
            raise UserError(f"Unknown field {place} in {source}.", remedy)
        current = getattr(default, name)
        if dataclasses.is_dataclass(current) and not isinstance(current, type):
            changes[name] = _override(current, value, f"{place}.", source=source, known=known)
        else:
            changes[name] = _converted(value, hints[name], place, source)
    return dataclasses.replace(default, **changes)


def _converted(value: Any, hint: Any, place: str, source: str) -> Any:
    """A JSON value as the field's type wants it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(UserError):
                return _converted(value, option, place, source)
    elif origin is Literal:
        # 1 == True, so the type is compared as well.
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple or hint is tuple:
        if isinstance(value, list | tuple):
            each = arguments or (Any, ...)
            repeated = len(each) == 2 and each[1] is Ellipsis
            kinds = [each[0]] * len(value) if repeated else [kind for kind in each if kind != ()]
            if len(kinds) == len(value):
                places = [f"{place}[{index}]" for index in range(len(value))]
                return tuple(map(_converted, value, kinds, places, [source] * len(value)))
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint in (None, type(None)):
        if value is None:
            return None
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise _wrong_type(place, value, _described(hint), source)


def _described(hint: Any) -> str:
    """A type in a person's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in arguments)
    if origin is tuple and arguments:
        if arguments[-1] is Ellipsis:
            return f"a list, each item {_described(arguments[0])}"
        return f"a list of {len(arguments)}: " + ", ".join(_described(kind) for kind in arguments)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    words |= {Path: "a path", type(None): "null", tuple: "a list"}
    return words.get(hint, str(hint))


def _wrong_type(place: str, value: Any, wanted: str, source: str) -> UserError:
    return UserError(f"{place} is {json.dumps(value, default=str)} in {source}.", f"Make it {wanted}.")
