"""Do the two places in which the GPTQ format states its config say the same?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.reading import read_json

_FILE = "quantize_config.json"
# what decides how tensors are read, and what is meant where it is not said
_DEFAULTS: dict[str, Any] = {
    "bits": None, "group_size": -1, "sym": True, "desc_act": False, "checkpoint_format": "gptq",
    "dynamic": {}, "lm_head": False, "quant_method": "gptq", "static_groups": False,
}  # fmt: skip


def check_gptq_config(directory: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what ``quantize_config.json`` says otherwise than ``config.json``.

    Args:
        directory: of the checkpoint.
        config: the content of its ``config.json``.
    """
    path, section = directory / _FILE, config.get("quantization_config")
    if not path.is_file() or not isinstance(section, Mapping):
        return
    if section.get("quant_method") != "gptq":
        what = f"left over: config.json says {ascii(section.get('quant_method'))[:40]}"
        yield error("two-configs", _FILE, what)
        return
    try:
        other = read_json(path)
    except UnreadableFileError as cause:
        yield error("bad-json", _FILE, str(cause))
        return
    for key, what in differences(section, other):
        yield error("two-configs", f"{_FILE}: {key}", what)


def differences(section: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys that decide about reading and differ, with both values."""
    for key, default in _DEFAULTS.items():
        here, there = (_value(content, key, default) for content in (section, other))
        if here != there:
            yield key, f"{ascii(there)[:60]}, in config.json {ascii(here)[:60]}"


def _value(content: Mapping[str, Any], key: str, default: Any) -> Any:
    value = content.get(key)
    if key == "checkpoint_format" and value is None:
        value = content.get("format")
    return default if value is None else value
