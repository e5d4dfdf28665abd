"""What hubs read of a model card: base model, licence, language, tags."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section_experts import effective_tokens
from moeq_plugin.untrusted.broken import BROKEN
from moeq_plugin.untrusted.reading import read_text

_PLAIN = re.compile(r"[A-Za-z][\w.+-]*(/[\w.+-]+)?", re.ASCII)
# of the card of the model that was quantized; the licence of a copy is that of the original
_TAKEN = re.compile(r"(license|license_name|license_link|language): *([\w./:+-]+) *", re.ASCII)
_LANGUAGE = re.compile(r"- *([a-z]{2,3}) *", re.ASCII)
_MAX_CARD_BYTES = 1 << 20
_BITS = re.compile(r"W(\d+) ")


def metadata(found: Findings) -> Iterator[str]:
    """Yield the lines that stand before a card, for hubs."""
    section = found.config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    tags = ["moeq-plugin", "llm-compressor"]
    if effective_tokens(found.linears):
        tags.insert(0, "moe")
    bits = {match[1] for x in found.linears if (match := _BITS.match(x.scheme))}
    tags += ["quantized", *(f"{b}-bit" for b in sorted(bits))]
    tags += [method] if isinstance(method, str) else []
    yield "---"
    if is_hub_id(found.model):
        yield f"base_model: {_scalar(found.model)}"
        yield "base_model_relation: quantized"
    yield from _of_original(Path(found.model))
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield "tags:"
    yield from (f"- {_scalar(tag)}" for tag in tags if tag)
    yield "---"


def base_model(found: Findings) -> str:
    """Return what the model before quantization is called by others."""
    return found.model if is_hub_id(found.model) else PurePath(found.model).name


def is_hub_id(name: str) -> bool:
    """Tell a name that others know from a path that is nobody else's business."""
    return bool(name) and len(PurePath(name).parts) == 2 and not Path(name).exists()


def _of_original(model: Path) -> Iterator[str]:
    """Yield licence and language as the card beside the original has them, if it is at hand."""
    try:
        head = read_text(model / "README.md", _MAX_CARD_BYTES).split("---")[1].splitlines()
    except BROKEN:
        return
    in_languages = False
    for line in head:
        if taken := _TAKEN.fullmatch(line):
            yield f"{taken[1]}: {taken[2] if taken[2].startswith('http') else _scalar(taken[2])}"
        elif line.strip() == "language:" or (in_languages and _LANGUAGE.fullmatch(line)):
            in_languages = True
            yield line.rstrip()
            continue
        in_languages = False


def _scalar(text: str) -> str:
    """Return a text as YAML reads it back, quoted where it may not stand plain."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
