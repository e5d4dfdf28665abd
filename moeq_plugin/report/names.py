"""Where a linear belongs, by its name: what tables and charts are sorted by."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PLACE = re.compile(r"^(?P<head>(?:.*?\.)?)(?P<layer>\d+)\.(?P<tail>.+)$")
_EXPERT = re.compile(r"^(?P<block>.*?)\.?experts\.(?P<expert>\d+)\.(?P<projection>.+)$")


@dataclass(frozen=True)
class Place:
    """Where a linear belongs.

    Attributes:
        layer: number of the decoder layer, ``None`` outside of layers.
        expert: number of the routed expert, ``None`` for all others.
        kind: what is left of the name, the same in every layer and for every expert, such as
            ``self_attn.q_proj`` or ``experts.gate_proj``.
    """

    layer: int | None
    expert: int | None
    kind: str


def place(name: str) -> Place:
    """Read a module's name.

    Example:
        >>> place("model.layers.3.mlp.experts.17.down_proj")
        Place(layer=3, expert=17, kind='experts.down_proj')
        >>> place("lm_head")
        Place(layer=None, expert=None, kind='lm_head')
    """
    found = _PLACE.match(name)
    if found is None:
        return Place(None, None, name)
    layer, tail = int(found["layer"]), found["tail"]
    of_expert = _EXPERT.match(tail)
    if of_expert is None:
        return Place(layer, None, tail)
    return Place(layer, int(of_expert["expert"]), f"experts.{of_expert['projection']}")
