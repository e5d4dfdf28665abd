"""How to load and serve a checkpoint: only what reads it as it was saved."""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.codebooks import METHOD
from moeq_plugin.checkpoint.overview import ONLY_OURS, inspect_model
from moeq_plugin.report.directory import Findings
from moeq_plugin.untrusted.broken import BROKEN

_WITH_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""
_WITH_OURS = """\
# transformers itself would load other numbers than were saved, see below
from moeq_plugin.integrations.llm_compressor import load_dequantized
from transformers import AutoTokenizer

model = load_dequantized("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""
_AFTER_IMPORT = """\
import moeq_plugin.integrations.hf  # transformers knows this model from here on
"""
_SERVER = """\
vllm serve {name} --tensor-parallel-size 1
curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{name}", "prompt": "The", "max_tokens": 40}}'"""


def use(found: Findings, name: str) -> Iterator[str]:
    """Yield commands and code for the readers that read the checkpoint as it was saved.

    Args:
        found: what its directory says.
        name: of the checkpoint.
    """
    misread = _misread(found)
    yield from ("", "## Use", "", f"`{name}` is this directory, or its id on a hub.")
    if "vllm" not in misread:
        yield from ("", "```", *_SERVER.format(name=name).splitlines(), "```")
    else:
        why = misread["vllm"][0].removeprefix("vllm: ")
        yield from ("", f"No line that serves it stands here, because of vLLM: {why}")
    if needs_import(found):
        code = _AFTER_IMPORT + _WITH_TRANSFORMERS
    else:
        code = _WITH_OURS if "transformers" in misread else _WITH_TRANSFORMERS
    yield from ("", "```python", *code.format(name=name).splitlines(), "```")
    if misread:
        yield from ("", "Before you load it:", "")
        yield from dict.fromkeys(f"- {limit}" for limits in misread.values() for limit in limits)


def needs_import(found: Findings) -> bool:
    """Tell whether only transformers reads the checkpoint, and only after an import of ours."""
    section = found.config.get("quantization_config")
    has_codebooks = isinstance(section, dict) and section.get("quant_method") == METHOD
    return has_codebooks or found.config.get("model_type") in ONLY_OURS


def _misread(found: Findings) -> dict[str, list[str]]:
    """Return for each reader that would misread the checkpoint why; under ``""`` other limits."""
    misread: dict[str, list[str]] = {}
    said = dict.fromkeys(limit for record in found.records for limit in record.limits)
    for limit in said:
        for reader in [r for r in ("transformers", "vllm") if r in limit.lower()] or [""]:
            misread.setdefault(reader, []).append(limit)
    try:
        readers_of = inspect_model(found.directory).readers
    except BROKEN:  # a family that nobody knows, or no weights: what the run has said is known
        return misread
    for reader in ("vllm", "transformers"):
        if readers_of.get(reader) and reader not in misread:
            misread[reader] = [f"{reader}: {limit}" for limit in readers_of[reader]]
    return misread
