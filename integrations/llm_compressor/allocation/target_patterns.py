"""Regular expressions that name a set of linears here and in vLLM, and nothing else.

vLLM knows Mixtral's blocks as ``block_sparse_moe`` and its projections as ``w1``, ``w3``, ``w2``;
compressed-tensors takes the alphabetically first pattern that matches, vLLM the first in the
config. So patterns are anchored at the end and no name matches two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from moeq_plugin.core.names import MIXTRAL_BLOCK, MIXTRAL_PROJECTIONS, InLayer, in_layer, of_expert


def patterns(rows: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    r"""Return for each key the patterns that match its names and none of the other keys' names.

    Names outside of numbered layers are returned as they are.

    Args:
        rows: names of linears by option.

    Example:
        >>> patterns({"W4": ["m.layers.0.mlp.up_proj", "m.layers.2.mlp.up_proj"]})
        {'W4': ['re:.*\\.layers\\.(?:0|2)\\.mlp\\.up_proj$']}
    """
    names = {key: list(of_key) for key, of_key in rows.items()}
    owners: dict[_Role, set[str]] = {}
    for key, of_key in names.items():
        for name in of_key:
            role = _role(name)
            if role is not None:
                owners.setdefault(role, set()).add(key)
    shared = {role for role, keys in owners.items() if len(keys) > 1}
    return {key: sorted(_patterns(of_key, shared)) for key, of_key in names.items()}


@dataclass(frozen=True)
class _Role:
    """A projection of all experts of one layer."""

    layer: int
    block: str
    projection: str


def _in_layer(name: str) -> InLayer | None:
    """Return where in a layer a linear is, ``None`` where patterns cannot say it."""
    found = in_layer(name)
    # a model of layers alone has no prefix, and the patterns ask for the dot after one
    return found if found and found.before else None


def _role(name: str) -> _Role | None:
    numbered = _in_layer(name)
    expert = of_expert(numbered.rest) if numbered else None
    if numbered is None or expert is None or not expert.block or "." in expert.projection:
        return None
    return _Role(numbered.layer, expert.block, expert.projection)


def _patterns(names: list[str], shared: set[_Role]) -> Iterator[str]:
    """Yield patterns for the names of one key; experts are listed where a role is shared."""
    dense: dict[str, set[int]] = {}
    experts: dict[_Role, set[int]] = {}
    for name in names:
        role, numbered = _role(name), _in_layer(name)
        if numbered is None:
            yield name
        elif role is None:
            dense.setdefault(numbered.rest, set()).add(numbered.layer)
        else:
            experts.setdefault(role, set()).add(int(name.split(".")[-2]))
    for rest, layers in dense.items():
        yield _pattern(layers, re.escape(rest))
    layers_of: dict[tuple[str, str, str], set[int]] = {}
    for role, numbers in experts.items():
        which = _any_of(numbers) if role in shared else r"\d+"
        layers_of.setdefault((role.block, role.projection, which), set()).add(role.layer)
    projections_of: dict[tuple[str, str, frozenset[int]], list[str]] = {}
    for (block, projection, which), layers in layers_of.items():
        alike = projections_of.setdefault((block, which, frozenset(layers)), [])
        alike += filter(None, (projection, MIXTRAL_PROJECTIONS.get(projection)))
    for (block, which, numbered_layers), projections in projections_of.items():
        blocks = rf"(?:{re.escape(block)}|{MIXTRAL_BLOCK})"
        rest = rf"{blocks}\.experts\.{which}\.(?:{'|'.join(projections)})"
        yield _pattern(numbered_layers, rest)


def _pattern(layers: Iterable[int], rest: str) -> str:
    return rf"re:.*\.layers\.{_any_of(layers)}\.{rest}$"


def _any_of(numbers: Iterable[int]) -> str:
    return f"(?:{'|'.join(map(str, sorted(numbers)))})"
