"""Which classes of ours are modifiers of llm-compressor, and what the fields of a recipe are."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from import_graph import INTEGRATIONS, modules
from llmcompressor.modifiers import Modifier

UNDER = f"{INTEGRATIONS}.llm_compressor"


@cache
def modifier_classes() -> tuple[type[Modifier], ...]:
    """Return all subclasses of the host's ``Modifier`` in this repository."""
    found = {}
    for name in modules():
        if name.startswith(UNDER):
            for value in vars(import_module(name)).values():
                if isinstance(value, type) and issubclass(value, Modifier):
                    found[f"{value.__module__}.{value.__qualname__}"] = value
    return tuple(found[name] for name in sorted(found) if name.startswith(UNDER))


def own_classes(modifier: type[Modifier]) -> list[type]:
    """Return the class and those of its bases that are in this repository."""
    return [cls for cls in modifier.__mro__ if cls.__module__.startswith(UNDER)]


def host_class(modifier: type[Modifier]) -> type[Modifier]:
    """Return the class of llm-compressor that a modifier of ours stands on."""
    return next(cls for cls in modifier.__mro__ if cls not in own_classes(modifier))


@cache
def recipe_fields() -> frozenset[str]:
    """Return the names of all fields that recipes may have for our modifiers, the host's too."""
    return frozenset().union(*(cls.model_fields for cls in modifier_classes()))
