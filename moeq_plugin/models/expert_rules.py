"""How files call an expert's projections, read off the rules that transformers loads by.

transformers fuses, say, ``experts.*.w1.weight`` and ``experts.*.w3.weight`` into ``gate_up_proj``
while loading. llm-compressor splits the fused tensor again and calls the parts ``gate_proj`` and
``up_proj``. The names in between are in the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform

# how a linearized expert calls what transformers fuses into one tensor
_FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
# of a quantized model, transformers (``quantizers.base``) builds their experts one by one
_ONE_BY_ONE = ("llama4", "llama4_text")
_PLAIN = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
# what the rules come to for the families that we know, where transformers is not there to be asked
_WITHOUT_TRANSFORMERS: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    **dict.fromkeys(("olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"), _PLAIN),
    "gpt_oss": {},
}
_PER_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight\$?$")


def names_in_checkpoint(rules: Iterable[WeightTransform]) -> dict[str, str]:
    """Return for each projection of an expert what a checkpoint calls it; empty without a rule."""
    from transformers.core_model_loading import WeightConverter

    names: dict[str, str] = {}
    for rule in rules:
        if not isinstance(rule, WeightConverter):
            continue
        targets = [str(pattern) for pattern in rule.target_patterns]
        sources = [_PER_EXPERT.search(str(source)) for source in rule.source_patterns]
        fused = _FUSED.get(targets[0].rsplit(".", 1)[-1]) if len(targets) == 1 else None
        if fused and len(fused) == len(sources) and all(sources):
            names.update(zip(fused, (m.group(1) for m in sources if m), strict=True))
    return names


def names_by_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the same for a model of which only the config is known.

    Rules belong to the model types and classes that a model is made of. The config names those
    that have a rule for experts: the whole model, and the part of it that reads text. Of a family
    that we do not know, only transformers knows the rules, and it has to be installed.

    Args:
        config: the content of ``config.json``.
    """
    if find_spec("transformers") is None:
        known = _WITHOUT_TRANSFORMERS.get(str(config.get("model_type")))
        if known is not None:
            return dict(known)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names: dict[str, str] = {}
    for owner in _owners(config):
        names |= names_in_checkpoint(get_checkpoint_conversion_mapping(owner) or ())
        if owner in _ONE_BY_ONE:
            names |= _PLAIN
    return names


def _owners(config: Mapping[str, Any]) -> Iterator[str]:
    text = config.get("text_config")
    classes = config.get("architectures")
    for owner in (
        *(classes if isinstance(classes, list) else ()),
        config.get("model_type"),
        text.get("model_type") if isinstance(text, Mapping) else None,
    ):
        if isinstance(owner, str):
            yield owner
