"""Make records of plain data, every field of the type that the record says."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, cast

T = TypeVar("T")


def build(cls: type[T], content: Any) -> T:
    """Return a dataclass of what a JSON file says.

    Args:
        cls: a dataclass whose fields are numbers, texts, enums, other dataclasses, and lists and
            mappings of them.
        content: an object of JSON.

    Raises:
        ValueError: if a field is missing, unknown or of another type, naming it.
    """
    return cast("T", _build(cls, content, cls.__name__))


def _build(cls: Any, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be an object, got {_short(content)}")
    kinds = _kinds(cls)
    needed = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
    unknown, missing = content.keys() - kinds.keys(), needed - content.keys()
    if unknown or missing:
        raise ValueError(
            f"{where}: unknown {sorted(map(_short, unknown))[:3]}, missing {sorted(missing)[:3]}"
        )
    return cls(**{name: _fit(kinds[name], of, f"{where}.{name}") for name, of in content.items()})


@cache
def _kinds(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fit(kind: Any, value: Any, where: str) -> Any:
    """Return a value as a type asks for it.

    Raises:
        ValueError: if it is of another.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in {typing.Union, types.UnionType}:
        if value is None and types.NoneType in inner:
            return None
        (kind,) = (of for of in inner if of is not types.NoneType)
        return _fit(kind, value, where)
    if origin is list and isinstance(value, list):
        return [_fit(inner[0], of, where) for of in value]
    if origin is dict and isinstance(value, dict):
        return {key: _fit(inner[1], of, where) for key, of in value.items()}
    if is_dataclass(kind):
        return _build(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if _is_plain(kind, value):
        return value
    raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, got {_short(value)}")


def _is_plain(kind: Any, value: Any) -> bool:
    if kind is float:  # null is what JSON has for a number that is none
        return value is None or type(value) in {int, float}
    return kind in {int, str, bool} and type(value) is kind


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
